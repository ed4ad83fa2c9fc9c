"""Unsigned integers of 1 to 16 bits, stored in exactly that many bits."""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

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
    def pack(cls, values: jax.Array | np.ndarray, bits: int) -> "Bits":
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
        if is_host(values):
            data = jax.device_put(_pack_on_host(np.asarray(values), bits))
        else:
            data = _pack(values, bits)
        return cls(data, bits, np.shape(values))

    def unpack(self) -> jax.Array:
        """Return the integers: uint8 if they fit, else uint16, of shape `shape`."""
        return jax.device_put(self.on_host()) if is_host(self.data) else _unpack(self)

    def on_host(self) -> np.ndarray:
        """Return the integers as `unpack` does, as an array of NumPy's."""
        return _unpack_on_host(np.asarray(self.data), self.bits, self.shape).astype(self.dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype `unpack` returns."""
        return jnp.dtype(jnp.uint8 if self.bits <= 8 else jnp.uint16)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed data."""
        return self.data.nbytes


# How many codes and zeros there are depends on the data, and `jit` would compile anew for every
# number of them. Outside of a trace NumPy does the same.

BLOCK = 2**20  # codes at a time, whose bits take a byte each


def is_host(*arrays: jax.typing.ArrayLike) -> bool:
    """Tell whether NumPy may compute with arrays: nothing is traced, and none lies with others.

    Constants of a function that is traced are none of NumPy's business: its program holds them
    packed, and unpacks them.

    Example:
      >>> packed = jnp.ones(2)
      >>> is_host(packed), jax.jit(lambda: 1 if is_host(packed) else 0)().tolist()
      (True, 0)
    """
    # Within a trace even the sum of two constants is traced.
    if isinstance(jax.lax.add(np.int32(0), np.int32(0)), Tracer):
        return False
    for x in arrays:
        if isinstance(x, Tracer):
            return False
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return False
    return True


def _pack_on_host(values: np.ndarray, bits: int) -> np.ndarray:
    flat = values.ravel().astype(np.uint16)  # [n]
    places = np.arange(bits, dtype=np.uint16)
    packed = [np.zeros(0, np.uint8)]
    for start in range(0, flat.size, BLOCK):
        # [block, bits], the least significant bit of each integer first
        planes = (flat[start : start + BLOCK, None] >> places) & np.uint16(1)
        packed.append(np.packbits(planes.astype(np.uint8).ravel(), bitorder="little"))
    return np.concatenate(packed)


@partial(jax.jit, static_argnames="bits")
def _pack(values: jax.Array, bits: int) -> jax.Array:
    flat = jnp.ravel(values).astype(jnp.uint16)  # [n]
    planes = (flat[:, None] >> jnp.arange(bits, dtype=jnp.uint16)[None, :]) & jnp.uint16(1)
    return jnp.packbits(planes.astype(jnp.uint8).ravel(), bitorder="little")


def _unpack_on_host(data: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    n = math.prod(shape)
    values = np.zeros(n, np.uint16 if bits > 8 else np.uint8)
    for start in range(0, n, BLOCK):
        size = min(BLOCK, n - start)
        own = data[start * bits // 8 :]  # a block begins at a whole byte
        planes = np.unpackbits(own, count=size * bits, bitorder="little")
        # [block, bytes of a value]: `packbits` fills the last byte of a row with zeros.
        rows = np.packbits(planes.reshape(size, bits), axis=1, bitorder="little")
        values[start : start + size] = rows.view("<u2" if bits > 8 else np.uint8).ravel()
    return values.reshape(shape)


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
    def best_width(mask: jax.Array | np.ndarray) -> int:
        """Return the symbol width, 2 to 12 bits, that encodes a boolean mask in the fewest bits."""
        zeros = _runs(mask)
        # A run of z zeros takes z // M fillers and one last symbol, M = 2**bits - 1.
        return min(range(2, 13), key=lambda bits: bits * int((zeros // (2**bits - 1) + 1).sum()))

    @classmethod
    def pack(cls, mask: jax.Array | np.ndarray, bits: int) -> "Gaps":
        """Encode a boolean mask (concrete, not traced) with symbols of the given width."""
        longest = 2**bits - 1
        zeros = _runs(mask)  # [ones]
        fillers = zeros // longest  # [ones]
        # All symbols are fillers but the last one of each run.
        symbols = np.full(int(fillers.sum()) + zeros.size, longest, np.uint16)
        symbols[np.cumsum(fillers + 1) - 1] = zeros % longest
        return cls(Bits.pack(symbols, bits), np.shape(mask))

    def unpack(self) -> jax.Array:
        """Return the mask as uint8 zeros and ones."""
        return jax.device_put(self.on_host()) if is_host(self.runs.data) else _unpack_gaps(self)

    def on_host(self) -> np.ndarray:
        """Return the mask as `unpack` does, as an array of NumPy's."""
        symbols = self.runs.on_host().astype(np.int64)
        is_one = symbols < 2**self.runs.bits - 1  # [symbols]
        # A symbol advances by its zeros, and by its one; fillers are none.
        positions = (np.cumsum(symbols + is_one) - 1)[is_one]
        mask = np.zeros(math.prod(self.shape), np.uint8)
        mask[positions[positions < mask.size]] = 1
        return mask.reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the symbols."""
        return self.runs.nbytes


def _runs(mask: jax.Array | np.ndarray) -> np.ndarray:
    """Count the zeros before each one; NumPy, since `jit` would compile anew for every mask."""
    return np.diff(np.flatnonzero(np.asarray(mask)), prepend=-1) - 1


@jax.jit
def _unpack_gaps(gaps: Gaps) -> jax.Array:
    symbols = gaps.runs.unpack().astype(jnp.int32)
    longest = 2**gaps.runs.bits - 1
    is_one = symbols < longest  # [symbols]
    n = math.prod(gaps.shape)
    # Fillers are sent to n and dropped.
    positions = jnp.where(is_one, jnp.cumsum(symbols + is_one.astype(jnp.int32)) - 1, n)
    return jnp.zeros(n, jnp.uint8).at[positions].set(jnp.uint8(1), mode="drop").reshape(gaps.shape)
