"""Low rank: a kernel as the product of two thin factors, or with one beside it; both trained."""

from compress_jax.lowrank._adapter import adapter
from compress_jax.lowrank._svd import svd

__all__ = ["adapter", "svd"]


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
