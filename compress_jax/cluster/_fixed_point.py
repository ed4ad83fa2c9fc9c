"""Sums that do not depend on the order of summation: 64-bit integers made of two 32-bit ones.

A float sum changes in its last bits with the order of its terms, and sharding changes the order.
Integer sums do not, so what is computed from them is the same on one device and on a thousand.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

FRACTION_BITS = 30


class Int64(NamedTuple):
    """Signed integers ``high * 2**32 + low``, whatever ``jax_enable_x64`` says.

    Attributes:
      high: int32, any shape.
      low: uint32, same shape.
    """

    high: jax.Array
    low: jax.Array

    def __add__(self, other: "Int64") -> "Int64":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the sum, exactly; a tuple's concatenation would be of no use here."""
        low = self.low + other.low
        return Int64(self.high + other.high + (low < self.low).astype(jnp.int32), low)

    def __sub__(self, other: "Int64") -> "Int64":
        """Return the difference, exactly."""
        borrow = (self.low < other.low).astype(jnp.int32)
        return Int64(self.high - other.high - borrow, self.low - other.low)

    def at(self, index: jax.Array) -> "Int64":
        """Return the integers at some positions."""
        return Int64(self.high[index], self.low[index])

    def to_float(self) -> jax.Array:
        """Return the nearest float32, up to its last bit."""
        negative = self.high < 0
        high = jnp.where(negative, ~self.high + (self.low == 0).astype(jnp.int32), self.high)
        low = jnp.where(negative, ~self.low + jnp.uint32(1), self.low)
        magnitude = high.astype(jnp.float32) * 2.0**32 + low.astype(jnp.float32)
        return jnp.where(negative, -magnitude, magnitude)


def exponent(x: jax.Array) -> jax.Array:
    """Return the least ``e`` with ``|x| < 2**e`` for all entries: a scale no rounding is needed for.

    Args:
      x: finite float32, any shape, at least one entry.

    Returns:
      int32 scalar; 0 if all entries are zero.

    Example:
      >>> int(exponent(jnp.array([0.3, -5.0])))
      3
    """
    return jnp.frexp(jnp.abs(x).max())[1].astype(jnp.int32)


def to_fixed(x: jax.Array, e: jax.Array) -> jax.Array:
    """Return ``round(x * 2**(30 - e))`` as int32, for ``|x| <= 2**e``; exact down to ``2**(e - 30)``.

    Example:
      >>> to_fixed(jnp.array([0.5, -1.0]), jnp.array(0)).tolist()
      [536870912, -1073741824]
    """
    return jnp.round(jnp.ldexp(x, FRACTION_BITS - e)).astype(jnp.int32)


def from_fixed(x: jax.Array, e: jax.Array) -> jax.Array:
    """Undo `to_fixed` on a float32 number of fixed-point units.

    Example:
      >>> from_fixed(jnp.array([2.0**29]), jnp.array(0)).tolist()
      [0.5]
    """
    return jnp.ldexp(x, e - FRACTION_BITS)


def prefix_sums(terms: jax.Array) -> Int64:
    """Return the sums of the first 0, 1, ..., n terms, exactly.

    The terms are laid out as a square whose columns are added one by one, all rows at once, and
    then the rows' totals: two loops of sqrt(n) steps, which compile in a fraction of the time of a
    parallel prefix sum.

    Args:
      terms: int32 ``[n]``.

    Returns:
      ``[n + 1]`` 64-bit sums: that over ``terms[i:j]`` is entry j minus entry i.

    Example:
      >>> sums = prefix_sums(jnp.array([2**30] * 8 + [-1]))
      >>> sums.at(jnp.array([8, 9])).to_float().tolist(), sums.high[-1].tolist(), sums.low[-1].tolist()
      ([8589934592.0, 8589934592.0], 1, 4294967295)
    """
    side = math.isqrt(max(terms.size - 1, 0)) + 1
    square = jnp.pad(terms, (0, side**2 - terms.size)).reshape(side, side)
    within = _running(_widened(square.T))  # [column, row]
    before = _running(Int64(within.high[-1], within.low[-1]))
    before = Int64(jnp.pad(before.high[:-1], (1, 0))[None], jnp.pad(before.low[:-1], (1, 0))[None])
    sums = within + before
    return Int64(*(jnp.pad(piece.T.ravel()[: terms.size], (1, 0)) for piece in sums))


def _running(terms: Int64) -> Int64:
    """Return the running sums over the first axis."""

    def step(total: Int64, term: Int64) -> tuple[Int64, Int64]:
        total = total + term
        return total, total

    return jax.lax.scan(step, jax.tree.map(lambda piece: jnp.zeros_like(piece[0]), terms), terms)[1]


def total(terms: jax.Array) -> Int64:
    """Return the sum of all terms, exactly.

    Args:
      terms: int32, any shape.

    Returns:
      A 64-bit scalar.

    Example:
      >>> float(total(jnp.full(1000, 2**30)).to_float()) / 2**30
      1000.0
    """
    zero = Int64(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.uint32))
    added = jax.lax.reduce(
        tuple(_widened(terms.ravel())), tuple(zero), lambda a, b: tuple(Int64(*a) + Int64(*b)), (0,)
    )
    return Int64(*added)


def _widened(terms: jax.Array) -> Int64:
    """Return int32 numbers as 64-bit ones: the sign fills the upper half."""
    return Int64(terms >> 31, terms.astype(jnp.uint32))
