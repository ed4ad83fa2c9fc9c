"""Weight sharing: every weight of a leaf is one of a few values, and the values are trained."""

from compress_jax.cluster._kmeans import kmeans

__all__ = ["kmeans"]


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
