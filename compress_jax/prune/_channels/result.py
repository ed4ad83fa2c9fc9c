"""What is left of a model: smaller parameters, the function that runs them, and a table of what went and what could not."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten, owner
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.prune._channels.choice import widths
from compress_jax.trace import Cost, Groups, Number, cost, groups, resize, resized_numbers

# Carry trees that were made for parameters over to smaller ones: moments, averages, scales,
# whatever library made them.


class Cut(NamedTuple):
    """How a parameter got smaller: its old shape, and by axis the indices that stayed."""

    shape: tuple[int, ...]
    indices: dict[int, np.ndarray]


def cuts(
    groups: Groups, kept: Mapping[str, Sequence[int] | np.ndarray], leaves: Leaves
) -> dict[str, Cut]:
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


def carried(tree: PyTree, cuts: dict[str, Cut]) -> Any:
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


def _leaf(path: str, leaf: PyTree, names: Mapping[str, Cut], cuts: Mapping[str, Cut]) -> Any:
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
            f"{path!r} has as many entries as all parameters together, and does not say which are "
            "whose; start it anew for "
            "the smaller parameters, or keep the optimizer's state as a tree (without "
            "optax.flatten)"
        )
    return leaf


def _carried(path: str, leaf: PyTree, cut: Cut, rest: Sequence[str]) -> Any:
    if not cut.indices or not hasattr(leaf, "shape") or all(size == 1 for size in leaf.shape):
        return leaf
    options = _by_name(path, leaf.shape, cut.shape, rest) or _axes(leaf.shape, cut.shape)
    ways = {
        tuple(
            (i, axis) for i, axis in enumerate(axes) if leaf.shape[i] != 1 and axis in cut.indices
        )
        for axes in options
    }
    distinct = {tuple((i, cut.indices[axis].tobytes()) for i, axis in way) for way in ways}
    if len(distinct) != 1:
        what = "several of its axes could be those of" if distinct else "it has other axes than"
        raise ShapeError(
            f"{path!r} has shape {leaf.shape}: {what} the parameter of shape {cut.shape} that it "
            "belongs to; "
            "leave it out and start it anew for the smaller parameters"
        )
    for i, axis in next(iter(ways)):
        leaf = jnp.take(leaf, cut.indices[axis], axis=i)
    return leaf


def _by_name(
    path: str, shape: tuple[int, ...], full: tuple[int, ...], rest: Sequence[str]
) -> list[tuple[int, ...]]:
    """Return which axes a leaf has where its path says so: factored moments (adafactor), and one vector an axis (SM3)."""
    keys = path.split("/")
    for key in FACTORS:
        if key in keys and (axes := _without(full, _largest(full)[FACTORS[key]])) is not None:
            return [axes] if shape == tuple(full[axis] for axis in axes) else []
    if (
        len(rest) == 1
        and rest[0].isdigit()
        and int(rest[0]) < len(full)
        and shape == (full[int(rest[0])],)
    ):
        return [(int(rest[0]),)]
    return []


FACTORS = {
    "v_row": 1,
    "v_col": 0,
}  # optax's names: which of the two largest axes, the second first, they are means over


def _largest(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the second largest and the largest axis, as optax.adafactor finds them."""
    return tuple(int(axis) for axis in np.argsort(shape)[-2:])


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...] | None:
    return tuple(i for i in range(len(shape)) if i != axis) if len(shape) > 1 else None


def _swapped(leaves: Leaves, names: Mapping[str, Cut]) -> dict[str, Any]:
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
                f"{path!r} is a mean over axis {old[1]} of a parameter of shape {cut.shape}; of "
                f"shape {short} it would be "
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
    return [
        axes
        for axes in ways
        if all(n in (1, full[axis]) for n, axis in zip(shape, axes, strict=True))
    ]


class Row(NamedTuple):
    """One group: its name, how many channels it had and has, and why none went, if so."""

    group: str
    size: int
    kept: int
    reason: str = ""


class Removal(NamedTuple):
    """What was removed, and what was not and why; prints as a table.

    Attributes:
      rows: one for each group.
      frozen: ``(path, axis)`` of axes that are in no group, or not as a whole, and why.
      before: cost of the full model.
      after: cost of the smaller one.
      widths: ``(kernel and axes, width before, width after)`` of widths that several groups make up
        together.
      numbers: constants that count what got shorter, or look as if they did: what they were, what
        they are now, and why.
    """

    rows: tuple[Row, ...]
    frozen: dict[tuple[str, int], str]
    before: Cost
    after: Cost
    widths: tuple[tuple[str, int, int], ...] = ()
    numbers: tuple[Number, ...] = ()

    def __str__(self) -> str:
        """Return the table."""
        width = max([len(row.group) for row in self.rows], default=5)
        lines = [f"{'group':<{width}}   size   kept"]
        lines += [
            f"{row.group:<{width}}  {row.size:>5}  {row.kept:>5}  {row.reason}".rstrip()
            for row in self.rows
        ]
        for reason in dict.fromkeys(self.frozen.values()):
            axes = ", ".join(
                f"{path}:{axis}" for (path, axis), why in self.frozen.items() if why == reason
            )
            lines.append(f"frozen ({reason}): {axes}")
        lines += [f"width {name}: {old} -> {new}" for name, old, new in self.widths if new < old]
        lines += [f"number {number}" for number in self.numbers]
        for name in ("macs", "params"):
            old, new = getattr(self.before, name), getattr(self.after, name)
            lines.append(f"{name}: {old:,} -> {new:,} ({old / max(new, 1):.2f}x fewer)")
        return "\n".join(lines)


class Shrunk(NamedTuple):
    """A smaller model.

    Attributes:
      params: the smaller parameters (or variables), of the same structure.
      fn: ``fn(params, *inputs)``, compiled; differentiate it, quantize its params, shrink it again.
      kept: by group the channels that stayed, ascending; JSON-able with ``.tolist()``, `narrow`
        takes them.
      table: what was removed, and what was not and why.
      cuts: by path of a parameter its old shape and, by axis, the indices that stayed.
    """

    params: Params
    fn: ModelFn
    kept: dict[str, np.ndarray]
    table: Removal
    cuts: dict[str, Cut]

    def carry(self, tree: PyTree) -> Any:
        """Return a tree that was made for the full parameters (an optimizer's state) as it is for the smaller ones.

        A leaf belongs to the parameter whose path its own ends in (``0/mu/params/conv/kernel``;
        also without the collection, ``0/mu/conv/kernel``), or a part of it does (SM3's
        ``0/mu/conv/kernel/1``, of axis 1). Axes of the parameter that it has, it loses the same
        indices of; leaves of no parameter (counts, rates) stay. Factored moments (adafactor's
        ``v_row``, ``v_col``) are known by name, and exchanged where a kernel's longest axis is
        another now.

        Args:
          tree: of any optax optimizer, of averages of parameters, or of gradients.

        Returns:
          The tree.

        Raises:
          ShapeError: if a leaf belongs to a parameter, but it cannot be told which of its axes it
            has, or if it holds all parameters in one vector (``optax.flatten``).
        """
        return carried(tree, self.cuts)


def narrow(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    kept: Mapping[str, Sequence[int] | np.ndarray],
    numbers: Mapping[str, bool] | None = None,
) -> Shrunk:
    """Keep given channels of given groups: `shrink` when the choice is made, or was made before (a checkpoint holds it).

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: trees of arrays or ``ShapeDtypeStruct``.
      kept: by name of a group of `compress_jax.trace.groups` the channels to keep.
      numbers: as for `shrink`.

    Returns:
      The smaller model.

    Raises:
      NoMatchError: if there is no group of a name, or a glob matches no number.
      ShapeError: if a channel is not one of the group's or none is kept.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"w": jnp.eye(3), "v": jnp.ones((3, 1))}
      >>> small = narrow(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], params, jnp.ones((2, 3)), kept={"w:1": [0, 2]})
      >>> small.params["w"].shape, small.fn(small.params, jnp.ones((2, 3))).tolist()
      ((3, 2), [[2.0], [2.0]])
    """
    return narrowed(fn, params, inputs, groups(fn, params, *inputs), kept, {}, numbers)


def narrowed(
    fn: ModelFn,
    params: Params,
    inputs: Sequence[Any],
    found: Groups,
    kept: Mapping[str, Sequence[int] | np.ndarray],
    reasons: Mapping[str, str],
    numbers: Mapping[str, bool] | None = None,
) -> Shrunk:
    """Return `narrow` of groups that are known already, with a reason for each that stays whole."""
    indices = {name: np.unique(np.asarray(channels, int)) for name, channels in kept.items()}
    shorter = {
        name: left
        for name, left in indices.items()
        if not np.array_equal(left, np.arange(found[name].size))
    }
    smaller = found.keep(params, shorter)
    small_fn = resize(fn, params, found, shorter, numbers)
    listed = resized_numbers(fn, params, *inputs, groups=found, kept=shorter, numbers=numbers)
    rows = [
        Row(group.name, group.size, len(shorter[group.name]))
        if group.name in shorter
        else Row(
            group.name,
            group.size,
            group.size,
            reasons.get(group.name, "no channel is among those to go"),
        )
        for group in found
    ]
    before, after = cost(fn, params, *inputs), cost(small_fn, smaller, *inputs)
    table = Removal(
        tuple(rows),
        dict(found.frozen),
        before,
        after,
        _widths(found, before, params, smaller),
        listed,
    )
    every = {group.name: indices.get(group.name, np.arange(group.size)) for group in found}
    return Shrunk(smaller, small_fn, every, table, cuts(found, shorter, flatten(params)[0]))


def _widths(
    found: Groups, before: Cost, params: Params, smaller: Any
) -> tuple[tuple[str, int, int], ...]:
    """Return the widths that several groups make up together, before and after."""
    old, new = flatten(params)[0], flatten(smaller)[0]
    every = widths(found, [each.site for each in before.by_site.values()], old)
    joint = [width for width in every if width.products]
    after = [math.prod(np.shape(new[width.path])[axis] for axis in width.axes) for width in joint]
    return tuple((str(width), width.size, size) for width, size in zip(joint, after, strict=True))
