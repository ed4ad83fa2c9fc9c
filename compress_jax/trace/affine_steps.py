"""What equations do to polynomials of parameters, and to scales and shifts by them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import JaxprEqn

from compress_jax.trace import polynomials as poly
from compress_jax.trace.polynomials import Atom, Dims, Polynomial

MANY = 2**12  # entries of a result that is worked out


def itself(kernel: Polynomial | None, path: str | None) -> Atom | None:
    """Return the parameter itself, if a value is that times what does not depend on it."""
    if kernel is None or len(kernel.terms) != 1:
        return None
    own = [(atom, p) for atom, p in kernel.terms[0][0] if atom.path == path]
    return own[0][0] if len(own) == 1 and own[0][1] == 1 and not own[0][0].steps else None


def combined(name: str, a: Polynomial, b: Polynomial) -> Polynomial | None:
    """Return what an equation of two operands makes of polynomials; None where that is no polynomial."""
    if name in ("add", "add_any", "sub"):
        return poly.add(a, b, -1.0 if name == "sub" else 1.0)
    if name == "mul":
        return poly.multiply(a, b)
    if name == "div":
        inverse = poly.power(b, -1.0)
        return inverse and poly.multiply(a, inverse)
    if name == "pow":
        exponent = poly.as_number(b)
        return None if exponent is None else poly.power(a, exponent)
    for one, other in ((a, b), (b, a)):
        if (floor := poly.as_number(other)) is not None:
            return poly.stepped(one, "max", floor) if one.terms else None
    return None


def scaled_and_shifted(
    name: str, scale: Polynomial, shift: Polynomial, other: Polynomial, *, first: bool
) -> tuple[Polynomial | None, Polynomial | None]:
    """Return the scale and shift after one more step; None where it is none."""
    if name in ("add", "add_any"):
        return scale, poly.add(shift, other)
    if name == "sub" and first:
        return scale, poly.add(shift, other, -1.0)
    if name == "sub":
        return poly.multiply(scale, poly.number(-1)), poly.add(other, shift, -1.0)
    if name == "mul" or (name == "div" and first):
        factor = other if name == "mul" else poly.power(other, -1.0)
        if factor is not None and factor.terms:
            return poly.multiply(scale, factor), poly.multiply(shift, factor)
    return None, None


def lifted(p: Polynomial, rank: int) -> Polynomial | None:
    """Return a scalar's polynomial laid out for more axes."""

    def lift(atom: Atom) -> Atom | None:
        if len(atom.dims) == rank:
            return atom
        return replace(atom, dims=((),) * rank) if not atom.dims else None

    return p.moved(lift)


def laid_out(atom: Atom, dims: Dims | None) -> Atom | None:
    """Return the atom in another layout, if there is one."""
    return None if dims is None else replace(atom, dims=dims)


def sliced(atom: Atom, loop: int) -> Atom | None:
    """Return one slice along the first axis, as a turn of a loop sees it; None if more than one stored axis lies there."""
    if not atom.dims or len(atom.dims[0]) > 1:
        return None
    return replace(atom, dims=atom.dims[1:], sliced=(*atom.sliced, *((axis, loop) for axis in atom.dims[0])))


def scalar(x: Any) -> float | None:
    """Return the number in an array of one entry, if it is known."""
    known = isinstance(x, (np.ndarray, jax.Array)) and not isinstance(x, Tracer) and x.size == 1
    if not known or not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
        return None
    return None if jnp.issubdtype(x.dtype, jnp.complexfloating) else float(x.reshape(()))


def uniform_result(eqn: JaxprEqn, values: Sequence[float | None]) -> float | None:
    """Return the number that all entries of an equation's result are, if all entries of each operand are one.

    Args:
      eqn: the equation, which runs nothing inside.
      values: the number that each operand is; None for those that are not known.

    Returns:
      The number; None if it is not known or the entries differ.
    """
    avals: list[Any] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    simple = all(hasattr(a, "shape") and math.prod(a.shape) <= MANY and a.dtype.kind in "fiub" for a in avals)
    if not values or None in values or len(eqn.outvars) != 1 or not simple or eqn.effects:
        return None
    with jax.ensure_compile_time_eval():
        pairs: Any = zip(avals[: len(values)], values, strict=True)
        operands = [jnp.full(aval.shape, value, aval.dtype) for aval, value in pairs]
        result = np.asarray(eqn.primitive.bind(*operands, **eqn.params)).astype(np.float64).reshape(-1)
    return float(result[0]) if result.size and (result == result[0]).all() else None
