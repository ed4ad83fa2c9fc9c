r"""Which numbers in a computation count the terms of a sum: what a mean divides by must shrink with the sum's axes.

A mean is a sum divided by a number: nothing ties the number to the axis but its value. So values
are followed as products :math:`X \prod_i S_i^{p_i}` of powers of sums :math:`S_i` over :math:`n_i`
terms, through roots, squares and quotients, and a factor :math:`n_i^{-p_i}` on such a value makes a
mean of a sum: ``sum(h * h) / n``, ``h / norm(h) * sqrt(n)``, ``h @ ones / n``.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from compress_jax.trace._groups.analyze import Walk
from compress_jax.trace._groups.axes import Axis, Dims, Leaf
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.interpret import UniformOperands
from compress_jax.trace._jaxpr.primitives import (
    CASTS,
    MOVES,
    PASS_THROUGH,
    Branches,
    Call,
    Scan,
    While,
    nested,
)
from compress_jax.trace._jaxpr.site import Position
from compress_jax.trace._resize.widths import Kept

# A value as a product of powers of sums and of numbers: what is known of it, and what arithmetic
# does to that.


HALF = Fraction(1, 2)


class Sum(NamedTuple):
    """A factor of a value: a power of a sum.

    Attributes:
      axes: that it is over.
      power: of the sum.
      of: what tells the summed value from others.
      centred: whether the mean over the same axes was taken off before.
      plain: False for a product of two values that is summed up (``q @ k``): a factor beside it may
        be a scale.
    """

    axes: tuple[Axis, ...]
    power: Fraction
    of: Any
    centred: bool = False
    plain: bool = True


class Scale(NamedTuple):
    """A number among a value's factors: an operand at a position, to a power (-1 where it divides, 2 after a square)."""

    position: Position
    which: int
    number: float
    power: int


@dataclass(frozen=True)
class Known:
    """What is known of a value.

    Attributes:
      dims: its axes; None for a constant.
      token: what tells it from other values.
      sums: its factors that are powers of sums.
      scales: numbers among its factors that are not accounted for.
      mean: ``(token, axes)`` of what it is the mean of.
      centred: the axes over which its mean is zero, before any square.
    """

    dims: Dims | None = None
    token: Any = field(default_factory=itertools.count().__next__)
    sums: tuple[Sum, ...] = ()
    scales: tuple[Scale, ...] = ()
    mean: tuple[Any, tuple[Axis, ...]] | None = None
    centred: tuple[Axis, ...] = ()


def close(number: float, expected: float) -> bool:
    """Tell whether a number is another one, in any of the dtypes that constants have."""
    rounded = (float(np.asarray(expected).astype(dtype)) for dtype in (jnp.bfloat16, jnp.float16))
    return math.isclose(number, expected, rel_tol=1e-6) or number in rounded


def power_of(base: float, power: float) -> float:
    """Return a power of a count; infinity for a negative one of zero."""
    return float(base**power) if base or power > 0 else math.inf


def powered(value: Known, power: Fraction) -> Known:
    """A power of a value, entry by entry."""
    sums = tuple(each._replace(power=each.power * power) for each in value.sums)
    times = power.numerator if power.denominator == 1 and power > 0 else 0
    scales = tuple(each._replace(power=each.power * times) for each in value.scales if times)
    return Known(value.dims, sums=sums, scales=scales, centred=value.centred if power == 2 else ())


def product_of(a: Known, b: Known, sign: int, dims: Dims) -> Known:
    """The product, or the quotient, of two values."""
    if a.token == b.token and sign == 1:
        return replace(powered(a, Fraction(2)), dims=dims)
    powers: dict[Sum, Fraction] = {}
    for value, times in ((a, 1), (b, sign)):
        for each in value.sums:
            base = each._replace(power=Fraction(1))
            powers[base] = powers.get(base, Fraction(0)) + times * each.power
    sums = tuple(base._replace(power=power) for base, power in powers.items() if power)
    return Known(dims, sums=sums, scales=(*a.scales, *(b.scales if sign == 1 else ())))


def otherwise(eqn: JaxprEqn, args: list[Known], taken: Sequence[float | None], dims: Dims) -> Known:
    """Powers change the powers of sums; a guard against zero changes nothing; most else loses all that is known."""
    name = eqn.primitive.name
    powers = {"sqrt": HALF, "rsqrt": -HALF, "square": Fraction(2)}
    if name in powers:
        return replace(powered(args[0], powers[name]), dims=dims)
    if name == "integer_pow" or (
        name == "pow" and taken[1] is not None and math.isfinite(taken[1])
    ):
        power = Fraction(
            eqn.params["y"] if name == "integer_pow" else taken[1] or 0
        ).limit_denominator(64)
        return replace(powered(args[0], power), dims=dims)
    if name in ("neg", "abs", "real"):
        return replace(args[0], dims=dims, token=Known().token, mean=None)
    if name == "sub" and args[1].mean is not None and args[1].mean[0] == args[0].token:
        return Known(dims, centred=args[1].mean[1])
    if name in ("add", "sub", "max", "min", "select_n", "clamp"):
        values = [arg for arg, number in zip(args, taken, strict=True) if number is None]
        values = values[1:] if name == "select_n" and len(values) > 1 else values
        if len(values) == 1:
            return Known(dims, sums=values[0].sums)
    return Known(dims)


class Count(NamedTuple):
    """A number that equals a count of what gets shorter.

    Attributes:
      which: the operand that it is.
      now: what it is if it counts what is left.
      proven: whether it makes a mean of a sum; else it is a scale as well (attention's, a
        kernel's).
      axes: that are counted.
    """

    which: int
    now: float
    proven: bool
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Followed:
    """What a walk over a jaxpr noted, by position.

    Attributes:
      counts: of an equation of which one operand looks like a count.
      calls: of an equation with a body, the axes of its operands and of its results; None for
        constants.
    """

    counts: dict[Position, Count] = field(default_factory=dict)
    calls: dict[Position, tuple[list[Dims | None], list[Dims | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Follower:
    """Follows what is known of values through a jaxpr that has been walked over.

    Attributes:
      walk: what the walk saw.
      kept: what is left of its axes.
      numbers: which operands are numbers.
      noted: where notes are put.
    """

    walk: Walk
    kept: Kept
    numbers: UniformOperands
    noted: Followed = field(default_factory=Followed)

    def run(
        self, jaxpr: ClosedJaxpr, args: Sequence[Known], position: Position = ()
    ) -> list[Known]:
        """Follow a jaxpr, or one inside it; return what is known of each of its results."""
        env: dict[Any, Known] = {var: Known() for var in jaxpr.jaxpr.constvars}
        env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Known:
            return Known() if isinstance(atom, Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.jaxpr.eqns):
            operands, place = [read(atom) for atom in eqn.invars], (*position, index)
            if eqn.primitive.name in PASS_THROUGH:
                results = operands
            elif nested(eqn) is None:
                results = self._leaf(eqn, operands, place)
            else:
                results = self._nested(eqn, operands, place)
                self.noted.calls[place] = (
                    [each.dims for each in operands],
                    [each.dims for each in results],
                )
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def _leaf(self, eqn: JaxprEqn, args: list[Known], position: Position) -> list[Known]:
        name, (operands, results) = eqn.primitive.name, self.walk.values[position]
        taken = self.numbers.get(position, (None,) * len(args))
        if len(results) != 1:
            return [Known(dims) for dims in results]
        dims = results[0]
        if primitives.kind(eqn) == "dot":
            return [self._contracted(eqn, args, operands, taken, dims, position)]
        if name == "reduce_sum":
            return [self._summed(args[0], tuple(operands[0][i] for i in eqn.params["axes"]), dims)]
        if name in MOVES or name in CASTS:
            same = (name, str(sorted(eqn.params.items(), key=str)), args[0].token)
            return [replace(args[0], dims=dims, token=same)]
        if name in ("mul", "div"):
            return [self._multiplied(name, args, taken, dims, position)]
        return [otherwise(eqn, args, taken, dims)]

    def _summed(self, value: Known, axes: tuple[Axis, ...], dims: Dims) -> Known:
        """A sum, or one over further axes of what is a sum itself; scales from before that make it a mean are noted."""
        inner = (
            value.sums[0]
            if len(value.sums) == 1 and value.sums[0].power == 1 and value.sums[0].plain
            else None
        )
        whole = (*inner.axes, *axes) if inner else axes
        total = Sum(
            whole, Fraction(1), inner.of if inner else value.token, self._same(value.centred, whole)
        )
        if any([self._note(total, scale) for scale in value.scales]):
            return Known(dims)
        return Known(dims, sums=(total,))

    def _same(self, a: Sequence[Axis], b: Sequence[Axis]) -> bool:
        leaves = [
            {leaf for axis in axes for leaf in self.walk.axes.leaves(axis)} for axes in (a, b)
        ]
        return leaves[0] == leaves[1]

    def _contracted(
        self,
        eqn: JaxprEqn,
        args: list[Known],
        operands: list[Dims],
        taken: Sequence[float | None],
        dims: Dims,
        at: Position,
    ) -> Known:
        """By a constant that is one number: a sum. A value with itself: a sum of squares. Of others, scales are noted."""
        contracted, _ = primitives.axes(eqn)
        for which in (0, 1):
            if (number := taken[which]) is not None:
                axes = tuple(operands[1 - which][i] for i in contracted[1 - which])
                made = self._summed(args[1 - which], axes, dims)
                return self._scaled(made, Scale(at, which, number, 1)) if number != 1 else made
        axes = tuple(operands[0][i] for i in contracted[0])
        if args[0].token == args[1].token and contracted[0] == contracted[1]:
            return self._summed(product_of(args[0], args[1], 1, ()), axes, dims)
        inner = Sum(axes, Fraction(1), None, plain=False)
        for scale in (*args[0].scales, *args[1].scales):
            for power in (Fraction(1), HALF):
                self._note(inner._replace(power=power), scale)
        return Known(dims, sums=(inner,))

    def _multiplied(
        self,
        name: str,
        args: list[Known],
        taken: Sequence[float | None],
        dims: Dims,
        position: Position,
    ) -> Known:
        sign = 1 if name == "mul" else -1
        for which in (0, 1):
            if (number := taken[which]) is not None and taken[1 - which] is None:
                power = sign if which == 1 else 1  # of the number among the result's factors
                value = args[1 - which] if which or sign == 1 else powered(args[1], Fraction(-1))
                return self._scaled(
                    replace(value, dims=dims, token=Known().token),
                    Scale(position, which, number, power),
                )
        made = product_of(args[0], args[1], sign, dims)
        for scale in made.scales:
            made = self._scaled(
                replace(made, scales=tuple(s for s in made.scales if s is not scale)), scale
            )
        return made

    def _scaled(self, value: Known, scale: Scale) -> Known:
        """Account for a number among a value's factors: it makes a mean of a sum, or is a scale."""
        for each in value.sums:
            if self._note(each, scale):
                mean = (
                    (each.of, each.axes)
                    if each.power == 1 and len(value.sums) == 1 and each.plain
                    else None
                )
                return replace(
                    value, sums=tuple(other for other in value.sums if other is not each), mean=mean
                )
        return replace(value, scales=(*value.scales, scale), mean=None)

    def _note(self, total: Sum, scale: Scale) -> bool:
        """Tell whether a factor is the count of a sum, to the power that makes it a mean; note what its number becomes."""
        full, now = (
            math.prod(axis.size for axis in total.axes),
            math.prod(map(self.kept.size, total.axes)),
        )
        power = float(-total.power / scale.power)  # of the count, in the number
        for less in (0, 1) if total.centred else (0,):
            if full > less and close(scale.number, power_of(full - less, power)):
                if now != full:
                    count = Count(scale.which, power_of(now - less, power), total.plain, total.axes)
                    self.noted.counts[scale.position] = count
                return True
        return False

    def _nested(self, eqn: JaxprEqn, args: list[Known], position: Position) -> list[Known]:
        def inside(
            body: ClosedJaxpr, args: Sequence[Known], name: int | str = "body"
        ) -> list[Known]:
            return self.run(body, args, (*position, name))

        match nested(eqn):
            case Call(body, shards):
                if shards is None:
                    return inside(body, args)
                pieces = [
                    _recut(a, var.aval) for a, var in zip(args, body.jaxpr.invars, strict=True)
                ]
                return [
                    _recut(a, var.aval)
                    for a, var in zip(inside(body, pieces), eqn.outvars, strict=True)
                ]
            case Scan() as scan:
                start = scan.consts + scan.carry
                slices = [Known(x.dims and x.dims[1:]) for x in args[start:]]
                carried = [Known(x.dims) for x in args[scan.consts : start]]
                results = inside(scan.body, [*args[: scan.consts], *carried, *slices])
                stacked = [
                    Known(y.dims and (Leaf(scan.length, -1), *y.dims))
                    for y in results[scan.carry :]
                ]
                return [*map(_either, carried, results[: scan.carry]), *stacked]
            case While() as loop:
                start = loop.condition_consts + loop.body_consts
                carried = [Known(x.dims) for x in args[start:]]
                results = inside(loop.body, [*args[loop.condition_consts : start], *carried])
                inside(loop.condition, [*args[: loop.condition_consts], *carried], "cond")
                return [*map(_either, carried, results)]
            case Branches(bodies):
                first, *others = (
                    inside(body, args[1:], index) for index, body in enumerate(bodies)
                )
                for other in others:
                    first = [*map(_either, first, other)]
                return first
        raise AssertionError(f"{eqn.primitive.name} is not nested")


def _either(a: Known, b: Known) -> Known:
    return Known(b.dims if a.dims is None else a.dims)


def _recut(a: Known, aval: Any) -> Known:
    """Return the axes of a device's piece, or of the whole; those that are cut are frozen and need no identity."""
    if a.dims is None:
        return Known()
    return Known(
        tuple(
            axis if axis.size == n else Leaf(n, -1)
            for axis, n in zip(a.dims, aval.shape, strict=True)
        )
    )


def counted(kept: Kept, count: Count) -> Iterator[Leaf]:
    """Yield the leaves that a count is of and that get shorter."""
    for axis in count.axes:
        yield from (leaf for leaf in kept.axes.leaves(axis) if leaf in kept.indices)
