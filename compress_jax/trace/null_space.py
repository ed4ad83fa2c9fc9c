"""The null space of small exact linear systems, in the basis whose vectors reach least far."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
Row = list[Fraction]


def null_space(names: Sequence[Name], equations: Iterable[Mapping[Name, Fraction]]) -> list[dict[Name, int]]:
    r"""Return a basis of the solutions of homogeneous equations in exact arithmetic.

    Of all bases it is one in minimal-span form: no two vectors begin at the same name, none end at the same, so that what
    can be balanced by a near neighbour is not balanced by a far one. Independent parts are solved apart.

    Args:
      names: the unknowns, in the order that says what is near.
      equations: coefficients by name; each sum is to be zero.

    Returns:
      ``{name: whole number}`` for each vector, zeros left out; the numbers have no common divisor, the first is positive.

    Example:
      >>> null_space("kgbn", [{"k": Fraction(1), "g": Fraction(1), "b": Fraction(-1)}, {"b": Fraction(1), "n": Fraction(1)}])
      [{'k': 1, 'g': -1}, {'g': 1, 'b': 1, 'n': -1}]

    References:
      Kschischang and Sorokine, "On the Trellis Structure of Block Codes", 1995, section IV (minimal-span form).
    """
    rows = {frozenset(equation.items()) for equation in equations if equation}
    place = {name: i for i, name in enumerate(names)}
    found = [
        vector
        for part, own in _parts(names, [dict(row) for row in rows])
        for vector in _minimal(_solve(part, own), len(part), part)
    ]
    return sorted(found, key=lambda vector: [place[name] for name in vector])


def _parts(
    names: Sequence[Name], rows: list[dict[Name, Fraction]]
) -> Iterable[tuple[list[Name], list[dict[Name, Fraction]]]]:
    """Yield unknowns that share equations, directly or not, with those equations."""
    above: dict[Name, Name] = {name: name for name in names}

    def root(name: Name) -> Name:
        while above[name] != name:
            above[name] = name = above[above[name]]
        return name

    for row in rows:
        first, *others = row
        for other in others:
            above[root(other)] = root(first)
    parts: dict[Name, tuple[list[Name], list[dict[Name, Fraction]]]] = {}
    for name in names:
        parts.setdefault(root(name), ([], []))[0].append(name)
    for row in rows:
        parts[root(next(iter(row)))][1].append(row)
    return parts.values()


def _solve(names: list[Name], equations: list[dict[Name, Fraction]]) -> list[Row]:
    """Return any basis, by elimination."""
    pivots: dict[int, Row] = {}
    for equation in equations:
        row = [equation.get(name, Fraction(0)) for name in names]
        for at, pivot in pivots.items():
            row = _minus(row, pivot, row[at])
        at = _first(row)
        if at < len(names):
            row = [x / row[at] for x in row]
            pivots = {i: _minus(pivot, row, pivot[at]) for i, pivot in pivots.items()} | {at: row}
    basis = []
    for free in range(len(names)):
        if free not in pivots:
            basis.append([-pivots[i][free] if i in pivots else Fraction(i == free) for i in range(len(names))])
    return basis


def _minimal(basis: list[Row], size: int, names: list[Name]) -> Iterable[dict[Name, int]]:
    """Yield the basis in minimal-span form: distinct beginnings first, then distinct ends that leave those as they are."""
    rows: dict[int, Row] = {}
    for row in basis:
        while (at := _first(row)) in rows:
            row = _minus(row, rows[at], row[at] / rows[at][at])
        rows[at] = row
    ends: dict[int, int] = {}
    for start in sorted(rows, reverse=True):  # a later beginning may be taken off an earlier one, never the other way
        while (last := size - 1 - _first(rows[start][::-1])) in ends:
            other = rows[ends[last]]
            rows[start] = _minus(rows[start], other, rows[start][last] / other[last])
        ends[last] = start
    for row in rows.values():
        yield _whole(dict(zip(names, row, strict=True)), row[_first(row)] > 0)


def _first(row: Row) -> int:
    return next((i for i, x in enumerate(row) if x), len(row))


def _minus(row: Row, other: Row, times: Fraction) -> Row:
    return [a - times * b for a, b in zip(row, other, strict=True)] if times else row


def _whole(vector: dict[Name, Fraction], positive: bool) -> dict[Name, int]:
    vector = {name: x for name, x in vector.items() if x}
    times = lcm(*(x.denominator for x in vector.values()))
    common = gcd(*(int(x * times) for x in vector.values()))
    return {name: int(x * times) // common * (1 if positive else -1) for name, x in vector.items()}
