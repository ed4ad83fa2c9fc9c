"""Masks from scores under a target, and the checks of what `update` is given."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.core import Tracer

from compress_jax.core._leafwise import check_finite
from compress_jax.core.amount import amount
from compress_jax.core.axes import Axes, over_layers
from compress_jax.core.compression import CompressionState
from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.exact import choose, less, uint64
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, Params, PyTree, Scalar, Step
from compress_jax.prune._masks.select import largest_of_each, magnitude_bits, smallest, value_bits
from compress_jax.prune._masks.structures import (
    NofM,
    Structure,
    spread_to_entries,
    unit_scores,
)
from compress_jax.prune._masks.target import Target

Masks = dict[str, jax.Array]
Key = Callable[..., jax.Array]
"""Unsigned integers in the order of the scores: `magnitude_bits` or `value_bits`."""


def keep_masks(
    scores: Mapping[str, jax.Array],
    target: Target,
    step: Step,
    *,
    signed: bool = False,
    axes: Mapping[str, Axes] | None = None,
) -> Masks:
    """Return the masks left by pruning the lowest scores, exactly as many units as the target says.

    Args:
      scores: by path, floating point, in the shape of the leaf.
      target: how much to prune, in which units, and whether leaves share one threshold.
      step: the step of the target's schedules.
      signed: order scores by value; by default by magnitude.
      axes: by path; by default as Flax stores kernels. With ``scope="leaf"`` each layer of a stack
        reaches the sparsity by itself.

    Returns:
      bool masks by path, true where an entry stays. Of equal scores the one earlier in C order is
      pruned first.

    Example:
      >>> import jax.numpy as jnp
      >>> keep_masks({"w": jnp.array([3.0, -1.0, 2.0])}, Target.of(0.5), 0)["w"].tolist()
      [True, False, False]
    """
    key = value_bits if signed else magnitude_bits
    structure = target.structure
    if axes is None:
        axes = {path: Axes.convention(x.shape) for path, x in scores.items()}
    # Groups are small and compare their own entries: no threshold is searched.
    if isinstance(structure, NofM):
        masks = {}
        for path, x in scores.items():
            along = structure.axes(axes[path])
            masks[path] = largest_of_each(key(x), structure.n, structure.m, along)
        return masks
    # Entries become units, the units of lowest score are pruned, and flags go back to entries.
    units = {path: _units(x, structure, axes[path], signed) for path, x in scores.items()}
    pruned = {}
    if target.scope == "leaf":
        for path, each in units.items():
            pruned[path] = _lowest_by_layer(each, axes[path], target.share(path, step), key)
    elif units:
        # One sparsity for all leaves, so that of any of them.
        share = target.share(next(iter(units)), step)
        lowest = _lowest_of_all(list(units.values()), share, target.floor, key)
        pruned = dict(zip(units, lowest, strict=True))
    return {path: _entries(~mask, structure, axes[path]) for path, mask in pruned.items()}


def _lowest_by_layer(units: jax.Array, axes: Axes, share: Scalar, key: Key) -> jax.Array:
    """Return a mask of the units of lowest score in each layer."""
    # The count of one layer: a stack is pruned as its layers would be.
    count = amount(share, units.size // max(axes.layers, 1))

    def lowest(layer: jax.Array) -> jax.Array:
        return smallest([layer], count, key)[0]

    return over_layers(lowest, axes, ("leaf",), "leaf")(units)


def _lowest_of_all(
    units: list[jax.Array], share: Scalar, floor: float, key: Key
) -> list[jax.Array]:
    """Return masks of the units of lowest score over all leaves, but the floor of each leaf."""
    count = amount(share, sum(leaf.size for leaf in units))
    if not floor:
        return smallest(units, count, key)
    # A leaf may lose only its own lowest units, all but its floor.
    most = [leaf.size - max(1, math.ceil(floor * leaf.size)) for leaf in units]
    candidates = [
        smallest([leaf], uint64(limit), key)[0] for leaf, limit in zip(units, most, strict=True)
    ]
    # Where the floors leave too few, the sparsity is not reached.
    limit = uint64(sum(most))
    return smallest(units, choose(less(limit, count), limit, count), key, candidates)


def _units(x: jax.Array, structure: Structure | None, axes: Axes, signed: bool) -> jax.Array:
    """Return the scores of units; scores of single entries keep their dtype."""
    if structure is None or isinstance(structure, NofM):
        return x
    # Of magnitudes, as entries of opposite signs would cancel.
    return unit_scores(x if signed else abs(x), structure.window(axes), structure.reduce)


def _entries(flags: jax.Array, structure: Structure | None, axes: Axes) -> jax.Array:
    """Return the flag of each entry from the flags of units."""
    if structure is None or isinstance(structure, NofM):
        return flags
    return spread_to_entries(flags, structure.window(axes), axes.shape)


def checked_gradients(
    leaves: Leaves, params: Params, grads: PyTree, needed: bool
) -> dict[str, jax.Array]:
    """Return the gradients of the pruned leaves by path, each in the shape of its leaf.

    Args:
      leaves: the pruned leaves by path.
      params: the tree that holds them.
      grads: a tree of the same paths, or None.
      needed: whether each leaf must have a gradient, finite where its values are known.

    Returns:
      ``{path: gradient}``.

    Raises:
      ArgumentError: if gradients are needed and missing, or belong to no leaf.
      ShapeError: if one has another shape than its leaf.
      NonFiniteError: outside ``jit``, if they are needed and not finite.
    """
    given = flatten(grads)[0] if grads is not None else {}
    paths = flatten(params)[0].keys()
    if unknown := [path for path in given if path not in paths]:
        raise ArgumentError(
            f"there are gradients for {', '.join(unknown)}, but no such leaf; there are: "
            f"{', '.join(leaves)}"
        )
    missing = [path for path in leaves if given.get(path) is None]
    if needed and missing:
        raise ArgumentError(
            f"this method needs gradients, and there is none for {', '.join(missing)}; give "
            "update(..., grads=...) the gradient of the loss at the weights the model used"
        )
    found = {path: given[path] for path in leaves if path not in missing}
    for path, grad in found.items():
        if jnp.shape(grad) != leaves[path].shape:
            raise ShapeError(
                f"leaf {path!r} has shape {leaves[path].shape}, its gradient {jnp.shape(grad)}"
            )
        if needed:
            check_finite(f"{path} (its gradient)", grad)
    return found


def skip_nonfinite(
    gradients: Mapping[str, jax.Array], new: CompressionState, old: CompressionState
) -> CompressionState:
    """Return the new state, or all of the old one if a gradient is not finite.

    Optimizers skip such a step too; under ``jit`` it cannot raise.

    Args:
      gradients: the gradients the new state depends on; none if it depends on none.
      new: the state after an update.
      old: the state before it, of the same structure.

    Returns:
      Either state.
    """
    if not gradients:
        return new
    # One flag for all leaves: state of different steps must not be mixed.
    finite = jnp.stack([jnp.isfinite(grad).all() for grad in gradients.values()]).all()
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)


def update_if(
    is_due: jax.Array | bool, new: Callable[[], Masks], old: Callable[[], Masks]
) -> Masks:
    """Return ``new()`` if an update is due, else ``old()``.

    A concrete condition is a Python branch, so that errors can be raised in it.
    """
    if isinstance(is_due, Tracer):
        return jax.lax.cond(is_due, new, old)
    return new() if bool(is_due) else old()
