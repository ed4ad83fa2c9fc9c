"""The abstract interpreter: run a jaxpr, and all that is nested in it, on abstract values.

`interpret` runs any `Domain`. The simplest domain is here too: `uniform_operands` finds the
constants in a computation whose entries are all one number.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from compress_jax.core.types import Aval
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

V = TypeVar("V")


@dataclass(frozen=True)
class Where:
    """The place of an equation.

    Attributes:
      position: index of the equation, then the body inside it, then the index there, and so on.
      loops: lengths of the loops around it, outermost first; a ``shard_map`` is a loop over its
        devices.
      conditional: whether a branch or a ``while`` loop is around it.
    """

    position: Position = ()
    loops: tuple[int, ...] = ()
    conditional: bool = False

    def at(self, index: int) -> "Where":
        """Return the place of an equation of this body."""
        return replace(self, position=(*self.position, index))

    def inside(
        self, body: int | str, loop: int | None = None, conditional: bool = False
    ) -> "Where":
        """Return the place of a body of this equation, which is run ``loop`` times."""
        loops = self.loops if loop is None else (*self.loops, loop)
        return Where((*self.position, body), loops, self.conditional or conditional)


@dataclass(frozen=True)
class ConstantValue:
    """A literal, or an array that a function closes over, whose numbers may not be known.

    Attributes:
      value: what the jaxpr holds.

    Example:
      >>> ConstantValue(jnp.ones(2)).entries.tolist()
      [1.0, 1.0]
      >>> jax.jit(lambda x: x * ConstantValue(x).known)(3)
      Array(0, dtype=int32, weak_type=True)
    """

    value: Any = field(repr=False)

    @property
    def known(self) -> bool:
        """Whether there is a value here and now.

        There is none for a tracer, as the analysis may run while a caller's ``jit`` traces; nor for
        an array of which other processes hold a part.
        """
        if isinstance(self.value, Tracer):
            return False
        if isinstance(self.value, jax.Array):
            return self.value.is_fully_addressable or self.value.is_fully_replicated
        return isinstance(self.value, (np.ndarray, np.generic, bool, int, float, complex))

    @property
    def entries(self) -> np.ndarray | None:
        """Its numbers or truth values; None if they are not known, or it is a typed key."""
        if not self.known or jnp.issubdtype(jnp.result_type(self.value), jax.dtypes.extended):
            return None
        return np.asarray(self.value)

    @property
    def real(self) -> np.ndarray | None:
        """Its numbers; None if they are not known, or complex, or truth values."""
        entries = self.entries
        if entries is None:
            return None
        dtype = entries.dtype
        is_real = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
        return entries if is_real else None

    @property
    def zero(self) -> bool:
        """Whether its numbers are known to be zero."""
        entries = self.entries
        if entries is None or not jnp.issubdtype(entries.dtype, jnp.number):
            return False
        return not entries.any()


class Domain(Protocol[V]):
    """Abstract values, and the transfer functions of equations on them.

    The interpreter joins the values of control-flow paths that meet (branches, an iteration of a
    loop and the next) and runs a loop's body until `same` holds of all that is carried: a fixed
    point. So `join` must be monotone, and `equation` may be called more than once for one place.
    """

    def constant(self, aval: Aval, value: ConstantValue) -> V:
        """Return the abstract value of a literal or a captured array."""
        ...

    def equation(self, eqn: JaxprEqn, args: list[V], where: Where) -> Sequence[V]:
        """Return the abstract results of an equation.

        The interpreter handles `PASS_THROUGH` and all that `nested` knows by itself; only the other
        equations come here.
        """
        ...

    def join(self, a: V, b: V) -> V:
        """Join two abstract values: return one that holds of both."""
        ...

    def same(self, a: V, b: V) -> bool:
        """Tell whether two abstract values are equal."""
        ...

    def unstack(self, a: V, loop: int) -> V:
        """Return a slice along the first axis: the operand of one iteration of a loop.

        Args:
          a: the abstract value of the stack.
          loop: how many loops are around this one.
        """
        ...

    def stack(self, a: V, length: int) -> V:
        """Return the results of a loop's iterations, stacked along a new first axis."""
        ...

    def reshard(self, a: V, aval: Aval) -> V:
        """Return the shard of a value inside ``shard_map``, or the value of a shard outside."""
        ...


def interpret(
    domain: Domain[V], jaxpr: ClosedJaxpr, args: Sequence[V], where: Where | None = None
) -> list[V]:
    """Run a jaxpr over a domain.

    Args:
      domain: the abstract values.
      jaxpr: the computation.
      args: an abstract value for each of its inputs.
      where: the place of the computation, if it is nested.

    Returns:
      An abstract value for each of its outputs.
    """
    where = where or Where()
    env: dict[Var, V] = {}

    def read(atom: Var | Literal) -> V:
        if isinstance(atom, Literal):
            return domain.constant(atom.aval, ConstantValue(atom.val))
        return env[atom]

    constants = zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)
    env |= {var: domain.constant(var.aval, ConstantValue(value)) for var, value in constants}
    env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))
    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        results = _equation(domain, eqn, [read(atom) for atom in eqn.invars], where.at(index))
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _equation(domain: Domain[V], eqn: JaxprEqn, args: list[V], where: Where) -> Sequence[V]:
    if eqn.primitive.name in PASS_THROUGH:
        return args
    match nested(eqn):
        case Call() as call:
            return _call(domain, eqn, call, args, where)
        case Scan() as scan:
            return _scan(domain, scan, args, where)
        case While() as loop:
            return _while(domain, loop, args, where)
        case Branches() as branches:
            return _branches(domain, branches, args, where)
        case _:
            return domain.equation(eqn, args, where)


def _call(domain: Domain[V], eqn: JaxprEqn, call: Call, args: list[V], where: Where) -> list[V]:
    if call.shards is None:
        return interpret(domain, call.body, args, where.inside("body"))
    inner = zip(args, call.body.jaxpr.invars, strict=True)
    shards = [domain.reshard(a, var.aval) for a, var in inner]
    # A shard_map is a loop over devices: each runs the body on its own shard.
    results = interpret(domain, call.body, shards, where.inside("body", loop=call.shards))
    return [domain.reshard(a, var.aval) for a, var in zip(results, eqn.outvars, strict=True)]


def _scan(domain: Domain[V], scan: Scan, args: list[V], where: Where) -> list[V]:
    consts, carry, xs = _cut(args, scan.consts, scan.carry)
    inside = where.inside("body", loop=scan.length)
    # An abstract slice is that of any iteration, so it is taken once.
    slices = [domain.unstack(x, len(where.loops)) for x in xs]

    # (consts, carry, slices of xs) -> (carry, slices of ys)
    def iteration(carry: list[V]) -> list[V]:
        return interpret(domain, scan.body, [*consts, *carry, *slices], inside)

    results = _fixed_point(domain, iteration, carry)
    stacked = [domain.stack(y, scan.length) for y in results[scan.carry :]]
    return [*results[: scan.carry], *stacked]


def _while(domain: Domain[V], loop: While, args: list[V], where: Where) -> list[V]:
    condition_consts, body_consts, carry = _cut(args, loop.condition_consts, loop.body_consts)
    inside = where.inside("body", conditional=True)

    def iteration(carry: list[V]) -> list[V]:
        return interpret(domain, loop.body, [*body_consts, *carry], inside)

    carry = _fixed_point(domain, iteration, carry)
    # The condition is run once, on the carry that holds for every iteration.
    check = where.inside("cond", conditional=True)
    _decide(domain, interpret(domain, loop.condition, [*condition_consts, *carry], check))
    return carry


def _branches(domain: Domain[V], branches: Branches, args: list[V], where: Where) -> list[V]:
    index, *operands = args
    _decide(domain, [index])
    # The index is data: run every branch, and join what each of them returns.
    results = [
        interpret(domain, body, operands, where.inside(i, conditional=True))
        for i, body in enumerate(branches.bodies)
    ]
    return [_join_all(domain, ways) for ways in zip(*results, strict=True)]


def _decide(domain: Domain[V], values: Sequence[V]) -> None:
    """Show a domain that has a method ``decides`` the values that choose a branch or end a loop."""
    decides = getattr(domain, "decides", None)
    if decides is not None:
        decides(values)


def _join_all(domain: Domain[V], ways: Sequence[V]) -> V:
    joined = ways[0]
    for way in ways[1:]:
        joined = domain.join(joined, way)
    return joined


def _fixed_point(
    domain: Domain[V], iteration: Callable[[list[V]], list[V]], carry: list[V]
) -> list[V]:
    """Run a loop's body until the joined carry no longer changes; return carry and further results.

    The carry is joined with its start: the loop may run no iteration.
    """
    # A join only gives up knowledge, and there is a finite amount of it: the loop ends.
    while True:
        results = iteration(carry)
        joined = [domain.join(a, b) for a, b in zip(carry, results[: len(carry)], strict=True)]
        # The carry holds for every iteration, so the further results (ys) of this round do too.
        if all(map(domain.same, joined, carry)):
            return [*joined, *results[len(carry) :]]
        carry = joined


def _cut(items: list[V], *sizes: int) -> list[list[V]]:
    """Cut a list into pieces of the given sizes and the rest."""
    pieces = []
    start = 0
    for size in sizes:
        pieces.append(items[start : start + size])
        start += size
    return [*pieces, items[start:]]


Number = float | None
"""The number that all entries of a value are; None where it is not known or they differ."""
UniformOperands = dict[Position, tuple[Number, ...]]


def uniform_operands(jaxpr: ClosedJaxpr) -> UniformOperands:
    """Return for each equation which of its operands are one number throughout.

    Args:
      jaxpr: the computation.

    Returns:
      ``{position: a number or None for each operand}``. Positions at which no operand is a number
      are left out, and those whose result is a number too: they are constants themselves.

    Example:
      >>> import jax
      >>> uniform_operands(jax.make_jaxpr(lambda x: x / (3 * jnp.sqrt(4.0)))(1.0))
      {(2,): (None, 6.0)}
    """
    domain = _Constants()
    interpret(domain, jaxpr, [None] * len(jaxpr.jaxpr.invars))
    found = domain.operands.items()
    return {place: args for place, args in found if any(x is not None for x in args)}


def uniform_value(value: object) -> Number:
    """Return the one number that a constant's entries are, if they are known, real and equal.

    Example:
      >>> uniform_value(np.full(3, 2)), uniform_value(2j)
      (2.0, None)
    """
    entries = ConstantValue(value).real
    if entries is None or not entries.size:
        return None
    first = entries.reshape(-1)[0]
    return float(first) if (entries == first).all() else None


@dataclass
class _Constants:
    """The domain of numbers; ``operands`` holds those of each equation by position."""

    operands: UniformOperands = field(default_factory=dict)

    def constant(self, aval: Aval, value: ConstantValue) -> Number:
        return uniform_value(value.value)

    # NaN equals not even itself, so a carry of NaN is joined to None, and the loop ends there.
    def join(self, a: Number, b: Number) -> Number:
        return a if a == b else None

    def same(self, a: Number, b: Number) -> bool:
        return a == b

    def unstack(self, a: Number, loop: int) -> Number:
        return a

    def stack(self, a: Number, length: int) -> Number:
        return a

    def reshard(self, a: Number, aval: Aval) -> Number:
        return a

    def equation(self, eqn: JaxprEqn, args: list[Number], where: Where) -> Sequence[Number]:
        result = _folded(eqn, args)
        if result is None:
            self.operands[where.position] = tuple(args)
        else:
            self.operands.pop(where.position, None)
        return [result] * len(eqn.outvars)


def _folded(eqn: JaxprEqn, args: Sequence[Number]) -> Number:
    """Return an equation's result if all operands are numbers and it has a rule."""
    known = [x for x in args if x is not None]
    if not known or len(known) < len(args):
        return None
    name = eqn.primitive.name
    # One number throughout stays that number, wherever its entries go.
    if name in MOVES or name in CASTS:
        return known[0]
    if name == "integer_pow":
        return _safely(lambda x: x ** eqn.params["y"], known)
    rule = RULES.get(name)
    return None if rule is None else _safely(rule, known)


def _safely(rule: Callable[..., float], args: Sequence[float]) -> float:
    # Python raises (1 / 0, the root of -1, an overflow) where an array would hold inf or NaN.
    try:
        return rule(*args)
    except (ArithmeticError, ValueError):
        return math.nan


# On Python's floats: in double precision, whatever the dtype of the equation.
RULES: dict[str, Callable[..., float]] = {
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
