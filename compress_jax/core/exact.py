"""Counts beyond 2**32 without 64-bit integers: two uint32 words, ``hi * 2**32 + lo``, exact on every device."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.levels import exponent_of, power_of_two


class Wide(NamedTuple):
    """An unsigned integer below 2**64.

    Attributes:
      hi: uint32, the upper word.
      lo: uint32, the lower word.
    """

    hi: jax.Array
    lo: jax.Array


def wide(value: int) -> Wide:
    """Return a Python integer in ``[0, 2**64)`` as a Wide.

    Example:
      >>> [int(word) for word in wide(2**32 + 5)]
      [1, 5]
    """
    return Wide(jnp.uint32(value >> 32), jnp.uint32(value & 0xFFFFFFFF))


def add(a: Wide, b: Wide) -> Wide:
    """Return ``a + b``; the carry shows in that the lower word wraps below what it was."""
    lo = a.lo + b.lo
    return Wide(a.hi + b.hi + (lo < a.lo).astype(jnp.uint32), lo)


def subtract(a: Wide, b: Wide) -> Wide:
    """Return ``a - b`` for ``b <= a``."""
    return Wide(a.hi - b.hi - (a.lo < b.lo).astype(jnp.uint32), a.lo - b.lo)


def less(a: Wide, b: Wide) -> jax.Array:
    """Return ``a < b``, a boolean."""
    return (a.hi < b.hi) | ((a.hi == b.hi) & (a.lo < b.lo))


def choose(which: jax.Array, a: Wide, b: Wide) -> Wide:
    """Return ``a`` where the boolean ``which`` is true, else ``b``."""
    return Wide(jnp.where(which, a.hi, b.hi), jnp.where(which, a.lo, b.lo))


def multiply(a: jax.Array, b: int) -> Wide:
    """Return ``a * b`` from the four products of 16-bit halves.

    Args:
      a: uint32 scalar.
      b: static, in ``[0, 2**32)``.

    Returns:
      The product, all 64 bits of it.

    Example:
      >>> [int(word) for word in multiply(jnp.uint32(2**31), 6)]
      [3, 0]
    """
    halves = (a & 0xFFFF, jnp.uint32(b & 0xFFFF)), (a >> 16, jnp.uint32(b >> 16))
    (a0, b0), (a1, b1) = halves
    low, high = Wide(jnp.uint32(0), a0 * b0), Wide(a1 * b1, jnp.uint32(0))
    crossed = [Wide(p >> 16, p << 16) for p in (a0 * b1, a1 * b0)]
    return add(add(low, high), add(*crossed))


def count(flags: jax.Array) -> Wide:
    """Return how many entries of a boolean array are true, however many there are.

    Args:
      flags: bool, any shape; no axis of 2**32 or more.

    Returns:
      The exact count.

    Example:
      >>> [int(word) for word in count(jnp.array([[True, False], [True, True]]))]
      [0, 3]
    """
    if flags.size < 2**32:
        return Wide(jnp.uint32(0), flags.sum(dtype=jnp.uint32))
    longest = max(range(flags.ndim), key=lambda axis: flags.shape[axis])
    return total(flags.sum(axis=longest, dtype=jnp.uint32))


def total(counts: jax.Array) -> Wide:
    """Return the sum of uint32 counts, which need not fit in one word.

    Args:
      counts: uint32, any shape.

    Returns:
      The sum, exact below 2**64.

    Example:
      >>> [int(word) for word in total(jnp.full(3, 2**31, jnp.uint32))]
      [1, 2147483648]
    """
    pairs = Wide(jnp.zeros_like(counts), counts)
    return jax.lax.reduce(pairs, Wide(jnp.uint32(0), jnp.uint32(0)), add, range(counts.ndim))


# Sums of floats that do not depend on the order of their terms, and so are the same under every
# sharding.


def exact_sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return the sum over some axes, the same bits in whatever order the terms are added.

    Every entry is rounded to a multiple of ``2**(e - q)``, where ``2**e`` is above all magnitudes
    of the array; the sums of these integers, taken in two halves of q/2 bits, cannot overflow. q is
    30 for sums of up to 65536 terms, and two bits less for each further doubling: what lies far
    below the largest entry of the array counts as zero.

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
    share = jax.lax.optimization_barrier(
        total * 2.0 ** (-2 * half)
    )  # both factors joined by the compiler could be 0
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
