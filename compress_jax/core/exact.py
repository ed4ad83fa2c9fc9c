"""Exact arithmetic without 64-bit types: two-word integers, and float sums in fixed point.

A float sum changes in its last bits with the order of its terms, and sharding changes the order.
Integer sums do not, so what is computed from them is the same on one device and on a thousand.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.levels import exponent_of, power_of_two


class Int64(NamedTuple):
    """64-bit integers ``high * 2**32 + low``, whatever ``jax_enable_x64`` says.

    The dtype of the upper word says whether they are signed: int32 for integers in
    ``[-2**63, 2**63)``, uint32 for those in ``[0, 2**64)``. Both operands of a function below have
    the same dtypes.

    Attributes:
      high: int32 or uint32, any shape.
      low: uint32, the same shape.

    Example:
      >>> add(uint64(2**32 - 1), uint64(1)).to_float().tolist()
      4294967296.0
    """

    high: jax.Array
    low: jax.Array

    def map(self, fn: Callable[[jax.Array], jax.Array]) -> "Int64":
        """Apply a function that moves entries (indexing, padding, reshaping) to both words."""
        return Int64(fn(self.high), fn(self.low))

    def to_float(self) -> jax.Array:
        """Return the nearest float32, up to its last bit; exact below 2**24."""
        if self.high.dtype == jnp.uint32:
            return _unsigned_to_float(self)
        negative = self.high < 0
        zero = Int64(jnp.zeros_like(self.high), jnp.zeros_like(self.low))
        magnitude = _unsigned_to_float(choose(negative, subtract(zero, self), self))
        return jnp.where(negative, -magnitude, magnitude)


def uint64(value: int) -> Int64:
    """Return a Python integer in ``[0, 2**64)`` as an unsigned scalar.

    Example:
      >>> [int(word) for word in uint64(2**32 + 5)]
      [1, 5]
    """
    return Int64(jnp.uint32(value >> 32), jnp.uint32(value & 0xFFFFFFFF))


def widened(x: jax.Array) -> Int64:
    """Return int32 integers as signed 64-bit ones, uint32 integers as unsigned ones.

    Example:
      >>> [word.tolist() for word in widened(jnp.array([-1, 7]))]
      [[-1, 0], [4294967295, 7]]
    """
    sign = x >> 31 if x.dtype == jnp.int32 else jnp.zeros_like(x)  # int32: 0 or -1
    return Int64(sign, x.astype(jnp.uint32))


def add(a: Int64, b: Int64) -> Int64:
    """Return ``a + b``, modulo 2**64."""
    low = a.low + b.low
    carry = low < a.low  # the lower word has wrapped around
    return Int64(a.high + b.high + carry.astype(a.high.dtype), low)


def subtract(a: Int64, b: Int64) -> Int64:
    """Return ``a - b``, modulo 2**64."""
    borrow = a.low < b.low
    return Int64(a.high - b.high - borrow.astype(a.high.dtype), a.low - b.low)


def less(a: Int64, b: Int64) -> jax.Array:
    """Return ``a < b``, a boolean."""
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def choose(which: jax.Array, a: Int64, b: Int64) -> Int64:
    """Return ``a`` where the boolean ``which`` is true, else ``b``."""
    return Int64(jnp.where(which, a.high, b.high), jnp.where(which, a.low, b.low))


def multiply(a: jax.Array, b: int) -> Int64:
    """Return ``a * b`` from the four products of 16-bit halves.

    Args:
      a: uint32 scalar.
      b: static, in ``[0, 2**32)``.

    Returns:
      The product, all 64 bits of it, unsigned.

    Example:
      >>> [int(word) for word in multiply(jnp.uint32(2**31), 6)]
      [3, 0]
    """
    a_low = a & 0xFFFF
    a_high = a >> 16
    b_low = jnp.uint32(b & 0xFFFF)
    b_high = jnp.uint32(b >> 16)
    outer = Int64(a_high * b_high, a_low * b_low)
    crossed = [Int64(p >> 16, p << 16) for p in (a_low * b_high, a_high * b_low)]
    return add(outer, add(*crossed))


def count(flags: jax.Array) -> Int64:
    """Return how many entries of a boolean array are true, however many there are.

    Args:
      flags: bool, any shape; no axis of 2**32 or more.

    Returns:
      The exact count, an unsigned scalar.

    Example:
      >>> [int(word) for word in count(jnp.array([[True, False], [True, True]]))]
      [0, 3]
    """
    if flags.size < 2**32:
        return widened(flags.sum(dtype=jnp.uint32))
    longest = max(range(flags.ndim), key=lambda axis: flags.shape[axis])
    return total(flags.sum(axis=longest, dtype=jnp.uint32))


def total(terms: jax.Array) -> Int64:
    """Return the sum of 32-bit integers, which need not fit in one word.

    Args:
      terms: int32 or uint32, any shape.

    Returns:
      The exact sum, a scalar, signed for int32 terms.

    Example:
      >>> [int(word) for word in total(jnp.full(3, 2**31, jnp.uint32))]
      [1, 2147483648]
      >>> total(jnp.full(1000, -(2**30))).to_float().tolist() / 2**30
      -1000.0
    """
    zero = widened(jnp.zeros((), terms.dtype))
    return jax.lax.reduce(widened(terms), zero, add, range(terms.ndim))


def prefix_sums(terms: jax.Array) -> Int64:
    """Return the sums of the first 0, 1, ..., n terms, exactly.

    The terms are laid out as a square whose columns are added one by one, all rows at once, and
    then the rows' totals: two loops of sqrt(n) steps, which compile in a fraction of the time of a
    parallel prefix sum.

    Args:
      terms: int32 ``[n]``.

    Returns:
      ``[n + 1]`` signed sums: that over ``terms[i:j]`` is entry j minus entry i.

    Example:
      >>> sums = prefix_sums(jnp.array([2**30] * 8 + [-1]))
      >>> sums.to_float()[8:].tolist(), sums.high[-1].tolist(), sums.low[-1].tolist()
      ([8589934592.0, 8589934592.0], 1, 4294967295)
    """
    side = math.isqrt(max(terms.size - 1, 0)) + 1
    square = jnp.pad(terms, (0, side**2 - terms.size)).reshape(side, side)  # [row, column]
    within = _running_sums(widened(square.T))  # [column, row]
    rows = _running_sums(within.map(lambda word: word[-1]))  # [row], each with those before
    before = rows.map(lambda word: jnp.pad(word[:-1], (1, 0))[None])  # [1, row], without its own
    sums = add(within, before)
    return sums.map(lambda word: jnp.pad(word.T.ravel()[: terms.size], (1, 0)))  # [n + 1]


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
    integers = to_fixed(x, exponent, 2 * half)
    # Sums of int32, unlike those of `total`, are what every backend adds fast and a mesh by one
    # all-reduce.
    high = (integers >> half).sum(axes).astype(jnp.float32)
    low = (integers & (2**half - 1)).sum(axes).astype(jnp.float32)
    return from_fixed(high * 2.0**half + low, exponent, 2 * half)


def half_bits(terms: int) -> int:
    """Return the widest integers of which so many can be added in int32, at most 15 bits.

    Example:
      >>> half_bits(2**16), half_bits(2**20)
      (15, 11)
    """
    return max(min(15, 31 - max(terms - 1, 1).bit_length()), 1)


def scale_exponent(x: jax.Array, largest: int = 126) -> jax.Array:
    """Return the least e from -124 to ``largest`` with ``abs(x) < 2**e`` for all entries.

    Args:
      x: float32, any shape, at least one entry.
      largest: static, at most 128, which is above every finite entry. By default 126, for which
        ``2**e`` and ``2**-e`` are both normal numbers; larger entries are then not below ``2**e``.

    Returns:
      int32 scalar.

    Example:
      >>> int(scale_exponent(jnp.array([0.3, -5.0])))
      3
    """
    return jnp.clip(exponent_of(jnp.max(jnp.abs(x))) + 1, -124, largest)


def to_fixed(x: jax.Array, exponent: jax.Array | int, bits: int = 30) -> jax.Array:
    """Return ``round(x * 2**(bits - exponent))`` as int32, half to even.

    Args:
      x: float32; entries beyond ``2**exponent`` count as ``2**exponent``.
      exponent: int32 scalar from -124 to 128, see `scale_exponent`.
      bits: static, from 2 to 30.

    Returns:
      int32, the shape of ``x``, at most ``2**bits`` in magnitude.

    Example:
      >>> to_fixed(jnp.array([1.0, -0.5]), 1, 4).tolist()
      [8, -4]
    """
    # 2**-exponent itself would be subnormal for an exponent of 127 or 128.
    scaled = jnp.clip(x * power_of_two(2 - jnp.asarray(exponent, jnp.int32)), -4.0, 4.0)
    return jnp.round(scaled * 2.0 ** (bits - 2)).astype(jnp.int32)


def from_fixed(x: jax.Array, exponent: jax.Array | int, bits: int = 30) -> jax.Array:
    """Return ``x * 2**(exponent - bits)``, which undoes `to_fixed`.

    Args:
      x: float32, a number of fixed-point units.
      exponent: as for `to_fixed`.
      bits: as for `to_fixed`.

    Returns:
      float32, the shape of ``x``.

    Example:
      >>> from_fixed(jnp.array([2.0**29]), 0).tolist()
      [0.5]
    """
    # Were both factors multiplied first, as a compiler may do, their product could underflow.
    scaled = jax.lax.optimization_barrier(x * 2.0 ** (2 - bits))
    return scaled * power_of_two(jnp.asarray(exponent, jnp.int32) - 2)


def _unsigned_to_float(x: Int64) -> jax.Array:
    return x.high.astype(jnp.uint32).astype(jnp.float32) * 2.0**32 + x.low.astype(jnp.float32)


def _running_sums(terms: Int64) -> Int64:
    """Return the sums of the first 1, 2, ... entries along the leading axis."""

    def step(so_far: Int64, term: Int64) -> tuple[Int64, Int64]:
        so_far = add(so_far, term)
        return so_far, so_far

    start = terms.map(lambda word: jnp.zeros_like(word[0]))
    return jax.lax.scan(step, start, terms)[1]
