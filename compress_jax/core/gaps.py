"""A 0/1 mask with few ones, stored as the distances between them."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.bits import Bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gaps:
    """A sparse 0/1 mask as the runs of zeros before each one, in fixed-width symbols.

    With M = 2**bits - 1, a symbol s < M means "s zeros, then a one", and M means "M zeros, no one yet".

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
        """Return the symbol width, 2 to 12 bits, that encodes a concrete boolean mask in the fewest bits."""
        zeros = _runs(mask)
        return min(range(2, 13), key=lambda bits: bits * int((zeros // (2**bits - 1) + 1).sum()))

    @classmethod
    def pack(cls, mask: jax.Array, bits: int) -> "Gaps":
        """Encode a boolean mask (concrete, not traced) with symbols of the given width."""
        longest, zeros = 2**bits - 1, _runs(mask)
        fillers = zeros // longest
        symbols = np.full(int(fillers.sum()) + zeros.size, longest, np.uint16)
        symbols[np.cumsum(fillers + 1) - 1] = zeros % longest
        return cls(Bits.pack(jnp.asarray(symbols), bits), jnp.shape(mask))

    def unpack(self) -> jax.Array:
        """Return the mask as uint8 zeros and ones."""
        return _unpack(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the symbols."""
        return self.runs.nbytes


def _runs(mask: jax.Array) -> np.ndarray:
    """Return how many zeros precede each one; in NumPy, since every mask would be another shape to compile for."""
    return np.diff(np.flatnonzero(np.asarray(mask)), prepend=-1) - 1


@jax.jit
def _unpack(gaps: Gaps) -> jax.Array:
    symbols, longest = gaps.runs.unpack().astype(jnp.int32), 2**gaps.runs.bits - 1
    is_one = symbols < longest
    n = math.prod(gaps.shape)
    positions = jnp.where(is_one, jnp.cumsum(symbols + is_one.astype(jnp.int32)) - 1, n)
    return jnp.zeros(n, jnp.uint8).at[positions].set(jnp.uint8(1), mode="drop").reshape(gaps.shape)
