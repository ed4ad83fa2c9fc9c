"""Whether another runtime computes what JAX does."""

import numpy as np

from compress_jax.core.errors import ExportError


def agree(ours: np.ndarray, theirs: np.ndarray, tolerance: float, what: str) -> float:
    """Compare results with those of JAX.

    Args:
      ours: what JAX computes.
      theirs: what the other runtime does.
      tolerance: largest root mean square difference, relative to that of ``ours``.
      what: the two, in words, for the error.

    Returns:
      The relative difference.

    Raises:
      ExportError: if it is larger, or shapes differ, or ``theirs`` is not finite.
    """
    if ours.shape != theirs.shape:
        raise ExportError(f"{what}: the result has shape {theirs.shape} instead of {ours.shape}")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    difference = float(np.sqrt(np.mean((ours - theirs) ** 2)) / (np.sqrt(np.mean(ours**2)) or 1))
    if not difference <= tolerance:
        raise ExportError(f"{what}: results differ by {difference:.2g} of their size, and {tolerance:.2g} is allowed")
    return difference
