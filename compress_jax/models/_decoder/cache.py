"""Keys and values of the tokens that a decoder has seen, so that it sees each once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import DType
from compress_jax.models._decoder.config import DecoderConfig
from compress_jax.models._decoder.packed_cache import PackedPair, Part
from compress_jax.quantize import KVGrid


class Cache(NamedTuple):
    """Keys and values of each layer.

    Attributes:
      layers: a pair ``(keys, values)`` of arrays ``[batch, capacity, kv_heads, head_width]``, or a
        `PackedPair` of them in few bits, for each layer; or one with a leading axis of layers where
        layers are stacked.
      length: how many tokens of each row are in it, int32 ``[batch]``. Only a cache of arrays can
        be set back to fewer: of blocks that are in codes the floats are gone.
    """

    layers: Any
    length: jax.Array

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for; on a grid full blocks of them."""
        first = jax.tree.leaves(self.layers, is_leaf=_is_packed)[0]
        return first.keys.capacity if _is_packed(first) else first.shape[-3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, with scales and the floats of blocks that are not full."""
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))


class Past(NamedTuple):
    """What a layer knows of the tokens before.

    Attributes:
      pair: its keys and values, as in `Cache`.
      length: how many tokens each row has there, int32 ``[batch]``.
      count: how many of the tokens that come next count, int32 ``[batch]``, or one number.
    """

    pair: Any
    length: jax.Array
    count: jax.Array | int


def empty_cache(
    config: DecoderConfig,
    batch: int,
    capacity: int,
    scan: bool,
    dtype: DType = jnp.float32,
    grid: KVGrid | None = None,
) -> Cache:
    """Return a cache without tokens.

    Example:
      >>> config = DecoderConfig(9, 8, 2, heads=4, kv_heads=2, head_width=2, hidden=16)
      >>> empty_cache(config, batch=1, capacity=5, scan=True).layers[0].shape
      (2, 1, 5, 2, 2)
    """
    whole("batch", batch, 1)
    whole("capacity", capacity, 1)
    if grid is not None and not isinstance(grid, KVGrid):
        raise ArgumentError(
            f"grid must be a quantize.KVGrid(key_bits, value_bits), got {grid!r:.60}"
        )
    shape = (batch, capacity, config.kv_heads, config.head_width)

    def pair(*stack: int) -> Any:
        if grid is not None:
            return PackedPair.empty(grid, shape, dtype, stack)
        # An array for each: one that stood twice could not be overwritten in place.
        return jnp.zeros((*stack, *shape), dtype), jnp.zeros((*stack, *shape), dtype)

    layers = pair(config.depth) if scan else tuple(pair() for _ in range(config.depth))
    return Cache(layers, jnp.zeros(batch, jnp.int32))


def extended(
    past: Past, key: jax.Array, value: jax.Array, mask: jax.Array, scatter: bool = True
) -> tuple[Any, list[Part]]:
    """Write new keys and values into a layer's pair.

    Args:
      past: the pair, and where each row goes on.
      key: ``[batch, length, kv_heads, head_width]``.
      value: likewise.
      mask: what queries see, ``[batch or 1, 1, 1, length, capacity]``.
      scatter: whether they are written in place; see `Decoder`.

    Returns:
      The pair with them, and the parts that the new tokens' queries attend to.
    """
    if _is_packed(past.pair):
        return past.pair.extended(key, value, past.length, past.count, mask)
    write = written if scatter else selected
    keys = write(past.pair[0], key, past.length)
    values = write(past.pair[1], value, past.length)
    return (keys, values), [Part(keys, values, mask)]


def _is_packed(x: object) -> bool:
    return isinstance(x, PackedPair)


def written(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Write each row's new entries behind those that it has.

    Args:
      old: ``[batch, capacity, ...]``.
      new: ``[batch, length, ...]``.
      at: where each row's begin, int32 ``[batch]``.

    Returns:
      An array like ``old``.

    Example:
      >>> written(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.array([0, 2])).tolist()
      [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    place = jax.vmap(lambda row, part, i: jax.lax.dynamic_update_slice_in_dim(row, part, i, 0))
    return place(old, new.astype(old.dtype), at)


def selected(old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Return what `written` does, each entry chosen from old and new: no scatter.

    Example:
      >>> selected(jnp.zeros((2, 3)), jnp.ones((2, 1)), jnp.array([0, 2])).tolist()
      [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    place = jnp.arange(old.shape[1])[None] - at[:, None]  # [batch, capacity]
    one = (1,) * (old.ndim - 2)
    fresh = ((place >= 0) & (place < new.shape[1])).reshape(*place.shape, *one)
    index = jnp.clip(place, 0, new.shape[1] - 1).reshape(*place.shape, *one)
    return jnp.where(fresh, jnp.take_along_axis(new.astype(old.dtype), index, axis=1), old)
