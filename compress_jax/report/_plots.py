"""The pictures of a report, as PNG files; the same run gives the same bytes."""

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from compress_jax.core import coverage
from compress_jax.core.table import printable
from compress_jax.core.types import JsonObject
from compress_jax.report._asked import Limits, limits
from compress_jax.report._read import Run
from compress_jax.report._rows import ACCURACY, value_text

CAPTIONS = {
    "tradeoff": "The metric on validation data against bytes on disk. The shaded corner is where "
    "the requirement is met; hollow marks are of test data, measured once, in the end.",
    "weights": "Weights of each layer: the float32 student in grey, the artifact in color. Exact "
    "zeros are not drawn; their share is in the corner.",
    "layers": "Stored bits for each entry (scales, masks and codebooks included) and share of "
    "exact zeros.",
    "curves": "Training, by stage.",
}

# Figures are made without pyplot, which would keep them in a global state and may open windows.

GREY = "#8a94a3"
BLUE = "#2f6fb3"
GREEN = "#1f9d61"
ORANGE = "#d9622b"
INK = "#1c2430"
CYCLE = (GREY, BLUE, GREEN, ORANGE, "#7a52b3", "#b38f1f", "#2fa8a8", "#b3437a")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
      width: in inches.
      height: in inches.

    Returns:
      The figure, whose parts are laid out without overlap when it is drawn.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    r"""Return text for a picture, with each dollar escaped: it would begin a formula.

    Example:
      >>> plain("$a$"), plain("a\x1b")
      ('\\$a\\$', 'a\\x1b')
    """
    return printable(text).replace("$", r"\$")


def clean(axes: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """Style axes: labels, no box, a faint grid behind.

    Args:
      axes: the axes.
      title: above, at the left.
      x: label of the x axis.
      y: label of the y axis.

    Returns:
      The axes.
    """
    axes.set_title(plain(title), loc="left", fontsize=10, color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color=GREY)
    axes.grid(color="#e3e6eb", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw with default settings, whatever the user's are.

    A glyph that the font lacks gives no warning; the tables show the name.
    """
    with matplotlib.rc_context(matplotlib.rcParamsDefault), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file; no date or version goes into it."""
    buffer = io.BytesIO()
    with drawing():
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


METRICS = (("train/loss", "training loss"), ("train/accuracy", "accuracy on training batches"))
COLUMNS = 3  # panels of weights side by side
MOST = 24  # panels of weights
BINS = 81


def curves(run: Run) -> Figure | None:
    """Draw loss and accuracy by step, a line for each stage.

    Args:
      run: the run.

    Returns:
      The figure, or None if the run kept no metrics.
    """
    recorded = set().union(*run.curves.values())  # metrics of any stage
    shown = [(key, title) for key, title in METRICS if key in recorded]
    if not shown:
        return None
    figure = new_figure(9, 3.4)
    panels = figure.subplots(1, len(shown), squeeze=False).ravel()
    for axes, (key, title) in zip(panels, shown, strict=True):
        _lines(clean(axes, title, "step"), run, key)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _lines(axes: Axes, run: Run, key: str) -> None:
    lowest = math.inf
    for i, (stage, series) in enumerate(run.curves.items()):
        points = series.get(key, [])
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        lowest = min([lowest, *values])
        axes.plot(
            steps,
            values,
            color=CYCLE[i % len(CYCLE)],
            label=f" {plain(stage)}",  # matplotlib leaves out a label that begins with _
            linewidth=1.3,
        )
    # Losses fall by orders of magnitude; a logarithmic axis shows no zeros.
    if key.endswith("loss") and lowest > 0:
        axes.set_yscale("log")


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
    bits = [row.bits for row in rows]
    zeros = [100 * row.sparsity for row in rows]
    _bars(clean(left, "stored bits for each entry"), bits, "{:.2f}", dense, BLUE)
    _bars(clean(right, "share of zeros, %"), zeros, "{:.1f}", dense, GREEN)
    left.set_yticks(range(len(rows)), [plain(row.path) for row in rows])
    left.invert_yaxis()  # the first layer on top; the right panel shares the axis
    right.set_xlim(0, 112)  # room for the label of a bar of 100 %
    return figure


def _bars(axes: Axes, values: list[float], pattern: str, dense: list[bool], color: str) -> None:
    colors = [GREY if each else color for each in dense]
    bars = axes.barh(range(len(values)), values, color=colors, height=0.7)
    labels = [pattern.format(value) for value in values]
    axes.bar_label(bars, labels, padding=3, fontsize=7.5, color=INK)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.14)


def tradeoff(run: Run) -> Figure:
    """Draw the networks of a run by bytes and accuracy, and the region that the requirement allows.

    Args:
      run: the run.

    Returns:
      The figure.
    """
    figure = new_figure(9, 4.8)
    metric = run.results.get("metric") or ACCURACY
    axes = clean(figure.subplots(), "", "bytes on disk", metric["name"])
    rows = run.results["rows"]
    allowed = limits(run)
    # The corner reaches to the limits of the axes, so these come first; labels are placed last.
    labels = [_point(axes, row, run.results["chosen"]) for row in rows]
    _limits(axes, rows)
    if allowed:
        _corner(axes, allowed, metric)
    if metric["percent"]:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    spread(figure, labels)
    return figure


def spread(figure: Figure, labels: list[Annotation]) -> None:
    """Move overlapping labels, each to the nearest free place beside its point.

    Args:
      figure: the figure of the labels.
      labels: annotations with offsets in points; earlier ones are placed first.
    """
    with drawing():
        # The sizes of texts are known only after a layout.
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in labels]
    taken: list[Bbox] = []
    points = 72 / figure.dpi  # points in a pixel: offsets are in points, boxes in pixels
    # Up and down by whole labels, the smallest moves first.
    steps = [0]
    for n in range(1, len(labels) + 2):
        steps += [n, -n]
    for label, box in zip(labels, boxes, strict=True):
        x, y = label.xyann
        places = []
        for step in steps:
            up = y + step * (box.height * points + 2)
            # At the right of the point, then at its left.
            places += [(x, up), (-x - box.width * points, up)]
        moved = {p: box.translated((p[0] - x) / points, (p[1] - y) / points) for p in places}
        free = (place for place, own in moved.items() if _is_free(own, taken, figure))
        label.xyann = next(free, (x, y))  # where there is no free place it stays, and overlaps
        taken.append(moved[label.xyann])


def _is_free(box: Bbox, taken: list[Bbox], figure: Figure) -> bool:
    inside = all(figure.bbox.contains(*corner) for corner in (box.min, box.max))
    return inside and not any(box.overlaps(other) for other in taken)


def _point(axes: Axes, row: JsonObject, chosen: str) -> Annotation:
    """Draw one network: validation accuracy filled, test accuracy hollow, the chosen one a star."""
    size = row["nbytes"]
    validation = row["validation"]
    test = row["test"]
    baseline = GREY if row["name"] == "teacher" else BLUE
    color = {None: baseline, True: GREEN, False: ORANGE}[row["accepted"]]
    marker: dict[str, Any] = {"marker": "o", "markersize": 8}
    if row["name"] == chosen:
        marker = {"marker": "*", "markersize": 16}
    axes.plot(size, validation, color=color, linestyle="", zorder=3, **marker)
    if test is not None:
        axes.plot([size, size], [validation, test], color=color, linewidth=1, alpha=0.5)
        hollow: dict[str, Any] = {"markersize": 7, "markerfacecolor": "white"}
        axes.plot(size, test, "o", color=color, zorder=2, **hollow)
    label = f"{plain(row['name'])}\n{size:,} bytes"
    place: dict[str, Any] = {"xytext": (9, 4), "textcoords": "offset points"}
    return axes.annotate(label, (size, validation), fontsize=8, color=INK, **place)


def _limits(axes: Axes, rows: list[JsonObject]) -> None:
    """Use a logarithmic axis of bytes with room for the labels, and ticks that people read."""
    sizes = [row["nbytes"] for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 2.6)
    low, high = axes.get_xlim()
    # Ticks at 1 and 3 of each power of ten.
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = []
    for power in powers:
        ticks += [10**power, 3 * 10**power]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    axes.margins(y=0.15)


def _corner(axes: Axes, allowed: Limits, metric: JsonObject) -> None:
    """Shade the region that is accurate and small enough, and write the limits on its edges."""
    higher = metric["higher_is_better"]
    limit = allowed.metric
    most = allowed.nbytes
    # The region must be visible even where no network reached it.
    low, high = axes.get_ylim()
    margin = 0.05 * (high - low)
    low = min(low, limit - margin)
    high = max(high, limit + margin)
    if metric["percent"]:
        high = min(high, 1.01)
    left = axes.get_xlim()[0] if most > axes.get_xlim()[0] else most / 1.6
    axes.fill_between(
        [left, most], limit, high if higher else low, color=GREEN, alpha=0.08, linewidth=0
    )
    axes.axhline(limit, color=GREEN, linewidth=1, linestyle=(0, (4, 3)))
    axes.axvline(most, color=GREEN, linewidth=1, linestyle=(0, (4, 3)))
    style: dict[str, Any] = {"fontsize": 8, "color": GREEN, "va": "bottom"}
    across = axes.get_yaxis_transform()
    along = axes.get_xaxis_transform()
    bound = f"at {'least' if higher else 'most'} {value_text(limit, metric)}"
    axes.text(0.995, limit, bound, transform=across, ha="right", **style)
    axes.text(most, 0.01, f" at most {most:,.0f} bytes", transform=along, **style)
    axes.set_ylim(low, high)
    axes.set_xlim(left, axes.get_xlim()[1])


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} B"


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
    # The largest leaves are chosen, and drawn in the order of the network.
    largest = sorted(paths, key=lambda path: -run.before[path].size)[:MOST]
    paths = [path for path in paths if path in largest]
    if not paths:
        return None
    rows = -(-len(paths) // COLUMNS)  # rounded up
    figure = new_figure(9, 0.3 + 1.95 * rows)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, path in zip(panels, paths, strict=False):
        before = np.asarray(run.before[path], np.float32)
        after = np.asarray(run.after[path], np.float32)
        _panel(clean(axes, path), before, after)
    # The last row may have fewer leaves than panels.
    for axes in panels[len(paths) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    """Draw histograms of one leaf's weights, as shares of all entries.

    Exact zeros of the artifact are left out: their bar would dwarf all others.
    """
    reach = max(float(np.abs(before).max()), float(np.abs(after).max()), 1e-12)
    # The same bins before and after, an odd number of them: zero is the middle of one.
    edges = np.linspace(-reach, reach, BINS + 1)
    nonzero = after[after != 0]
    for values, color, alpha in ((before.ravel(), GREY, 0.55), (nonzero, BLUE, 0.75)):
        counts, _ = np.histogram(values, edges)
        shares = 100 * counts / before.size
        axes.stairs(shares, edges, fill=True, color=color, alpha=alpha, linewidth=0)
    note = f"{1 - nonzero.size / after.size:.1%} zeros\n{np.unique(nonzero).size:,} values"
    corner: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top"}
    axes.text(0.98, 0.95, note, fontsize=7.5, color=INK, **corner)
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
