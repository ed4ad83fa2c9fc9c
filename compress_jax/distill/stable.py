"""Norms, directions and bounds with finite values and gradients at any finite features, zeros and 1e38 among them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from compress_jax.core import straight_through
from compress_jax.distill.teacher import at_least_float32

SMALLEST = 1e-12
"""What is not larger has no direction: it counts as zero, and gets no gradient. No gradient is larger than its inverse."""

Axes = int | Sequence[int] | None

_clip = straight_through(jnp.clip)


def bounded(x: jax.Array, power: int) -> jax.Array:
    """Return ``x`` in float32, kept so small that a sum over all its entries to a power, with any usual weight, is finite.

    The bound is 1e7 times 100 for power 4 and millions of entries, more for less. It is straight-through: gradients are
    those of the bounded value, never zero.

    Args:
      x: any floating array.
      power: of the features that the loss contains: 2 for a squared difference.

    Returns:
      ``x``, clipped.

    Example:
      >>> bool(jnp.isfinite(jnp.square(bounded(jnp.array([3e38, -1.0]), 2)).sum()))
      True
    """
    x = at_least_float32(x)
    bound = (float(jnp.finfo(x.dtype).max) / 1e6 / max(x.size, 1)) ** (1 / power) / 2
    return _clip(x, -bound, bound)


def rescaled(x: jax.Array, axis: Axes = None) -> jax.Array:
    """Return ``x / max(abs(x))`` in float32, the maximum taken over some axes; what is zero there stays zero.

    The divisor counts as a constant for gradients, which makes no difference to a loss that does not depend on scale.

    Args:
      x: any floating array.
      axis: axes that share one scale; None for all.

    Returns:
      Values from -1 to 1, the shape of ``x``.

    Example:
      >>> rescaled(jnp.array([[1e38, -2e38], [0.0, 0.0]]), axis=1).tolist()
      [[0.5, -1.0], [0.0, 0.0]]
    """
    x = at_least_float32(x) / 16  # XLA may multiply by the inverse, and that of the largest floats is flushed to 0
    size = jax.lax.stop_gradient(jnp.abs(x).max(axis=axis, keepdims=True))
    alive = size > SMALLEST / 16
    return jnp.where(alive, x / jnp.where(alive, size, 1.0), 0.0)


def length(x: jax.Array, axis: Axes = -1, keepdims: bool = False) -> jax.Array:
    """Return the Euclidean norm over some axes, with gradient 0 at 0.

    Args:
      x: float32, of entries not near the largest float.
      axis: axes of one vector.
      keepdims: keep those axes, as 1.

    Returns:
      The norms.

    Example:
      >>> jax.grad(length)(jnp.zeros(2)).tolist(), float(length(jnp.array([3.0, 4.0])))
      ([0.0, 0.0], 5.0)
    """
    size = jax.lax.stop_gradient(jnp.abs(x).max(axis=axis, keepdims=True))
    square = jnp.square(rescaled(x, axis)).sum(axis=axis, keepdims=True)
    norm = size * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return norm if keepdims else norm.squeeze(axis)


def unit(x: jax.Array, axis: Axes = -1) -> jax.Array:
    """Return the direction of a vector, ``x / norm(x)``, in float32; 0, with gradient 0, where it has none.

    Args:
      x: any floating array.
      axis: axes of one vector.

    Returns:
      Vectors of norm 1 or 0, the shape of ``x``.

    Example:
      >>> unit(jnp.array([[1e38, 0.0], [0.0, 0.0]])).tolist()
      [[1.0, 0.0], [0.0, 0.0]]
    """
    x = rescaled(x, axis)
    square = jnp.square(x).sum(axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))
