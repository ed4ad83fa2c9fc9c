"""The pictures of a report, as PNG files; the same run gives the same bytes."""

from collections.abc import Callable

from compress_jax.report.draw_curves import curves
from compress_jax.report.draw_layers import layers
from compress_jax.report.draw_tradeoff import tradeoff
from compress_jax.report.draw_weights import weights
from compress_jax.report.figure import Figure, png
from compress_jax.report.read import Run

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
      PNG files by name: ``tradeoff``, ``layers``, ``weights``, and ``curves`` if the run kept metrics.
    """
    drawn = {name: draw(run) for name, draw in DRAW.items()}
    return {name: png(figure) for name, figure in drawn.items() if figure is not None}
