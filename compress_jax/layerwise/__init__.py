"""Layers solved by calibration data: a block after the other, and what the solvers share.

`solve` goes through a network block by block. `Rewritten` is what every rewrite of `quantize` and
`prune` returns; `output_error` is the error that the solvers lower.
"""

from compress_jax.layerwise._blocks import solve
from compress_jax.layerwise._result import Measured, Rewritten
from compress_jax.layerwise._solve import output_error

__all__ = ["Measured", "Rewritten", "output_error", "solve"]


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
