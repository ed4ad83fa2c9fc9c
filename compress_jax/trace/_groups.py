"""`groups`: which parameter axes of a function can be permuted or shortened together, and which cannot, and why."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from compress_jax.trace._analyse import Analysis, analyse
from compress_jax.trace.axes import Leaf
from compress_jax.trace.group import Group, Groups, Member, show
from compress_jax.trace.site import Position

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
    analysis = analyse(fn, variables, *inputs)
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
