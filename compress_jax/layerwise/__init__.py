"""One layer at a time: its least-squares problem, the solvers' shared loops, and their result.

`Rewritten` is what every rewrite of `quantize` and `prune` returns; `output_error` is the error
that the solvers lower.
"""

from compress_jax.layerwise._result import Rewritten
from compress_jax.layerwise._solve import output_error

__all__ = ["Rewritten", "output_error"]


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
