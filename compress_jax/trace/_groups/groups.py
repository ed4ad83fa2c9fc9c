"""`groups`: which parameter axes of a function can be permuted or shortened together, and which cannot, and why."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten
from compress_jax.trace._groups.analyze import Analysis, analyze, returned
from compress_jax.trace._groups.axes import Leaf
from compress_jax.trace._groups.group import Group, Groups, Member, permuted, show
from compress_jax.trace._jaxpr.site import Position

Coordinates = dict[Leaf, np.ndarray]
INDEXED = "single indices are picked out"


def groups(fn: Callable[..., Any], variables: Any, *inputs: Any) -> Groups:
    r"""Return the groups of parameter axes that belong together: channels, heads, hidden features.

    For every group and every permutation ``P`` of its coordinates ``fn(P variables, *inputs) == fn(variables, *inputs)``,
    where ``P`` permutes all members alike. Shortening all members alike therefore leaves out the same features everywhere:
    it is what structured pruning may remove. They are found by following axes through the function's jaxpr: both operands
    of a sum, and the contracted axes of a product, are one axis; reshapes and concatenations build axes from parts. What
    is not understood is frozen: inputs, outputs, constants that vary, positions, windows, whatever is looked up by index
    and primitives that are not known. Random numbers count as good in any order, so dropout freezes nothing. An output
    that is a parameter returned anew (batch statistics) goes with that parameter.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.

    Returns:
      The groups in the order in which the function produces them, with what is frozen and why; `Groups` permutes and
      shortens variables, ``print`` shows it all as a table.

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
      Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023 (the idea of a dependency graph; here of axes).
    """
    analysis = analyze(fn, variables, *inputs)
    free, places = _free(analysis), _places(analysis)
    leaves = dict.fromkeys(leaf for along in places.values() for leaf in along if leaf in free)
    found = {leaf: {member: along[leaf] for member, along in places.items() if leaf in along} for leaf in leaves}
    named = _named(analysis, found, places)
    items = tuple(Group(name, leaf.size, tuple(found[leaf]), found[leaf]) for leaf, name in named.items())
    return Groups(items, dict(_frozen(analysis, places, free)), analysis.unknown)


def _places(analysis: Analysis) -> dict[Member, Coordinates]:
    """Return for each parameter axis longer than 1 the coordinates in the leaves it is made of, in their order."""
    every = {(path, i): axis for path, dims in analysis.params.items() for i, axis in enumerate(dims) if axis.size > 1}
    return {member: analysis.walk.axes.coordinates(axis) for member, axis in every.items()}


def _free(analysis: Analysis) -> set[Leaf]:
    """Return the leaves that nothing freezes and that something sums over: others have no effect."""
    walk = analysis.walk
    used = {leaf for summed in walk.summed.values() for axis in summed for leaf in walk.axes.leaves(axis)}
    return {leaf for leaf in used if walk.axes.reason(leaf) is None}


def _frozen(analysis: Analysis, places: dict[Member, Coordinates], free: set[Leaf]) -> Iterator[tuple[Member, str]]:
    """Yield why axes, or parts of them, stay as they are."""
    for member, along in places.items():
        stuck = [analysis.walk.axes.reason(leaf) or "unused" for leaf in along if leaf not in free]
        covered = np.any([place >= 0 for leaf, place in along.items() if leaf in free], axis=0)
        if stuck or not covered.all():
            yield member, ", ".join(dict.fromkeys(stuck or [INDEXED]))


def _named(
    analysis: Analysis, found: dict[Leaf, dict[Member, np.ndarray]], places: dict[Member, Coordinates]
) -> dict[Leaf, str]:
    """Return a name for each group, in the order in which they are produced, then of their place along that axis."""
    order = {member: place for place, member in enumerate(_producers(analysis))}
    late = len(order)
    first = {leaf: min(axes, key=lambda member: order.get(member, late)) for leaf, axes in found.items()}
    seen: Counter[str] = Counter()
    named = {}
    for leaf in sorted(first, key=lambda leaf: (order.get(first[leaf], late), list(places[first[leaf]]).index(leaf))):
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
            made[position] = [(site.param, axis) for axis in (kept if site.param_axes else reversed(kept))]
    return list(dict.fromkeys(member for position in sorted(made, key=_place) for member in made[position]))


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
      undetected: members that can be left out of the permutation without any output changing: parameters that have no
        effect, whose entries are all equal (a bias of zeros), or that are the only member.
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
            missed = f", undetected: {', '.join(map(show, check.undetected))}" if check.undetected else ""
            result = ("ok" if check.ok else "FAILS") + missed
            rows.append(f"{check.name:<{width}}  {check.size:>5}  {check.error:7.1e}  {result}")
        return "\n".join(rows)


def verify_groups(
    fn: Callable[..., Any],
    variables: Any,
    *inputs: Any,
    groups: Groups | None = None,
    key: jax.Array | None = None,
    tolerance: float = 1e-4,
) -> Verification:
    """Check groups by running the function on permuted variables.

    Each group is permuted by a random cycle through all its coordinates, all members alike: the outputs must not change,
    except that parameters returned anew come back permuted. Then each member in turn is left out, which must change an
    output. Freshly initialised variables hide errors, since zeros permute to zeros: give them random content before.

    Args:
      fn: a pure function of ``(variables, *inputs)``; compiled once. Random numbers that it draws are not permuted, so turn
        dropout off.
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
    found = groups(fn, variables, *inputs) if groups is None else groups
    leaves, rebuild = flatten(variables)
    for path, leaf in {**leaves, **flatten({"inputs": list(inputs)})[0]}.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ShapeError(f"{path!r} is only a shape; the permutation check runs the function and needs arrays")
    compiled = jax.jit(lambda leaves, inputs: flatten(fn(rebuild(leaves), *inputs))[0])
    rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.key(0) if key is None else key)))
    expected = compiled(leaves, inputs)

    def change(group: Group, permutation: np.ndarray, members: Iterable[Member]) -> float:
        got = compiled(permuted(leaves, group, permutation, members), inputs)
        return _change(got, _returned_alike(leaves, expected, group, permutation))

    return Verification(tuple(_check(group, partial(change, group, _cycle(rng, group.size)), tolerance) for group in found))


def _check(group: Group, change: Callable[[Iterable[Member]], float], tolerance: float) -> Check:
    """Permute a group, whole and with each member left out."""
    error = change(group.members)
    without = {member: [other for other in group.members if other != member] for member in group.members}
    undetected = tuple(member for member, others in without.items() if change(others) <= tolerance)
    return Check(group.name, group.size, error, error <= tolerance, undetected)


def _returned_alike(leaves: Leaves, expected: Leaves, group: Group, permutation: np.ndarray) -> Leaves:
    """Permute those outputs that are members returned anew."""
    expected = dict(expected)
    for output, path in returned(expected, leaves).items():
        for member in group.members:
            if member[0] == path:
                expected[output] = jnp.take(expected[output], group.order(member, permutation), axis=member[1])
    return expected


def _cycle(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a random permutation of one cycle: nothing stays where it is."""
    order, cycle = rng.permutation(size), np.empty(size, int)
    cycle[order] = np.roll(order, 1)
    return cycle


def _change(got: Leaves, expected: Leaves) -> float:
    """Return the largest difference, each output's relative to its largest entry; NaN if there is a NaN."""
    return float(np.max([0.0, *(_difference(_numbers(got[path]), _numbers(expected[path])) for path in expected)]))


def _numbers(x: Any) -> np.ndarray:
    """Return an output in double precision; of random keys, their data."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        x = jax.random.key_data(x)
    return np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    same = got == expected  # infinities too
    finite = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    return float(np.abs(np.where(same, 0, got) - np.where(same, 0, expected)).max(initial=0) / (finite or 1))
