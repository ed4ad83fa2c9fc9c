"""Masks in the state at one bit a weight, for any compression that has some."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from compress_jax.core.arguments import compression as checked
from compress_jax.core.axes import Axes
from compress_jax.core.compression import (
    ByLeaf,
    Compression,
    CompressionState,
    LeafView,
    Pointwise,
    bound,
    leaf_views,
    stamped,
)
from compress_jax.core.describe import describe
from compress_jax.core.errors import ArgumentError
from compress_jax.core.schedules import Scheduled, at_once, begin, schedules_of
from compress_jax.core.types import Params, PyTree, Step
from compress_jax.prune._masks.bit_mask import BitMask, is_packed, packed, unpacked


def bit_masks(compression: Compression) -> Compression:
    """Keep the masks of a compression at one bit a weight, where a bool array takes a byte.

    Nothing else changes: views, packed forms and masks are the same bit for bit. A mask is cut into
    bytes along one axis only, so that it is divided over devices and over the layers of a stack as
    its leaf is, and a model that runs its layers in a loop unpacks one layer at a time. Devices
    whose number does not divide that of the bytes along an axis hold all of them along it.

    An `update` still has bool arrays while it runs. Where it also has gradients, as in `rigl`, they
    may add to the step's peak what the state saves.

    Args:
      compression: any: a pruning method, or a combination of methods such as `chain`.

    Returns:
      The Compression. In its ``fixed``, a `BitMask` stands for every bool array of rank 1 or more;
      its ``unpack()`` is the mask.

    Raises:
      ArgumentError: if the argument is no Compression; in `init`, if a part of it is wrapped
        already.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.bit_masks(cj.prune.magnitude(0.75))
      >>> params = {"w": jnp.arange(32.0).reshape(8, 4)}
      >>> mask = c.init(params).fixed["w"]
      >>> mask.words.nbytes, int(mask.unpack().sum())
      (4, 8)
    """
    checked("compression", compression)
    return _BitMasks(compression).compression()


class _BitMasks(NamedTuple):
    """The argument of `bit_masks`, and the functions of its Compression."""

    of: Compression

    def compression(self) -> Compression:
        update = Scheduled(self.update, schedules_of(self.of), self.at_once)
        by_leaf = isinstance(self.of.view, ByLeaf)
        made = Compression(
            self.init,
            ByLeaf(self.view, self.leaf_views) if by_leaf else self.view,
            update,
            self.pack,
            self.of.skipped,
            self.pointwise,
            bind=self.bind,
            axes=self.of.axes,
        )
        return stamped(made, f"bit_masks({describe(self.of)})")

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return _BitMasks(bound(self.of, known)).compression()

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        state = begin(self.of, params, step)
        if any(map(is_packed, jax.tree.leaves(state.fixed, is_leaf=is_packed))):
            raise ArgumentError(
                f"bit_masks goes around a compression once, and a part of {describe(self.of)} has "
                "packed masks already; take bit_masks off the part"
            )
        return _packed(state)

    def view(self, params: Params, state: CompressionState) -> Params:
        return self.of.view(params, _unpacked(state))

    def update(self, params: Params, state: CompressionState, **inputs: PyTree) -> CompressionState:
        own = _unpacked(state)
        new = self.of.update(params, own, **inputs)
        return state if new is own else _packed(new)

    def at_once(
        self, params: Params, state: CompressionState, **inputs: PyTree
    ) -> CompressionState:
        return _packed(at_once(self.of)(params, _unpacked(state), **inputs))

    def pack(self, params: Params, state: CompressionState) -> Params:
        return self.of.pack(params, _unpacked(state))

    def pointwise(self, params: Params, state: CompressionState) -> dict[str, Pointwise]:
        return self.of.pointwise(params, _unpacked(state))

    def leaf_views(self, params: Params, state: CompressionState) -> dict[str, LeafView]:
        leaves, structure = jax.tree.flatten(state.fixed, is_leaf=is_packed)
        dense = [unpacked(x) for x in leaves]
        masks = {id(x): mask for x, mask in zip(dense, leaves, strict=True) if is_packed(mask)}
        own = state._replace(fixed=jax.tree.unflatten(structure, dense))
        return {
            path: _unpacking(view, masks) for path, view in leaf_views(self.of, params, own).items()
        }


def _packed(state: CompressionState) -> CompressionState:
    return state._replace(fixed=packed(state.fixed))


def _unpacked(state: CompressionState) -> CompressionState:
    return state._replace(fixed=unpacked(state.fixed))


def _unpacking(view: LeafView, masks: Mapping[int, BitMask]) -> LeafView:
    """Return a view whose layers have masks in words, which it unpacks.

    Args:
      view: of a leaf, its layers with bool arrays.
      masks: the words of each, by the identity of the bool array. A method hands the arrays of its
        state on as they are; one that it computes of them is not found, and stays as it is.

    Returns:
      The view.
    """
    layers = jax.tree.map(lambda x: masks.get(id(x), x), view.layers)
    stacked = [view.stacked]
    for x in jax.tree.leaves(layers, is_leaf=is_packed):
        if is_packed(x):  # words can be sliced along the axes before the packed one
            stacked.append(x.words.ndim + x.axis)

    def fn(x: jax.Array, layers: PyTree, shared: PyTree) -> jax.Array:
        return view.fn(x, unpacked(layers), shared)

    return view._replace(fn=fn, layers=layers, stacked=min(stacked))
