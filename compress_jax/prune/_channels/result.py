"""The smaller model: its parameters, its function, a table of what was removed, sliced states."""

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten, owner
from compress_jax.core.types import Leaf, Leaves, ModelFn, Params, PyTree, Shape
from compress_jax.prune._channels.choice import widths
from compress_jax.prune._channels.judge import Judged
from compress_jax.trace import Cost, Groups, Number, cost, groups, resize, resized_numbers


class Cut(NamedTuple):
    """How a parameter was sliced.

    Attributes:
      shape: its old shape.
      indices: by axis the indices that stayed.
    """

    shape: Shape
    indices: dict[int, np.ndarray]


class Row(NamedTuple):
    """One row of the table of `Removal`.

    Attributes:
      group: the name of the group.
      size: the number of its channels before.
      kept: the number of its channels after.
      reason: why no channel was removed, if so.
    """

    group: str
    size: int
    kept: int
    reason: str = ""


class Removal(NamedTuple):
    """What `shrink` removed, and what it did not and why; prints as a table.

    Attributes:
      rows: one for each group.
      frozen: the reason by ``(path, axis)``, for axes that are not in a group, or only in part.
      before: the cost of the full model.
      after: the cost of the smaller model.
      widths: ``(kernel and axes, width before, width after)`` of widths that are the product of
        several groups.
      numbers: constants of the function that count, or seem to count, a shortened axis: their old
        and new values, and why.
      judged: the criteria that data chose from, with their distances; empty if none did.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"w": jnp.eye(3), "v": jnp.ones((3, 1))}
      >>> def fn(p, x): return jnp.tanh(x @ p["w"]) @ p["v"]
      >>> small = cj.prune.shrink(fn, params, jnp.ones((2, 3)), ratio=0.3)
      >>> [(row.group, row.size, row.kept) for row in small.table.rows]
      [('w:1', 3, 2)]
    """

    rows: tuple[Row, ...]
    frozen: dict[tuple[str, int], str]
    before: Cost
    after: Cost
    widths: tuple[tuple[str, int, int], ...] = ()
    numbers: tuple[Number, ...] = ()
    judged: tuple[Judged, ...] = ()

    def __str__(self) -> str:
        """Return the table."""
        width = max([len(row.group) for row in self.rows], default=5)
        lines = [f"{'group':<{width}}   size   kept"]
        for row in self.rows:
            line = f"{row.group:<{width}}  {row.size:>5}  {row.kept:>5}  {row.reason}"
            lines.append(line.rstrip())
        # One line a reason: most axes are frozen for the same few.
        by_reason: dict[str, list[str]] = {}
        for (path, axis), reason in self.frozen.items():
            by_reason.setdefault(reason, []).append(f"{path}:{axis}")
        for reason, axes in by_reason.items():
            lines.append(f"frozen ({reason}): {', '.join(axes)}")
        lines += [f"width {name}: {old} -> {new}" for name, old, new in self.widths if new < old]
        lines += [f"number {number}" for number in self.numbers]
        lines += map(str, self.judged)
        for name in ("macs", "params"):
            old = getattr(self.before, name)
            new = getattr(self.after, name)
            lines.append(f"{name}: {old:,} -> {new:,} ({old / max(new, 1):.2f}x fewer)")
        return "\n".join(lines)


class Shrunk(NamedTuple):
    """A smaller model, from `shrink` or `narrow`.

    Attributes:
      params: the smaller parameters (or variables), of the same structure.
      fn: ``fn(params, *inputs)``, compiled; differentiate it, quantize its params, shrink it again.
      kept: by group the channels that stayed, ascending, for `narrow`; to store them as JSON use
        ``.tolist()``.
      table: what was removed, and what was not and why.
      cuts: by path of a parameter its old shape and, by axis, the indices that stayed.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import compress_jax as cj
      >>> params = {"w": jnp.eye(3), "v": jnp.ones((3, 1))}
      >>> def fn(p, x): return jnp.tanh(x @ p["w"]) @ p["v"]
      >>> small = cj.prune.shrink(fn, params, jnp.ones((2, 3)), ratio=0.3)
      >>> small.kept["w:1"].tolist(), small.params["w"].shape
      ([0, 1], (3, 2))
      >>> small.slice_state(optax.sgd(0.1, momentum=0.9).init(params))[0].trace["w"].shape
      (3, 2)
    """

    params: Params
    fn: ModelFn
    kept: dict[str, np.ndarray]
    table: Removal
    cuts: dict[str, Cut]

    def slice_state(self, tree: PyTree) -> PyTree:
        """Slice a tree that was made for the full parameters, such as an optimizer's state.

        A leaf belongs to the parameter whose path its own path ends in
        (``0/mu/params/conv/kernel``; also without the collection, ``0/mu/conv/kernel``), or a part
        of its path does (SM3's ``0/mu/conv/kernel/1``, for axis 1). It is sliced along the axes
        that it shares with the parameter. Leaves of no parameter (counts, learning rates) stay.
        Factored moments (adafactor's ``v_row``, ``v_col``) are known by name, and swapped where
        another axis of the kernel is now the longest.

        Args:
          tree: the state of an optax optimizer, averages of parameters, or gradients.

        Returns:
          The tree for the smaller parameters.

        Raises:
          ShapeError: if it is not clear which axes a leaf shares with its parameter, or if a leaf
            holds all parameters in one vector (``optax.flatten``).
        """
        return sliced(tree, self.cuts)

    def carry(self, tree: PyTree) -> PyTree:
        """Old name of `slice_state`, for one version."""
        text = "Shrunk.carry is now Shrunk.slice_state; the old name goes in the next version"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return self.slice_state(tree)


def narrow(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    kept: Mapping[str, Sequence[int] | np.ndarray],
    numbers: Mapping[str, bool] | None = None,
) -> Shrunk:
    """Keep given channels of given groups: `shrink` with a choice of your own or from a checkpoint.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: trees of arrays or ``ShapeDtypeStruct``.
      kept: the channels to keep by name of a group of `compress_jax.trace.groups`.
      numbers: as of `shrink`.

    Returns:
      The smaller model.

    Raises:
      NoMatchError: if there is no group of that name, or a glob matches no number.
      ShapeError: if a group has no such channel, or none is kept.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"w": jnp.eye(3), "v": jnp.ones((3, 1))}
      >>> def fn(p, x): return jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> small = cj.prune.narrow(fn, params, jnp.ones((2, 3)), kept={"w:1": [0, 2]})
      >>> small.params["w"].shape, small.fn(small.params, jnp.ones((2, 3))).tolist()
      ((3, 2), [[2.0], [2.0]])
    """
    return narrowed(fn, params, inputs, groups(fn, params, *inputs), kept, {}, numbers)


def narrowed(
    fn: ModelFn,
    params: Params,
    inputs: Sequence[PyTree],
    found: Groups,
    kept: Mapping[str, Sequence[int] | np.ndarray],
    reasons: Mapping[str, str],
    numbers: Mapping[str, bool] | None = None,
) -> Shrunk:
    """Return `narrow` for groups that are already found, with the reasons why some stay whole."""
    indices = {name: np.unique(np.asarray(channels, int)) for name, channels in kept.items()}
    # A group that keeps all its channels needs no new width.
    shorter = {
        name: left
        for name, left in indices.items()
        if not np.array_equal(left, np.arange(found[name].size))
    }
    smaller = found.keep(params, shorter)
    small_fn = resize(fn, params, found, shorter, numbers)
    listed = resized_numbers(fn, params, *inputs, groups=found, kept=shorter, numbers=numbers)
    rows = []
    for group in found:
        if group.name in shorter:
            rows.append(Row(group.name, group.size, len(shorter[group.name])))
        else:
            reason = reasons.get(group.name, "no channel is among those of lowest score")
            rows.append(Row(group.name, group.size, group.size, reason))
    before = cost(fn, params, *inputs)
    after = cost(small_fn, smaller, *inputs)
    joint = _widths(found, before, params, smaller)
    table = Removal(tuple(rows), dict(found.frozen), before, after, joint, listed)
    every = {group.name: indices.get(group.name, np.arange(group.size)) for group in found}
    return Shrunk(smaller, small_fn, every, table, cuts(found, shorter, flatten(params)[0]))


def _widths(
    found: Groups, before: Cost, params: Params, smaller: Params
) -> tuple[tuple[str, int, int], ...]:
    """Return the widths that are products of several groups, before and after."""
    new = flatten(smaller)[0]
    rows = []
    for width in widths(found, [each.site for each in before.by_site.values()], flatten(params)[0]):
        if width.products:
            shape = np.shape(new[width.path])
            size = math.prod(shape[axis] for axis in width.axes)
            rows.append((str(width), width.size, size))
    return tuple(rows)


def cuts(
    groups: Groups, kept: Mapping[str, Sequence[int] | np.ndarray], leaves: Leaves
) -> dict[str, Cut]:
    """Return the cut of each parameter, also of those that stay whole."""
    found = {path: Cut(np.shape(leaf), {}) for path, leaf in leaves.items()}
    # By (path, axis) which indices stay, bool [size of the axis].
    masks: dict[tuple[str, int], np.ndarray] = {}
    for name, channels in kept.items():
        group = groups[name]
        for member in group.members:
            # Several groups may lie along one axis; an index stays if all of them keep it.
            masks[member] = masks.get(member, np.bool_(True)) & group.mask(member, channels)
    for (path, axis), mask in masks.items():
        found[path].indices[axis] = np.flatnonzero(mask)
    return found


def sliced(tree: PyTree, cuts: Mapping[str, Cut]) -> PyTree:
    """Return a tree whose leaves are sliced as the parameters they belong to; see `slice_state`.

    Example:
      >>> import jax
      >>> shorter = {"params/w": Cut((2, 3), {1: np.array([0, 2])})}
      >>> tree = {"count": jnp.array(7), "mu": {"w": jnp.ones((2, 3))}, "row": {"w": jnp.arange(3)}}
      >>> jax.tree.map(lambda x: x.shape, sliced(tree, shorter))
      {'count': (), 'mu': {'w': (2, 2)}, 'row': {'w': (2,)}}
    """
    leaves, rebuild = flatten(tree)
    # Optimizers may see the params without their collection ("params/").
    short = {path.partition("/")[2]: cut for path, cut in cuts.items() if "/" in path}
    names = {**short, **cuts}
    made = {}
    for path, leaf in leaves.items():
        found = _parameter_of(path, names)
        if found is None:
            _check_not_flattened(path, leaf, cuts)
            made[path] = leaf
        else:
            own, rest = found
            made[path] = _sliced_leaf(path, leaf, names[own], rest)
    return rebuild(_swapped(made, names))


def _parameter_of(path: str, names: Mapping[str, Cut]) -> tuple[str, list[str]] | None:
    """Return the parameter that a path, or the longest part of it, ends in, and the keys after."""
    keys = path.split("/")
    # Keys may follow the parameter's path ("kernel/1"): ever shorter beginnings are tried.
    for end in range(len(keys), 0, -1):
        own = owner("/".join(keys[:end]), names)
        if own is not None:
            return own, keys[end:]
    return None


def _check_not_flattened(path: str, leaf: PyTree, cuts: Mapping[str, Cut]) -> None:
    """Raise ShapeError if a leaf may hold all parameters in one vector (``optax.flatten``)."""
    if np.ndim(leaf) != 1 or np.size(leaf) <= 1 or not any(cut.indices for cut in cuts.values()):
        return
    total = sum(math.prod(cut.shape) for cut in cuts.values())
    trained = sum(math.prod(cut.shape) for path, cut in cuts.items() if path.startswith("params/"))
    if np.size(leaf) in (total, trained):
        raise ShapeError(
            f"{path!r} has as many entries as all parameters together, and does not say which are "
            "whose; start it anew for the smaller parameters, or keep the optimizer's state as a "
            "tree (without optax.flatten)"
        )


def _sliced_leaf(path: str, leaf: PyTree, cut: Cut, rest: Sequence[str]) -> Leaf:
    # Placeholders of size 1 (adafactor's for what it does not factor) have nothing to slice.
    if not cut.indices or not hasattr(leaf, "shape") or all(size == 1 for size in leaf.shape):
        return leaf
    options = _axes_by_name(path, leaf.shape, cut.shape, rest)
    options = options or _axes_by_shape(leaf.shape, cut.shape)
    # (axis of the leaf, axis of the parameter) of the slices that each option means.
    ways = set()
    for axes in options:
        pairs = [(i, axis) for i, axis in enumerate(axes) if leaf.shape[i] != 1]
        ways.add(tuple((i, axis) for i, axis in pairs if axis in cut.indices))
    # Options are one if they slice alike: a square kernel may lose the same on both axes.
    distinct = {tuple((i, cut.indices[axis].tobytes()) for i, axis in way) for way in ways}
    if len(distinct) != 1:
        what = "several of its axes could be those of" if distinct else "it has other axes than"
        raise ShapeError(
            f"{path!r} has shape {leaf.shape}: {what} the parameter of shape {cut.shape} that it "
            "belongs to; leave it out and start it anew for the smaller parameters"
        )
    for i, axis in next(iter(ways)):
        leaf = jnp.take(leaf, cut.indices[axis], axis=i)
    return leaf


def _axes_by_name(path: str, shape: Shape, full: Shape, rest: Sequence[str]) -> list[Shape]:
    """Return the axes of a parameter that a leaf has, where its path says so.

    So do factored moments (adafactor), and one vector for each axis (SM3).
    """
    keys = path.split("/")
    for key, place in FACTORED.items():
        if key in keys and len(full) > 1:
            # The axis that the mean was taken over is gone.
            mean_over = _two_largest(full)[place]
            axes = tuple(i for i in range(len(full)) if i != mean_over)
            return [axes] if shape == tuple(full[axis] for axis in axes) else []
    if len(rest) == 1 and rest[0].isdigit():
        axis = int(rest[0])
        if axis < len(full) and shape == (full[axis],):
            return [(axis,)]
    return []


# Names in optax: moments that are means over the largest axis, and over the second largest.
FACTORED = {"v_row": 1, "v_col": 0}


def _two_largest(shape: Shape) -> Shape:
    """Return the second largest and the largest axis, as optax.adafactor finds them."""
    return tuple(int(axis) for axis in np.argsort(shape)[-2:])


def _axes_by_shape(shape: Shape, full: Shape) -> list[Shape]:
    """Return the ways to read a shape as the full one with axes added in front or left out.

    An axis that was added is -1; one that is present may have size 1.
    """
    # Axes in front hold several values of one parameter: a history, an ensemble.
    more = len(shape) - len(full)
    if more > 0:
        return [(*[-1] * more, *range(len(full)))] if shape[more:] == full else []
    found = []
    for axes in combinations(range(len(full)), len(shape)):
        if all(n in (1, full[axis]) for n, axis in zip(shape, axes, strict=True)):
            found.append(axes)
    return found


def _swapped(leaves: Leaves, names: Mapping[str, Cut]) -> dict[str, Leaf]:
    """Swap factored moments where the longest axis is now the second longest.

    Each is a mean over one of the two, so each becomes the other.
    """
    made = dict(leaves)
    for path, leaf in leaves.items():
        keys = path.split("/")
        own = owner(path, names)
        if "v_row" not in keys or own is None or len(names[own].shape) < 2 or np.size(leaf) == 1:
            continue
        cut = names[own]
        # The shape of the smaller parameter.
        short = tuple(len(cut.indices.get(axis, range(n))) for axis, n in enumerate(cut.shape))
        old = _two_largest(cut.shape)
        new = _two_largest(short)
        if set(old) != set(new):
            raise ShapeError(
                f"{path!r} is a mean over axis {old[1]} of a parameter of shape {cut.shape}; of "
                f"shape {short} it would be one over axis {new[1]}; leave it out and start it anew "
                "for the smaller parameters"
            )
        # The same two axes in the other order of size: the two moments change places.
        if old != new:
            other = "/".join("v_col" if key == "v_row" else key for key in keys)
            made[path] = leaves[other]
            made[other] = leaf
    return made
