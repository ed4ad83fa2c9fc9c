"""Masks at one bit an entry, packed along one axis, so that they are divided as their leaf is."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from compress_jax.core.types import PyTree, Shape

BITS = 8  # of a word


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BitMask:
    """A mask whose entries lie eight to a byte along one axis, the first in the lowest bit.

    The other axes are those of the mask. So words are divided over devices as the leaf is, and the
    words of a layer are a slice of those of the stack.

    Attributes:
      words: uint8, the mask's shape but for ``ceil(size / 8)`` along the axis.
      axis: along which entries are packed, counted from the end: slices of the first axes keep it.
      size: entries along it.

    Example:
      >>> mask = jnp.array([[True], [False], [True]])
      >>> packed = BitMask.pack(mask)
      >>> packed.words.tolist(), packed.unpack().tolist() == mask.tolist()
      ([[5]], True)
    """

    words: jax.Array
    axis: int = field(metadata={"static": True})
    size: int = field(metadata={"static": True})

    @classmethod
    def pack(cls, mask: jax.Array) -> "BitMask":
        """Pack a bool array of rank 1 or more."""
        axis = packed_axis(mask.shape)
        size = mask.shape[axis]
        first = mask.ndim + axis
        padding = [(0, 0)] * mask.ndim
        padding[axis] = (0, -size % BITS)
        whole = jnp.pad(mask, padding) if size % BITS else mask
        # [..., words, 8, ...]: the bits of each word on an axis of their own.
        split = (*mask.shape[:first], -(-size // BITS), BITS, *mask.shape[first + 1 :])
        bits = whole.reshape(split).astype(jnp.uint8)
        bits = bits << _places(bits.ndim, first + 1)
        return cls(bits.sum(axis=first + 1, dtype=jnp.uint8), axis, size)

    def unpack(self) -> jax.Array:
        """Return the mask, bool."""
        first = self.words.ndim + self.axis
        words = jnp.expand_dims(self.words, first + 1)  # [..., words, 1, ...]
        bits = (words >> _places(words.ndim, first + 1)) & jnp.uint8(1)
        merged = (*self.words.shape[:first], -1, *self.words.shape[first + 1 :])
        mask = bits.reshape(merged) != 0
        return jax.lax.slice_in_dim(mask, 0, self.size, axis=first) if self.size % BITS else mask


def _places(rank: int, axis: int) -> jax.Array:
    """Return the places of the bits of a word along one of several axes, uint8."""
    shape = tuple(BITS if i == axis else 1 for i in range(rank))
    return jax.lax.broadcasted_iota(jnp.uint8, shape, axis)


def packed_axis(shape: Shape) -> int:
    """Return the axis along which a mask is packed, counted from the end.

    Args:
      shape: of the mask, rank 1 or more.

    Returns:
      Of the last two axes one that whole words fill, so that words are divided as entries are,
      wherever the devices divide their number. The second to last is preferred: entries that lie
      side by side then go to words that do, which packs three times as fast. If neither axis is
      filled, that of fewer words.

    Example:
      >>> packed_axis((24, 512, 12)), packed_axis((3, 3, 3, 64)), packed_axis((5,))
      (-2, -1, -1)
    """
    choices = (-2, -1) if len(shape) > 1 else (-1,)

    def words(axis: int) -> float:
        return -(-shape[axis] // BITS) / max(shape[axis], 1)  # of each entry along the axis

    return min(choices, key=words)


def packed(tree: PyTree) -> PyTree:
    """Return a tree whose masks, the bool arrays of rank 1 or more, are packed."""
    return jax.tree.map(lambda x: BitMask.pack(x) if _is_mask(x) else x, tree)


def unpacked(tree: PyTree) -> PyTree:
    """Return a tree with bool arrays in place of packed masks."""
    return jax.tree.map(lambda x: x.unpack() if is_packed(x) else x, tree, is_leaf=is_packed)


def is_packed(x: object) -> bool:
    """Tell whether it is a packed mask."""
    return isinstance(x, BitMask)


def _is_mask(x: jax.Array) -> bool:
    return jnp.ndim(x) > 0 and jnp.asarray(x).dtype == jnp.bool_
