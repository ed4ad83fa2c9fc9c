"""Scalings of a function's parameters that leave the function as it is: what smoothing and equalisation may fold where."""

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd, lcm
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, ModelFn, PyTree, Variables
from compress_jax.trace._groups.analyze import Analysis, analyze
from compress_jax.trace._groups.axes import Leaf, Member
from compress_jax.trace._jaxpr.interpret import interpret
from compress_jax.trace._symmetry.exponents import Demands, Unknown, Walked

# The null space of small exact linear systems, in the basis whose vectors reach least far.


Name = TypeVar("Name", bound=Hashable)
Row = list[Fraction]


def null_space(
    names: Sequence[Name], equations: Iterable[Mapping[Name, Fraction]]
) -> list[dict[Name, int]]:
    r"""Return a basis of the solutions of homogeneous equations in exact arithmetic.

    Of all bases it is one in minimal-span form: no two vectors begin at the same name, none end at
    the same, so that what can be balanced by a near neighbour is not balanced by a far one.
    Independent parts are solved apart.

    Args:
      names: the unknowns, in the order that says what is near.
      equations: coefficients by name; each sum is to be zero.

    Returns:
      ``{name: whole number}`` for each vector, zeros left out; the numbers have no common divisor,
      the first is positive.

    Example:
      >>> null_space("kgbn", [{"k": Fraction(1), "g": Fraction(1), "b": Fraction(-1)}, {"b": Fraction(1), "n": Fraction(1)}])
      [{'k': 1, 'g': -1}, {'g': 1, 'b': 1, 'n': -1}]

    References:
      Kschischang and Sorokine, "On the Trellis Structure of Block Codes", 1995, section IV
      (minimal-span form).
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
            basis.append(
                [
                    -pivots[i][free] if i in pivots else Fraction(i == free)
                    for i in range(len(names))
                ]
            )
    return basis


def _minimal(basis: list[Row], size: int, names: list[Name]) -> Iterable[dict[Name, int]]:
    """Yield the basis in minimal-span form: distinct beginnings first, then distinct ends that leave those as they are."""
    rows: dict[int, Row] = {}
    for row in basis:
        while (at := _first(row)) in rows:
            row = _minus(row, rows[at], row[at] / rows[at][at])
        rows[at] = row
    ends: dict[int, int] = {}
    for start in sorted(
        rows, reverse=True
    ):  # a later beginning may be taken off an earlier one, never the other way
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


Vector = dict[Unknown, int]


@dataclass(frozen=True)
class Part:
    """A parameter that takes up the powers of factors.

    Attributes:
      path: of the parameter.
      axes: along which factors run, ascending.
      power: the power, never 0.
      coordinates: int ``[size of each axis]``, the factor that each of their indices takes, -1 for
        none.
    """

    path: str
    axes: tuple[int, ...]
    power: int
    coordinates: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class Scaling:
    """Parameters that take up the powers of one vector of factors, each its own power, without changing the function.

    Attributes:
      size: number of factors.
      parts: the parameters, by the axes that factors run along.
      stack: sizes of the leading axes of all parameters (layers stacked for ``scan``) along which
        factors may differ.
    """

    size: int
    parts: tuple[Part, ...]
    stack: tuple[int, ...] = ()

    def spread(self, part: Part, ndim: int, factors: jax.Array) -> jax.Array:
        """Return what a parameter is multiplied by, broadcasting against it.

        Args:
          part: of this scaling.
          ndim: of its parameter.
          factors: float32 ``[*stack, size]``, positive.

        Returns:
          Powers of the factors, axes of size 1 where they do not vary.
        """
        place = part.coordinates
        own = jnp.where(place < 0, 1.0, factors[..., np.maximum(place, 0)] ** float(part.power))
        shape = [1] * ndim
        shape[: len(self.stack)] = self.stack
        for axis, n in zip(part.axes, place.shape, strict=True):
            shape[axis] = n
        return own.reshape(shape)

    def apply(self, leaves: Leaves, factors: jax.Array) -> dict[str, Any]:
        """Return the parameters of this scaling, scaled; a tree's other leaves are not in it.

        Args:
          leaves: arrays by path.
          factors: float32 ``[*stack, size]``, positive.

        Returns:
          ``{path: array}``, computed in float32, of the dtypes they had.
        """
        new = {part.path: leaves[part.path].astype(jnp.float32) for part in self.parts}
        for part in self.parts:
            new[part.path] = new[part.path] * self.spread(part, new[part.path].ndim, factors)
        return {path: x.astype(leaves[path].dtype) for path, x in new.items()}

    def largest(self, part: Part, x: jax.Array) -> jax.Array:
        """Return the largest entry that every factor meets, ``[*stack, size]``.

        Args:
          part: of this scaling.
          x: non-negative, in the shape of the part's parameter.
        """
        rows, place = self._rows(part, x)
        return jnp.zeros((*self.stack, self.size)).at[..., place].max(rows.max(-1))

    def mean(self, part: Part, x: jax.Array) -> jax.Array:
        """Return the mean of the entries that every factor meets, ``[*stack, size]``; arguments as in `largest`."""
        rows, place = self._rows(part, x)
        sums = jnp.zeros((*self.stack, self.size)).at[..., place].add(rows.mean(-1))
        return sums / np.maximum(np.bincount(place, minlength=self.size), 1).astype(np.float32)

    def _rows(self, part: Part, x: jax.Array) -> tuple[jax.Array, np.ndarray]:
        """Return ``[*stack, indices that take a factor, all other entries]`` and which factor each index takes."""
        n, axes = len(self.stack), part.axes
        rows = jnp.moveaxis(x.astype(jnp.float32), axes, range(n, n + len(axes)))
        place = part.coordinates.reshape(-1)
        rows = rows.reshape(*self.stack, len(place), -1)
        return rows[..., np.flatnonzero(place >= 0), :], place[place >= 0]


def scalings(
    fn: ModelFn, variables: Variables, *inputs: PyTree, hold: Collection[str] = ()
) -> tuple[tuple[Scaling, ...], dict[Member, str]]:
    r"""Find the scalings that leave a function as it is, by following powers of a factor through its jaxpr.

    ``fn`` of parameters of which every member's coordinate j is multiplied by :math:`s_j^e` is
    ``fn`` of the parameters as they were, for every positive s. They follow from linear equations
    in the exponents: relu, max-pooling, sums over other axes, products and norms' scales let
    factors through, while gelu, softmax, or the function's output fix them.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.
      hold: paths of parameters that are to stay as they are.

    Returns:
      ``(scalings, {(path, axis): why it cannot be scaled})``; each scaling reaches no further than
      it must.

    Example:
      >>> params = {"up": jnp.ones((3, 4)), "bias": jnp.ones(4), "down": jnp.ones((4, 2))}
      >>> found, why = scalings(lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"], params, jnp.ones((1, 3)))
      >>> [{part.path: (part.axes, part.power) for part in scaling.parts} for scaling in found]
      [{'bias': ((0,), 1), 'up': ((1,), 1), 'down': ((0,), -1)}]
      >>> why
      {('down', 1): "it is the function's output", ('up', 0): "it is the function's input"}
    """
    analysis = analyze(fn, variables, *inputs)
    domain = Walked(analysis, Demands(analysis.walk.axes), frozenset(hold))
    args = [_start(domain, path, leaf) for path, leaf in analysis.traced.params.items()]
    rest = analysis.traced.jaxpr.jaxpr.invars[len(args) :]
    data = [
        domain.demands.still(
            tuple(Leaf(n, -1) for n in var.aval.shape), "it is the function's input"
        )
        for var in rest
    ]
    results = interpret(domain, analysis.traced.jaxpr, [*args, *data])
    starts = dict(zip(analysis.params, args, strict=True))
    for path, value in zip(flatten(analysis.traced.out)[0], results, strict=True):
        if path in analysis.state:
            domain.join(starts[analysis.state[path]], value)
        else:
            domain.demands.fix(value, "it is the function's output")
    return _solved(domain, analysis)


def _start(domain: Walked, path: str, leaf: PyTree) -> Any:
    dims = domain.analysis.params[path]
    if path in domain.hold or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return domain.demands.still(dims, "a parameter that is held")
    return domain.start(path, dims)


def _solved(domain: Walked, analysis: Analysis) -> tuple[tuple[Scaling, ...], dict[Member, str]]:
    basis = null_space(_in_order(domain, analysis), [fixed.form for fixed in domain.demands.fixed])
    seen: dict[Any, list[Vector]] = {}
    for place, vector in enumerate(
        basis
    ):  # one of heads and one of each head's features, alike, are one of both
        alike = frozenset((name.path, power) for name, power in vector.items())
        seen.setdefault(alike if len(alike) == len(vector) else place, []).append(vector)
    scaled = {(name.path, name.axis) for vector in basis for name in vector}
    why: dict[Member, str] = {}
    for fixed in domain.demands.fixed:
        for name in fixed.form:
            if (name.path, name.axis) not in scaled:
                why.setdefault((name.path, name.axis), fixed.why)
    return tuple(_scaling(domain, analysis, vectors) for vectors in seen.values()), dict(
        sorted(why.items())
    )


def _in_order(domain: Walked, analysis: Analysis) -> list[Unknown]:
    """Return the unknowns of parameters in use, in the order in which the computation demands something of them."""
    met = [name for fixed in domain.demands.fixed for name in fixed.form]
    for path in sorted(domain.used):
        for i, axis in enumerate(analysis.params[path]):
            met += [Unknown(path, i, leaf) for leaf in analysis.walk.axes.leaves(axis)]
    return list(dict.fromkeys(met))


def _scaling(domain: Walked, analysis: Analysis, vectors: list[Vector]) -> Scaling:
    """Return the scaling of one solution, or of several for other leaves of the same parameters, jointly."""
    sizes = [next(iter(vector)).leaf.size for vector in vectors]
    if len(vectors) == 1:
        names = [[(name, sizes[0])] for name in vectors[0]]
    else:
        by_path = [{name.path: name for name in vector} for vector in vectors]
        names = [
            [(each[path], size) for each, size in zip(by_path, sizes, strict=True)]
            for path in by_path[0]
        ]
    power = {name: power for vector in vectors for name, power in vector.items()}
    parts = tuple(_part(analysis, own, power[own[0][0]]) for own in names)
    return Scaling(math.prod(sizes), parts, _stack(domain, analysis, vectors))


def _part(analysis: Analysis, names: list[tuple[Unknown, int]], power: int) -> Part:
    axes = tuple(sorted({name.axis for name, _ in names}))
    dims = analysis.params[names[0][0].path]
    total = np.zeros([dims[axis].size for axis in axes], int)
    inside = np.ones_like(total, bool)
    for name, size in names:
        along = analysis.walk.axes.coordinates(dims[name.axis])[name.leaf]
        shape = [-1 if axis == name.axis else 1 for axis in axes]
        total, inside = total * size + along.reshape(shape), inside & (along.reshape(shape) >= 0)
    return Part(names[0][0].path, axes, power, np.where(inside, total, -1))


def _stack(domain: Walked, analysis: Analysis, vectors: list[Vector]) -> tuple[int, ...]:
    """Return the leading axes along which factors may differ: all parameters are sliced by loops that carry none of them."""
    paths = {name.path for vector in vectors for name in vector}
    depth = {domain.stacks.get(path, 0) if path not in domain.whole else 0 for path in paths}
    power = {name: power for vector in vectors for name, power in vector.items()}
    carried = any(
        sum(times * power.get(name, 0) for name, times in form.items()) for form in domain.carried
    )
    shapes = {tuple(axis.size for axis in analysis.params[path][: max(depth)]) for path in paths}
    return shapes.pop() if len(depth) == len(shapes) == 1 and not carried else ()
