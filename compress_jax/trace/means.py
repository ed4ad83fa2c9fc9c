"""Follow axes and counts through a jaxpr: which number that a sum is divided by counts its terms, and must shrink with them.

A mean is a sum divided by a literal: nothing ties the number to the axis but its value. So a sum is followed to where it is
divided by (or multiplied with the inverse of) just as many as its terms, or one less, as unbiased variances do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from compress_jax.trace._analyse import Walk
from compress_jax.trace.axes import Axis, Leaf
from compress_jax.trace.axis_moves import Dims
from compress_jax.trace.kept import Kept
from compress_jax.trace.nested import Branches, Call, Scan, While, nested
from compress_jax.trace.site import Position


class Known(NamedTuple):
    """What is known of a value.

    Attributes:
      dims: its axes; None for a constant.
      summed: the axes over which it is a sum, up to a factor.
      number: the value of all its entries, if that is known.
    """

    dims: Dims | None = None
    summed: tuple[Axis, ...] = ()
    number: float | None = None


@dataclass(frozen=True)
class Followed:
    """What a walk over a jaxpr noted, by position.

    Attributes:
      numbers: of an equation of which one operand is a count: which, and what it becomes.
      calls: of an equation with a body, the axes of its operands and of its results; None for constants.
    """

    numbers: dict[Position, tuple[int, float]] = field(default_factory=dict)
    calls: dict[Position, tuple[list[Dims | None], list[Dims | None]]] = field(default_factory=dict)


PASSING = frozenset(
    "convert_element_type broadcast_in_dim reshape squeeze expand_dims transpose copy copy_p stop_gradient name"
    " sharding_constraint reduce_precision".split()
)
ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b if b else math.nan,
    "max": max,
    "min": min,
}


def follow(
    walk: Walk, kept: Kept, jaxpr: ClosedJaxpr, args: Sequence[Known], noted: Followed, position: Position = ()
) -> list[Known]:
    """Follow what is known of values through a jaxpr that has been walked over.

    Args:
      walk: what the walk saw.
      kept: what is left of its axes.
      jaxpr: the computation.
      args: what is known of each of its inputs.
      noted: where notes are put.
      position: where the computation stands, for nested ones.

    Returns:
      What is known of each of its results.
    """
    env: dict[Any, Known] = {
        var: Known(number=_number(value)) for var, value in zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)
    }
    env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Known:
        return Known(number=_number(atom.val)) if isinstance(atom, Literal) else env[atom]

    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        operands, place = [read(atom) for atom in eqn.invars], (*position, index)
        if nested(eqn) is None:
            results = _leaf(walk, kept, eqn, operands, noted, place)
        else:
            results = _nested(walk, kept, eqn, operands, noted, place)
            noted.calls[place] = [each.dims for each in operands], [each.dims for each in results]
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _number(value: Any) -> float | None:
    """Return the one value of a constant's entries, if they are real and equal."""
    dtype = getattr(value, "dtype", np.asarray(0.0).dtype)
    if isinstance(value, Tracer) or not (jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)):
        return None
    entries = np.asarray(value).reshape(-1)
    return float(entries[0]) if entries.size and (entries == entries[0]).all() else None


def _leaf(walk: Walk, kept: Kept, eqn: JaxprEqn, args: list[Known], noted: Followed, position: Position) -> list[Known]:
    name, (operands, results) = eqn.primitive.name, walk.values[position]
    dims = results[0] if results else ()
    if name == "reduce_sum":
        return [Known(dims, (*args[0].summed, *(operands[0][i] for i in eqn.params["axes"])))]
    if name in PASSING and len(args) == 1:
        return [args[0]._replace(dims=dims)]
    if name in ARITHMETIC and None not in (args[0].number, args[1].number):
        return [Known(dims, number=ARITHMETIC[name](args[0].number or 0.0, args[1].number or 0.0))]
    if name in ("div", "mul"):
        return [Known(dims, _divided(kept, name, args, noted, position))]
    return [Known(each) for each in results]


def _divided(kept: Kept, name: str, args: list[Known], noted: Followed, position: Position) -> tuple[Axis, ...]:
    """Note a count among the operands; return the axes that the quotient is still a sum over."""
    for which in (1,) if name == "div" else (1, 0):
        summed, number = args[1 - which].summed, args[which].number
        if summed and number is not None:
            full = math.prod(axis.size for axis in summed)
            less = _less(full, number if name == "div" else (1 / number if number else math.nan))
            if less is None:
                return summed
            now = math.prod(map(kept.size, summed))
            if now != full:
                noted.numbers[position] = which, float(now - less if name == "div" else 1 / (now - less))
    return ()


def _less(full: int, number: float) -> int | None:
    """Return by how much less than the number of terms a number is, 0 or 1; None if it is another number."""
    return next((less for less in (0, 1) if full > less and math.isclose(number, full - less, rel_tol=1e-6)), None)


def _nested(walk: Walk, kept: Kept, eqn: JaxprEqn, args: list[Known], noted: Followed, position: Position) -> list[Known]:
    def inside(body: ClosedJaxpr, args: Sequence[Known], name: int | str = "body") -> list[Known]:
        return follow(walk, kept, body, args, noted, (*position, name))

    match nested(eqn):
        case Call(body, shards):
            if shards is None:
                return inside(body, args)
            pieces = [_recut(a, var.aval) for a, var in zip(args, body.jaxpr.invars, strict=True)]
            return [_recut(a, var.aval) for a, var in zip(inside(body, pieces), eqn.outvars, strict=True)]
        case Scan() as scan:
            start = scan.consts + scan.carry
            slices = [Known(x.dims and x.dims[1:]) for x in args[start:]]
            carried = [Known(x.dims) for x in args[scan.consts : start]]
            results = inside(scan.body, [*args[: scan.consts], *carried, *slices])
            stacked = [Known(y.dims and (Leaf(scan.length, -1), *y.dims)) for y in results[scan.carry :]]
            return [*map(_either, carried, results[: scan.carry]), *stacked]
        case While() as loop:
            start = loop.condition_consts + loop.body_consts
            carried = [Known(x.dims) for x in args[start:]]
            results = inside(loop.body, [*args[loop.condition_consts : start], *carried])
            inside(loop.condition, [*args[: loop.condition_consts], *carried], "cond")
            return [*map(_either, carried, results)]
        case Branches(bodies):
            first, *others = (inside(body, args[1:], index) for index, body in enumerate(bodies))
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
    return Known(tuple(axis if axis.size == n else Leaf(n, -1) for axis, n in zip(a.dims, aval.shape, strict=True)))
