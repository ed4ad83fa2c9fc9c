"""Run a jaxpr on shorter values: each equation with its own parameters resized, each nested one built again around that."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from compress_jax.trace import rebuild
from compress_jax.trace._analyse import Walk
from compress_jax.trace.axes import Leaf
from compress_jax.trace.counts import Followed, Follower, Known
from compress_jax.trace.kept import Kept, cut
from compress_jax.trace.nested import Branches, Call, Scan, While, nested
from compress_jax.trace.numbers import numbers
from compress_jax.trace.primitives import PASSED
from compress_jax.trace.resize_derivatives import custom_jvp, custom_vjp
from compress_jax.trace.resize_rules import resized
from compress_jax.trace.site import Position

Body = Callable[..., tuple[list[Any], dict[str, Any]]]


@dataclass(frozen=True)
class Plan:
    """How to run a jaxpr on shorter values.

    Attributes:
      walk: the axes of every value in it.
      kept: what is left of them.
      followed: numbers that look like counts, and the axes of calls.
      numbers: by position, operands that are numbers and become others: ``{which: number}``.
    """

    walk: Walk
    kept: Kept
    followed: Followed
    numbers: Mapping[Position, Mapping[int, float]]

    @classmethod
    def of(cls, walk: Walk, indices: dict[Leaf, np.ndarray], jaxpr: ClosedJaxpr, args: Sequence[Known]) -> "Plan":
        """Make the plan of a jaxpr that has been walked over: numbers that make a mean of a sum follow its terms."""
        kept = Kept(walk.axes, indices)
        follower = Follower(walk, kept, numbers(jaxpr))
        follower.run(jaxpr, args)
        counts = follower.noted.counts
        return cls(walk, kept, follower.noted, {at: {each.which: each.now} for at, each in counts.items() if each.proven})

    def run(self, jaxpr: ClosedJaxpr, args: Sequence[Any], position: Position = ()) -> list[Any]:
        """Run the jaxpr, or one inside it, on shorter values; a constant stays whole until an equation takes it."""
        env: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.jaxpr.eqns):
            with ExitStack() as stack:
                stack.enter_context(eqn.ctx.manager)
                if scope := str(eqn.source_info.name_stack):
                    stack.enter_context(jax.named_scope(scope))
                results = self._equation(eqn, [read(atom) for atom in eqn.invars], (*position, index))
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, args: list[Any], position: Position) -> list[Any]:
        def body(jaxpr: ClosedJaxpr, where: int | str = "body") -> Body:
            return lambda *operands, given=None: (self.run(jaxpr, operands, (*position, where)), {})

        if eqn.primitive.name in PASSED:
            return rebuild.bind(eqn, args)
        match nested(eqn):
            case None:
                return self._leaf(eqn, args, position)
            case Call(jaxpr, shards) if shards is not None:
                return rebuild.shard_map(eqn.params, args, body(jaxpr), {})[0]
            case Call(jaxpr) if eqn.primitive.name == "custom_jvp_call":
                return custom_jvp(self, eqn, args, body(jaxpr), position)
            case Call(jaxpr) if eqn.primitive.name.startswith("custom_vjp_call"):
                return custom_vjp(self, eqn, args, body(jaxpr), position)
            case Call(jaxpr):
                return rebuild.call(eqn, args, body(jaxpr))[0]
            case Scan() as scan:
                return _scan(eqn, args, scan, body(scan.body))
            case While() as loop:
                return _while(args, loop, body(loop.condition, "cond"), body(loop.body))
            case Branches(bodies):
                return _branches(eqn, args, [body(jaxpr, index) for index, jaxpr in enumerate(bodies)])
        raise AssertionError(f"{eqn.primitive.name} has no form")

    def _leaf(self, eqn: JaxprEqn, args: list[Any], position: Position) -> list[Any]:
        operands, results = self.walk.values[position]
        args = [cut(x, self.kept.shape(dims)) for x, dims in zip(args, operands, strict=True)]
        for which, number in self.numbers.get(position, {}).items():
            args[which] = jnp.full_like(args[which], number)
        params = eqn.primitive.get_bind_params({**eqn.params, **resized(self.kept, eqn, operands, results)})
        made = eqn.primitive.bind(*args, **params)
        return list(made) if eqn.primitive.multiple_results else [made]


def _scan(eqn: JaxprEqn, args: list[Any], scan: Scan, body: Body) -> list[Any]:
    start = scan.consts + scan.carry
    consts, xs = args[: scan.consts], args[start:]
    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    carry = _settled(lambda carry, first: body(*consts, *carry, *first)[0], args[scan.consts : start], first)

    def turn(*operands: Any, given: Any = None) -> tuple[list[Any], dict[str, Any]]:
        return _as_carried(body(*operands)[0], carry), {}

    return rebuild.scan(eqn, [*consts, *carry, *xs], scan, turn, {})[0]


def _while(args: list[Any], loop: While, condition: Body, body: Body) -> list[Any]:
    split = loop.condition_consts + loop.body_consts
    consts = args[loop.condition_consts : split]
    carry = _settled(lambda carry, _: body(*consts, *carry)[0], args[split:], [])

    def turn(*operands: Any) -> tuple[list[Any], dict[str, Any]]:
        return _as_carried(body(*operands)[0], carry), {}

    return rebuild.while_loop([*args[:split], *carry], loop, condition, turn, lambda old, new: new, False)[0]


def _branches(eqn: JaxprEqn, args: list[Any], bodies: list[Body]) -> list[Any]:
    """Where one branch returns a constant, which is still whole, the others tell how much of it is left."""
    made = [jax.eval_shape(lambda *a, body=body: body(*a)[0], *args[1:]) for body in bodies]
    least = [min(options, key=lambda x: x.size) for options in zip(*made, strict=True)]

    def alike(body: Body) -> Body:
        return lambda *operands: (_as_carried(body(*operands)[0], least), {})

    return rebuild.branches(eqn, args, [alike(body) for body in bodies])[0]


def _settled(turn: Callable[[list[Any], list[Any]], list[Any]], carry: list[Any], rest: list[Any]) -> list[Any]:
    """Return what a loop carries, cut as a turn of it leaves it: a constant it starts from is still whole."""
    while True:
        results = jax.eval_shape(turn, carry, rest)[: len(carry)]
        shapes = [tuple(map(min, np.shape(x), y.shape)) for x, y in zip(carry, results, strict=True)]
        if all(np.shape(x) == shape for x, shape in zip(carry, shapes, strict=True)):
            return carry
        carry = [cut(x, shape) for x, shape in zip(carry, shapes, strict=True)]


def _as_carried(results: list[Any], like: Sequence[Any]) -> list[Any]:
    """Cut those of the first results that are constants and still whole."""
    return [*(cut(x, np.shape(y)) for x, y in zip(results, like, strict=False)), *results[len(like) :]]
