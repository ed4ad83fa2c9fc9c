"""`groups`: which parameter axes of a function can be permuted or shortened together.

`Group` and `Groups` hold the answer and apply it to variables. `verify_groups` checks it by running
the function on permuted variables.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Array, Leaves, ModelFn, PyTree, Variables
from compress_jax.trace._groups.analyze import Analysis, analyze, returned
from compress_jax.trace._groups.axes import Leaf, Member
from compress_jax.trace._jaxpr.site import Position

Coordinates = dict[Leaf, np.ndarray]  # of the indices of one parameter axis, by leaf
INDEXED = "single indices are picked out"


@dataclass(frozen=True)
class Group:
    """Coordinates (channels, heads, features) of several parameter axes that belong together.

    Attributes:
      name: where they are produced, such as ``"params/conv/kernel:3"`` for axis 3 of that kernel; a
        second group produced along the same axis ends in ``#2``. It depends neither on shapes nor
        on the run.
      size: how many coordinates there are.
      members: the parameter axes they lie in, in the order of the tree.
      coordinates: for each member, the coordinate that each index of the axis belongs to, -1 for
        none: int array of the axis' length. Where a coordinate occurs several times (a flattened
        feature map), its k-th occurrence corresponds to the k-th occurrence of every other.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
      >>> group = cj.trace.groups(lambda p, x: (x @ p["w"]) @ p["v"], params, jnp.ones((1, 3)))[0]
      >>> group.name, group.size, group.members
      ('w:1', 4, (('v', 0), ('w', 1)))
    """

    name: str
    size: int
    members: tuple[Member, ...]
    coordinates: dict[Member, np.ndarray] = field(repr=False, compare=False)

    def mask(self, member: Member, kept: Iterable[int]) -> np.ndarray:
        """Return which indices of a member's axis remain if only some coordinates are kept.

        Args:
          member: path and axis.
          kept: the coordinates to keep.

        Returns:
          bool array of the axis' length.

        Example:
          >>> member = ("dense/kernel", 0)
          >>> flat = Group("conv/kernel:3", 2, (member,), {member: np.array([0, 1, 0, 1])})
          >>> flat.mask(member, [1]).tolist()
          [False, True, False, True]
        """
        place = self.coordinates[member]  # [length of the axis]
        # Indices without a coordinate belong to other groups, or to none: they stay.
        return (place < 0) | np.isin(place, np.asarray(list(kept), int))

    def order(self, member: Member, permutation: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return, for each index of a member's axis, the old index that a permutation puts there.

        Args:
          member: path and axis.
          permutation: coordinate ``i`` becomes what ``permutation[i]`` was.

        Returns:
          int array of the axis' length.

        Example:
          >>> member = ("dense/kernel", 0)
          >>> flat = Group("conv/kernel:3", 2, (member,), {member: np.array([0, 1, 0, 1])})
          >>> flat.order(member, [1, 0]).tolist()
          [1, 0, 3, 2]
        """
        place = self.coordinates[member]  # [length of the axis]
        inside = np.flatnonzero(place >= 0)
        # A stable sort keeps the occurrences of a coordinate in their order along the axis.
        by_coordinate = inside[np.argsort(place[inside], kind="stable")]
        occurrences = by_coordinate.reshape(self.size, -1)  # [coordinate, occurrence]
        # The k-th occurrence of a coordinate goes to the k-th occurrence of the other.
        order = np.arange(len(place))
        order[occurrences] = occurrences[np.asarray(permutation)]
        return order


@dataclass(frozen=True)
class Groups:
    """The groups of a function's parameters: a read-only list in the order of the computation.

    Attributes:
      items: the groups.
      frozen: by ``(path, axis)`` the reason why a parameter axis, or a part or factor of it, cannot
        be permuted. Axes of size 1 are left out. Every index of an axis that is not listed lies in
        a group.
      unknown: how often each primitive without a rule occurs; all it touches is frozen.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
      >>> print(cj.trace.groups(lambda p, x: (x @ p["w"]) @ p["v"], params, jnp.ones((1, 3))))
      group   size  members
      w:1        4  v:0, w:1
      frozen (output): v:1
      frozen (input): w:0
    """

    items: tuple[Group, ...]
    frozen: dict[Member, str]
    unknown: dict[str, int]

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.items)

    def __iter__(self) -> Iterator[Group]:
        """Iterate over the groups."""
        return iter(self.items)

    @overload
    def __getitem__(self, which: int | str) -> Group: ...

    @overload
    def __getitem__(self, which: slice) -> tuple[Group, ...]: ...

    def __getitem__(self, which: int | str | slice) -> Group | tuple[Group, ...]:
        """Return a group by its index or its name, or several by a slice."""
        if not isinstance(which, str):
            return self.items[which]
        for group in self.items:
            if group.name == which:
                return group
        listing = "\n  ".join(group.name for group in self.items) or "(none)"
        raise NoMatchError(f"no group is called {which!r}. The groups are:\n  {listing}")

    def keep(
        self, variables: Variables, kept: Mapping[str, Sequence[int] | np.ndarray]
    ) -> Variables:
        """Return smaller variables that hold only some coordinates of some groups.

        Args:
          variables: the tree that was analyzed, of arrays.
          kept: by name of a group the coordinates to keep, in any order; other groups stay whole.

        Returns:
          The tree with shorter axes; the remaining coordinates keep their order.

        Raises:
          NoMatchError: if there is no group of a name.
          ShapeError: if a coordinate is not one of the group's, or none is kept.

        Example:
          >>> import compress_jax as cj
          >>> params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
          >>> found = cj.trace.groups(lambda p, x: (x @ p["w"]) @ p["v"], params, jnp.ones((1, 3)))
          >>> {path: w.shape for path, w in found.keep(params, {"w:1": [0, 2]}).items()}
          {'v': (2, 2), 'w': (3, 2)}
        """
        leaves, rebuild = flatten(variables)
        masks: dict[Member, np.ndarray] = {}
        for name, coordinates in kept.items():
            group = self[name]
            _check(group, coordinates)
            # Several groups may lie in one axis: an index stays if each of them keeps it.
            for member in group.members:
                masks[member] = masks.get(member, True) & group.mask(member, coordinates)
        for (path, axis), mask in masks.items():
            leaves[path] = jnp.take(leaves[path], np.flatnonzero(mask), axis=axis)
        return rebuild(leaves)

    def permute(
        self, variables: Variables, group: Group | str, permutation: Sequence[int] | np.ndarray
    ) -> Variables:
        """Return variables with one group permuted, for which the function returns the same.

        Args:
          variables: the tree that was analyzed, of arrays.
          group: one of the groups, or its name.
          permutation: of ``range(group.size)``; coordinate ``i`` becomes what ``permutation[i]``
            was.

        Returns:
          The tree, every member of the group permuted.

        Raises:
          NoMatchError: if there is no group of that name.
          ShapeError: if it is not a permutation of the group's coordinates.

        Example:
          >>> import compress_jax as cj
          >>> params = {"w": jnp.array([[1.0, 2.0]]), "v": jnp.array([[3.0], [4.0]])}
          >>> found = cj.trace.groups(lambda p, x: (x @ p["w"]) @ p["v"], params, jnp.ones((1, 1)))
          >>> {path: w.tolist() for path, w in found.permute(params, "w:1", [1, 0]).items()}
          {'v': [[4.0], [3.0]], 'w': [[2.0, 1.0]]}
        """
        found = group if isinstance(group, Group) else self[group]
        if sorted(np.asarray(permutation).tolist()) != list(range(found.size)):
            raise ShapeError(
                f"{found.name!r} needs a permutation of range({found.size}), not "
                f"{list(permutation)}"
            )
        leaves, rebuild = flatten(variables)
        return rebuild(permuted(leaves, found, permutation, found.members))

    def __str__(self) -> str:
        """Return a table: every group, then what is frozen and why, then unknown primitives."""
        return "\n".join([*_table(self.items), *_frozen(self.frozen), *_unknown(self.unknown)])


def permuted(
    leaves: Leaves,
    group: Group,
    permutation: Sequence[int] | np.ndarray,
    members: Iterable[Member],
) -> Leaves:
    """Return leaves with certain members of a group permuted.

    Args:
      leaves: arrays by path.
      group: the group.
      permutation: of its coordinates.
      members: those of its members to permute.

    Returns:
      All leaves.
    """
    leaves = dict(leaves)
    for path, axis in members:
        order = group.order((path, axis), permutation)
        leaves[path] = jnp.take(leaves[path], order, axis=axis)
    return leaves


def _check(group: Group, kept: Sequence[int] | np.ndarray) -> None:
    """Raise a ShapeError if coordinates are not the group's, or there are none."""
    if not len(kept) or not set(np.asarray(kept).tolist()) <= set(range(group.size)):
        raise ShapeError(
            f"{group.name!r} has coordinates 0 to {group.size - 1}; keep at least one of them, "
            f"not {list(kept)}"
        )


def _table(groups: Sequence[Group]) -> list[str]:
    """Return a line for each group: name, size, members."""
    width = max([len("group"), *(len(group.name) for group in groups)])
    rows = [
        f"{group.name:<{width}}  {group.size:>5}  {', '.join(map(show, group.members))}"
        for group in groups
    ]
    return [f"{'group':<{width}}  {'size':>5}  members", *rows] if rows else ["no groups"]


def _frozen(frozen: dict[Member, str]) -> list[str]:
    """Return a line for each reason: what is frozen for it."""
    by_reason: dict[str, list[str]] = {}
    for member, reason in frozen.items():
        by_reason.setdefault(reason, []).append(show(member))
    return [f"frozen ({reason}): {', '.join(shown)}" for reason, shown in by_reason.items()]


def _unknown(unknown: dict[str, int]) -> list[str]:
    """Return a line that lists the primitives without a rule."""
    if not unknown:
        return []
    return ["unknown ops: " + ", ".join(f"{name} x{count}" for name, count in unknown.items())]


def show(member: Member) -> str:
    """Return a member as text.

    Example:
      >>> show(("dense/kernel", 1))
      'dense/kernel:1'
    """
    return f"{member[0]}:{member[1]}"


def groups(fn: ModelFn, variables: Variables, *inputs: PyTree) -> Groups:
    r"""Return the groups of parameter axes that belong together: channels, heads, hidden features.

    For every group and every permutation ``P`` of its coordinates
    ``fn(P variables, *inputs) == fn(variables, *inputs)``, where ``P`` permutes all members alike.
    Shortening all members alike therefore removes the same features everywhere: this is what
    structured pruning may remove. Groups are found by following axes through the function's jaxpr:
    both operands of a sum, and the contracted axes of a product, are one axis; reshapes and
    concatenations build axes from other axes. What is not understood is frozen: inputs, outputs,
    constants that vary, positions, windows, whatever is looked up by index and primitives without a
    rule. Random numbers may be drawn in any order, so dropout freezes nothing. An output that is an
    updated parameter (batch statistics) goes with that parameter.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.

    Returns:
      The groups in the order in which the function produces them, with what is frozen and why.
      `Groups` permutes and shortens variables; ``print`` shows a table.

    Raises:
      ShapeError: if an argument has a leaf that is not an array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"conv": jnp.ones((3, 3, 3, 4)), "head": jnp.ones((4 * 4 * 4, 10))}
      >>> def fn(params, x):
      ...     layout = ("NHWC", "HWIO", "NHWC")
      ...     x = jax.lax.conv_general_dilated(
      ...         x, params["conv"], (2, 2), "SAME", dimension_numbers=layout
      ...     )
      ...     return jax.nn.relu(x).reshape(1, -1) @ params["head"]
      >>> print(cj.trace.groups(fn, params, jnp.ones((1, 8, 8, 3))))
      group    size  members
      conv:3      4  conv:3, head:0
      frozen (spatial window): conv:0, conv:1, head:0
      frozen (input): conv:2
      frozen (output): head:1

    References:
      Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023 (the idea of a dependency
      graph; here of axes).
    """
    # A group is a leaf of the axis algebra that is free to be permuted, with all axes it lies in.
    analysis = analyze(fn, variables, *inputs)
    free = _free(analysis)
    places = _places(analysis)
    found: dict[Leaf, dict[Member, np.ndarray]] = {}
    for member, along in places.items():
        for leaf, coordinates in along.items():
            if leaf in free:
                found.setdefault(leaf, {})[member] = coordinates
    named = _named(analysis, found, places)
    items = tuple(
        Group(name, leaf.size, tuple(found[leaf]), found[leaf]) for leaf, name in named.items()
    )
    return Groups(items, dict(_frozen_members(analysis, places, free)), analysis.unknown)


def _places(analysis: Analysis) -> dict[Member, Coordinates]:
    """Return for each parameter axis longer than 1 its coordinates in the leaves it is made of."""
    places = {}
    for path, dims in analysis.params.items():
        for i, axis in enumerate(dims):
            if axis.size > 1:
                places[path, i] = analysis.walk.axes.coordinates(axis)
    return places


def _free(analysis: Analysis) -> set[Leaf]:
    """Return the leaves that are not frozen and that an equation sums over: others are unused."""
    axes = analysis.walk.axes
    used: set[Leaf] = set()
    for summed in analysis.walk.summed.values():
        for axis in summed:
            used.update(axes.leaves(axis))
    return {leaf for leaf in used if axes.reason(leaf) is None}


def _frozen_members(
    analysis: Analysis, places: dict[Member, Coordinates], free: set[Leaf]
) -> Iterator[tuple[Member, str]]:
    """Yield why axes, or parts of them, cannot be permuted."""
    for member, along in places.items():
        reasons = [
            analysis.walk.axes.reason(leaf) or "unused" for leaf in along if leaf not in free
        ]
        # [length of the axis]: whether an index lies in a free leaf. An index that was picked out
        # is a term of size 1, which has no leaf.
        covered = np.any([place >= 0 for leaf, place in along.items() if leaf in free], axis=0)
        if reasons or not covered.all():
            yield member, ", ".join(dict.fromkeys(reasons or [INDEXED]))


def _named(
    analysis: Analysis,
    found: dict[Leaf, dict[Member, np.ndarray]],
    places: dict[Member, Coordinates],
) -> dict[Leaf, str]:
    """Return a name for each leaf's group, in the order in which they are produced.

    A group is named after the first axis that produces it. Groups produced along one axis follow
    each other in the order in which they lie in it.
    """
    # Axes that no contraction produces (a learned query) come after those that one does.
    order = {member: rank for rank, member in enumerate(_producers(analysis))}
    last = len(order)
    producer = {
        leaf: min(axes, key=lambda member: order.get(member, last)) for leaf, axes in found.items()
    }

    def rank(leaf: Leaf) -> tuple[int, int]:
        member = producer[leaf]
        return order.get(member, last), list(places[member]).index(leaf)

    uses: Counter[str] = Counter()
    named = {}
    for leaf in sorted(producer, key=rank):
        base = show(producer[leaf])
        uses[base] += 1
        named[leaf] = base if uses[base] == 1 else f"{base}#{uses[base]}"
    return named


def _producers(analysis: Analysis) -> list[Member]:
    """Return the parameter axes that are outputs of a contraction or a lookup, in program order."""
    traced = analysis.traced
    produced: dict[Position, list[Member]] = {}
    # A lookup produces the features of its table, whose axis 0 is indexed.
    for position, table in traced.found.lookups.items():
        produced[position] = [(table, axis) for axis in range(1, len(analysis.params[table]))]
    for position, site in traced.sites.items():
        if site.param is not None:
            # What is neither summed over nor stacked for a loop is an output.
            gone = (*(site.param_axes or ()), *site.stack_axes)
            outputs = [axis for axis in range(len(analysis.params[site.param])) if axis not in gone]
            # Where the summed axes are unknown, the last axis is the likeliest output.
            if not site.param_axes:
                outputs.reverse()
            produced[position] = [(site.param, axis) for axis in outputs]
    in_order = [produced[position] for position in sorted(produced, key=_place)]
    return list(dict.fromkeys(itertools.chain.from_iterable(in_order)))


def _place(position: Position) -> tuple[tuple[int, int | str], ...]:
    """Return a key that sorts positions in program order."""
    # A position mixes integers and words, which Python does not order among themselves.
    return tuple((0, step) if isinstance(step, int) else (1, step) for step in position)


# The permutation check, which runs the function.


@dataclass(frozen=True)
class Check:
    """The result of permuting one group.

    Attributes:
      name: of the group.
      size: of the group.
      error: largest change of an output, relative to that output's largest entry.
      ok: whether the error is within the tolerance.
      undetected: members that can be left out of the permutation without a change of any output:
        parameters without effect, those with equal entries (a bias of zeros), or a single member.
    """

    name: str
    size: int
    error: float
    ok: bool
    undetected: tuple[Member, ...]


@dataclass(frozen=True)
class Verification:
    """The results of permuting every group.

    Attributes:
      checks: one for each group.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"w": jnp.array([[1.0, 2.0]]), "v": jnp.array([[3.0], [4.0]])}
      >>> report = cj.trace.verify_groups(
      ...     lambda p, x: (x @ p["w"]) @ p["v"], params, jnp.ones((1, 1))
      ... )
      >>> print(report)
      group   size    error  check
      w:1        2  0.0e+00  ok
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no group's permutation changes the function."""
        return all(check.ok for check in self.checks)

    @property
    def undetected(self) -> dict[str, tuple[Member, ...]]:
        """By name of the group, the members whose omission the check does not notice."""
        return {check.name: check.undetected for check in self.checks if check.undetected}

    def __str__(self) -> str:
        """Return a table: a line for each group."""
        width = max([len("group"), *(len(check.name) for check in self.checks)])
        rows = [f"{'group':<{width}}   size    error  check"]
        for check in self.checks:
            result = "ok" if check.ok else "FAILS"
            if check.undetected:
                result += f", undetected: {', '.join(map(show, check.undetected))}"
            rows.append(f"{check.name:<{width}}  {check.size:>5}  {check.error:7.1e}  {result}")
        return "\n".join(rows)


_find_groups = groups  # `verify_groups` has an argument of that name


def verify_groups(
    fn: ModelFn,
    variables: Variables,
    *inputs: PyTree,
    groups: Groups | None = None,
    key: jax.Array | None = None,
    tolerance: float = 1e-4,
) -> Verification:
    """Check groups by running the function on permuted variables.

    Each group is permuted by a random cycle through all its coordinates, all members alike: the
    outputs must not change, except that updated parameters are returned permuted. Then each member
    in turn is left out, which must change an output. Freshly initialized variables hide errors,
    since zeros permute to zeros: fill them with random numbers before.

    Args:
      fn: a pure function of ``(variables, *inputs)``; compiled once. Random numbers that it draws
        are not permuted, so turn dropout off.
      variables: tree of arrays.
      inputs: trees of arrays.
      groups: what to check; by default what `compress_jax.trace.groups` finds.
      key: typed key for the permutations; by default that of seed 0.
      tolerance: the largest change that counts as none, relative to the largest entry of an output.

    Returns:
      The report; ``ok`` if no permutation of a whole group changes anything.

    Raises:
      ShapeError: if a variable or an input is not an array.

    Example:
      >>> import compress_jax as cj
      >>> params = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.zeros(2), "v": jnp.arange(2.0)[:, None]}
      >>> fn = lambda p, x: (x @ p["w"] + p["b"][None]) @ p["v"]
      >>> report = cj.trace.verify_groups(fn, params, jnp.ones((1, 1)))
      >>> report.ok, report.undetected
      (True, {'w:1': (('b', 0),)})
    """
    found = _find_groups(fn, variables, *inputs) if groups is None else groups
    leaves, rebuild = flatten(variables)
    for path, leaf in {**leaves, **flatten({"inputs": list(inputs)})[0]}.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ShapeError(
                f"{path!r} is only a shape; the permutation check runs the function and needs "
                "arrays"
            )
    compiled = jax.jit(lambda leaves, inputs: flatten(fn(rebuild(leaves), *inputs))[0])
    # NumPy draws the permutations, as they are needed on the host.
    key = jax.random.key(0) if key is None else key
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    expected = compiled(leaves, inputs)

    def change(group: Group, permutation: np.ndarray, members: Iterable[Member]) -> float:
        got = compiled(permuted(leaves, group, permutation, members), inputs)
        return _change(got, _permuted_outputs(leaves, expected, group, permutation))

    checks = []
    for group in found:
        change_of = partial(change, group, _cycle(rng, group.size))
        checks.append(_verified(group, change_of, tolerance))
    return Verification(tuple(checks))


def _verified(group: Group, change: Callable[[Iterable[Member]], float], tolerance: float) -> Check:
    """Permute a group, whole and with each member left out."""
    error = change(group.members)
    # A member whose omission changes nothing was not really tested (a bias of zeros).
    undetected = []
    for member in group.members:
        others = [other for other in group.members if other != member]
        if change(others) <= tolerance:
            undetected.append(member)
    return Check(group.name, group.size, error, error <= tolerance, tuple(undetected))


def _permuted_outputs(
    leaves: Leaves, expected: Leaves, group: Group, permutation: np.ndarray
) -> Leaves:
    """Permute those outputs that are updated members."""
    expected = dict(expected)
    for output, path in returned(expected, leaves).items():
        for member in group.members:
            if member[0] == path:
                order = group.order(member, permutation)
                expected[output] = jnp.take(expected[output], order, axis=member[1])
    return expected


def _cycle(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a random permutation of one cycle, which moves every coordinate."""
    order = rng.permutation(size)  # the cycle goes through the coordinates in this order
    cycle = np.empty(size, int)
    cycle[order] = np.roll(order, 1)
    return cycle


def _change(got: Leaves, expected: Leaves) -> float:
    """Return the largest difference, relative to each output's largest entry; NaN for a NaN."""
    changes = [_difference(_numbers(got[path]), _numbers(expected[path])) for path in expected]
    return float(np.max([0.0, *changes]))  # unlike `max`, keeps a NaN


def _numbers(x: Array) -> np.ndarray:
    """Return an output in double precision; of random keys, their data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = jax.random.key_data(x)
    return np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    same = got == expected  # infinities too, whose difference would be NaN
    # Only finite entries give a scale. Zeros give none: their change is taken as it is.
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0) or 1
    difference = np.where(same, 0, got) - np.where(same, 0, expected)
    return float(np.abs(difference).max(initial=0) / scale)
