"""The moves between a stored parameter and the contractions that use it.

A parameter that is only transposed, reshaped, sliced, cast or passed to the iterations of a loop
has the same entries at the contraction as in storage. So its integer codes can be moved likewise,
without computing the float values in between.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from compress_jax.core.types import Aval
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.evaluate import bind
from compress_jax.trace._jaxpr.find_sites import Traced
from compress_jax.trace._jaxpr.interpret import Where, interpret
from compress_jax.trace._jaxpr.primitives import CASTS, INDEXED, MOVES
from compress_jax.trace._jaxpr.site import Position


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on params or inputs; computed only if a route needs it."""

    make: Callable[[], Any] = field(repr=False)


@dataclass(frozen=True)
class Lost:
    """A value whose entries are not those of a stored parameter.

    Attributes:
      reason: what changed the parameter that it depends on; empty if it depends on none.
    """

    reason: str = ""


@dataclass(frozen=True)
class Move:
    """An equation that only moves entries.

    Attributes:
      eqn: the equation.
      result: which of its results is used.
      indices: its other operands.
    """

    eqn: JaxprEqn
    result: int = 0
    indices: tuple[Constant, ...] = ()

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
class Iteration:
    """The slice of a stack that an iteration of a loop uses: one index of the first axis.

    Attributes:
      loop: which loop, counted from the outermost.
    """

    loop: int


Step = Move | Cast | Iteration


@dataclass(frozen=True)
class Route:
    """A parameter and the steps from storage to its use.

    Attributes:
      path: the parameter's.
      steps: in order.
    """

    path: str
    steps: tuple[Step, ...] = ()

    @property
    def loops(self) -> tuple[int, ...]:
        """The loops whose iterations pick a slice, in the order of the steps."""
        return tuple(step.loop for step in self.steps if isinstance(step, Iteration))

    @property
    def stacked(self) -> int:
        """How many first steps pick slices, and so can be taken before anything is unpacked."""
        return next(
            (i for i, step in enumerate(self.steps) if not isinstance(step, Iteration)),
            len(self.steps),
        )

    def take(self, x: jax.Array, iterations: Sequence[jax.Array] = (), done: int = 0) -> jax.Array:
        """Move a stored array of any dtype to the operand, in one iteration.

        Args:
          x: array of the stored shape, or of the shape after the first ``done`` steps.
          iterations: the current iteration of each loop in the remaining steps.
          done: how many steps to skip.

        Returns:
          Array of the operand's shape.
        """
        left = iter(iterations)
        for step in self.steps[done:]:
            if isinstance(step, Iteration):
                x = jax.lax.dynamic_index_in_dim(x, next(left), keepdims=False)
            elif isinstance(step, Move):
                x = step(x)
        return x

    def every(self, x: jax.Array) -> jax.Array:
        """Move a stored array in all iterations at once: those of `loops` are the first axes."""
        return _every(self.steps, x)

    def cast(self, x: jax.Array) -> jax.Array:
        """Cast an array as the parameter is cast on its route."""
        for step in self.steps:
            if isinstance(step, Cast):
                x = step(x)
        return x


def _every(steps: Sequence[Step], x: jax.Array) -> jax.Array:
    for i, step in enumerate(steps):
        if isinstance(step, Iteration):
            return jax.vmap(lambda piece, rest=steps[i + 1 :]: _every(rest, piece))(x)
        x = step(x) if isinstance(step, Move) else x
    return x


Value = Constant | Lost | Route


@dataclass
class Routes:
    """The interpreter's domain of routes; ``found`` has each contraction's operands by position."""

    found: dict[Position, tuple[Value, Value]] = field(default_factory=dict)

    def constant(self, aval: Aval, value: object) -> Value:
        """Return a known value."""
        return Constant(lambda: value)

    def join(self, a: Value, b: Value) -> Value:
        """Return what may be either value."""
        return a if a == b else _lost([a, b], "it is not the same in every iteration or branch")

    def same(self, a: Value, b: Value) -> bool:
        """Tell whether two values are the same."""
        return a == b

    def unstack(self, a: Value, loop: int) -> Value:
        """Return the slice of an iteration."""
        return Route(a.path, (*a.steps, Iteration(loop))) if isinstance(a, Route) else _lost([a])

    def stack(self, a: Value, length: int) -> Value:
        """Return slices put together."""
        return _lost([a], "a loop returns it")

    def reshard(self, a: Value, aval: Aval) -> Value:
        """Return a device's piece."""
        return _lost([a], "each device of a shard_map has a piece of the parameter")

    def equation(self, eqn: JaxprEqn, args: list[Value], where: Where) -> Sequence[Value]:
        """Return the results of an equation; note the operands of a contraction."""
        if primitives.kind(eqn) is not None:
            self.found[where.position] = (args[0], args[1])
            return [_lost(args, "a contraction changes the parameter on its way")]
        name = eqn.primitive.name
        outs = range(len(eqn.outvars))
        if args and all(isinstance(arg, Constant) for arg in args) and not eqn.effects:
            return [Constant(_evaluated(eqn, args, i)) for i in outs]
        first, rest = (args[0], args[1:]) if args else (None, [])
        if isinstance(first, Route) and all(isinstance(each, Constant) for each in rest):
            if name in MOVES or name in INDEXED:
                indices = tuple(each for each in rest if isinstance(each, Constant))
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
    """Return a lost value with the earliest reason, if it depends on a parameter."""
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
      >>> (_, a), (_, b) = found.values()
      >>> a.take(jnp.eye(3, 3, 1)).tolist()
      [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
      >>> b.reason
      'the parameter is changed on its way (mul)'
    """
    domain = Routes()
    inputs = [Lost()] * (len(traced.jaxpr.jaxpr.invars) - len(traced.params))
    interpret(domain, traced.jaxpr, [*(Route(path) for path in traced.params), *inputs])
    return domain.found
