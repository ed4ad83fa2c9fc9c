"""The abstract interpreter: walk a jaxpr and everything nested in it, with any notion of what a value is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from compress_jax.trace._jaxpr.primitives import (
    CASTS,
    MOVES,
    PASSED,
    Branches,
    Call,
    Scan,
    While,
    nested,
)
from compress_jax.trace._jaxpr.site import Position


@dataclass(frozen=True)
class Where:
    """The place of an equation.

    Attributes:
      position: index of the equation, then the body inside it, then the index there, and so on.
      loops: lengths of the loops around it, outermost first; a ``shard_map`` is a loop over its
        devices.
      conditional: whether a branch or a ``while`` loop is around it.
    """

    position: tuple[int | str, ...] = ()
    loops: tuple[int, ...] = ()
    conditional: bool = False

    def at(self, index: int) -> "Where":
        """Return the place of an equation of this body."""
        return replace(self, position=(*self.position, index))

    def inside(
        self, body: int | str, loop: int | None = None, conditional: bool = False
    ) -> "Where":
        """Return the place of a body of this equation, ``loop`` times run."""
        loops = self.loops if loop is None else (*self.loops, loop)
        return Where((*self.position, body), loops, self.conditional or conditional)


class Domain(Protocol):
    """What a value is and what equations do to it.

    The interpreter calls ``join`` where two ways meet (branches, one turn of a loop and the next)
    and runs a loop's body again until ``same`` holds, so joins must only ever climb and
    ``equation`` may be called more than once for one place.
    """

    def constant(self, aval: Any, value: Any) -> Any:
        """Return the value of a literal or a captured array."""
        ...

    def equation(self, eqn: JaxprEqn, args: list[Any], where: Where) -> Sequence[Any]:
        """Return the results of an equation that runs nothing known inside and does more than pass its operands on."""
        ...

    def join(self, a: Any, b: Any) -> Any:
        """Return what holds of both values."""
        ...

    def same(self, a: Any, b: Any) -> bool:
        """Tell whether two values say the same."""
        ...

    def unstack(self, a: Any, loop: int) -> Any:
        """Return the slice along its first axis that a turn of a loop sees; ``loop`` is how many loops are around."""
        ...

    def stack(self, a: Any, length: int) -> Any:
        """Return a value's slices put together along a new first axis."""
        ...

    def reshard(self, a: Any, aval: Any) -> Any:
        """Return a value as ``shard_map`` cuts it into, or puts it together from, the pieces of its devices."""
        ...


def interpret(
    domain: Domain, jaxpr: ClosedJaxpr, args: Sequence[Any], where: Where | None = None
) -> list[Any]:
    """Run a jaxpr over a domain.

    Args:
      domain: what values are.
      jaxpr: the computation.
      args: a value for each of its inputs.
      where: the place of the computation, for nested ones.

    Returns:
      A value for each of its outputs.
    """
    where = where or Where()
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return domain.constant(atom.aval, atom.val) if isinstance(atom, Literal) else env[atom]

    constants = zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)
    env |= {var: domain.constant(var.aval, value) for var, value in constants}
    env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))
    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        results = _equation(domain, eqn, [read(atom) for atom in eqn.invars], where.at(index))
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _equation(domain: Domain, eqn: JaxprEqn, args: list[Any], where: Where) -> Sequence[Any]:
    if eqn.primitive.name in PASSED:
        return args
    match nested(eqn):
        case Call() as call:
            return _call(domain, eqn, call, args, where)
        case Scan() as scan:
            return _scan(domain, scan, args, where)
        case While() as loop:
            return _while(domain, loop, args, where)
        case Branches(bodies):
            _decided(domain, args[:1])
            results = [
                interpret(domain, body, args[1:], where.inside(index, conditional=True))
                for index, body in enumerate(bodies)
            ]
            return [_join(domain, ways) for ways in zip(*results, strict=True)]
        case _:
            return domain.equation(eqn, args, where)


def _decided(domain: Domain, values: Sequence[Any]) -> None:
    """Tell a domain that has a method ``decides`` which values choose a branch or end a loop."""
    note = getattr(domain, "decides", None)
    if note is not None:
        note(values)


def _join(domain: Domain, ways: Sequence[Any]) -> Any:
    met = ways[0]
    for way in ways[1:]:
        met = domain.join(met, way)
    return met


def _call(domain: Domain, eqn: JaxprEqn, call: Call, args: list[Any], where: Where) -> list[Any]:
    if call.shards is None:
        return interpret(domain, call.body, args, where.inside("body"))
    pieces = [
        domain.reshard(a, var.aval) for a, var in zip(args, call.body.jaxpr.invars, strict=True)
    ]
    results = interpret(domain, call.body, pieces, where.inside("body", loop=call.shards))
    return [domain.reshard(a, var.aval) for a, var in zip(results, eqn.outvars, strict=True)]


def _scan(domain: Domain, scan: Scan, args: list[Any], where: Where) -> list[Any]:
    consts, carry, xs = _cut(args, scan.consts, scan.carry)
    inside = where.inside("body", loop=scan.length)
    slices = [domain.unstack(x, len(where.loops)) for x in xs]

    def turn(carry: list[Any]) -> list[Any]:
        return interpret(domain, scan.body, [*consts, *carry, *slices], inside)

    results = _settle(domain, turn, carry)
    return [*results[: scan.carry], *(domain.stack(y, scan.length) for y in results[scan.carry :])]


def _while(domain: Domain, loop: While, args: list[Any], where: Where) -> list[Any]:
    condition_consts, body_consts, carry = _cut(args, loop.condition_consts, loop.body_consts)
    inside = where.inside("body", conditional=True)
    carry = _settle(
        domain, lambda carry: interpret(domain, loop.body, [*body_consts, *carry], inside), carry
    )
    _decided(
        domain,
        interpret(
            domain,
            loop.condition,
            [*condition_consts, *carry],
            where.inside("cond", conditional=True),
        ),
    )
    return carry


def _settle(domain: Domain, turn: Any, carry: list[Any]) -> list[Any]:
    """Run a loop's body until what is carried stays the same; return the results, the carried ones joined with the start."""
    while True:
        results = turn(carry)
        joined = [domain.join(a, b) for a, b in zip(carry, results[: len(carry)], strict=True)]
        if all(map(domain.same, joined, carry)):
            return [*joined, *results[len(carry) :]]
        carry = joined


def _cut(items: list[Any], *sizes: int) -> list[list[Any]]:
    """Cut a list into pieces of the given sizes and the rest."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(items[start : start + size])
        start += size
    return [*pieces, items[start:]]


# Constants in a computation whose entries are all one number, followed to the equations that take
# them.


Numbers = dict[Position, tuple[float | None, ...]]


def numbers(jaxpr: ClosedJaxpr) -> Numbers:
    """Return for each equation that works on other values too which of its operands are one number throughout.

    Args:
      jaxpr: the computation.

    Returns:
      ``{position: a number or None for each operand}``; positions at which no operand is a number
      are left out.

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
    if isinstance(value, Tracer) or not (
        jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
    ):
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

    def equation(
        self, eqn: JaxprEqn, args: list[float | None], where: Where
    ) -> Sequence[float | None]:
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
