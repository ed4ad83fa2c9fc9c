"""`scalings`: which parameters may be rescaled together without changing the function.

Smoothing and equalization fold their factors into these. The exponents of the factors are the null
space of the linear equations that `exponents` collects from the jaxpr.
"""

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd, lcm
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.paths import flatten
from compress_jax.core.types import Array, Leaves, ModelFn, PyTree, Variables
from compress_jax.trace._groups.analyze import Analysis, analyze
from compress_jax.trace._groups.axes import Dims, Leaf, Member
from compress_jax.trace._jaxpr.interpret import interpret
from compress_jax.trace._jaxpr.site import Shape
from compress_jax.trace._symmetry.exponents import Demands, Form, Scaled, ScalingWalk, Unknown

Name = TypeVar("Name", bound=Hashable)
Row = list[Fraction]
Vector = dict[Unknown, int]


@dataclass(frozen=True)
class Part:
    """A parameter that is multiplied by a power of the factors.

    Attributes:
      path: of the parameter.
      axes: along which the factors vary, ascending.
      power: the power, never 0.
      coordinates: int ``[size of each axis]``, the factor of each index, -1 for none.
    """

    path: str
    axes: tuple[int, ...]
    power: int
    coordinates: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class Scaling:
    """Parameters that may be multiplied by powers of common factors without changing the function.

    Attributes:
      size: number of factors.
      parts: the parameters, each with its own power.
      stack: sizes of the leading axes of all parameters (layers stacked for ``scan``) along which
        factors may differ.
    """

    size: int
    parts: tuple[Part, ...]
    stack: tuple[int, ...] = ()

    def spread(self, part: Part, ndim: int, factors: jax.Array) -> jax.Array:
        """Return the powers that a parameter is multiplied by, in a shape that broadcasts with it.

        Args:
          part: of this scaling.
          ndim: of its parameter.
          factors: float32 ``[*stack, size]``, positive.

        Returns:
          Powers of the factors, with axes of size 1 along which they do not vary.
        """
        place = part.coordinates
        # [*stack, *scaled axes]; an index without a factor is multiplied by 1.
        own = jnp.where(place < 0, 1.0, factors[..., np.maximum(place, 0)] ** float(part.power))
        shape = [1] * ndim
        shape[: len(self.stack)] = self.stack
        for axis, n in zip(part.axes, place.shape, strict=True):
            shape[axis] = n
        return own.reshape(shape)

    def apply(self, leaves: Leaves, factors: jax.Array) -> dict[str, jax.Array]:
        """Return the parameters of this scaling, multiplied by their powers of the factors.

        Args:
          leaves: arrays by path.
          factors: float32 ``[*stack, size]``, positive.

        Returns:
          ``{path: array}`` of these parameters only, computed in float32, in their old dtypes.
        """
        # Rounded to the old dtype once, after all parts of a parameter.
        new = {part.path: leaves[part.path].astype(jnp.float32) for part in self.parts}
        for part in self.parts:
            new[part.path] = new[part.path] * self.spread(part, new[part.path].ndim, factors)
        return {path: x.astype(leaves[path].dtype) for path, x in new.items()}

    def largest(self, part: Part, x: jax.Array) -> jax.Array:
        """Return the largest entry among those that each factor multiplies, ``[*stack, size]``.

        Args:
          part: of this scaling.
          x: non-negative, in the shape of the part's parameter.
        """
        rows, place = self._rows(part, x)
        return jnp.zeros((*self.stack, self.size)).at[..., place].max(rows.max(-1))

    def mean(self, part: Part, x: jax.Array) -> jax.Array:
        """Return the mean of the entries that each factor multiplies, ``[*stack, size]``.

        Args:
          part: of this scaling.
          x: any numbers, in the shape of the part's parameter.
        """
        rows, place = self._rows(part, x)
        sums = jnp.zeros((*self.stack, self.size)).at[..., place].add(rows.mean(-1))
        return sums / np.maximum(np.bincount(place, minlength=self.size), 1).astype(np.float32)

    def _rows(self, part: Part, x: jax.Array) -> tuple[jax.Array, np.ndarray]:
        """Return ``[*stack, scaled index, other entries]`` and the factor of each such index."""
        n = len(self.stack)
        axes = part.axes
        # [*stack, *scaled axes, *others]
        rows = jnp.moveaxis(x.astype(jnp.float32), axes, range(n, n + len(axes)))
        place = part.coordinates.reshape(-1)
        rows = rows.reshape(*self.stack, len(place), -1)
        return rows[..., np.flatnonzero(place >= 0), :], place[place >= 0]


def scalings(
    fn: ModelFn, variables: Variables, *inputs: PyTree, hold: Collection[str] = ()
) -> tuple[tuple[Scaling, ...], dict[Member, str]]:
    r"""Find the scalings of parameters that do not change a function.

    If every part's coordinate j is multiplied by :math:`s_j^e`, e the part's power, ``fn`` returns
    the same for every positive s. The powers solve linear equations that are collected by following
    factors through the function's jaxpr: relu, max-pooling, sums over other axes, products and the
    scales of norms pass them on, while gelu, softmax or the function's output fix them.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays or ``ShapeDtypeStruct``.
      inputs: trees of the same.
      hold: paths of parameters that are to stay as they are.

    Returns:
      ``(scalings, {(path, axis): why it cannot be scaled})``; each scaling has as few parts as
      possible.

    Example:
      >>> params = {"up": jnp.ones((3, 4)), "bias": jnp.ones(4), "down": jnp.ones((4, 2))}
      >>> fn = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
      >>> found, why = scalings(fn, params, jnp.ones((1, 3)))
      >>> [{part.path: (part.axes, part.power) for part in scaling.parts} for scaling in found]
      [{'bias': ((0,), 1), 'up': ((1,), 1), 'down': ((0,), -1)}]
      >>> why
      {('down', 1): "it is the function's output", ('up', 0): "it is the function's input"}
    """
    analysis = analyze(fn, variables, *inputs)
    domain = ScalingWalk(analysis, Demands(analysis.walk.axes), frozenset(hold))
    args = [_start(domain, path, leaf) for path, leaf in analysis.traced.params.items()]
    rest = analysis.traced.jaxpr.jaxpr.invars[len(args) :]
    data = [_data(domain, var.aval.shape) for var in rest]
    results = interpret(domain, analysis.traced.jaxpr, [*args, *data])
    starts = dict(zip(analysis.params, args, strict=True))
    for path, value in zip(flatten(analysis.traced.out)[0], results, strict=True):
        # An updated parameter (batch statistics) must scale as the parameter does.
        if path in analysis.state:
            domain.join(starts[analysis.state[path]], value)
        else:
            domain.demands.fix(value, "it is the function's output")
    return _solved(domain, analysis)


def _data(domain: ScalingWalk, shape: Shape) -> Scaled:
    dims = tuple(Leaf(n, -1) for n in shape)
    return domain.demands.unscaled(dims, "it is the function's input")


def _start(domain: ScalingWalk, path: str, leaf: Array | jax.ShapeDtypeStruct) -> Scaled:
    dims = domain.analysis.params[path]
    if path in domain.hold or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return domain.demands.unscaled(dims, "a parameter that is held")
    return domain.start(path, dims)


def _solved(
    domain: ScalingWalk, analysis: Analysis
) -> tuple[tuple[Scaling, ...], dict[Member, str]]:
    fixed = domain.demands.fixed
    basis = null_space(_in_order(domain, analysis), [demand.form for demand in fixed])
    # As one for heads and one for the features of a head.
    joined: list[list[Vector]] = []
    for vector in basis:
        group = next((each for each in joined if _together(domain, [*each, vector])), None)
        if group is None:
            joined.append([vector])
        else:
            group.append(vector)
    scaled: set[Member] = set()
    for vector in basis:
        scaled |= {(name.path, name.axis) for name in vector}
    # The first demand on an axis that no solution scales is its reason.
    why: dict[Member, str] = {}
    for demand in fixed:
        for name in demand.form:
            if (name.path, name.axis) not in scaled:
                why.setdefault((name.path, name.axis), demand.why)
    found = tuple(_scaling(domain, analysis, vectors) for vectors in joined)
    return found, dict(sorted(why.items()))


def _together(domain: ScalingWalk, vectors: Sequence[Vector]) -> bool:
    """Tell whether solutions can be one scaling, with a factor for every tuple of coordinates.

    They can if every value that one of them scales has one axis for each of them, all with the same
    exponent: its entries are then multiplied by that power of the factor at its coordinates. A sum
    over heads of products ``[head, feature] x [head, other feature]`` cancels factors of heads, and
    factors of features on each side, but not a factor for every head and feature.
    """
    if len({frozenset((name.path, k) for name, k in vector.items()) for vector in vectors}) > 1:
        return False
    for value in domain.live:
        exponents = [_exponents(value, vector) for vector in vectors]
        if len(exponents[0]) > 1 or any(each != exponents[0] for each in exponents):
            return False
    return True


def _exponents(value: Scaled, vector: Vector) -> list[Fraction]:
    """Return the exponents of a value along its axes at a solution, zeros left out."""
    leaf = next(iter(vector)).leaf  # the same for all names of a solution
    exponents = [_exponent(form, vector) for form in value.along(leaf)]
    return [exponent for exponent in exponents if exponent]


def _in_order(domain: ScalingWalk, analysis: Analysis) -> list[Unknown]:
    """Return the unknowns of used parameters, in the order of the demands on them."""
    names: list[Unknown] = []
    for fixed in domain.demands.fixed:
        names += fixed.form
    for path in sorted(domain.used):
        for i, axis in enumerate(analysis.params[path]):
            names += [Unknown(path, i, leaf) for leaf in analysis.walk.axes.leaves(axis)]
    return list(dict.fromkeys(names))


def _scaling(domain: ScalingWalk, analysis: Analysis, vectors: list[Vector]) -> Scaling:
    """Return the scaling of one solution, or of several that go together."""
    sizes = [next(iter(vector)).leaf.size for vector in vectors]
    power: Vector = {}
    for vector in vectors:
        power |= vector
    parts: list[Part] = []
    if len(vectors) == 1:
        parts = [_part(analysis, [(name, sizes[0])], power[name]) for name in vectors[0]]
    else:
        # Every vector has one unknown for each path: the part has the product of their leaves.
        by_path: list[dict[str, Unknown]] = []
        for vector in vectors:
            by_path.append({name.path: name for name in vector})
        for path in by_path[0]:
            names = [each[path] for each in by_path]
            parts.append(_part(analysis, list(zip(names, sizes, strict=True)), power[names[0]]))
    return Scaling(math.prod(sizes), tuple(parts), _stack(domain, analysis, vectors))


def _part(analysis: Analysis, names: list[tuple[Unknown, int]], power: int) -> Part:
    """Return the part of one parameter; factors are indexed by all its leaves, row-major."""
    axes = tuple(sorted({name.axis for name, _ in names}))
    dims = analysis.params[names[0][0].path]
    total = np.zeros([dims[axis].size for axis in axes], int)
    inside = np.ones_like(total, bool)
    for name, size in names:
        along = analysis.walk.axes.coordinates(dims[name.axis])[name.leaf]
        along = along.reshape([-1 if axis == name.axis else 1 for axis in axes])  # [1, n, 1]
        total = total * size + along
        inside = inside & (along >= 0)
    return Part(names[0][0].path, axes, power, np.where(inside, total, -1))


def _stack(domain: ScalingWalk, analysis: Analysis, vectors: list[Vector]) -> tuple[int, ...]:
    """Return the sizes of the leading axes along which factors may differ.

    They are the axes along which loops slice all parameters, if no loop carries a scaled value from
    one iteration to the next.
    """
    power: Vector = {}
    for vector in vectors:
        power |= vector
    if any(_exponent(form, power) for form in domain.carried):
        return ()
    paths = {name.path for name in power}
    depths = {domain.stacks.get(path, 0) if path not in domain.whole else 0 for path in paths}
    depth = max(depths)
    shapes = {_sizes(analysis.params[path][:depth]) for path in paths}
    # All parameters must have the same stack.
    return shapes.pop() if len(depths) == len(shapes) == 1 else ()


def _sizes(dims: Dims) -> Shape:
    return tuple(axis.size for axis in dims)


def _exponent(form: Form, power: Vector) -> Fraction:
    """Return the exponent that a form is at a solution."""
    return sum((times * power.get(name, 0) for name, times in form.items()), Fraction(0))


# The null space of a small linear system in exact arithmetic.


def null_space(
    names: Sequence[Name], equations: Iterable[Mapping[Name, Fraction]]
) -> list[dict[Name, int]]:
    r"""Return a basis of the solutions of homogeneous equations in exact arithmetic.

    The basis is in minimal-span form: no two vectors begin at the same name and none end at the
    same, so that exponents are balanced between near neighbors. Independent systems are solved
    separately.

    Args:
      names: the unknowns, neighbors next to each other.
      equations: coefficients by name; each weighted sum must be zero.

    Returns:
      ``{name: whole number}`` for each vector, zeros left out; the numbers have no common divisor,
      the first is positive.

    Example:
      >>> one = Fraction(1)
      >>> null_space("kgbn", [{"k": one, "g": one, "b": -one}, {"b": one, "n": one}])
      [{'k': 1, 'g': -1}, {'g': 1, 'b': 1, 'n': -1}]

    References:
      Kschischang and Sorokine, "On the Trellis Structure of Block Codes", 1995, section IV
      (minimal-span form).
    """
    # As a set: a loop's body is followed several times, and repeats its equations.
    rows = {frozenset(equation.items()) for equation in equations if equation}
    place = {name: i for i, name in enumerate(names)}
    found: list[dict[Name, int]] = []
    for part, own in _parts(names, [dict(row) for row in rows]):
        found += _minimal(_solve(part, own), len(part), part)
    return sorted(found, key=lambda vector: [place[name] for name in vector])


def _parts(
    names: Sequence[Name], rows: list[dict[Name, Fraction]]
) -> Iterable[tuple[list[Name], list[dict[Name, Fraction]]]]:
    """Return the independent systems: unknowns that share equations, with these (union-find)."""
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
    """Return any basis, by Gauss-Jordan elimination."""
    pivots: dict[int, Row] = {}
    for equation in equations:
        row = [equation.get(name, Fraction(0)) for name in names]
        for at, pivot in pivots.items():
            row = _minus(row, pivot, row[at])
        at = _first(row)  # the pivot; len(names) for a row that has become zero
        if at < len(names):
            row = [x / row[at] for x in row]
            pivots = {i: _minus(pivot, row, pivot[at]) for i, pivot in pivots.items()} | {at: row}
    basis = []
    for free in range(len(names)):
        if free not in pivots:
            vector = [Fraction(i == free) for i in range(len(names))]
            for i, pivot in pivots.items():
                vector[i] = -pivot[free]
            basis.append(vector)
    return basis


def _minimal(basis: list[Row], size: int, names: list[Name]) -> Iterable[dict[Name, int]]:
    """Yield the basis in minimal-span form.

    First the beginnings are made distinct, then the ends, without changing the beginnings.
    """
    rows: dict[int, Row] = {}
    for row in basis:
        while (at := _first(row)) in rows:
            row = _minus(row, rows[at], row[at] / rows[at][at])
        rows[at] = row
    ends: dict[int, int] = {}
    # From the last beginning on: a row that begins later may be subtracted from one that begins
    # earlier, never the reverse.
    for start in sorted(rows, reverse=True):
        while (last := size - 1 - _first(rows[start][::-1])) in ends:
            other = rows[ends[last]]
            rows[start] = _minus(rows[start], other, rows[start][last] / other[last])
        ends[last] = start
    for row in rows.values():
        yield _whole(dict(zip(names, row, strict=True)), row[_first(row)] > 0)


def _first(row: Row) -> int:
    """Return the index of the first entry that is not zero, or the length."""
    return next((i for i, x in enumerate(row) if x), len(row))


def _minus(row: Row, other: Row, times: Fraction) -> Row:
    """Return ``row - times * other``."""
    return [a - times * b for a, b in zip(row, other, strict=True)] if times else row


def _whole(vector: dict[Name, Fraction], positive: bool) -> dict[Name, int]:
    """Return the multiple of a vector with coprime integers, negated unless ``positive``."""
    vector = {name: x for name, x in vector.items() if x}
    times = lcm(*(x.denominator for x in vector.values()))
    common = gcd(*(int(x * times) for x in vector.values()))
    return {name: int(x * times) // common * (1 if positive else -1) for name, x in vector.items()}
