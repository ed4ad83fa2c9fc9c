"""How a stored parameter reaches the operands of contractions: the moves on its way, which its codes can make as well.

A parameter that is only transposed, reshaped, cut, cast or handed to the turns of a loop arrives as
it was stored, entry for entry. So its integer codes arrive by the same moves, and no value in
between needs to be computed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.evaluate import bind
from compress_jax.trace._jaxpr.find_sites import Traced
from compress_jax.trace._jaxpr.interpret import Where, interpret
from compress_jax.trace._jaxpr.primitives import CASTS, INDEXED, MOVES
from compress_jax.trace._jaxpr.site import Position


@dataclass(frozen=True)
class Fixed:
    """A value that does not depend on params or inputs; computed only if a route asks for it."""

    make: Callable[[], Any] = field(repr=False)


@dataclass(frozen=True)
class Lost:
    """A value that is not a parameter as it was stored.

    Attributes:
      reason: what became of the parameter in it; empty if none is in it.
    """

    reason: str = ""


@dataclass(frozen=True)
class Move:
    """An equation that puts entries elsewhere, and which of its results is followed."""

    eqn: JaxprEqn
    result: int = 0
    indices: tuple[Fixed, ...] = ()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Move an array of any dtype."""
        return bind(self.eqn, [x, *(each.make() for each in self.indices)])[self.result]


@dataclass(frozen=True)
class Cast:
    """A cast to another floating-point dtype or to fewer digits, which codes need not follow."""

    eqn: JaxprEqn

    def __call__(self, x: jax.Array) -> jax.Array:
        """Cast an array of any shape."""
        p = self.eqn.params
        return x.astype(p["new_dtype"]) if "new_dtype" in p else jax.lax.reduce_precision(x, **p)


@dataclass(frozen=True)
class Turn:
    """What a turn of a loop sees of a stack: one index of the first axis. Loops are counted from the outermost."""

    loop: int


@dataclass(frozen=True)
class Route:
    """A parameter and the steps from how it is stored to how it is used.

    Attributes:
      path: of the parameter.
      steps: in order.
    """

    path: str
    steps: tuple[Move | Cast | Turn, ...] = ()

    @property
    def loops(self) -> tuple[int, ...]:
        """The loops whose turns pick a slice, in the order they do."""
        return tuple(step.loop for step in self.steps if isinstance(step, Turn))

    @property
    def stacked(self) -> int:
        """How many steps at the beginning pick slices: they can be taken before anything is unpacked."""
        return next(
            (i for i, step in enumerate(self.steps) if not isinstance(step, Turn)), len(self.steps)
        )

    def take(self, x: jax.Array, turns: Sequence[Any] = (), done: int = 0) -> jax.Array:
        """Return what a stored array becomes at the operand in one turn, its dtype as it is.

        Args:
          x: array of the stored shape, or what the first ``done`` steps leave of it.
          turns: for each loop of the steps that are left, the turn.
          done: how many steps to leave out.

        Returns:
          Array of the operand's shape.
        """
        left = iter(turns)
        for step in self.steps[done:]:
            if isinstance(step, Turn):
                x = jax.lax.dynamic_index_in_dim(x, next(left), keepdims=False)
            elif isinstance(step, Move):
                x = step(x)
        return x

    def every(self, x: jax.Array) -> jax.Array:
        """Return what a stored array becomes in all turns: those of `loops` are the first axes."""
        return _every(self.steps, x)

    def cast(self, x: jax.Array) -> jax.Array:
        """Cast an array as the parameter is cast on the way."""
        for step in self.steps:
            x = step(x) if isinstance(step, Cast) else x
        return x


def _every(steps: Sequence[Any], x: jax.Array) -> jax.Array:
    for i, step in enumerate(steps):
        if isinstance(step, Turn):
            return jax.vmap(lambda piece, rest=steps[i + 1 :]: _every(rest, piece))(x)
        x = step(x) if isinstance(step, Move) else x
    return x


Value = Fixed | Lost | Route


@dataclass
class Routes:
    """The domain of routes for the interpreter; ``found`` holds the operands of every contraction by position."""

    found: dict[Position, tuple[Value, Value]] = field(default_factory=dict)

    def constant(self, aval: Any, value: Any) -> Value:
        """Return a known value."""
        return Fixed(lambda: value)

    def join(self, a: Value, b: Value) -> Value:
        """Return what may be either value."""
        return a if a == b else _lost([a, b], "it is not the same in every turn or branch")

    def same(self, a: Value, b: Value) -> bool:
        """Tell whether two values are the same."""
        return a == b

    def unstack(self, a: Value, loop: int) -> Value:
        """Return the slice that a turn sees."""
        return Route(a.path, (*a.steps, Turn(loop))) if isinstance(a, Route) else _lost([a])

    def stack(self, a: Value, length: int) -> Value:
        """Return slices put together."""
        return _lost([a], "a loop returns it")

    def reshard(self, a: Value, aval: Any) -> Value:
        """Return a device's piece."""
        return _lost([a], "each device of a shard_map has a piece of the parameter")

    def equation(self, eqn: JaxprEqn, args: list[Value], where: Where) -> Sequence[Value]:
        """Return the results of an equation; note the operands of a contraction."""
        if primitives.kind(eqn) is not None:
            self.found[where.position] = (args[0], args[1])
            return [_lost(args, "a contraction changes the parameter on its way")]
        name, outs = eqn.primitive.name, range(len(eqn.outvars))
        if args and all(isinstance(arg, Fixed) for arg in args) and not eqn.effects:
            return [Fixed(_evaluated(eqn, args, i)) for i in outs]
        first, rest = (args[0], args[1:]) if args else (None, [])
        if isinstance(first, Route) and all(isinstance(each, Fixed) for each in rest):
            if name in MOVES or name in INDEXED:
                indices = tuple(each for each in rest if isinstance(each, Fixed))
                return [Route(first.path, (*first.steps, Move(eqn, i, indices))) for i in outs]
            if name in CASTS and jnp.issubdtype(
                getattr(eqn.outvars[0].aval, "dtype", bool), jnp.floating
            ):
                return [Route(first.path, (*first.steps, Cast(eqn)))]
        return [_lost(args, _changed(name, args))] * len(eqn.outvars)


def _evaluated(eqn: JaxprEqn, args: Sequence[Any], result: int) -> Callable[[], Any]:
    def make() -> Any:
        with jax.ensure_compile_time_eval():
            return bind(eqn, [arg.make() for arg in args])[result]

    return make


def _changed(name: str, args: Sequence[Value]) -> str:
    if len({arg.path for arg in args if isinstance(arg, Route)}) > 1:
        return f"several parameters are joined ({name})"
    if name in INDEXED:
        return "a slice of the parameter is used, and data decide which"
    return f"the parameter is changed on its way ({name})"


def _lost(args: Sequence[Value], reason: str = "") -> Lost:
    """Return what is lost: for the first reason that was met, if a parameter is in it."""
    earlier = next((arg.reason for arg in args if isinstance(arg, Lost) and arg.reason), "")
    return Lost(earlier or (reason if any(isinstance(arg, Route) for arg in args) else ""))


def routes(traced: Traced) -> Mapping[Position, tuple[Value, Value]]:
    """Return the operands of every contraction of a trace: routes of parameters where they are.

    Args:
      traced: the trace.

    Returns:
      ``{position of a site: (lhs, rhs)}``.

    Example:
      >>> from compress_jax.trace._jaxpr.find_sites import trace
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"].T) @ (2 * p["b"])
      >>> shape = jax.ShapeDtypeStruct((3, 3), jnp.float32)
      >>> found = routes(trace(fn, {"a": shape, "b": shape}, shape))
      >>> for _, operand in found.values():
      ...     print(operand.take(jnp.eye(3, 3, 1)).tolist() if isinstance(operand, Route) else operand.reason)
      [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
      the parameter is changed on its way (mul)
    """
    domain = Routes()
    inputs = [Lost()] * (len(traced.jaxpr.jaxpr.invars) - len(traced.params))
    interpret(domain, traced.jaxpr, [*(Route(path) for path in traced.params), *inputs])
    return domain.found
