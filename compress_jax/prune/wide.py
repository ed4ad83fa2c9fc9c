"""Counts beyond 2**32 without 64-bit integers: two uint32 words, ``hi * 2**32 + lo``, exact on every device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
