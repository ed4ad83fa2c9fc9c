"""Levels of small floats and tables: the value of each code, and rounding to the nearest.

Both kinds have the same attributes: ``bits``, ``values`` (the level of every code), ``largest``,
``encode``, ``decode`` and ``round``. They are plain tuples of numbers, so they are hashed, compared
and saved by value.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np


class Float(NamedTuple):
    r"""A floating-point format of a few bits; codes are bit patterns, the sign first.

    With m mantissa bits and the lowest exponent :math:`e = 2 - 2^{bits - 1}` for exponents of so
    many bits, a magnitude code c stands for the subnormal number :math:`c \, 2^{e - m}` if
    :math:`c < 2^m`, else for
    :math:`(2^m + c \bmod 2^m) \, 2^{\lfloor c / 2^m \rfloor - 1 + e - m}`.

    Attributes:
      exponent_bits: 1 to 7.
      mantissa_bits: 0 to 8, the leading one not counted.
      reserved: how many of the largest magnitudes are not numbers: 1 in e4m3fn, 4 in e5m2 (infinity
        and NaN), none in e2m1.

    Example:
      >>> e2m1 = Float(2, 1)
      >>> e2m1.values[:8], e2m1.encode(jnp.array([-0.2, 0.75, -9.0])).tolist()
      ((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), [0, 2, 15])

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1.
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, section 5.3.
    """

    exponent_bits: int
    mantissa_bits: int
    reserved: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code, the sign among them."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def lowest_exponent(self) -> int:
        """The exponent of the smallest normal number, and of all subnormal ones."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def _magnitudes(self) -> np.ndarray:
        m = self.mantissa_bits
        codes = np.arange(2 ** (self.bits - 1) - self.reserved)
        # A subnormal number has exponent field 0, no leading one, and the exponent of field 1.
        normal = codes >= 2**m
        exponent = np.where(normal, (codes >> m) - 1, 0) + self.lowest_exponent - m
        return np.ldexp(np.where(normal, 2**m + codes % 2**m, codes).astype(np.float64), exponent)

    @property
    def values(self) -> tuple[float, ...]:
        """The number every code stands for; those that stand for none, and minus zero, hold 0."""
        magnitudes = np.pad(self._magnitudes, (0, self.reserved))
        return tuple(np.concatenate([magnitudes, 0 - magnitudes]).tolist())

    @property
    def largest(self) -> float:
        """The largest number."""
        return float(self._magnitudes[-1])

    def encode(self, x: jax.Array) -> jax.Array:
        """Return the code of the nearest number: ties to even, saturating, zero never negative.

        Args:
          x: float array, finite or infinite.

        Returns:
          int32 codes of the shape of ``x``.
        """
        integer, exponent = self._nearest(x)
        # The leading one of a normal number, 2**m, is carried into the exponent field, which is one
        # more than the difference of exponents. So is that of an integer rounded up to 2**(m + 1).
        magnitude = jnp.abs(integer) + ((exponent - self.lowest_exponent) << self.mantissa_bits)
        # An integer has no -0, so zero has the code without a sign.
        return jnp.where(integer < 0, magnitude + 2 ** (self.bits - 1), magnitude)

    def round(self, x: jax.Array) -> jax.Array:
        """Return the nearest number in float32, exactly ``decode(encode(x))``, without a table."""
        integer, exponent = self._nearest(x)
        return integer.astype(jnp.float32) * power_of_two(exponent - self.mantissa_bits)

    def decode(self, codes: jax.Array) -> jax.Array:
        """Return the numbers of some codes, float32."""
        return _look_up(self.values, codes)

    def _nearest(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return int32 i and e with ``i * 2**(e - mantissa_bits)`` the number nearest to x."""
        # Not a cast to the dtype and back: XLA may leave such a pair out, and casts overflow to NaN
        # or infinity.
        x = jnp.clip(x.astype(jnp.float32), -self.largest, self.largest)
        # Below the normal numbers the spacing no longer shrinks.
        exponent = jnp.maximum(exponent_of(x), self.lowest_exponent)
        integer = jnp.round(x * power_of_two(self.mantissa_bits - exponent))  # half to even
        return integer.astype(jnp.int32), exponent


UNROLLED = 16  # levels up to which each comparison is an operation of its own


class Table(NamedTuple):
    """Any ascending levels; the code of a level is its place.

    Attributes:
      values: the levels, each a float32 number.

    Example:
      >>> ternary = Table((-1.0, 0.0, 1.0))
      >>> ternary.bits, ternary.encode(jnp.array([-9.0, 0.4, 0.6])).tolist()
      (2, [0, 1, 2])
    """

    values: tuple[float, ...]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(1, (len(self.values) - 1).bit_length())

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(map(abs, self.values))

    @property
    def thresholds(self) -> np.ndarray:
        """The least float32 that is rounded to each level but the first."""
        # The middles in float64, then rounded up to float32: no float32 lies in between.
        middle = np.convolve(np.array(self.values, np.float64), [0.5, 0.5], "valid")
        nearest = middle.astype(np.float32)
        return np.where(nearest < middle, np.nextafter(nearest, np.float32(np.inf)), nearest)

    def encode(self, x: jax.Array) -> jax.Array:
        """Return the code of the nearest level as int32; ties go to the larger level."""
        x = x.astype(jnp.float32)
        if len(self.values) > UNROLLED:
            found = jnp.searchsorted(self.thresholds, x, side="right", method="compare_all")
            return found.astype(jnp.int32)
        # A sum of comparisons runs entry by entry; `compare_all` holds [levels, *x.shape].
        codes = jnp.zeros(x.shape, jnp.int32)
        for threshold in self.thresholds:
            # Not `x >= threshold`: NaN has the last code, as `searchsorted` has it.
            codes += (~(x < threshold)).astype(jnp.int32)
        return codes

    def round(self, x: jax.Array) -> jax.Array:
        """Return the nearest level in float32, ``decode(encode(x))``."""
        return self.decode(self.encode(x))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Return the levels of some codes, float32."""
        return _look_up(self.values, codes)


Levels: TypeAlias = Float | Table


def exponent_of(x: jax.Array) -> jax.Array:
    """Return ``floor(log2(abs(x)))`` exactly, as int32; -127 below the normal float32 numbers.

    Args:
      x: float32.

    Returns:
      int32 of the shape of ``x``.

    Example:
      >>> exponent_of(jnp.array([0.99, -8.0, 0.0])).tolist()
      [-1, 3, -127]
    """
    # float32: sign bit, 8 bits of the exponent plus 127, 23 bits of the mantissa.
    return ((jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 255) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Return ``2**exponent`` exactly, as float32.

    Args:
      exponent: int32, -126 to 127.

    Returns:
      float32 of the shape of ``exponent``.

    Example:
      >>> power_of_two(jnp.array([-1, 10])).tolist()
      [0.5, 1024.0]
    """
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _look_up(values: tuple[float, ...], codes: jax.Array) -> jax.Array:
    return jnp.asarray(np.array(values, np.float32))[codes]
