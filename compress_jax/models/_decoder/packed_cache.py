"""Keys and values of a decoder in few bits, as its cache stores them."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.types import DType
from compress_jax.quantize import KVGrid
from compress_jax.quantize._activations.kv_grid import Coded, EntryLevels


class Part(NamedTuple):
    """Keys and values that queries may attend to.

    Attributes:
      keys: ``[batch, number, kv_heads, head_width]``.
      values: likewise.
      mask: which of them each query sees, ``[batch or 1, 1, 1, length, number]``.
    """

    keys: jax.Array
    values: jax.Array
    mask: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedEntries:
    """The keys, or the values, of a layer: full blocks of tokens in codes, the last one in floats.

    Layers that are stacked have a leading axis in each array.

    Attributes:
      coded: of all blocks; the codes are ``[batch, blocks, block, bytes]``.
      recent: the tokens behind the last full block, ``[batch, block, kv_heads, head_width]``; what
        follows them there does not count.
      levels: what codes stand for.
    """

    coded: Coded
    recent: jax.Array
    levels: EntryLevels = field(metadata={"static": True})

    @classmethod
    def empty(
        cls,
        levels: EntryLevels,
        shape: tuple[int, ...],
        dtype: DType,
        stack: tuple[int, ...] = (),
    ) -> "PackedEntries":
        """Return room for ``[batch, capacity, kv_heads, head_width]``, rounded up to full blocks.

        Example:
          >>> levels = EntryLevels(bits=4, by_channel=True, block=4)
          >>> PackedEntries.empty(levels, (2, 6, 3, 8), jnp.float32).coded.codes.shape
          (2, 2, 4, 12)
        """
        batch, capacity, *entries = shape
        blocks = -(-capacity // levels.block)

        def codes() -> Coded:
            return levels.encode(jnp.zeros((*stack, batch, blocks, levels.block, *entries)))

        # Shapes alone: encoding zeros would hold all of them in floats.
        coded = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(codes))
        return cls(coded, jnp.zeros((*stack, batch, levels.block, *entries), dtype), levels)

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return math.prod(self.coded.codes.shape[-3:-1])

    def floats(self) -> jax.Array:
        """Return the levels of all blocks, float32 ``[batch, capacity, kv_heads, head_width]``."""
        x = self.levels.decode(self.coded, *self.recent.shape[-2:])
        return x.reshape(x.shape[0], -1, *x.shape[-2:])

    def extended(
        self, new: jax.Array, at: jax.Array, count: jax.Array | int
    ) -> tuple["PackedEntries", jax.Array]:
        """Write each row's new entries behind those that it has.

        Args:
          new: ``[batch, length, kv_heads, head_width]``.
          at: how many tokens each row has, int32 ``[batch]``.
          count: how many of the new ones count, int32 ``[batch]``, or one number.

        Returns:
          The entries with them, and floats of the blocks that they touch, from that of ``at`` on.
        """
        block = self.levels.block
        new = new.astype(self.recent.dtype)
        touched = (new.shape[1] + block - 2) // block + 1

        def joined(recent: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
            rest = jnp.zeros(((touched - 1) * block, *recent.shape[1:]), recent.dtype)
            known = jnp.concatenate([recent, rest])
            return jax.lax.dynamic_update_slice_in_dim(known, new, at % block, 0)

        # [batch, touched * block, kv_heads, head_width]
        window = jax.vmap(joined)(self.recent, new, at)
        blocks = window.reshape(len(window), touched, block, *window.shape[2:])
        places = (at // block)[:, None] + jnp.arange(touched)[None]  # [batch, touched]
        full = (places + 1) * block <= (at + count)[:, None]
        # A block that is not full is written nowhere: out of range, and dropped.
        places = jnp.where(full, places, self.coded.codes.shape[-3])
        write = jax.vmap(lambda old, x, to: old.at[to].set(x, mode="drop"))
        encoded = self.levels.encode(blocks)
        coded = Coded(*(write(old, x, places) for old, x in zip(self.coded, encoded, strict=True)))
        # Where the last block is full nothing is behind it, and what is cut out does not matter.
        begin = ((at + count) // block - at // block) * block
        cut = jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, block, 0))
        return PackedEntries(coded, cut(window, begin), self.levels), window


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedPair:
    """Keys and values of a layer in few bits.

    Attributes:
      keys: as they are compared, rotated if the grid says so.
      values: as they are.
      grid: what says so.
    """

    keys: PackedEntries
    values: PackedEntries
    grid: KVGrid = field(metadata={"static": True})

    @classmethod
    def empty(
        cls, grid: KVGrid, shape: tuple[int, ...], dtype: DType, stack: tuple[int, ...] = ()
    ) -> "PackedPair":
        """Return room for keys and values; arguments as those of `PackedEntries.empty`."""
        keys = PackedEntries.empty(grid.key_levels, shape, dtype, stack)
        return cls(keys, PackedEntries.empty(grid.value_levels, shape, dtype, stack), grid)

    def extended(
        self,
        key: jax.Array,
        value: jax.Array,
        at: jax.Array,
        count: jax.Array | int,
        mask: jax.Array,
    ) -> tuple["PackedPair", list[Part]]:
        """Write new keys and values; return the pair with them, and what their queries attend to.

        These are blocks before a query's own in codes, and its own in floats. So it does not matter
        how many tokens come at once.
        """
        keys, recent_keys = self.keys.extended(self.grid.rotated(key), at, count)
        values, recent_values = self.values.extended(value, at, count)
        old, own = split_masks(mask, at, key.shape[1], self.grid.block, recent_keys.shape[1])
        parts = [
            Part(keys.floats(), values.floats(), old),
            Part(recent_keys, recent_values, own),
        ]
        return PackedPair(keys, values, self.grid), parts


def split_masks(
    mask: jax.Array, at: jax.Array, length: int, block: int, number: int
) -> tuple[jax.Array, jax.Array]:
    """Divide what queries see into earlier blocks and their own one.

    Args:
      mask: what they see in all, ``[batch or 1, 1, 1, length, capacity]``.
      at: the position of each row's first query, int32 ``[batch]``.
      length: of the queries.
      block: tokens of a block.
      number: tokens of the window, which begins with the block of ``at``.

    Returns:
      Masks over all blocks, and over the window.

    Example:
      >>> causal = jnp.tril(jnp.ones((4, 4), bool))[None, None, None, 2:]
      >>> old, own = split_masks(causal, jnp.array([2]), 2, block=2, number=4)
      >>> old[0, 0, 0].astype(int).tolist(), own[0, 0, 0].astype(int).tolist()
      ([[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 0, 0]])
    """
    queries = (at[:, None] + jnp.arange(length)[None]) // block  # [batch, length]
    keys = jnp.arange(mask.shape[-1]) // block
    earlier = keys[None, None] < queries[..., None]  # [batch, length, capacity]
    places = (at // block * block)[:, None] + jnp.arange(number)[None]  # [batch, number]
    same = (places // block)[:, None] == queries[..., None]  # [batch, length, number]

    def rows(mask: jax.Array, places: jax.Array) -> jax.Array:
        # A window may reach beyond the capacity, where no query is.
        return jnp.take(mask, places, axis=-1, mode="fill", fill_value=False)

    mask = jnp.broadcast_to(mask, (len(at), *mask.shape[1:]))
    own = jax.vmap(rows)(mask, places)
    return mask & earlier[:, None, None], own & same[:, None, None]
