"""Agreement of another runtime with JAX: of every result, and of every channel of it."""

import jax
import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.types import Array, PyTree

CHANNEL = 2.0  # a single channel may differ this much more than a whole result
NOISE = 3.0  # times the simulation's own rounding error that rounding may explain
MOST = 0.1  # share of a result's size that rounding may explain at most


def agree(
    ours: PyTree, theirs: PyTree, tolerance: float, what: str, floats: PyTree = None
) -> float:
    r"""Compare results with those of JAX.

    The root mean square difference of every result, relative to that result's size, may be
    ``tolerance``; that of every index of every axis but the first (of each channel, for example)
    may be twice as large. Where values are rounded, ``floats`` shows how much rounding explains:
    three times the simulation's own difference from it, and at most a tenth of the result's size.

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
      >>> agree(right, right, 1e-3, "ONNX")
      0.0
      >>> agree(right, wrong, 0.04, "ONNX")
      Traceback (most recent call last):
      compress_jax.core.errors.ExportError: ONNX: results differ by 0.045 of their size, and 0.04 is allowed
    """  # noqa: E501
    mine = jax.tree.leaves(ours)
    others = jax.tree.leaves(theirs)
    plain = mine if floats is None else jax.tree.leaves(floats)
    if len(mine) != len(others):
        raise ExportError(f"{what}: there are {len(others)} results instead of {len(mine)}")
    largest = 0.0
    for i, (a, b, c) in enumerate(zip(mine, others, plain, strict=True)):
        name = what if len(mine) == 1 else f"{what}, result {i}"
        largest = max(largest, _agree(a, b, c, tolerance, name))
    return largest


def _agree(ours: Array, theirs: Array, plain: Array, tolerance: float, what: str) -> float:
    if np.shape(ours) != np.shape(theirs):
        raise ExportError(
            f"{what}: the result has shape {np.shape(theirs)} instead of {np.shape(ours)}"
        )
    # float64, so that squares of float32 and bfloat16 neither overflow nor lose digits.
    ours, theirs, plain = (np.asarray(x).astype(np.float64) for x in (ours, theirs, plain))
    # NaN and inf must stand in the same places; then they are left out.
    finite = np.isfinite(ours)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    if not (same | (finite & np.isfinite(theirs))).all():
        raise ExportError(f"{what}: one result holds NaN or inf where the other does not")
    ours, theirs, plain = (np.where(finite, x, 0) for x in (ours, theirs, plain))
    size = float(_rms(ours)) or 1.0
    off = theirs - ours
    rounding = plain - ours
    # Two independent errors, so their squares add up.
    allowed = np.hypot(tolerance * size, min(NOISE * _rms(rounding), MOST * size))
    difference = float(_rms(off) / size)
    if not _rms(off) <= allowed:  # also where it is NaN
        raise ExportError(
            f"{what}: results differ by {difference:.2g} of their size, and {allowed / size:.2g} "
            "is allowed"
        )
    # A single wrong channel hardly shows in the whole.
    for axis in range(1, ours.ndim):
        _channels(off, rounding, axis, size, tolerance, what)
    return difference


def _channels(
    off: np.ndarray, rounding: np.ndarray, axis: int, size: float, tolerance: float, what: str
) -> None:
    """Compare the difference at each index of an axis with what its own rounding explains."""
    others = tuple(a for a in range(off.ndim) if a != axis)
    found = _rms(off, others)  # [size of the axis]
    # A channel's own rounding, or the average one where its own happens to be small.
    noise = np.maximum(_rms(rounding, others), _rms(rounding))
    allowed = CHANNEL * np.hypot(tolerance * size, np.minimum(NOISE * noise, MOST * size))
    if (found > allowed).any():
        worst = int((found / np.maximum(allowed, np.finfo(float).tiny)).argmax())
        raise ExportError(
            f"{what}: index {worst} of axis {axis} differs by {found[worst] / size:.2g} of the "
            f"result's size, and {allowed[worst] / size:.2g} is allowed"
        )


def _rms(x: np.ndarray, axes: tuple[int, ...] | None = None) -> np.ndarray:
    return np.sqrt(np.mean(x**2, axis=axes)) if x.size else np.zeros(())
