"""Carry trees that were made for parameters over to smaller ones: moments, averages, scales, whatever library made them."""

import math
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
    made = {path: _leaf(path, leaf, names, cuts) for path, leaf in leaves.items()}
    return rebuild(_swapped(made, names))


def _leaf(path: str, leaf: Any, names: Mapping[str, Cut], cuts: Mapping[str, Cut]) -> Any:
    """Return what is left of a leaf: of the parameter that its path ends in, or that an earlier part of it ends in."""
    keys = path.split("/")
    ends = ((owner("/".join(keys[:end]), names), keys[end:]) for end in range(len(keys), 0, -1))
    own, rest = next(((own, rest) for own, rest in ends if own is not None), (None, []))
    if own is not None:
        return _carried(path, leaf, names[own], rest)
    total = sum(math.prod(cut.shape) for cut in cuts.values())
    trained = sum(math.prod(cut.shape) for path, cut in cuts.items() if path.startswith("params/"))
    if (
        np.ndim(leaf) == 1
        and np.size(leaf) > 1
        and np.size(leaf) in (total, trained)
        and any(c.indices for c in cuts.values())
    ):
        raise ShapeError(
            f"{path!r} has as many entries as all parameters together, and does not say which are whose; start it anew for "
            "the smaller parameters, or keep the optimizer's state as a tree (without optax.flatten)"
        )
    return leaf


def _carried(path: str, leaf: Any, cut: Cut, rest: Sequence[str]) -> Any:
    if not cut.indices or not hasattr(leaf, "shape") or all(size == 1 for size in leaf.shape):
        return leaf
    options = _by_name(path, leaf.shape, cut.shape, rest) or _axes(leaf.shape, cut.shape)
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


def _by_name(path: str, shape: tuple[int, ...], full: tuple[int, ...], rest: Sequence[str]) -> list[tuple[int, ...]]:
    """Return which axes a leaf has where its path says so: factored moments (adafactor), and one vector an axis (SM3)."""
    keys = path.split("/")
    for key in FACTORS:
        if key in keys and (axes := _without(full, _largest(full)[FACTORS[key]])) is not None:
            return [axes] if shape == tuple(full[axis] for axis in axes) else []
    if len(rest) == 1 and rest[0].isdigit() and int(rest[0]) < len(full) and shape == (full[int(rest[0])],):
        return [(int(rest[0]),)]
    return []


FACTORS = {"v_row": 1, "v_col": 0}  # optax's names: which of the two largest axes, the second first, they are means over


def _largest(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the second largest and the largest axis, as optax.adafactor finds them."""
    return tuple(int(axis) for axis in np.argsort(shape)[-2:])


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...] | None:
    return tuple(i for i in range(len(shape)) if i != axis) if len(shape) > 1 else None


def _swapped(leaves: dict[str, Any], names: Mapping[str, Cut]) -> dict[str, Any]:
    """Exchange factored moments where the longest axis is now the second longest: each is a mean over one of them."""
    made = dict(leaves)
    for path, leaf in leaves.items():
        keys = path.split("/")
        own = owner(path, names)
        if "v_row" not in keys or own is None or len(names[own].shape) < 2 or np.size(leaf) == 1:
            continue
        cut = names[own]
        short = tuple(len(cut.indices.get(axis, range(n))) for axis, n in enumerate(cut.shape))
        old, new = _largest(cut.shape), _largest(short)
        if set(old) != set(new):
            raise ShapeError(
                f"{path!r} is a mean over axis {old[1]} of a parameter of shape {cut.shape}; of shape {short} it would be "
                f"one over axis {new[1]}; leave it out and start it anew for the smaller parameters"
            )
        if old != new:
            other = "/".join("v_col" if key == "v_row" else key for key in keys)
            made[path], made[other] = leaves[other], leaf
    return made


def _axes(shape: tuple[int, ...], full: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the ways in which a shape is the full one, with more axes in front (-1), or with axes left out or of size 1."""
    more = len(shape) - len(full)
    if more > 0:
        return [(*[-1] * more, *range(len(full)))] if shape[more:] == full else []
    ways = combinations(range(len(full)), len(shape))
    return [axes for axes in ways if all(n in (1, full[axis]) for n, axis in zip(shape, axes, strict=True))]
