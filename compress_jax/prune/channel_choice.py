"""Which channels go: ratios for each group, who competes with whom, and multiples that widths are rounded to."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import match, matches
from compress_jax.prune.amount import amount_exact
from compress_jax.trace import Group

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
            raise ConfigError(f"ratio {share} for {pattern!r}: the share of channels to remove lies between 0 and 1")
        if names:
            match(pattern, names)
    return {name: next((share for glob, share in table.items() if matches(glob, name)), 0.0) for name in names}


def pools(groups: list[Group], share: dict[str, float], scope: str) -> list[list[Group]]:
    """Return which groups compete: those of one ratio, if they may (each for itself, all, or those built alike).

    Groups are built alike if their members are: as many parameters of the same last name, rank and axis.

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

    The ``round(ratio * channels)`` of the lowest scores go, a half rounded up; of equal scores the later ones first. No
    group loses more than its share ``most``, nor its last channel; then what stays is rounded up to a multiple.

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
    lowest = [(scores[name][i], place, -i, name) for place, name in enumerate(order) for i in order[name][: cap[name]]]
    gone = sorted(lowest)[: amount_exact(ratio, sum(group.size for group in pool))]
    kept = {}
    for group in pool:
        left = group.size - sum(name == group.name for *_, name in gone)
        multiple = (multiples or {}).get(group.name, 1)
        left = min(-(-left // multiple) * multiple, group.size)
        kept[group.name] = np.sort(order[group.name][group.size - left :])
    return kept
