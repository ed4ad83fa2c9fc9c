"""Accuracy against size, the picture of the whole run."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from compress_jax.report.figure import BLUE, GREEN, GREY, INK, ORANGE, Axes, Figure, clean, drawing, new_figure, plain
from compress_jax.report.read import Run


def tradeoff(run: Run) -> Figure:
    """Draw every network of a run by bytes on disk and accuracy, and where the requirement is met.

    Args:
      run: the run.

    Returns:
      The figure.
    """
    figure = new_figure(9, 4.8)
    axes = clean(figure.subplots(), "", "bytes on disk", "accuracy")
    rows, requirement = run.results["rows"], run.about.get("requirement")
    labels = [_point(axes, row, run.results["chosen"]) for row in rows]
    _limits(axes, rows)
    if requirement:
        _corner(axes, rows, requirement)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    spread(figure, labels)
    return figure


def spread(figure: Figure, labels: list[Annotation]) -> None:
    """Move labels that lie on one another, each to the nearest free place beside its point.

    Args:
      figure: theirs.
      labels: annotations with offsets in points; the first keep their places.
    """
    with drawing():
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in labels]
    taken: list[Bbox] = []
    points = 72 / figure.dpi
    for label, box in zip(labels, boxes, strict=True):
        x, y = label.xyann
        steps = [0, *(sign * n for n in range(1, len(labels) + 2) for sign in (1, -1))]
        sides = (x, -x - box.width * points)
        places = [(side, y + step * (box.height * points + 2)) for step in steps for side in sides]
        moved = {place: box.translated((place[0] - x) / points, (place[1] - y) / points) for place in places}
        free = (place for place, own in moved.items() if _is_free(own, taken, figure))
        label.xyann = next(free, (x, y))
        taken.append(moved[label.xyann])


def _is_free(box: Bbox, taken: list[Bbox], figure: Figure) -> bool:
    inside = all(figure.bbox.contains(*corner) for corner in (box.min, box.max))
    return inside and not any(box.overlaps(other) for other in taken)


def _point(axes: Axes, row: Mapping[str, Any], chosen: str) -> Annotation:
    colour = {None: GREY if row["name"] == "teacher" else BLUE, True: GREEN, False: ORANGE}[row["accepted"]]
    star = row["name"] == chosen
    axes.plot(row["nbytes"], row["validation"], "*" if star else "o", color=colour, markersize=16 if star else 8, zorder=3)
    if row["test"] is not None:
        axes.plot([row["nbytes"]] * 2, [row["validation"], row["test"]], color=colour, linewidth=1, alpha=0.5)
        axes.plot(row["nbytes"], row["test"], "o", color=colour, markersize=7, markerfacecolor="white", zorder=2)
    label = f"{plain(row['name'])}\n{row['nbytes']:,} bytes"
    return axes.annotate(
        label, (row["nbytes"], row["validation"]), (9, 4), textcoords="offset points", fontsize=8, color=INK
    )


def _limits(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Use a logarithmic axis of bytes with room for the labels, and ticks that people read."""
    sizes = [row["nbytes"] for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 2.6)
    low, high = axes.get_xlim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    axes.set_xticks([tick for p in powers for tick in (10**p, 3 * 10**p) if low <= tick <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    axes.margins(y=0.15)


def _corner(axes: Axes, rows: list[dict[str, Any]], requirement: Mapping[str, Any]) -> None:
    """Shade what is accurate and small enough, and write the limits on its edges."""
    student = next(row for row in rows if row["name"] == "student")
    reference = student if requirement["reference"] == "student" else rows[0]
    floor = reference["validation"] - (requirement["max_drop"] or 0.0)
    most = min(student["nbytes"] / (requirement["min_ratio"] or 1.0), requirement["max_bytes"] or math.inf)
    low, high = min(axes.get_ylim()[0], floor - 0.005), min(axes.get_ylim()[1], 1.01)
    left = axes.get_xlim()[0] if most > axes.get_xlim()[0] else most / 1.6
    axes.fill_between([left, most], floor, high, color=GREEN, alpha=0.08, linewidth=0)
    axes.axhline(floor, color=GREEN, linewidth=1, linestyle=(0, (4, 3)))
    axes.axvline(most, color=GREEN, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(0.995, floor, f"at least {100 * floor:.2f} %", transform=axes.get_yaxis_transform(), **_NOTE, ha="right")
    axes.text(most, 0.01, f" at most {most:,.0f} bytes", transform=axes.get_xaxis_transform(), **_NOTE)
    axes.set_ylim(low, high)
    axes.set_xlim(left, axes.get_xlim()[1])


_NOTE: dict[str, Any] = {"fontsize": 8, "color": GREEN, "va": "bottom"}


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} B"
