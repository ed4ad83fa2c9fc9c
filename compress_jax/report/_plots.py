"""The pictures of a report, as PNG files; the same run gives the same bytes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from compress_jax.core import coverage
from compress_jax.report._figure import (
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    Axes,
    Figure,
    clean,
    drawing,
    new_figure,
    plain,
    png,
)
from compress_jax.report._read import Run

# Training curves of all stages.


METRICS = (("train/loss", "training loss"), ("train/accuracy", "accuracy on training batches"))


def curves(run: Run) -> Figure | None:
    """Draw loss and accuracy by step, a line for each stage.

    Args:
      run: the run.

    Returns:
      The figure, or None if the run kept no metrics.
    """
    shown = [
        (key, title)
        for key, title in METRICS
        if any(key in series for series in run.curves.values())
    ]
    if not shown:
        return None
    figure = new_figure(9, 3.4)
    for axes, (key, title) in zip(
        figure.subplots(1, len(shown), squeeze=False).ravel(), shown, strict=True
    ):
        _lines(clean(axes, title, "step"), run, key)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _lines(axes: Axes, run: Run, key: str) -> None:
    for i, (stage, series) in enumerate(run.curves.items()):
        points = series.get(key, [])
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(
            steps,
            values,
            color=CYCLE[i % len(CYCLE)],
            label=f" {plain(stage)}",  # a label that begins with _ is left out
            linewidth=1.3,
        )
    if key.endswith("loss") and all(
        value > 0 for series in run.curves.values() for _, value in series.get(key, [])
    ):
        axes.set_yscale("log")


# Bits and sparsity of each leaf, as bars.


def layers(run: Run) -> Figure:
    """Draw stored bits and share of zeros of each leaf; leaves stored dense are grey.

    Args:
      run: the run.

    Returns:
      The figure.
    """
    rows = coverage(None, run.packed["params"]).rows
    figure = new_figure(9, 1.2 + 0.24 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    dense = [row.form == "dense" for row in rows]
    _bars(
        clean(left, "stored bits for each entry"), [row.bits for row in rows], "{:.2f}", dense, BLUE
    )
    _bars(
        clean(right, "share of zeros, %"),
        [100 * row.sparsity for row in rows],
        "{:.1f}",
        dense,
        GREEN,
    )
    left.set_yticks(range(len(rows)), [plain(row.path) for row in rows])
    left.invert_yaxis()
    right.set_xlim(0, 112)
    return figure


def _bars(axes: Axes, values: list[float], form: str, dense: list[bool], colour: str) -> None:
    bars = axes.barh(
        range(len(values)), values, color=[GREY if each else colour for each in dense], height=0.7
    )
    axes.bar_label(
        bars, [form.format(value) for value in values], padding=3, fontsize=7.5, color=INK
    )
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.14)


# Accuracy against size, the picture of the whole run.


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
        moved = {
            place: box.translated((place[0] - x) / points, (place[1] - y) / points)
            for place in places
        }
        free = (place for place, own in moved.items() if _is_free(own, taken, figure))
        label.xyann = next(free, (x, y))
        taken.append(moved[label.xyann])


def _is_free(box: Bbox, taken: list[Bbox], figure: Figure) -> bool:
    inside = all(figure.bbox.contains(*corner) for corner in (box.min, box.max))
    return inside and not any(box.overlaps(other) for other in taken)


def _point(axes: Axes, row: Mapping[str, Any], chosen: str) -> Annotation:
    colour = {None: GREY if row["name"] == "teacher" else BLUE, True: GREEN, False: ORANGE}[
        row["accepted"]
    ]
    star = row["name"] == chosen
    axes.plot(
        row["nbytes"],
        row["validation"],
        "*" if star else "o",
        color=colour,
        markersize=16 if star else 8,
        zorder=3,
    )
    if row["test"] is not None:
        axes.plot(
            [row["nbytes"]] * 2,
            [row["validation"], row["test"]],
            color=colour,
            linewidth=1,
            alpha=0.5,
        )
        axes.plot(
            row["nbytes"],
            row["test"],
            "o",
            color=colour,
            markersize=7,
            markerfacecolor="white",
            zorder=2,
        )
    label = f"{plain(row['name'])}\n{row['nbytes']:,} bytes"
    return axes.annotate(
        label,
        (row["nbytes"], row["validation"]),
        (9, 4),
        textcoords="offset points",
        fontsize=8,
        color=INK,
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
    most = min(
        student["nbytes"] / (requirement["min_ratio"] or 1.0), requirement["max_bytes"] or math.inf
    )
    low, high = min(axes.get_ylim()[0], floor - 0.005), min(axes.get_ylim()[1], 1.01)
    left = axes.get_xlim()[0] if most > axes.get_xlim()[0] else most / 1.6
    axes.fill_between([left, most], floor, high, color=GREEN, alpha=0.08, linewidth=0)
    axes.axhline(floor, color=GREEN, linewidth=1, linestyle=(0, (4, 3)))
    axes.axvline(most, color=GREEN, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(
        0.995,
        floor,
        f"at least {100 * floor:.2f} %",
        transform=axes.get_yaxis_transform(),
        **_NOTE,
        ha="right",
    )
    axes.text(
        most, 0.01, f" at most {most:,.0f} bytes", transform=axes.get_xaxis_transform(), **_NOTE
    )
    axes.set_ylim(low, high)
    axes.set_xlim(left, axes.get_xlim()[1])


_NOTE: dict[str, Any] = {"fontsize": 8, "color": GREEN, "va": "bottom"}


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} B"


# Histograms of each layer's weights, before and after.


COLUMNS, MOST, BINS = 3, 24, 81


def weights(run: Run) -> Figure | None:
    """Draw the weights of the float32 student and of the artifact, one panel a leaf.

    Args:
      run: the run.

    Returns:
      The figure; of a deep network, the 24 largest leaves in the order of the network. None if no
      leaf was compressed.
    """
    forms = {row.path: row.form for row in coverage(None, run.packed["params"]).rows}
    paths = [path for path, form in forms.items() if form != "dense" and path in run.before]
    largest = sorted(paths, key=lambda path: -run.before[path].size)[:MOST]
    paths = [path for path in paths if path in largest]
    if not paths:
        return None
    rows = -(-len(paths) // COLUMNS)
    figure = new_figure(9, 0.3 + 1.95 * rows)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, path in zip(panels, paths, strict=False):
        _panel(
            clean(axes, path),
            np.asarray(run.before[path], np.float32),
            np.asarray(run.after[path], np.float32),
        )
    for axes in panels[len(paths) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    """Draw shares of all entries.

    The two can be compared; exact zeros would dwarf everything else and are left out.
    """
    reach = max(float(np.abs(before).max()), float(np.abs(after).max()), 1e-12)
    edges = np.linspace(-reach, reach, BINS + 1)
    kept = after[after != 0]
    for values, colour, alpha in ((before.ravel(), GREY, 0.55), (kept, BLUE, 0.75)):
        counts, _ = np.histogram(values, edges)
        axes.stairs(
            100 * counts / before.size, edges, fill=True, color=colour, alpha=alpha, linewidth=0
        )
    note = f"{1 - kept.size / after.size:.1%} zeros\n{np.unique(kept).size:,} values"
    axes.text(
        0.98, 0.95, note, transform=axes.transAxes, fontsize=7.5, color=INK, ha="right", va="top"
    )
    axes.set_ylabel("% of weights", fontsize=8)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)


DRAW: dict[str, Callable[[Run], Figure | None]] = {
    "tradeoff": tradeoff,
    "layers": layers,
    "weights": weights,
    "curves": curves,
}


def pictures(run: Run) -> dict[str, bytes]:
    """Draw all there is to draw.

    Args:
      run: the run.

    Returns:
      PNG files by name: ``tradeoff``, ``layers``, ``weights``, and ``curves`` if the run kept
      metrics.
    """
    drawn = {name: draw(run) for name, draw in DRAW.items()}
    return {name: png(figure) for name, figure in drawn.items() if figure is not None}
