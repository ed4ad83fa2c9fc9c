"""Which channels are removed: the ratio of each group, groups that compete, widths and multiples.

A width is the number of inputs or outputs of one kernel. It is the size of one group of channels,
or the product of several (heads and their features).
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain, combinations, product
from typing import NamedTuple

import numpy as np

from compress_jax.core.amount import amount_exact
from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import match, matches
from compress_jax.core.types import Leaves, Shape
from compress_jax.trace import Group, Groups, Site

Ratio = float | Mapping[str, float]
"""The share of channels to remove, or ``{glob over names of groups: share}``."""

Axes = tuple[int, ...]


def ratios(ratio: Ratio, names: list[str]) -> dict[str, float]:
    """Return the ratio of each group: the number, or that of the first glob that matches, else 0.

    Args:
      ratio: share of channels to remove, 0 to 1.
      names: the names of the groups.

    Returns:
      ``{name: ratio}``.

    Raises:
      ConfigError: if a ratio is not between 0 and 1.
      NoMatchError: if a glob matches no group; lists them.

    Example:
      >>> ratios({"head*": 0.0, "**": 0.5}, ["conv:3", "head:1"])
      {'conv:3': 0.5, 'head:1': 0.0}
    """
    table = ratio if isinstance(ratio, Mapping) else {"**": ratio}
    for pattern, share in table.items():
        if not 0 <= share <= 1:
            raise ConfigError(
                f"ratio {share} for {pattern!r}: the share of channels to remove lies between 0 "
                "and 1"
            )
        # A glob that matches nothing is a mistake, unless the model has no groups at all.
        if names:
            match(pattern, names)
    found = {}
    for name in names:
        glob = _glob_of(table, name)
        found[name] = 0.0 if glob is None else table[glob]
    return found


def _glob_of(ratio: Ratio | None, name: str) -> str | None:
    """Return the glob that sets a group's ratio; None if a number does, or nothing."""
    globs = ratio if isinstance(ratio, Mapping) else ()
    return next((glob for glob in globs if matches(glob, name)), None)


def pools(groups: list[Group], share: dict[str, float], scope: str) -> list[list[Group]]:
    """Return the lists of groups whose channels compete.

    Only groups of the same ratio compete: with ``"local"`` none, with ``"global"`` all, with
    ``"isomorphic"`` those whose members have the same last names and axes.

    Args:
      groups: the groups that lose channels.
      share: the ratio by name of a group.
      scope: ``"local"``, ``"global"`` or ``"isomorphic"``.

    Returns:
      Lists of groups.

    Raises:
      ConfigError: if the scope is not known.
    """
    if scope not in ("local", "global", "isomorphic"):
        raise ConfigError(f"scope={scope!r} is not known; use 'local', 'global' or 'isomorphic'")
    found: dict[Hashable, list[Group]] = {}
    for group in groups:
        members = sorted((path.rpartition("/")[2], axis) for path, axis in group.members)
        # Groups of equal ratios and kinds compete.
        kind = {"local": group.name, "global": None, "isomorphic": tuple(members)}[scope]
        found.setdefault((share[group.name], kind), []).append(group)
    return list(found.values())


def choose(
    pool: list[Group],
    scores: dict[str, np.ndarray],
    ratio: float,
    multiples: Mapping[str, int] | None = None,
    max_ratio: float = 1.0,
) -> dict[str, np.ndarray]:
    """Return the channels that stay in groups that compete.

    The ``round(ratio * channels)`` channels of lowest score are removed, a half rounded up; of
    equal scores the later ones first. No group loses more than ``max_ratio``, nor its last channel.
    The number that stays is then rounded up to a multiple.

    Args:
      pool: the groups.
      scores: the scores of channels by name of a group.
      ratio: the share of all their channels to remove.
      multiples: the multiple by name of a group; 1 if not given.
      max_ratio: the largest share that one group may lose.

    Returns:
      ``{name: ascending indices}``.

    Example:
      >>> wide, narrow = (Group(name, n, (), {}) for name, n in (("wide", 4), ("narrow", 2)))
      >>> scores = {"wide": np.array([3.0, 0.1, 0.2, 0.3]), "narrow": np.array([1.0, 2.0])}
      >>> {name: kept.tolist() for name, kept in choose([wide, narrow], scores, 0.5).items()}
      {'wide': [0], 'narrow': [0, 1]}
    """
    order = {}
    candidates = []
    for place, group in enumerate(pool):
        score = scores[group.name]
        ranked = np.lexsort((-np.arange(group.size), score))  # ascending, later ones first
        # The last channel of a group never competes.
        cap = min(amount_exact(max_ratio, group.size), group.size - 1)
        candidates += [(score[i], place, -i, group.name) for i in ranked[:cap]]
        order[group.name] = ranked
    # Ties are broken by the order of the groups, then from the last channel on.
    count = amount_exact(ratio, sum(group.size for group in pool))
    removed = Counter(name for *_, name in sorted(candidates)[:count])
    kept = {}
    for group in pool:
        multiple = (multiples or {}).get(group.name, 1)
        left = group.size - removed[group.name]
        left = min(-(-left // multiple) * multiple, group.size)  # rounded up
        kept[group.name] = np.sort(order[group.name][group.size - left :])
    return kept


class Width(NamedTuple):
    """The inputs or the outputs of one kernel.

    Attributes:
      path: the path of the kernel.
      axes: the axes of the stored kernel that make up the width; several in a kernel such as
        ``[in, heads, head_dim]``.
      size: the number of inputs or outputs.
      times: by name of a group, the number of them that each of its channels spans.
      products: pairs of groups whose sizes multiply.
    """

    path: str
    axes: Axes
    size: int
    times: dict[str, int]
    products: frozenset[frozenset[str]]

    def __str__(self) -> str:
        """Return the kernel and its axes as text."""
        return f"{self.path}:{','.join(map(str, self.axes))}"


def widths(found: Groups, sites: Sequence[Site], leaves: Leaves) -> tuple[Width, ...]:
    """Return the widths of all kernels that groups of channels make up.

    Args:
      found: the groups.
      sites: the sites of the function.
      leaves: arrays or shapes by path.

    Returns:
      The widths, in the order of the computation.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((3, 4, 1))}
      >>> def fn(p, x):
      ...     return jnp.einsum("bhd,hdo->bo", jnp.einsum("bi,ihd->bhd", x, p["a"]), p["b"])
      >>> found = cj.trace.groups(fn, params, jnp.ones((1, 2)))
      >>> for width in widths(found, cj.trace.sites(fn, params, jnp.ones((1, 2))), params):
      ...     print(width, width.size, width.times)
      a:1,2 12 {'a:1': 4, 'a:2': 3}
      b:0,1 12 {'a:1': 4, 'a:2': 3}
    """
    members = {member for group in found for member in group.members}
    made: dict[tuple[str, Axes], Width] = {}
    for site in sites:
        # Products of activations have no kernel; where axes are unknown, so are widths.
        if site.param is None or site.param_axes is None or site.batch_axes is None:
            continue
        path = site.param
        shape = np.shape(leaves[path])
        summed = site.param_axes
        if site.kind == "conv":  # the window is summed over, but is no width
            summed = [axis for axis in summed if (path, axis) in members]
        # What is neither summed over nor a batch or stack axis indexes outputs.
        other = (*site.param_axes, *site.batch_axes, *site.stack_axes)
        outputs = [axis for axis in range(len(shape)) if axis not in other]
        for axes in (summed, outputs):
            chosen = tuple(axis for axis in sorted(axes) if shape[axis] > 1)
            if any((path, axis) in members for axis in chosen):
                made[path, chosen] = _width(found, path, chosen, shape)
    return tuple(made.values())


def _width(found: Groups, path: str, axes: Axes, shape: Shape) -> Width:
    inside = [group for group in found if any((path, axis) in group.members for axis in axes)]
    times = {}
    for group in inside:
        # Entries along each axis that belong to channel 0: all of them, if the group is elsewhere.
        counts = []
        for axis in axes:
            channel = group.coordinates.get((path, axis))
            counts.append(shape[axis] if channel is None else int((channel == 0).sum()))
        times[group.name] = math.prod(counts)
    products = frozenset(
        frozenset((a.name, b.name))
        for a, b in combinations(inside, 2)
        if _multiply(a, b, path, axes)
    )
    return Width(path, axes, math.prod(shape[axis] for axis in axes), times, products)


def _multiply(a: Group, b: Group, path: str, axes: Axes) -> bool:
    """Return whether some entries belong to channels of both groups.

    So do all entries if the groups lie along different axes, or some if one axis is a product.
    """
    for i, j in product(axes, axes):
        ours = a.coordinates.get((path, i))
        theirs = b.coordinates.get((path, j))
        if ours is None or theirs is None:
            continue
        if i != j or ((ours >= 0) & (theirs >= 0)).any():
            return True
    return False


def one_of_each(
    taking: Sequence[Group],
    every: Iterable[Width],
    share: Mapping[str, float],
    ratio: Ratio | None,
    max_ratio: float,
) -> dict[str, str]:
    """Choose one of the groups that multiply to a width; return the others with the reason.

    The ratio is then one of the width. The chosen group is the one that comes closest to the ratio,
    or the outer one of two that come as close (heads, before their features). Groups whose ratios
    are set by different globs all lose channels.

    Args:
      taking: the groups that may lose channels.
      every: the widths.
      share: the share to remove by name of a group.
      ratio: the ratio that the user gave.
      max_ratio: the largest share that one group may lose.

    Returns:
      ``{name: reason}`` of the groups that stay whole.
    """
    names = [group.name for group in taking]
    neighbors: dict[str, set[str]] = {name: set() for name in names}
    pairs: set[frozenset[str]] = set()
    for width in every:
        pairs |= width.products
    # Two groups exclude each other only if the same glob, or the same number, sets both ratios.
    for pair in pairs:
        a, b = sorted(pair)
        if a in neighbors and b in neighbors and _glob_of(ratio, a) == _glob_of(ratio, b):
            neighbors[a].add(b)
            neighbors[b].add(a)

    def distance(group: Group) -> float:
        """Return how far the removable share of a group is from its ratio."""
        wanted = share[group.name]
        lost = min(
            amount_exact(wanted, group.size),
            amount_exact(max_ratio, group.size),
            group.size - 1,
        )
        return abs(lost / group.size - wanted)

    # By neighbors first: a group that multiplies with several others stands for all of them.
    def rank(group: Group) -> tuple[int, float, int]:
        return -len(neighbors[group.name]), distance(group), names.index(group.name)

    whole: dict[str, str] = {}
    for group in sorted(taking, key=rank):
        if group.name not in whole:
            others = neighbors[group.name] - whole.keys()
            whole |= dict.fromkeys(others, f"its width is shortened by {group.name}")
    return whole


def multiples_of(taking: Sequence[Group], every: Iterable[Width], round_to: int) -> dict[str, int]:
    """Return the multiple of each group's size for which widths are multiples of ``round_to``.

    Args:
      taking: the groups that lose channels.
      every: the widths.
      round_to: the multiple of widths.

    Returns:
      ``{name: multiple}``.
    """
    names = {group.name for group in taking}
    every = tuple(every)
    multiples = {}
    for name in names:
        own = [width for width in every if name in width.times]
        pairs = set(chain.from_iterable(width.products for width in own))
        # A factor that the rest of a width has counts only if no other group shortens that rest.
        shared = 1
        if own and not any(name in pair and pair <= names for pair in pairs):
            shared = math.gcd(*(width.times[name] for width in own))
        multiples[name] = round_to // math.gcd(round_to, shared)
    return multiples
