"""Histograms of each layer's weights, before and after."""

import numpy as np

from compress_jax.core import coverage
from compress_jax.report.figure import BLUE, GREY, INK, Axes, Figure, clean, new_figure
from compress_jax.report.read import Run

COLUMNS, MOST, BINS = 3, 24, 81


def weights(run: Run) -> Figure | None:
    """Draw the weights of the float32 student and of the artifact, a panel for each compressed leaf.

    Args:
      run: the run.

    Returns:
      The figure; of a deep network, the 24 largest leaves in the order of the network. None if no leaf was compressed.
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
        _panel(clean(axes, path), np.asarray(run.before[path], np.float32), np.asarray(run.after[path], np.float32))
    for axes in panels[len(paths) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    """Draw shares of all entries, so that the two can be compared; exact zeros would dwarf everything else."""
    reach = max(float(np.abs(before).max()), float(np.abs(after).max()), 1e-12)
    edges = np.linspace(-reach, reach, BINS + 1)
    kept = after[after != 0]
    for values, colour, alpha in ((before.ravel(), GREY, 0.55), (kept, BLUE, 0.75)):
        counts, _ = np.histogram(values, edges)
        axes.stairs(100 * counts / before.size, edges, fill=True, color=colour, alpha=alpha, linewidth=0)
    note = f"{1 - kept.size / after.size:.1%} zeros\n{np.unique(kept).size:,} values"
    axes.text(0.98, 0.95, note, transform=axes.transAxes, fontsize=7.5, color=INK, ha="right", va="top")
    axes.set_ylabel("% of weights", fontsize=8)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
