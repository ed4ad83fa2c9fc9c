"""Carry trees that were made for parameters over to smaller ones: moments, averages, scales, whatever library made them."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten, owner
from compress_jax.trace import Groups


class Cut(NamedTuple):
    """How a parameter got smaller: its old shape, and by axis the indices that stayed."""

    shape: tuple[int, ...]
    indices: dict[int, np.ndarray]


def cuts(groups: Groups, kept: Mapping[str, Sequence[int] | np.ndarray], leaves: dict[str, Any]) -> dict[str, Cut]:
    """Return how each parameter gets smaller, those that stay whole too."""
    found = {path: Cut(np.shape(leaf), {}) for path, leaf in leaves.items()}
    masks: dict[tuple[str, int], np.ndarray] = {}
    for name, channels in kept.items():
        group = groups[name]
        for member in group.members:
            masks[member] = masks.get(member, np.bool_(True)) & group.mask(member, channels)
    for (path, axis), mask in masks.items():
        found[path].indices[axis] = np.flatnonzero(mask)
    return found


def carried(tree: Any, cuts: dict[str, Cut]) -> Any:
    """Return a tree of which every leaf that belongs to a parameter lost what the parameter lost; see `Shrunk.carry`.

    Example:
      >>> import jax
      >>> shorter = {"params/w": Cut((2, 3), {1: np.array([0, 2])})}
      >>> tree = {"count": jnp.array(7), "mu": {"w": jnp.ones((2, 3))}, "row": {"w": jnp.arange(3)}}
      >>> jax.tree.map(lambda x: x.shape, carried(tree, shorter))
      {'count': (), 'mu': {'w': (2, 2)}, 'row': {'w': (2,)}}
    """
    leaves, rebuild = flatten(tree)
    names = {path.partition("/")[2]: cut for path, cut in cuts.items() if "/" in path} | cuts
    owners = {path: owner(path, names) for path in leaves}
    return rebuild({p: leaf if (own := owners[p]) is None else _carried(p, leaf, names[own]) for p, leaf in leaves.items()})


def _carried(path: str, leaf: Any, cut: Cut) -> Any:
    if not cut.indices or not hasattr(leaf, "shape") or all(size == 1 for size in leaf.shape):
        return leaf
    options = [axes for axes in _axes(leaf.shape, cut.shape) if axes is not None]
    ways = {
        tuple((i, axis) for i, axis in enumerate(axes) if leaf.shape[i] != 1 and axis in cut.indices) for axes in options
    }
    distinct = {tuple((i, cut.indices[axis].tobytes()) for i, axis in way) for way in ways}
    if len(distinct) != 1:
        what = "several of its axes could be those of" if distinct else "it has other axes than"
        raise ShapeError(
            f"{path!r} has shape {leaf.shape}: {what} the parameter of shape {cut.shape} that it belongs to; "
            "leave it out and start it anew for the smaller parameters"
        )
    for i, axis in next(iter(ways)):
        leaf = jnp.take(leaf, cut.indices[axis], axis=i)
    return leaf


def _axes(shape: tuple[int, ...], full: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the ways in which a shape is the full one, with more axes in front (-1), or with axes left out or of size 1."""
    more = len(shape) - len(full)
    if more > 0:
        return [(*[-1] * more, *range(len(full)))] if shape[more:] == full else []
    ways = combinations(range(len(full)), len(shape))
    return [axes for axes in ways if all(n in (1, full[axis]) for n, axis in zip(shape, axes, strict=True))]
