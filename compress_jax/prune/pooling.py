"""From scores of entries to scores of units (blocks of entries that go together), and from masks of units back."""

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError
from compress_jax.core.levels import power_of_two
from compress_jax.prune.exact_sum import exact_sum, scale_exponent

Window = tuple[int, ...]
REDUCTIONS = ("sum", "mean", "l2", "max")


def check_reduction(reduce: str) -> str:
    """Return the name of a reduction, or raise a ValueError that lists them.

    Example:
      >>> check_reduction("mean")
      'mean'
    """
    if not isinstance(reduce, str) or reduce not in REDUCTIONS:
        raise ArgumentError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    return reduce


def units(shape: tuple[int, ...], window: Window) -> tuple[int, ...]:
    """Return how many units there are along each axis, one that is not full at an end included.

    Example:
      >>> units((5, 8), (2, 4))
      (3, 2)
    """
    return tuple(-(-n // w) for n, w in zip(shape, window, strict=True))


def pooled(scores: jax.Array, window: Window, reduce: str) -> jax.Array:
    r"""Return the score of every unit.

    Of the scores s in a unit (a last one that is not full has fewer): ``"sum"`` :math:`\sum s`, ``"mean"`` their mean,
    ``"l2"`` :math:`\sqrt{\sum s^2}`, ``"max"`` the largest. Sums are taken in fixed point (`exact_sum`), so that the
    result has the same bits under every sharding.

    Args:
      scores: floating point, any shape.
      window: static, the shape of a unit, of the rank of ``scores``.
      reduce: one of `REDUCTIONS`.

    Returns:
      float32, shape ``units(scores.shape, window)``.

    Example:
      >>> pooled(jnp.arange(6.0).reshape(2, 3), (2, 2), "mean").tolist()
      [[2.0, 3.5]]
    """
    x = scores.astype(jnp.float32)
    within = tuple(range(1, 2 * x.ndim, 2))
    if reduce == "max":
        return _tiled(x, window, -jnp.inf).max(within)
    if reduce == "l2":
        exponent = scale_exponent(x)
        normal = x * power_of_two(-exponent)  # squares neither overflow nor vanish
        return jnp.sqrt(exact_sum(_tiled(normal * normal, window), within)) * power_of_two(exponent)
    total = exact_sum(_tiled(x, window), within)
    return total if reduce == "sum" else total * _reciprocals(scores.shape, window)


def spread(flags: jax.Array, window: Window, shape: tuple[int, ...]) -> jax.Array:
    """Return the flag of every entry's unit.

    Args:
      flags: bool, one a unit.
      window: static, the shape of a unit.
      shape: static, of the array.

    Returns:
      bool, of that shape.

    Example:
      >>> spread(jnp.array([[True, False]]), (2, 2), (2, 3)).tolist()
      [[True, True, False], [True, True, False]]
    """
    grid = flags.reshape([k for n in flags.shape for k in (n, 1)])
    full = jnp.broadcast_to(grid, [k for n, w in zip(flags.shape, window, strict=True) for k in (n, w)])
    whole = full.reshape([n * w for n, w in zip(flags.shape, window, strict=True)])
    return whole[tuple(slice(n) for n in shape)]


def _tiled(x: jax.Array, window: Window, fill: float = 0.0) -> jax.Array:
    """Return ``[units along 0, window 0, units along 1, window 1, ...]``, padded at the ends."""
    counts = units(x.shape, window)
    ends = [(0, k * w - n) for k, w, n in zip(counts, window, x.shape, strict=True)]
    padded = jnp.pad(x, ends, constant_values=fill) if any(end for _, end in ends) else x
    return padded.reshape([k for pair in zip(counts, window, strict=True) for k in pair])


def _reciprocals(shape: tuple[int, ...], window: Window) -> np.ndarray:
    """Return one over the number of entries of every unit, float32."""
    counts = np.ones((), np.float64)
    for n, w in zip(shape, window, strict=True):
        along = np.minimum(w, n - w * np.arange(-(-n // w)))
        counts = counts[..., None] * along
    return (1 / counts).astype(np.float32)
