"""Constants in a computation whose entries are all one number, followed to the equations that take them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, JaxprEqn

from compress_jax.trace.interpret import Where, interpret
from compress_jax.trace.primitives import CASTS, MOVES
from compress_jax.trace.site import Position

Numbers = dict[Position, tuple[float | None, ...]]


def numbers(jaxpr: ClosedJaxpr) -> Numbers:
    """Return for each equation that works on other values too which of its operands are one number throughout.

    Args:
      jaxpr: the computation.

    Returns:
      ``{position: a number or None for each operand}``; positions at which no operand is a number are left out.

    Example:
      >>> import jax
      >>> numbers(jax.make_jaxpr(lambda x: x / (3 * jnp.sqrt(4.0)))(1.0))
      {(2,): (None, 6.0)}
    """
    domain = _Constants()
    interpret(domain, jaxpr, [None] * len(jaxpr.jaxpr.invars))
    return {place: args for place, args in domain.taken.items() if any(x is not None for x in args)}


def one_number(value: Any) -> float | None:
    """Return the one value of a constant's entries, if they are real and equal."""
    dtype = getattr(value, "dtype", np.asarray(0.0).dtype)
    if isinstance(value, Tracer) or not (jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)):
        return None
    entries = np.asarray(value).reshape(-1)
    return float(entries[0]) if entries.size and (entries == entries[0]).all() else None


@dataclass
class _Constants:
    """The domain for the interpreter: a value is a number, or None."""

    taken: Numbers = field(default_factory=dict)

    def constant(self, aval: Any, value: Any) -> float | None:
        return one_number(value)

    def join(self, a: float | None, b: float | None) -> float | None:
        return a if a == b else None

    def same(self, a: float | None, b: float | None) -> bool:
        return a == b

    def unstack(self, a: float | None, loop: int) -> float | None:
        return a

    def stack(self, a: float | None, length: int) -> float | None:
        return a

    def reshard(self, a: float | None, aval: Any) -> float | None:
        return a

    def equation(self, eqn: JaxprEqn, args: list[float | None], where: Where) -> Sequence[float | None]:
        made = _made(eqn, args)
        if made is None:
            self.taken[where.position] = tuple(args)
        else:
            self.taken.pop(where.position, None)
        return [made] * len(eqn.outvars)


def _made(eqn: JaxprEqn, args: Sequence[float | None]) -> float | None:
    known = [x for x in args if x is not None]
    name = eqn.primitive.name
    if not known or len(known) < len(args):
        return None
    if name in MOVES or name in CASTS:
        return known[0]
    if name == "integer_pow":
        return _safely(lambda x: x ** eqn.params["y"], known)
    rule = ARITHMETIC.get(name)
    return None if rule is None else _safely(rule, known)


def _safely(rule: Callable[..., float], args: Sequence[float]) -> float:
    try:
        return rule(*args)
    except (ArithmeticError, ValueError):
        return math.nan


ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": max,
    "min": min,
    "neg": lambda a: -a,
    "sqrt": math.sqrt,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "square": lambda a: a * a,
    "pow": math.pow,
    "exp": math.exp,
    "log": math.log,
}
