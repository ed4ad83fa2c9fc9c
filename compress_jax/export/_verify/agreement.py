"""Whether another runtime computes what JAX does: every result, and every channel of it."""

from typing import Any

import jax
import numpy as np

from compress_jax.core.errors import ExportError

CHANNEL = 2.0  # how much more than a whole result may a single channel of it differ
NOISE = 3.0  # how many times the simulation's own rounding error is explained by rounding
MOST = 0.1  # of a result's size, that rounding may explain at all


def agree(ours: Any, theirs: Any, tolerance: float, what: str, floats: Any = None) -> float:
    r"""Compare results with those of JAX.

    The root mean square difference of every result, relative to that result's size, may be
    ``tolerance``, and of every index of every axis but the first (of each channel, say) twice as
    much of the whole result's size. Where values are rounded, ``floats`` tells how much rounding
    explains: three times the simulation's own difference from it, and at most a tenth of the
    result's size.

    Args:
      ours: what JAX computes: an array or a tree of them.
      theirs: what the other runtime does: as many arrays.
      tolerance: largest root mean square difference, relative to that of ``ours``.
      what: the two, in words, for the error.
      floats: what JAX computes without rounding, like ``ours``.

    Returns:
      The largest relative difference of a whole result.

    Raises:
      ExportError: if it is larger, or shapes differ, or one holds NaN or inf where the other does
        not.

    Example:
      >>> right, wrong = np.array([[3.0, 0.1], [4.0, 0.2]]), np.array([[3.0, 0.0], [4.0, 0.0]])
      >>> agree(right, right, 1e-3, "ONNX against JAX")
      0.0
      >>> agree(right, wrong, 0.04, "ONNX against JAX")
      Traceback (most recent call last):
      compress_jax.core.errors.ExportError: ONNX against JAX: results differ by 0.045 of their size, and 0.04 is allowed
    """
    mine, others = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    plain = mine if floats is None else jax.tree.leaves(floats)
    if len(mine) != len(others):
        raise ExportError(f"{what}: there are {len(others)} results instead of {len(mine)}")
    each = zip(mine, others, plain, strict=True)
    return max(
        (_agree(a, b, c, tolerance, _named(what, i, mine)) for i, (a, b, c) in enumerate(each)),
        default=0.0,
    )


def _named(what: str, index: int, results: list[Any]) -> str:
    return what if len(results) == 1 else f"{what}, result {index}"


def _agree(ours: Any, theirs: Any, plain: Any, tolerance: float, what: str) -> float:
    ours, theirs, plain = (np.asarray(x) for x in (ours, theirs, plain))
    if ours.shape != theirs.shape:
        raise ExportError(f"{what}: the result has shape {theirs.shape} instead of {ours.shape}")
    ours, theirs, plain = (x.astype(np.float64) for x in (ours, theirs, plain))
    finite = np.isfinite(ours)
    if not (
        (ours == theirs) | (np.isnan(ours) & np.isnan(theirs)) | (finite & np.isfinite(theirs))
    ).all():
        raise ExportError(f"{what}: one result holds NaN or inf where the other does not")
    ours, theirs, plain = (np.where(finite, x, 0) for x in (ours, theirs, plain))
    size = _rms(ours) or 1.0
    off, rounding = theirs - ours, plain - ours
    allowed = np.hypot(tolerance * size, min(NOISE * _rms(rounding), MOST * size))
    difference = float(_rms(off) / size)
    if not _rms(off) <= allowed:
        raise ExportError(
            f"{what}: results differ by {difference:.2g} of their size, and {allowed / size:.2g} "
            "is allowed"
        )
    for axis in range(1, ours.ndim):
        _channels(off, rounding, axis, size, tolerance, what)
    return difference


def _channels(
    off: np.ndarray, rounding: np.ndarray, axis: int, size: float, tolerance: float, what: str
) -> None:
    """Hold each index of an axis to what its own rounding explains."""
    others = tuple(a for a in range(off.ndim) if a != axis)
    found, noise = _rms(off, others), np.maximum(_rms(rounding, others), _rms(rounding))
    allowed = CHANNEL * np.hypot(tolerance * size, np.minimum(NOISE * noise, MOST * size))
    if (found > allowed).any():
        worst = int((found / np.maximum(allowed, np.finfo(float).tiny)).argmax())
        raise ExportError(
            f"{what}: index {worst} of axis {axis} differs by {found[worst] / size:.2g} of the "
            "result's size, and "
            f"{allowed[worst] / size:.2g} is allowed"
        )


def _rms(x: np.ndarray, axes: tuple[int, ...] | None = None) -> Any:
    return np.sqrt(np.mean(x**2, axis=axes)) if x.size else 0.0
