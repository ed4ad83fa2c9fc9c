"""A value as a product of powers of sums and of numbers: what is known of it, and what arithmetic does to that."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.trace.axes import Axis
from compress_jax.trace.axis_moves import Dims
from compress_jax.trace.site import Position

HALF = Fraction(1, 2)


class Sum(NamedTuple):
    """A factor of a value: a power of a sum.

    Attributes:
      axes: that it is over.
      power: of the sum.
      of: what tells the summed value from others.
      centred: whether the mean over the same axes was taken off before.
      plain: False for a product of two values that is summed up (``q @ k``): a factor beside it may be a scale.
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
    if name == "integer_pow" or (name == "pow" and taken[1] is not None and math.isfinite(taken[1])):
        power = Fraction(eqn.params["y"] if name == "integer_pow" else taken[1] or 0).limit_denominator(64)
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
