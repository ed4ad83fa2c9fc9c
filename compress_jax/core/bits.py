"""Unsigned integers of 1 to 16 bits, stored in exactly that many bits."""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError


def bits_for(levels: int) -> int:
    """Return the number of bits that tell ``levels`` values apart, at least 1.

    Args:
      levels: how many distinct codes there are, at least 1.

    Returns:
      ``max(1, ceil(log2(levels)))``.

    Example:
      >>> bits_for(2), bits_for(16), bits_for(17)
      (1, 4, 5)
    """
    return max(1, (levels - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bits:
    """An array of unsigned integers packed into bytes without gaps, least significant bit first.

    Attributes:
      data: uint8 ``[ceil(n * bits / 8)]``, where n is the product of `shape`.
      bits: the width of one integer, 1 to 16.
      shape: the shape of the array of integers, in C order.

    Example:
      >>> packed = Bits.pack(jnp.array([[1, 2, 3], [4, 5, 6]]), bits=3)
      >>> packed.nbytes, packed.unpack().tolist()
      (3, [[1, 2, 3], [4, 5, 6]])
    """

    data: jax.Array
    bits: int = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def pack(cls, values: jax.Array, bits: int) -> "Bits":
        """Pack integers that all lie in ``[0, 2**bits)``; what lies outside loses its upper bits.

        Args:
          values: integers (or booleans) of any shape.
          bits: the width of one integer, 1 to 16.

        Returns:
          The packed integers.

        Raises:
          ArgumentError: if ``bits`` is not in 1..16.
        """
        if not 1 <= bits <= 16:
            raise ArgumentError(f"bits must be 1 to 16, got {bits}")
        return cls(_pack(values, bits), bits, jnp.shape(values))

    def unpack(self) -> jax.Array:
        """Return the integers: uint8 if they fit, else uint16, of shape `shape`."""
        return _unpack(self)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype `unpack` returns."""
        return jnp.dtype(jnp.uint8 if self.bits <= 8 else jnp.uint16)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed data."""
        return self.data.nbytes


# Compiled, so that there is one compilation for each shape and not one for each operation.
@partial(jax.jit, static_argnames="bits")
def _pack(values: jax.Array, bits: int) -> jax.Array:
    flat = jnp.ravel(values).astype(jnp.uint16)  # [n]
    # [n, bits], the least significant bit of each integer first
    planes = (flat[:, None] >> jnp.arange(bits, dtype=jnp.uint16)[None, :]) & jnp.uint16(1)
    return jnp.packbits(planes.astype(jnp.uint8).ravel(), bitorder="little")


@jax.jit
def _unpack(packed: Bits) -> jax.Array:
    n = math.prod(packed.shape)
    dtype = packed.dtype
    planes = jnp.unpackbits(packed.data, count=n * packed.bits, bitorder="little")
    planes = planes.reshape(n, packed.bits)
    # [bits]: 1, 2, 4, ...; no sum of them exceeds the dtype.
    weights = jnp.left_shift(jnp.ones((), dtype), jnp.arange(packed.bits, dtype=dtype))
    return (planes.astype(dtype) * weights[None, :]).sum(axis=1, dtype=dtype).reshape(packed.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gaps:
    """A sparse 0/1 mask as the runs of zeros before each one, in fixed-width symbols.

    With M = 2**bits - 1, a symbol s < M means "s zeros, then a one", and M means "M zeros, no one
    yet".

    Attributes:
      runs: the symbols.
      shape: the shape of the mask.

    Example:
      >>> gaps = Gaps.pack(jnp.array([0, 0, 0, 0, 1, 1], bool), bits=2)
      >>> gaps.runs.unpack().tolist(), gaps.unpack().tolist()
      ([3, 1, 0], [0, 0, 0, 0, 1, 1])

    References:
      Han, Mao and Dally, "Deep Compression", 2016, figure 2 (relative index with filler zeros).
    """

    runs: Bits
    shape: tuple[int, ...] = field(metadata={"static": True})

    @staticmethod
    def best_width(mask: jax.Array) -> int:
        """Return the symbol width, 2 to 12 bits, that encodes a boolean mask in the fewest bits."""
        zeros = _runs(mask)
        # A run of z zeros takes z // M fillers and one last symbol, M = 2**bits - 1.
        return min(range(2, 13), key=lambda bits: bits * int((zeros // (2**bits - 1) + 1).sum()))

    @classmethod
    def pack(cls, mask: jax.Array, bits: int) -> "Gaps":
        """Encode a boolean mask (concrete, not traced) with symbols of the given width."""
        longest = 2**bits - 1
        zeros = _runs(mask)  # [ones]
        fillers = zeros // longest  # [ones]
        # All symbols are fillers but the last one of each run.
        symbols = np.full(int(fillers.sum()) + zeros.size, longest, np.uint16)
        symbols[np.cumsum(fillers + 1) - 1] = zeros % longest
        return cls(Bits.pack(jnp.asarray(symbols), bits), jnp.shape(mask))

    def unpack(self) -> jax.Array:
        """Return the mask as uint8 zeros and ones."""
        return _unpack_gaps(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the symbols."""
        return self.runs.nbytes


def _runs(mask: jax.Array) -> np.ndarray:
    """Count the zeros before each one; NumPy, since `jit` would compile anew for every mask."""
    return np.diff(np.flatnonzero(np.asarray(mask)), prepend=-1) - 1


@jax.jit
def _unpack_gaps(gaps: Gaps) -> jax.Array:
    symbols = gaps.runs.unpack().astype(jnp.int32)
    longest = 2**gaps.runs.bits - 1
    is_one = symbols < longest  # [symbols]
    n = math.prod(gaps.shape)
    # A symbol advances by its zeros, and by its one; fillers are sent to n and dropped.
    positions = jnp.where(is_one, jnp.cumsum(symbols + is_one.astype(jnp.int32)) - 1, n)
    return jnp.zeros(n, jnp.uint8).at[positions].set(jnp.uint8(1), mode="drop").reshape(gaps.shape)
