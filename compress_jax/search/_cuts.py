"""Widths and depth beside the options of leaves, in one integer program."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from compress_jax.core.paths import flatten
from compress_jax.search._allocate import Link, assign
from compress_jax.search._candidate import Subject
from compress_jax.search._sensitivity import Sensitivities

DEPTH = "depth"
"""The unit of all blocks; other units are named as groups of channels, which have a colon."""

Shares = dict[str, float]
"""By unit the share of its channels, or of the blocks, that is removed."""


class Cut(NamedTuple):
    """What removing a share of one unit does.

    Attributes:
      unit: a group of channels by its name, or ``"depth"``.
      ratio: the share that is removed.
      score: how far the outputs move, as the options of leaves are scored.
      left: ``{path: the share of the leaf's entries that stays}``, of leaves that get smaller.

    Example:
      >>> Cut("dense/kernel:1", 0.5, 0.02, {"dense/kernel": 0.5}).ratio
      0.5
    """

    unit: str
    ratio: float
    score: float
    left: dict[str, float]


def name_of(shares: Mapping[str, float]) -> str:
    """Return a name that tells equal cuts by what they are.

    Example:
      >>> name_of({"a:0": 0.5, "b:1": 0.5}), name_of({"depth": 0.25})
      ('cut-0.5-229ae4', 'cut-0.25-9aa4f7')
    """
    key = hashlib.sha256(json.dumps(dict(shares), sort_keys=True).encode()).hexdigest()[:6]
    alike = set(shares.values())
    return "-".join(["cut", *([f"{alike.pop():g}"] if len(alike) == 1 else []), key])


def left_of(before: Subject, after: Subject) -> dict[str, float]:
    """Return the share of each leaf's entries that stays, of leaves that got smaller."""
    full = flatten(before.variables["params"])[0]
    small = flatten(after.variables["params"])[0]
    sizes = {path: small[path].size if path in small else 0 for path in full}
    return {path: sizes[path] / x.size for path, x in full.items() if sizes[path] < x.size}


def alike(cuts: Sequence[Cut]) -> list[Shares]:
    """Return the cuts that remove one share of every width, and those of depth alone.

    Example:
      >>> found = [Cut("a:0", 0.5, 1.0, {}), Cut("b:0", 0.5, 1.0, {}), Cut("depth", 0.5, 1.0, {})]
      >>> alike(found)
      [{'a:0': 0.5, 'b:0': 0.5}, {'depth': 0.5}]
    """
    found: dict[tuple[bool, float], Shares] = {}
    for cut in cuts:
        found.setdefault((cut.unit == DEPTH, cut.ratio), {})[cut.unit] = cut.ratio
    return list(found.values())


def recovered(cuts: Sequence[Cut], shares: Shares, score: float) -> list[Cut]:
    """Return cuts whose scores add up to what they score together after training.

    Args:
      cuts: with the scores of single ones before training.
      shares: what was removed together and trained: of equal shares.
      score: how far the outputs were from the network's then.

    Returns:
      All cuts; the scores of those in ``shares`` have one factor.

    Example:
      >>> found = [Cut("a:0", 0.5, 6.0, {}), Cut("b:0", 0.5, 2.0, {}), Cut("b:0", 0.25, 1.0, {})]
      >>> [cut.score for cut in recovered(found, {"a:0": 0.5, "b:0": 0.5}, 4.0)]
      [3.0, 1.0, 1.0]
    """
    own = [cut for cut in cuts if shares.get(cut.unit) == cut.ratio]
    total = sum(cut.score for cut in own)
    if total <= 0:
        return list(cuts)
    return [cut._replace(score=cut.score / total * score) if cut in own else cut for cut in cuts]


def smallest(table: Sensitivities, cuts: Sequence[Cut]) -> Sensitivities:
    """Return a table in which each leaf has one more option: all cuts, and its least bytes."""
    units = _units(cuts)
    sizes = {}
    for path, own in table.nbytes.items():
        stay = math.prod(min(c.left.get(path, 1.0) for c in each) for each in units.values())
        sizes[path] = {**own, "": _scaled(min(own.values()), stay)}
    return replace(table, nbytes=sizes)


def jointly(
    table: Sensitivities, cuts: Sequence[Cut], max_bytes: float, max_bitops: float
) -> tuple[Shares, dict[str, str]] | None:
    r"""Choose for each unit which share is removed, and for each leaf which option it takes.

    .. math:: \min_{r,o} \sum_u \Omega_u(r_u) + \sum_p \Omega_p(o_p) \quad \text{with} \quad
       \sum_p bytes_p(o_p) \prod_u left_{up}(r_u) \le B

    and bit-operations likewise. The product makes it no sum over units and leaves: a leaf has one
    column for each pair of an option and shares of the units that it is part of, and columns of
    different leaves must agree on a unit's share. What no option changes counts in full.

    Args:
      table: scores and sizes of the leaves' options.
      cuts: of units.
      max_bytes: of all leaves.
      max_bitops: of one call.

    Returns:
      The shares that are removed, without units that stay whole, and ``{path: option}``; None if
      nothing meets the budgets.

    Example:
      >>> scores, sizes = {"a": {"int4": 0.1, "int8": 0.0}}, {"a": {"int4": 50, "int8": 100}}
      >>> table = Sensitivities("kl", scores, sizes, sizes, {"a": 1}, {}, {}, 0, 0)
      >>> cuts = [Cut("a:1", 0.5, 0.03, {"a": 0.5})]
      >>> jointly(table, cuts, 60, math.inf), jointly(table, cuts, 30, math.inf)
      (({'a:1': 0.5}, {'a': 'int8'}), ({'a:1': 0.5}, {'a': 'int4'}))
    """
    units = _units(cuts)
    leaves = {path: _columns(path, list(own), units) for path, own in table.scores.items()}
    values = [[each.score for each in own] for own in units.values()]
    values += [[table.scores[p][c.option] for c in own] for p, own in leaves.items()]
    weights, limits = [], []
    for limit, amounts, fixed in (
        (max_bytes, table.nbytes, table.left_nbytes),
        (max_bitops, table.bitops, table.left_bitops),
    ):
        if math.isfinite(limit):
            own = [[_scaled(amounts[p][c.option], c.left) for c in x] for p, x in leaves.items()]
            weights.append([*([0] * len(each) for each in units.values()), *own])
            limits.append(math.floor(limit) - fixed)
    found = assign(values, weights, limits, list(_links(units, leaves)))
    if found is None:
        return None
    first, second = found[: len(units)], found[len(units) :]
    chosen = [own[i] for own, i in zip(units.values(), first, strict=True)]
    options = {p: x[i].option for (p, x), i in zip(leaves.items(), second, strict=True)}
    return {cut.unit: cut.ratio for cut in chosen if cut.ratio}, options


class _Column(NamedTuple):
    """One option of a leaf under some shares of its units."""

    option: str
    choices: dict[str, int]
    left: float


def _units(cuts: Sequence[Cut]) -> dict[str, list[Cut]]:
    """Return the choices of each unit: to stay whole, and its cuts."""
    units: dict[str, list[Cut]] = {}
    for cut in cuts:
        units.setdefault(cut.unit, [Cut(cut.unit, 0.0, 0.0, {})]).append(cut)
    return units


def _columns(path: str, options: list[str], units: dict[str, list[Cut]]) -> list[_Column]:
    touched = [name for name, own in units.items() if any(path in cut.left for cut in own)]
    columns = []
    for option in options:
        for which in product(*(range(len(units[name])) for name in touched)):
            choices = dict(zip(touched, which, strict=True))
            stay = math.prod(units[name][i].left.get(path, 1.0) for name, i in choices.items())
            columns.append(_Column(option, choices, stay))
    return columns


def _links(units: dict[str, list[Cut]], leaves: dict[str, list[_Column]]) -> list[Link]:
    """Return what ties the columns of a leaf to the choices of its units."""
    numbers = {name: i for i, name in enumerate(units)}
    found = []
    for place, columns in enumerate(leaves.values(), len(units)):
        for name in columns[0].choices:
            labels = [column.choices[name] for column in columns]
            own = list(range(len(units[name])))
            found.append(Link((numbers[name], place), (own, labels)))
    return found


def _scaled(amount: int, share: float) -> int:
    return math.ceil(amount * share - 1e-9)
