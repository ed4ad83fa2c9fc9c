"""Sums of floats that do not depend on the order of their terms, and so are the same under every sharding."""

import math

import jax
import jax.numpy as jnp

from compress_jax.core.levels import exponent_of, power_of_two


def exact_sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return the sum over some axes, the same bits in whatever order the terms are added.

    Every entry is rounded to a multiple of ``2**(e - q)``, where ``2**e`` is above all magnitudes of the array; the sums of
    these integers, taken in two halves of q/2 bits, cannot overflow. q is 30 for sums of up to 65536 terms, and two bits
    less for each further doubling: what lies far below the largest entry of the array counts as zero.

    Args:
      x: float32, any shape.
      axes: what to sum over.

    Returns:
      float32, without those axes. Entries beyond 2**126 count as 2**126.

    Example:
      >>> exact_sum(jnp.array([[1.0, 2.0], [-0.5, 0.25]]), (1,)).tolist()
      [3.0, -0.25]
    """
    half = half_bits(math.prod(x.shape[axis] for axis in axes))
    exponent = scale_exponent(x)
    whole = fixed_point(x, exponent, 2 * half)
    high, low = whole >> half, whole & (2**half - 1)
    total = high.sum(axes).astype(jnp.float32) * 2.0**half + low.sum(axes).astype(jnp.float32)
    share = jax.lax.optimization_barrier(total * 2.0 ** (-2 * half))  # both factors joined by the compiler could be 0
    return share * power_of_two(exponent)  # multiplications by powers of two are exact


def half_bits(terms: int) -> int:
    """Return the widest integers of which so many can be added in int32, at most 15 bits.

    Example:
      >>> half_bits(2**16), half_bits(2**20)
      (15, 11)
    """
    return max(min(15, 31 - max(terms - 1, 1).bit_length()), 1)


def scale_exponent(x: jax.Array) -> jax.Array:
    """Return the least e from -126 to 126 with ``2**e > abs(x)`` for all entries, or 126; int32 scalar.

    Example:
      >>> int(scale_exponent(jnp.array([0.3, -5.0])))
      3
    """
    return jnp.clip(exponent_of(jnp.max(jnp.abs(x))) + 1, -126, 126)


def fixed_point(x: jax.Array, exponent: jax.Array, bits: int) -> jax.Array:
    """Return ``round(x * 2**(bits - exponent))`` as int32, half to even.

    Args:
      x: float32.
      exponent: int32 scalar from `scale_exponent`.
      bits: static, at most 30.

    Example:
      >>> fixed_point(jnp.array([1.0, -0.5]), jnp.int32(1), 4).tolist()
      [8, -4]
    """
    return jnp.round(jnp.clip(x * power_of_two(-exponent), -1.0, 1.0) * 2.0**bits).astype(jnp.int32)
