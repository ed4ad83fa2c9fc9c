"""`groups`: which parameter axes of a function can be permuted or shortened together, and which cannot, and why."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import flatten
from compress_jax.core.types import ModelFn, PyTree, Variables
from compress_jax.trace._groups.analyze import Analysis, analyze, returned
from compress_jax.trace._groups.axes import Leaf, Member
from compress_jax.trace._jaxpr.site import Position

# A group: everything along which a network's parameters must be permuted or removed together; and
# doing so.


@dataclass(frozen=True)
class Group:
    """Channels, heads, features: indices that the same ones of every member belong to.

    Attributes:
      name: where they are produced, such as ``"params/conv/kernel:3"`` for axis 3 of that kernel; a
        second group produced along the same axis ends in ``#2``. It depends neither on shapes nor
        on the run.
      size: how many there are.
      members: the parameter axes they lie in, in the order of the tree.
      coordinates: for each member, which of them each index of the axis belongs to, -1 for none:
        int array of the axis' length. Where one occurs several times (a flattened feature map), its
        first occurrences correspond to the others' first ones, the second ones to the second ones,
        and so on.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    coordinates: dict[Member, np.ndarray] = field(repr=False, compare=False)

    def mask(self, member: Member, kept: Iterable[int]) -> np.ndarray:
        """Return which indices of a member's axis are left if only some of the group are kept.

        Args:
          member: path and axis.
          kept: the coordinates to keep.

        Returns:
          bool array of the axis' length.

        Example:
          >>> flat = Group("conv/kernel:3", 2, (("dense/kernel", 0),), {("dense/kernel", 0): np.array([0, 1, 0, 1])})
          >>> flat.mask(("dense/kernel", 0), [1]).tolist()
          [False, True, False, True]
        """
        place = self.coordinates[member]
        return (place < 0) | np.isin(place, np.asarray(list(kept), int))

    def order(self, member: Member, permutation: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return which old index every index of a member's axis takes over if the group is permuted.

        Args:
          member: path and axis.
          permutation: coordinate ``i`` becomes what ``permutation[i]`` was.

        Returns:
          int array of the axis' length.

        Example:
          >>> flat = Group("conv/kernel:3", 2, (("dense/kernel", 0),), {("dense/kernel", 0): np.array([0, 1, 0, 1])})
          >>> flat.order(("dense/kernel", 0), [1, 0]).tolist()
          [1, 0, 3, 2]
        """
        place = self.coordinates[member]
        inside = np.flatnonzero(place >= 0)
        occurrences = inside[np.argsort(place[inside], kind="stable")].reshape(
            self.size, -1
        )  # of each coordinate, in order
        order = np.arange(len(place))
        order[occurrences] = occurrences[np.asarray(permutation)]
        return order


@dataclass(frozen=True)
class Groups:
    """The groups of a function's parameters, in the order in which it produces them; a read-only list.

    Attributes:
      frozen: why parameter axes stay as they are, or a part or a factor of them does, by
        ``(path, axis)``; axes of size 1 left out. Every index of an axis that is not listed lies in
        a group.
      unknown: how often each primitive occurs that no rule is known for; all it touches is frozen.
    """

    items: tuple[Group, ...]
    frozen: dict[Member, str]
    unknown: dict[str, int]

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.items)

    def __iter__(self):
        """Go through the groups."""
        return iter(self.items)

    def __getitem__(self, which: Any) -> Any:
        """Return a group by its place or its name, or several by a slice."""
        if not isinstance(which, str):
            return self.items[which]
        for group in self.items:
            if group.name == which:
                return group
        listing = "\n  ".join(group.name for group in self.items) or "(none)"
        raise NoMatchError(f"no group is called {which!r}. The groups are:\n  {listing}")

    def keep(self, variables: Variables, kept: Mapping[str, Sequence[int] | np.ndarray]) -> Any:
        """Return smaller variables, of which only some coordinates of some groups are left.

        Args:
          variables: the tree that was analysed, of arrays.
          kept: by name of a group the coordinates to keep, in any order; other groups stay whole.

        Returns:
          The tree with shorter axes; the order of what is left is as before.

        Raises:
          NoMatchError: if there is no group of a name.
          ShapeError: if a coordinate is not one of the group's, or none is kept.

        Example:
          >>> from compress_jax.trace._groups.groups import groups
          >>> params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
          >>> smaller = groups(lambda p, x: (x @ p["w"]) @ p["v"], params, jnp.ones((1, 3))).keep(params, {"w:1": [0, 2]})
          >>> {path: w.shape for path, w in smaller.items()}
          {'v': (2, 2), 'w': (3, 2)}
        """
        leaves, rebuild = flatten(variables)
        masks: dict[Member, np.ndarray] = {}
        for name, coordinates in kept.items():
            group = self[name]
            _check(group, coordinates)
            for member in group.members:
                masks[member] = masks.get(member, True) & group.mask(member, coordinates)
        for (path, axis), mask in masks.items():
            leaves[path] = jnp.take(leaves[path], np.flatnonzero(mask), axis=axis)
        return rebuild(leaves)

    def permute(
        self, variables: Variables, group: Group | str, permutation: Sequence[int] | np.ndarray
    ) -> Any:
        """Return variables of which the members of one group are permuted; the function they give is the same.

        Args:
          variables: the tree that was analysed, of arrays.
          group: one of the groups, or its name.
          permutation: of ``range(group.size)``; coordinate ``i`` becomes what ``permutation[i]``
            was.

        Returns:
          The tree.

        Raises:
          NoMatchError: if there is no group of that name.
          ShapeError: if it is not a permutation of the group's coordinates.

        Example:
          >>> from compress_jax.trace._groups.groups import groups
          >>> params = {"w": jnp.array([[1.0, 2.0]]), "v": jnp.array([[3.0], [4.0]])}
          >>> found = groups(lambda p, x: (x @ p["w"]) @ p["v"], params, jnp.ones((1, 1)))
          >>> {path: w.tolist() for path, w in found.permute(params, "w:1", [1, 0]).items()}
          {'v': [[4.0], [3.0]], 'w': [[2.0, 1.0]]}
        """
        found: Group = group if isinstance(group, Group) else self[group]
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
    leaves: Mapping[str, Any], group: Group, permutation: Any, members: Iterable[Member]
) -> dict[str, Any]:
    """Return leaves of which certain members of a group are permuted.

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
        leaves[path] = jnp.take(leaves[path], group.order((path, axis), permutation), axis=axis)
    return leaves


def _check(group: Group, kept: Sequence[int] | np.ndarray) -> None:
    if not len(kept) or not set(np.asarray(kept).tolist()) <= set(range(group.size)):
        raise ShapeError(
            f"{group.name!r} has coordinates 0 to {group.size - 1}; keep at least one of them, "
            f"not {list(kept)}"
        )


def _table(groups: Sequence[Group]) -> list[str]:
    """Return a line for each group: name, size, members."""
    width = max([len(group.name) for group in groups], default=5)
    rows = [
        f"{group.name:<{width}}  {group.size:>5}  {', '.join(map(show, group.members))}"
        for group in groups
    ]
    return [f"{'group':<{width}}  {'size':>5}  members", *rows] if rows else ["no groups"]


def _frozen(frozen: dict[Member, str]) -> list[str]:
    """Return a line for each reason: what is frozen for it."""
    reasons = dict.fromkeys(frozen.values())
    return [
        f"frozen ({reason}): {', '.join(show(m) for m, why in frozen.items() if why == reason)}"
        for reason in reasons
    ]


def _unknown(unknown: dict[str, int]) -> list[str]:
    """Return a line that lists the primitives without a rule."""
    return (
        ["unknown ops: " + ", ".join(f"{name} x{count}" for name, count in unknown.items())]
        if unknown
        else []
    )


def show(member: Member) -> str:
    """Return a member as text.

    Example:
      >>> show(("dense/kernel", 1))
      'dense/kernel:1'
    """
    return f"{member[0]}:{member[1]}"


Coordinates = dict[Leaf, np.ndarray]
INDEXED = "single indices are picked out"


def groups(fn: ModelFn, variables: Variables, *inputs: PyTree) -> Groups:
    r"""Return the groups of parameter axes that belong together: channels, heads, hidden features.

    For every group and every permutation ``P`` of its coordinates
    ``fn(P variables, *inputs) == fn(variables, *inputs)``, where ``P`` permutes all members alike.
    Shortening all members alike therefore leaves out the same features everywhere: it is what
    structured pruning may remove. They are found by following axes through the function's jaxpr:
    both operands of a sum, and the contracted axes of a product, are one axis; reshapes and
    concatenations build axes from parts. What is not understood is frozen: inputs, outputs,
    constants that vary, positions, windows, whatever is looked up by index and primitives that are
    not known. Random numbers count as good in any order, so dropout freezes nothing. An output that
    is a parameter returned anew (batch statistics) goes with that parameter.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.

    Returns:
      The groups in the order in which the function produces them, with what is frozen and why;
      `Groups` permutes and shortens variables, ``print`` shows it all as a table.

    Raises:
      ShapeError: if an argument has a leaf that is not an array.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"conv": jnp.ones((3, 3, 3, 4)), "head": jnp.ones((4 * 4 * 4, 10))}
      >>> def fn(params, x):
      ...     x = jax.lax.conv_general_dilated(x, params["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
      ...     return jax.nn.relu(x).reshape(1, -1) @ params["head"]
      >>> print(groups(fn, params, jnp.ones((1, 8, 8, 3))))
      group    size  members
      conv:3      4  conv:3, head:0
      frozen (spatial window): conv:0, conv:1, head:0
      frozen (input): conv:2
      frozen (output): head:1

    References:
      Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023 (the idea of a dependency
      graph; here of axes).
    """
    analysis = analyze(fn, variables, *inputs)
    free, places = _free(analysis), _places(analysis)
    leaves = dict.fromkeys(leaf for along in places.values() for leaf in along if leaf in free)
    found = {
        leaf: {member: along[leaf] for member, along in places.items() if leaf in along}
        for leaf in leaves
    }
    named = _named(analysis, found, places)
    items = tuple(
        Group(name, leaf.size, tuple(found[leaf]), found[leaf]) for leaf, name in named.items()
    )
    return Groups(items, dict(_frozen_members(analysis, places, free)), analysis.unknown)


def _places(analysis: Analysis) -> dict[Member, Coordinates]:
    """Return for each parameter axis longer than 1 the coordinates in the leaves it is made of, in their order."""
    every = {
        (path, i): axis
        for path, dims in analysis.params.items()
        for i, axis in enumerate(dims)
        if axis.size > 1
    }
    return {member: analysis.walk.axes.coordinates(axis) for member, axis in every.items()}


def _free(analysis: Analysis) -> set[Leaf]:
    """Return the leaves that nothing freezes and that something sums over: others have no effect."""
    walk = analysis.walk
    used = {
        leaf
        for summed in walk.summed.values()
        for axis in summed
        for leaf in walk.axes.leaves(axis)
    }
    return {leaf for leaf in used if walk.axes.reason(leaf) is None}


def _frozen_members(
    analysis: Analysis, places: dict[Member, Coordinates], free: set[Leaf]
) -> Iterator[tuple[Member, str]]:
    """Yield why axes, or parts of them, stay as they are."""
    for member, along in places.items():
        stuck = [analysis.walk.axes.reason(leaf) or "unused" for leaf in along if leaf not in free]
        covered = np.any([place >= 0 for leaf, place in along.items() if leaf in free], axis=0)
        if stuck or not covered.all():
            yield member, ", ".join(dict.fromkeys(stuck or [INDEXED]))


def _named(
    analysis: Analysis,
    found: dict[Leaf, dict[Member, np.ndarray]],
    places: dict[Member, Coordinates],
) -> dict[Leaf, str]:
    """Return a name for each group, in the order in which they are produced, then of their place along that axis."""
    order = {member: place for place, member in enumerate(_producers(analysis))}
    late = len(order)
    first = {
        leaf: min(axes, key=lambda member: order.get(member, late)) for leaf, axes in found.items()
    }
    seen: Counter[str] = Counter()
    named = {}
    for leaf in sorted(
        first,
        key=lambda leaf: (order.get(first[leaf], late), list(places[first[leaf]]).index(leaf)),
    ):
        base = show(first[leaf])
        seen[base] += 1
        named[leaf] = base if seen[base] == 1 else f"{base}#{seen[base]}"
    return named


def _producers(analysis: Analysis) -> list[Member]:
    """Return the parameter axes that stay in the result of a contraction or a lookup, in program order."""
    traced, made = analysis.traced, {}
    for position, table in traced.found.lookups.items():
        made[position] = [(table, axis) for axis in range(1, len(analysis.params[table]))]
    for position, site in traced.sites.items():
        if site.param is not None:
            gone = (*(site.param_axes or ()), *site.stack_axes)
            kept = [axis for axis in range(len(analysis.params[site.param])) if axis not in gone]
            made[position] = [
                (site.param, axis) for axis in (kept if site.param_axes else reversed(kept))
            ]
    return list(
        dict.fromkeys(member for position in sorted(made, key=_place) for member in made[position])
    )


def _place(position: Position) -> tuple[tuple[int, int | str], ...]:
    """Return a key that sorts positions in program order."""
    return tuple((0, step) if isinstance(step, int) else (1, step) for step in position)


# The permutation check: whether groups are what they claim to be, by running the function.


Leaves = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What permuting one group did.

    Attributes:
      name: of the group.
      size: of the group.
      error: largest change of an output, relative to that output's largest entry.
      ok: whether the error is within the tolerance.
      undetected: members that can be left out of the permutation without any output changing:
        parameters that have no effect, whose entries are all equal (a bias of zeros), or that are
        the only member.
    """

    name: str
    size: int
    error: float
    ok: bool
    undetected: tuple[Member, ...]


@dataclass(frozen=True)
class Verification:
    """What permuting every group did.

    Attributes:
      checks: one for each group.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no group's permutation changes the function."""
        return all(check.ok for check in self.checks)

    @property
    def undetected(self) -> dict[str, tuple[Member, ...]]:
        """By name of the group, the members of which the check cannot tell that they belong to it."""
        return {check.name: check.undetected for check in self.checks if check.undetected}

    def __str__(self) -> str:
        """Return a table: a line for each group."""
        width = max([len(check.name) for check in self.checks], default=5)
        rows = [f"{'group':<{width}}   size    error  check"]
        for check in self.checks:
            missed = (
                f", undetected: {', '.join(map(show, check.undetected))}"
                if check.undetected
                else ""
            )
            result = ("ok" if check.ok else "FAILS") + missed
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
    outputs must not change, except that parameters returned anew come back permuted. Then each
    member in turn is left out, which must change an output. Freshly initialised variables hide
    errors, since zeros permute to zeros: give them random content before.

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
      >>> params = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.zeros(2), "v": jnp.array([[3.0], [4.0]])}
      >>> report = verify_groups(lambda p, x: (x @ p["w"] + p["b"][None]) @ p["v"], params, jnp.ones((1, 1)))
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
    rng = np.random.default_rng(
        np.asarray(jax.random.key_data(jax.random.key(0) if key is None else key))
    )
    expected = compiled(leaves, inputs)

    def change(group: Group, permutation: np.ndarray, members: Iterable[Member]) -> float:
        got = compiled(permuted(leaves, group, permutation, members), inputs)
        return _change(got, _returned_alike(leaves, expected, group, permutation))

    return Verification(
        tuple(
            _verified(group, partial(change, group, _cycle(rng, group.size)), tolerance)
            for group in found
        )
    )


def _verified(group: Group, change: Callable[[Iterable[Member]], float], tolerance: float) -> Check:
    """Permute a group, whole and with each member left out."""
    error = change(group.members)
    without = {
        member: [other for other in group.members if other != member] for member in group.members
    }
    undetected = tuple(member for member, others in without.items() if change(others) <= tolerance)
    return Check(group.name, group.size, error, error <= tolerance, undetected)


def _returned_alike(
    leaves: Leaves, expected: Leaves, group: Group, permutation: np.ndarray
) -> Leaves:
    """Permute those outputs that are members returned anew."""
    expected = dict(expected)
    for output, path in returned(expected, leaves).items():
        for member in group.members:
            if member[0] == path:
                expected[output] = jnp.take(
                    expected[output], group.order(member, permutation), axis=member[1]
                )
    return expected


def _cycle(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a random permutation of one cycle: nothing stays where it is."""
    order, cycle = rng.permutation(size), np.empty(size, int)
    cycle[order] = np.roll(order, 1)
    return cycle


def _change(got: Leaves, expected: Leaves) -> float:
    """Return the largest difference, each output's relative to its largest entry; NaN if there is a NaN."""
    return float(
        np.max(
            [
                0.0,
                *(_difference(_numbers(got[path]), _numbers(expected[path])) for path in expected),
            ]
        )
    )


def _numbers(x: Any) -> np.ndarray:
    """Return an output in double precision; of random keys, their data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = jax.random.key_data(x)
    return np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    same = got == expected  # infinities too
    finite = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    return float(
        np.abs(np.where(same, 0, got) - np.where(same, 0, expected)).max(initial=0) / (finite or 1)
    )
