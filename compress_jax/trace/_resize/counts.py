r"""Which numbers in a computation count the terms of a sum, such as the n of a mean.

A mean is a sum divided by a number, which only its value relates to the summed axes. So every value
is described as a product :math:`X \prod_i S_i^{p_i}` of powers of sums :math:`S_i` over
:math:`n_i` terms, through roots, squares and quotients. A factor :math:`n_i^{-p_i}` on such a value
makes a mean of a sum: ``sum(h * h) / n``, ``h / norm(h) * sqrt(n)``, ``h @ ones / n``.

`Follower` finds these numbers; `decided` says what each becomes at the new width.
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from compress_jax.core.paths import matches
from compress_jax.core.types import Aval
from compress_jax.trace._groups.analyze import Analysis, Walk
from compress_jax.trace._groups.axes import Axis, Dims, Leaf
from compress_jax.trace._groups.groups import Groups
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.interpret import UniformOperands, uniform_operands
from compress_jax.trace._jaxpr.primitives import (
    CASTS,
    MOVES,
    PASS_THROUGH,
    Branches,
    Call,
    Scan,
    While,
    bodies,
    nested,
)
from compress_jax.trace._jaxpr.site import Position
from compress_jax.trace._resize.widths import KeptCoordinates, differences, leaves_of

HALF = Fraction(1, 2)
Numbers = Mapping[str, bool]  # whether numbers follow the width, by globs over their names
CODE = "as in the same code at the new width"
MEAN = (
    "it makes a mean of a sum over {}; the code does not run at the new width, so this is by its "
    "value"
)
SCALE = "it may be a scale: it multiplies a sum of products over {}, not a mean"
GIVEN = "as given by numbers="


class Sum(NamedTuple):
    """A factor of a value: a power of a sum.

    Attributes:
      axes: the summed axes.
      power: of the sum.
      of: the token of the summed value.
      centered: whether the mean over the same axes was subtracted before.
      plain: False for a sum of products of two values (``q @ k``), whose numeric factor may be a
        scale.
    """

    axes: tuple[Axis, ...]
    power: Fraction
    of: Hashable
    centered: bool = False
    plain: bool = True


class Scale(NamedTuple):
    """A number among a value's factors.

    Attributes:
      position: of the equation that takes it.
      which: its operand there.
      number: its value.
      power: of the number in the value: -1 where it divides, 2 after a square.
    """

    position: Position
    which: int
    number: float
    power: int


@dataclass(frozen=True)
class Known:
    """What is known of a value, as a product of powers of sums and of numbers.

    Attributes:
      dims: its axes; None for a constant.
      token: equal for equal values only.
      sums: its factors that are powers of sums.
      scales: its numeric factors that do not make a mean of one of the sums.
      mean: if it is a mean, the token of the averaged value and the axes.
      centered: the axes over which its mean is zero, before any square.
    """

    dims: Dims | None = None
    token: Hashable = field(default_factory=itertools.count().__next__)
    sums: tuple[Sum, ...] = ()
    scales: tuple[Scale, ...] = ()
    mean: tuple[Hashable, tuple[Axis, ...]] | None = None
    centered: tuple[Axis, ...] = ()


def close(number: float, expected: float) -> bool:
    """Return whether a constant is the expected number, perhaps rounded to 16 bits."""
    rounded = [float(np.asarray(expected).astype(dtype)) for dtype in (jnp.bfloat16, jnp.float16)]
    return math.isclose(number, expected, rel_tol=1e-6) or number in rounded


def power_of(base: float, power: float) -> float:
    """Return a power of a count; infinity for a negative one of zero."""
    return float(base**power) if base or power > 0 else math.inf


def powered(value: Known, power: Fraction) -> Known:
    """Return an elementwise power of a value."""
    sums = tuple(each._replace(power=each.power * power) for each in value.sums)
    # Other powers of a number are not followed.
    times = power.numerator if power.denominator == 1 and power > 0 else 0
    scales = tuple(each._replace(power=each.power * times) for each in value.scales if times)
    return Known(
        value.dims, sums=sums, scales=scales, centered=value.centered if power == 2 else ()
    )


def product_of(a: Known, b: Known, sign: int, dims: Dims) -> Known:
    """Return the elementwise product of two values, or their quotient for ``sign=-1``."""
    # x * x is a square, of which more is known than of a product: x may be centered.
    if a.token == b.token and sign == 1:
        return replace(powered(a, Fraction(2)), dims=dims)
    # Powers of one sum add up: x / s**0.5 / s**0.5 has the factor s**-1.
    powers: dict[Sum, Fraction] = {}
    for value, times in ((a, 1), (b, sign)):
        for each in value.sums:
            base = each._replace(power=Fraction(1))
            powers[base] = powers.get(base, Fraction(0)) + times * each.power
    sums = tuple(base._replace(power=power) for base, power in powers.items() if power)
    # Numbers in a denominator are not followed.
    return Known(dims, sums=sums, scales=(*a.scales, *(b.scales if sign == 1 else ())))


def otherwise(eqn: JaxprEqn, args: list[Known], taken: Sequence[float | None], dims: Dims) -> Known:
    """Return what is known of the result of any other elementwise equation.

    Powers change the powers of sums. A guard against zero (adding or comparing with a number) keeps
    the sums. Subtracting its own mean centers a value. Of anything else nothing is known.
    """
    name = eqn.primitive.name
    powers = {"sqrt": HALF, "rsqrt": -HALF, "square": Fraction(2)}
    if name in powers:
        return replace(powered(args[0], powers[name]), dims=dims)
    exponent = eqn.params["y"] if name == "integer_pow" else None
    if name == "pow":
        exponent = taken[1]
    if exponent is not None and math.isfinite(exponent):
        # Powers are compared exactly, so 0.3333 is taken as 1/3.
        power = Fraction(exponent).limit_denominator(64)
        return replace(powered(args[0], power), dims=dims)
    if name in ("neg", "abs", "real"):
        return replace(args[0], dims=dims, token=Known().token, mean=None)
    # x - mean(x): the terms of the mean are those of x itself, by its token.
    if name == "sub" and args[1].mean is not None and args[1].mean[0] == args[0].token:
        return Known(dims, centered=args[1].mean[1])
    if name in ("add", "sub", "max", "min", "select_n", "clamp"):
        values = [arg for arg, number in zip(args, taken, strict=True) if number is None]
        if name == "select_n" and len(values) > 1:
            values = values[1:]  # without the predicate
        if len(values) == 1:
            return Known(dims, sums=values[0].sums)
    return Known(dims)


class Count(NamedTuple):
    """A number that equals a (power of a) count over axes that are shortened.

    Attributes:
      which: the operand that it is.
      now: the number for the new count.
      proven: whether it makes a mean of a sum; else it may be a scale (attention's, a kernel's).
      axes: the counted axes.
    """

    which: int
    now: float
    proven: bool
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Followed:
    """What `Follower` found in a jaxpr, by position.

    Attributes:
      counts: for an equation with an operand that looks like a count, that count.
      calls: for an equation with a body, the axes of its operands and of its results; None for
        constants.
    """

    counts: dict[Position, Count] = field(default_factory=dict)
    calls: dict[Position, tuple[list[Dims | None], list[Dims | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Follower:
    """Follows what is known of values through a jaxpr.

    Attributes:
      walk: the axes of every value in it.
      kept: the coordinates that remain.
      numbers: by position, the operands that are numbers.
      noted: what has been found.
    """

    walk: Walk
    kept: KeptCoordinates
    numbers: UniformOperands
    noted: Followed = field(default_factory=Followed)

    def run(
        self, jaxpr: ClosedJaxpr, args: Sequence[Known], position: Position = ()
    ) -> list[Known]:
        """Return what is known of each result of a jaxpr, or of one inside it."""
        env: dict[Var, Known] = {var: Known() for var in jaxpr.jaxpr.constvars}
        env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))

        def read(atom: Var | Literal) -> Known:
            return Known() if isinstance(atom, Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.jaxpr.eqns):
            operands = [read(atom) for atom in eqn.invars]
            place = (*position, index)
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
        name = eqn.primitive.name
        operands, results = self.walk.values[position]
        taken = self.numbers.get(position, (None,) * len(args))
        # Several results (split, top_k): none is a sum, a product or a move of the whole value.
        if len(results) != 1:
            return [Known(dims) for dims in results]
        dims = results[0]
        if primitives.kind(eqn) == "dot":
            return [self._contracted(eqn, args, operands, taken, dims, position)]
        if name == "reduce_sum":
            return [self._summed(args[0], tuple(operands[0][i] for i in eqn.params["axes"]), dims)]
        if name in MOVES or name in CASTS:
            # The same move of the same value is the same value.
            same = (name, str(sorted(eqn.params.items(), key=str)), args[0].token)
            return [replace(args[0], dims=dims, token=same)]
        if name in ("mul", "div"):
            return [self._multiplied(name, args, taken, dims, position)]
        return [otherwise(eqn, args, taken, dims)]

    def _summed(self, value: Known, axes: tuple[Axis, ...], dims: Dims) -> Known:
        """Return a sum over axes.

        A sum of a sum is one over the axes of both. Numeric factors from before the sum that make
        it a mean are noted.
        """
        # sum(sum(x, 1), 0) has the terms of sum(x, (0, 1)).
        only = value.sums[0] if len(value.sums) == 1 else None
        inner = only if only and only.power == 1 and only.plain else None
        whole = (*inner.axes, *axes) if inner else axes
        of = inner.of if inner else value.token
        total = Sum(whole, Fraction(1), of, self._same(value.centered, whole))
        # sum(x / n): a list, so that every number is noted.
        makes_mean = [self._note(total, scale) for scale in value.scales]
        if any(makes_mean):
            return Known(dims)
        return Known(dims, sums=(total,))

    def _same(self, a: Sequence[Axis], b: Sequence[Axis]) -> bool:
        leaves = self.walk.axes.leaves
        return set(itertools.chain(*map(leaves, a))) == set(itertools.chain(*map(leaves, b)))

    def _contracted(
        self,
        eqn: JaxprEqn,
        args: list[Known],
        operands: list[Dims],
        taken: Sequence[float | None],
        dims: Dims,
        at: Position,
    ) -> Known:
        """Return a contraction, which is a sum if an operand is constant or both are one value.

        With a constant that is one number it is a sum times that number; of a value with itself it
        is a sum of squares. Of other products, the numeric factors that may be scales are noted.
        """
        contracted, _ = primitives.axes(eqn)
        for which in (0, 1):
            if (number := taken[which]) is not None:
                axes = tuple(operands[1 - which][i] for i in contracted[1 - which])
                made = self._summed(args[1 - which], axes, dims)
                if number == 1:
                    return made
                return self._scaled(made, Scale(at, which, number, 1))
        axes = tuple(operands[0][i] for i in contracted[0])
        if args[0].token == args[1].token and contracted[0] == contracted[1]:
            return self._summed(product_of(args[0], args[1], 1, ()), axes, dims)
        # q @ k: a factor 1/n or 1/sqrt(n) of an operand may be a scale, not a mean's.
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
        """Return the product or quotient of two values, of which one may be a number."""
        sign = 1 if name == "mul" else -1
        for which in (0, 1):
            number = taken[which]
            if number is not None and taken[1 - which] is None:
                power = sign if which == 1 else 1  # of the number among the result's factors
                value = args[1 - which]
                if which == 0 and sign == -1:  # number / value
                    value = powered(value, Fraction(-1))
                value = replace(value, dims=dims, token=Known().token)
                return self._scaled(value, Scale(position, which, number, power))
        made = product_of(args[0], args[1], sign, dims)
        # A number of one operand may make a mean of a sum in the other.
        for scale in made.scales:
            others = tuple(other for other in made.scales if other is not scale)
            made = self._scaled(replace(made, scales=others), scale)
        return made

    def _scaled(self, value: Known, scale: Scale) -> Known:
        """Multiply a value by a number, which makes a mean of one of its sums or is a scale."""
        for each in value.sums:
            if self._note(each, scale):
                # Only sum(x) / n itself: a root of it, or a product with it, centers nothing.
                is_mean = each.power == 1 and len(value.sums) == 1 and each.plain
                others = tuple(other for other in value.sums if other is not each)
                return replace(value, sums=others, mean=(each.of, each.axes) if is_mean else None)
        return replace(value, scales=(*value.scales, scale), mean=None)

    def _note(self, total: Sum, scale: Scale) -> bool:
        """Return whether a number makes a mean of a sum, and note what it becomes.

        It does if it is the count of the sum's terms to the opposite power of the sum; or the count
        less one, if the mean was subtracted before (an unbiased variance).
        """
        full = math.prod(axis.size for axis in total.axes)
        now = math.prod(map(self.kept.size, total.axes))
        power = float(-total.power / scale.power)  # of the count, in the number
        for less in (0, 1) if total.centered else (0,):
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
                results = inside(body, _resharded(args, body.jaxpr.invars))
                return _resharded(results, eqn.outvars)
            case Scan() as scan:
                start = scan.consts + scan.carry
                # Iterations differ, so that of carries and slices only the axes are known.
                slices = [Known(x.dims and x.dims[1:]) for x in args[start:]]
                carried = [Known(x.dims) for x in args[scan.consts : start]]
                results = inside(scan.body, [*args[: scan.consts], *carried, *slices])
                length = Leaf(scan.length, -1)
                stacked = [Known(y.dims and (length, *y.dims)) for y in results[scan.carry :]]
                return [*map(_either, carried, results[: scan.carry]), *stacked]
            case While() as loop:
                start = loop.condition_consts + loop.body_consts
                carried = [Known(x.dims) for x in args[start:]]
                results = inside(loop.body, [*args[loop.condition_consts : start], *carried])
                inside(loop.condition, [*args[: loop.condition_consts], *carried], "cond")
                return [*map(_either, carried, results)]
            case Branches(bodies):
                ways = [inside(body, args[1:], index) for index, body in enumerate(bodies)]
                results = ways[0]
                for way in ways[1:]:
                    results = [*map(_either, results, way)]
                return results
        raise AssertionError(f"{eqn.primitive.name} is not nested")


def _either(a: Known, b: Known) -> Known:
    # A constant has no axes; the value that it is joined with has.
    return Known(b.dims if a.dims is None else a.dims)


def _resharded(values: Sequence[Known], variables: Sequence[Var]) -> list[Known]:
    """Return the axes of devices' shards, or of whole arrays again.

    Sharded axes are frozen and cannot be shortened, so that any leaf will do for them.
    """
    return [_reshard(value, var.aval) for value, var in zip(values, variables, strict=True)]


def _reshard(value: Known, aval: Aval) -> Known:
    if value.dims is None:
        return Known()
    sizes = zip(value.dims, aval.shape, strict=True)
    return Known(tuple(axis if axis.size == n else Leaf(n, -1) for axis, n in sizes))


# What the numbers become.


class Number(NamedTuple):
    """A number in a computation whose axes are shortened.

    Attributes:
      name: its scope and its operation, numbered where there are several: ``"block/norm/div"``,
        ``"mul#2"``.
      old: its value at the old width.
      new: its value at the new width.
      follows: whether the two may differ.
      counts: names of the groups that it counts or seems to count; empty if only the code shows
        that it depends on a width.
      reason: why it follows or stays.

    Example:
      >>> import compress_jax as cj
      >>> print(cj.trace.Number("div", 4.0, 2.0, True, ("a:1",), "it makes a mean"))
      div: 4 -> 2 (it makes a mean)
    """

    name: str
    old: float
    new: float
    follows: bool
    counts: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        """Return a line of text."""
        if self.follows:
            return f"{self.name}: {self.old:.6g} -> {self.new:.6g} ({self.reason})"
        counts = ", ".join(self.counts)
        return (
            f"{self.name}: {self.old:.6g} stays, though it looks like a count of {counts} "
            f"({self.reason})"
        )


def decided(
    analysis: Analysis,
    kept: KeptCoordinates,
    counts: Mapping[Position, Count],
    code: ClosedJaxpr | None,
    groups: Groups,
    given: Numbers,
) -> tuple[tuple[Number, ...], dict[Position, dict[int, float]], bool]:
    """Decide what numbers become at the new width.

    Args:
      analysis: of the function at its old width.
      kept: the coordinates that remain.
      counts: what `Follower` noted.
      code: the jaxpr of its own code at the new width, if that does the same.
      groups: of its parameters.
      given: what the user decides, by globs over names.

    Returns:
      The numbers; what they become, by position and operand; whether that differs from the code.
    """
    jaxpr = analysis.traced.jaxpr
    by_code = {} if code is None else differences(jaxpr, code)
    before = uniform_operands(jaxpr)
    # All that look like a count by their value, and all that the code makes depend on the width.
    places = {(at, count.which) for at, count in counts.items()}
    for at, operands in by_code.items():
        places |= {(at, which) for which in operands}
    found = []
    changed: dict[Position, dict[int, float]] = {}
    differ = False
    for (at, which), name in _named(jaxpr, places).items():
        count = counts.get(at)
        # It may be the other operand that looks like a count.
        if count is not None and count.which != which:
            count = None
        # The code decides where it runs at the new width; else what makes a mean of a sum follows.
        if code is not None:
            own = by_code.get(at, {}).get(which)
        else:
            own = count.now if count and count.proven else None
        follows = next((answer for glob, answer in given.items() if matches(glob, name)), None)
        new = _new(own, count, follows)
        differ |= new != own
        old = before[at][which] or 0.0
        over = () if count is None else _over(analysis, kept, groups, count)
        reason = _why(count, over) if code is None else CODE
        if follows is not None:
            reason = GIVEN
        found.append(Number(name, old, old if new is None else new, new is not None, over, reason))
        if new is not None:
            changed.setdefault(at, {})[which] = new
    return tuple(found), changed, differ


def _new(own: float | None, count: Count | None, follows: bool | None) -> float | None:
    """Return what a number becomes, or None if it stays; ``follows`` is what the user decides."""
    if follows is None or (follows and own is not None):
        return own
    return count.now if follows and count else None


def _why(count: Count | None, over: tuple[str, ...]) -> str:
    return (MEAN if count and count.proven else SCALE).format(", ".join(over))


def _over(
    analysis: Analysis, kept: KeptCoordinates, groups: Groups, count: Count
) -> tuple[str, ...]:
    """Return the names of the groups that a number counts."""
    axes = set(_counted(kept, count))
    return tuple(group.name for group in groups if axes & set(leaves_of(analysis, group)))


def _counted(kept: KeptCoordinates, count: Count) -> Iterator[Leaf]:
    """Yield the leaves of the counted axes that are shortened."""
    for axis in count.axes:
        yield from (leaf for leaf in kept.axes.leaves(axis) if leaf in kept.indices)


def _named(
    jaxpr: ClosedJaxpr, places: set[tuple[Position, int]]
) -> dict[tuple[Position, int], str]:
    """Return a name for each operand, in program order."""
    uses: Counter[str] = Counter()
    named = {}
    for position, eqn in _equations(jaxpr):
        for which in range(len(eqn.invars)):
            if (position, which) in places:
                base = "/".join(filter(None, (str(eqn.source_info.name_stack), eqn.primitive.name)))
                uses[base] += 1
                named[position, which] = base if uses[base] == 1 else f"{base}#{uses[base]}"
    return named


def _equations(jaxpr: ClosedJaxpr, position: Position = ()) -> Iterator[tuple[Position, JaxprEqn]]:
    """Yield the equations of a jaxpr and of those inside it, with their positions."""
    for index, eqn in enumerate(jaxpr.eqns):
        at = (*position, index)
        yield at, eqn
        for step, body in bodies(nested(eqn)).items():
            yield from _equations(body, (*at, step))
