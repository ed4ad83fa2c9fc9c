"""Bits and sparsity of each leaf, as bars."""

from compress_jax.core import coverage
from compress_jax.report.figure import BLUE, GREEN, GREY, INK, Axes, Figure, clean, new_figure, plain
from compress_jax.report.read import Run


def layers(run: Run) -> Figure:
    """Draw stored bits and share of zeros of each leaf of the artifact's params; leaves stored dense are grey.

    Args:
      run: the run.

    Returns:
      The figure.
    """
    rows = coverage(None, run.packed["params"]).rows
    figure = new_figure(9, 1.2 + 0.24 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    dense = [row.form == "dense" for row in rows]
    _bars(clean(left, "stored bits for each entry"), [row.bits for row in rows], "{:.2f}", dense, BLUE)
    _bars(clean(right, "share of zeros, %"), [100 * row.sparsity for row in rows], "{:.1f}", dense, GREEN)
    left.set_yticks(range(len(rows)), [plain(row.path) for row in rows])
    left.invert_yaxis()
    right.set_xlim(0, 112)
    return figure


def _bars(axes: Axes, values: list[float], form: str, dense: list[bool], colour: str) -> None:
    bars = axes.barh(range(len(values)), values, color=[GREY if each else colour for each in dense], height=0.7)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=7.5, color=INK)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.14)
