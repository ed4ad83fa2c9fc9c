"""Which channels go: ratios for each group, who competes with whom, and multiples that widths are rounded to."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compress_jax.core.amount import amount_exact
from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import match, matches
from compress_jax.core.types import Leaves
from compress_jax.trace import Group, Groups, Site

Ratio = float | Mapping[str, float]


def ratios(ratio: Ratio, names: list[str]) -> dict[str, float]:
    """Return each group's ratio: a number for all, or of the first glob that matches its name (0 if none does).

    Args:
      ratio: share of channels to remove, 0 to 1.
      names: of the groups.

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
        if names:
            match(pattern, names)
    return {
        name: next((share for glob, share in table.items() if matches(glob, name)), 0.0)
        for name in names
    }


def pools(groups: list[Group], share: dict[str, float], scope: str) -> list[list[Group]]:
    """Return which groups compete: those of one ratio, if they may (each for itself, all, or those built alike).

    Groups are built alike if their members are: as many parameters of the same last name, rank and
    axis.

    Args:
      groups: that take part.
      share: their ratios.
      scope: ``"local"``, ``"global"`` or ``"isomorphic"``.

    Returns:
      Lists of groups.

    Raises:
      ConfigError: if the scope is not known.
    """

    def kind(group: Group) -> Any:
        built = sorted((path.rpartition("/")[2], axis) for path, axis in group.members)
        return {"local": group.name, "global": None, "isomorphic": tuple(built)}[scope]

    if scope not in ("local", "global", "isomorphic"):
        raise ConfigError(f"scope={scope!r} is not known; use 'local', 'global' or 'isomorphic'")
    found: dict[Any, list[Group]] = {}
    for group in groups:
        found.setdefault((share[group.name], kind(group)), []).append(group)
    return list(found.values())


def choose(
    pool: list[Group],
    scores: dict[str, np.ndarray],
    ratio: float,
    multiples: Mapping[str, int] | None = None,
    most: float = 1.0,
) -> dict[str, np.ndarray]:
    """Return the channels that stay of groups that compete.

    The ``round(ratio * channels)`` of the lowest scores go, a half rounded up; of equal scores the
    later ones first. No group loses more than its share ``most``, nor its last channel; then what
    stays is rounded up to a multiple.

    Args:
      pool: the groups.
      scores: of their channels.
      ratio: share of all their channels to remove.
      multiples: by name of a group, the multiple that what stays is rounded up to; 1 if not given.
      most: of any one group.

    Returns:
      ``{name: ascending indices}``.

    Example:
      >>> wide, narrow = (Group(name, n, (), {}) for name, n in (("wide", 4), ("narrow", 2)))
      >>> scores = {"wide": np.array([3.0, 0.1, 0.2, 0.3]), "narrow": np.array([1.0, 2.0])}
      >>> {name: kept.tolist() for name, kept in choose([wide, narrow], scores, 0.5).items()}
      {'wide': [0], 'narrow': [0, 1]}
    """
    order = {group.name: np.lexsort((-np.arange(group.size), scores[group.name])) for group in pool}
    cap = {group.name: min(amount_exact(most, group.size), group.size - 1) for group in pool}
    lowest = [
        (scores[name][i], place, -i, name)
        for place, name in enumerate(order)
        for i in order[name][: cap[name]]
    ]
    gone = sorted(lowest)[: amount_exact(ratio, sum(group.size for group in pool))]
    kept = {}
    for group in pool:
        left = group.size - sum(name == group.name for *_, name in gone)
        multiple = (multiples or {}).get(group.name, 1)
        left = min(-(-left // multiple) * multiple, group.size)
        kept[group.name] = np.sort(order[group.name][group.size - left :])
    return kept


# Widths: how many features a kernel takes or gives, which one group of channels or a product of
# several makes up.


Axes = tuple[int, ...]


class Width(NamedTuple):
    """The inputs or the outputs of one kernel.

    Attributes:
      path: of the kernel.
      axes: of the stored kernel that make it up: several where it is stored as a tensor
        (``[in, heads, head_dim]``).
      size: how many there are.
      times: by name of a group, in how many of them each of its channels lies.
      products: pairs of groups that multiply.
    """

    path: str
    axes: Axes
    size: int
    times: dict[str, int]
    products: frozenset[frozenset[str]]

    def __str__(self) -> str:
        """Return it as text."""
        return f"{self.path}:{','.join(map(str, self.axes))}"


def widths(found: Groups, sites: Sequence[Site], leaves: Leaves) -> tuple[Width, ...]:
    """Return the widths of all kernels in which groups lie.

    Args:
      found: the groups.
      sites: of the function.
      leaves: arrays or shapes by path.

    Returns:
      The widths, in the order of the computation.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace import groups, sites as sites_of
      >>> params = {"a": jnp.ones((2, 3, 4)), "b": jnp.ones((3, 4, 1))}
      >>> def fn(p, x):
      ...     return jnp.einsum("bhd,hdo->bo", jnp.einsum("bi,ihd->bhd", x, p["a"]), p["b"])
      >>> for width in widths(groups(fn, params, jnp.ones((1, 2))), sites_of(fn, params, jnp.ones((1, 2))), params):
      ...     print(width, width.size, width.times)
      a:1,2 12 {'a:1': 4, 'a:2': 3}
      b:0,1 12 {'a:1': 4, 'a:2': 3}
    """
    members = {(path, axis) for group in found for path, axis in group.members}
    made: dict[tuple[str, Axes], Width] = {}
    for site in sites:
        if site.param is None or site.param_axes is None or site.batch_axes is None:
            continue
        shape = np.shape(leaves[site.param])
        gone = (*site.param_axes, *site.batch_axes, *site.stack_axes)
        into = [
            axis for axis in site.param_axes if site.kind != "conv" or (site.param, axis) in members
        ]
        for axes in (into, [axis for axis in range(len(shape)) if axis not in gone]):
            chosen = tuple(axis for axis in sorted(axes) if shape[axis] > 1)
            if any((site.param, axis) in members for axis in chosen):
                made[site.param, chosen] = _width(found, site.param, chosen, shape)
    return tuple(made.values())


def _width(found: Groups, path: str, axes: Axes, shape: tuple[int, ...]) -> Width:
    inside = [group for group in found if any((path, axis) in group.members for axis in axes)]
    times = {}
    for group in inside:
        places = [group.coordinates.get((path, axis)) for axis in axes]
        counts = [
            n if place is None else np.count_nonzero(place == 0)
            for place, n in zip(places, _sizes(axes, shape), strict=True)
        ]
        times[group.name] = math.prod(int(count) for count in counts)
    pairs = ((a, b) for i, a in enumerate(inside) for b in inside[i + 1 :])
    products = frozenset(
        frozenset((a.name, b.name)) for a, b in pairs if _multiply(a, b, path, axes)
    )
    return Width(path, axes, math.prod(_sizes(axes, shape)), times, products)


def _sizes(axes: Axes, shape: tuple[int, ...]) -> list[int]:
    return [shape[axis] for axis in axes]


def _multiply(a: Group, b: Group, path: str, axes: Axes) -> bool:
    """Tell whether entries lie in channels of both: along different axes, or where one axis is a product."""
    for i in axes:
        for j in axes:
            ours, theirs = a.coordinates.get((path, i)), b.coordinates.get((path, j))
            if (
                ours is not None
                and theirs is not None
                and (i != j or ((ours >= 0) & (theirs >= 0)).any())
            ):
                return True
    return False


def one_of_each(
    taking: Sequence[Group],
    every: Iterable[Width],
    share: Mapping[str, float],
    ratio: Any,
    most: float,
) -> dict[str, str]:
    """Return which groups stay whole, and why, so that a ratio is one of widths: of groups that multiply one loses channels.

    It is the one that comes closest to the ratio, the outer one of those that come as close (heads,
    before their features). Of groups that different globs of a ratio speak of, each loses its own.

    Args:
      taking: groups that may lose channels.
      every: the widths.
      share: by name of a group, the share to remove.
      ratio: as the user gave it.
      most: the largest share that a group may lose.

    Returns:
      ``{name: reason}``.
    """
    names = [group.name for group in taking]
    beside: dict[str, set[str]] = {name: set() for name in names}
    for pair in {pair for width in every for pair in width.products}:
        a, b = sorted(pair)
        if a in beside and b in beside and _said_by(ratio, a) == _said_by(ratio, b):
            beside[a].add(b)
            beside[b].add(a)

    def off(group: Group) -> float:
        lost = min(
            amount_exact(share[group.name], group.size),
            amount_exact(most, group.size),
            group.size - 1,
        )
        return abs(lost / group.size - share[group.name])

    order = sorted(
        taking, key=lambda group: (-len(beside[group.name]), off(group), names.index(group.name))
    )
    whole: dict[str, str] = {}
    for group in order:
        if group.name not in whole:
            others = beside[group.name] - whole.keys()
            whole |= dict.fromkeys(others, f"its width is shortened by {group.name}")
    return whole


def _said_by(ratio: Any, name: str) -> str | None:
    """Return the glob that a group's ratio comes from."""
    return (
        next((glob for glob in ratio if matches(glob, name)), None)
        if isinstance(ratio, Mapping)
        else None
    )


def steps(taking: Sequence[Group], every: Iterable[Width], round_to: int) -> dict[str, int]:
    """Return by name of a group the multiple that its size is rounded up to, so that widths are multiples of ``round_to``.

    Args:
      taking: groups that lose channels.
      every: the widths.
      round_to: the multiple of widths.

    Returns:
      ``{name: multiple}``.
    """
    names, every = {group.name for group in taking}, tuple(every)
    made = {}
    for name in names:
        own = [width for width in every if name in width.times]
        alone = not any(name in pair and pair <= names for width in own for pair in width.products)
        shared = math.gcd(*(width.times[name] for width in own)) if own and alone else 1
        made[name] = round_to // math.gcd(round_to, shared)
    return made
