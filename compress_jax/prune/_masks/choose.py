"""From scores to masks: what is kept, under a target."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from compress_jax.core.amount import amount
from compress_jax.core.axes import Axes, over_layers
from compress_jax.core.compression import CompressionState
from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.exact import choose, less, uint64
from compress_jax.core.leafwise import check_finite
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, Params, PyTree, Step
from compress_jax.prune._masks.select import largest_of_each, magnitude_bits, smallest, value_bits
from compress_jax.prune._masks.structures import NofM, Structure, pooled, spread
from compress_jax.prune._masks.target import Target

Masks = dict[str, jax.Array]


def kept(
    scores: Mapping[str, jax.Array],
    target: Target,
    step: Step,
    *,
    signed: bool = False,
    axes: Mapping[str, Axes] | None = None,
) -> Masks:
    """Return the masks of what is kept when the lowest scores are pruned, exactly as many units as the target says.

    Args:
      scores: of every leaf, floating point, its shape.
      target: how many, of which units, compared within what.
      step: the step the target is looked up at.
      signed: order scores by value; by default by magnitude.
      axes: of every leaf; by default as Flax stores kernels. With ``scope="leaf"`` each layer of a
        stack counts by itself.

    Returns:
      bool masks by path, true where an entry is kept. Of equal scores the one earlier in C order is
      pruned first.

    Example:
      >>> import jax.numpy as jnp
      >>> kept({"w": jnp.array([3.0, -1.0, 2.0])}, Target.of(0.5), 0)["w"].tolist()
      [True, False, False]
    """
    key, structure = (value_bits if signed else magnitude_bits), target.structure
    axes = axes or {path: Axes.convention(x.shape) for path, x in scores.items()}
    if isinstance(structure, NofM):
        along = {path: structure.axes(axes[path]) for path in scores}
        return {
            path: largest_of_each(key(x), structure.n, structure.m, along[path])
            for path, x in scores.items()
        }
    pools = {path: _pooled(x, structure, axes[path], signed) for path, x in scores.items()}
    if target.scope == "global":
        share = target.share(next(iter(pools)), step) if pools else 0.0
        pruned = (
            dict(zip(pools, _of_all(list(pools.values()), share, target.floor, key), strict=True))
            if pools
            else {}
        )
    else:
        pruned = {
            path: _smallest_of_layers(pool, axes[path], target.share(path, step), key)
            for path, pool in pools.items()
        }
    return {path: _spread(~mask, structure, axes[path]) for path, mask in pruned.items()}


def _smallest_of_layers(
    pool: jax.Array, axes: Axes, share: Any, key: Callable[..., jax.Array]
) -> jax.Array:
    """Return a mask of the smallest units of every layer, which are pruned."""
    pruned = amount(share, pool.size // max(axes.layers, 1))
    return over_layers(lambda layer: smallest([layer], pruned, key)[0], axes, ("leaf",), "leaf")(
        pool
    )


def _of_all(pools: list[jax.Array], share: Any, floor: float, key: Any) -> list[jax.Array]:
    """Return masks of the lowest units of all leaves together, of which each keeps its floor."""
    lost = amount(share, sum(pool.size for pool in pools))
    if not floor:
        return smallest(pools, lost, key)
    most = [pool.size - max(1, math.ceil(floor * pool.size)) for pool in pools]
    may = [smallest([pool], uint64(count), key)[0] for pool, count in zip(pools, most, strict=True)]
    limit = uint64(sum(most))
    return smallest(pools, choose(less(limit, lost), limit, lost), key, may)


def _pooled(x: jax.Array, structure: Structure | None, axes: Axes, signed: bool) -> jax.Array:
    """Return the scores of units; single entries stay in their dtype."""
    if structure is None or isinstance(structure, NofM):
        return x
    return pooled(x if signed else abs(x), structure.window(axes), structure.reduce)


def _spread(flags: jax.Array, structure: Structure | None, axes: Axes) -> jax.Array:
    if structure is None or isinstance(structure, NofM):
        return flags
    return spread(flags, structure.window(axes), axes.shape)


# What an update is given: gradients that are checked, and steps that are left out because they are
# broken or not due.


def gradients_of(leaves: Leaves, params: Params, grads: PyTree, needed: bool) -> dict[str, Any]:
    """Return the gradients of some leaves that `update` was given, by path, all of them of their leaf's shape.

    Args:
      leaves: by path, those that are pruned.
      params: the tree they are of.
      grads: a tree of the same names, or None.
      needed: whether there must be one for every leaf, finite as far as that can be told.

    Returns:
      ``{path: gradient}``.

    Raises:
      ArgumentError: if they are needed and missing, or of leaves that there are not.
      ShapeError: if one has another shape than its leaf.
      NonFiniteError: outside ``jit``, if they are needed and not finite.
    """
    found = flatten(grads)[0] if grads is not None else {}
    if unknown := [path for path in found if path not in flatten(params)[0]]:
        raise ArgumentError(
            f"there are gradients for {', '.join(unknown)}, but no such leaf; there are: "
            f"{', '.join(leaves)}"
        )
    missing = [path for path in leaves if found.get(path) is None]
    if needed and missing:
        raise ArgumentError(
            f"this method looks at gradients, and there is none for {', '.join(missing)}; give "
            "update(..., grads=...) "
            "the gradient of the loss at the weights the model used"
        )
    found = {path: found[path] for path in leaves if found.get(path) is not None}
    for path, grad in found.items():
        if jnp.shape(grad) != leaves[path].shape:
            raise ShapeError(
                f"leaf {path!r} has shape {leaves[path].shape}, its gradient {jnp.shape(grad)}"
            )
        if needed:
            check_finite(f"{path} (its gradient)", grad)
    return found


def unless_broken(
    gradients: Mapping[str, Any], new: CompressionState, old: CompressionState
) -> CompressionState:
    """Return the new state, or under ``jit`` the old one whole if any gradient is not finite: a step an optimizer skips.

    Args:
      gradients: what the new state follows from.
      new: the state after an update.
      old: the state before it, of the same structure.

    Returns:
      Either.
    """
    if not gradients:
        return new
    sound = jnp.stack([jnp.isfinite(grad).all() for grad in gradients.values()]).all()
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, old)


def chosen(acts: Any, new: Callable[[], Masks], old: Callable[[], Masks]) -> Masks:
    """Return one of two sets of masks: by a plain choice where it is known which, so that errors can be raised."""
    if isinstance(acts, Tracer):
        return jax.lax.cond(acts, new, old)
    return new() if bool(acts) else old()
