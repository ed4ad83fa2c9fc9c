"""Run a jaxpr on shorter values: every equation, loop and custom derivative resized."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun

from compress_jax.core.errors import ShapeError
from compress_jax.core.types import PyTree
from compress_jax.trace._groups.analyze import Walk
from compress_jax.trace._groups.axes import Axes, Dims, Leaf
from compress_jax.trace._jaxpr import evaluate
from compress_jax.trace._jaxpr.interpret import interpret, uniform_operands
from compress_jax.trace._jaxpr.primitives import (
    PASS_THROUGH,
    Branches,
    Call,
    Scan,
    While,
    nested,
    opened,
)
from compress_jax.trace._jaxpr.site import Position
from compress_jax.trace._resize.counts import Followed, Follower, Known
from compress_jax.trace._resize.widths import (
    KeptCoordinates,
    resized,
    sliced,
)

T = TypeVar("T")
Values = list[jax.Array]  # the operands or the results of an equation, traced or not
Body = Callable[..., tuple[Values, dict[str, Any]]]  # (*operands) -> (results, {})


@dataclass(frozen=True)
class Plan:
    """How to run a jaxpr on shorter values.

    Attributes:
      walk: the axes of every value in it.
      kept: the coordinates of them that remain.
      followed: numbers that look like counts, and the axes of calls.
      numbers: by position, the new numbers: ``{which operand: number}``.
    """

    walk: Walk
    kept: KeptCoordinates
    followed: Followed
    numbers: Mapping[Position, Mapping[int, float]]

    @classmethod
    def of(
        cls, walk: Walk, indices: dict[Leaf, np.ndarray], jaxpr: ClosedJaxpr, args: Sequence[Known]
    ) -> "Plan":
        """Return the plan in which exactly those numbers that make a mean of a sum follow."""
        kept = KeptCoordinates(walk.axes, indices)
        follower = Follower(walk, kept, uniform_operands(jaxpr))
        follower.run(jaxpr, args)
        counts = follower.noted.counts.items()
        changed = {at: {count.which: count.now} for at, count in counts if count.proven}
        return cls(walk, kept, follower.noted, changed)

    def run(self, jaxpr: ClosedJaxpr, args: Sequence[jax.Array], position: Position = ()) -> Values:
        """Run the jaxpr, or one inside it, on shorter values.

        A constant stays whole until an equation takes it and slices it.
        """
        env: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.jaxpr.eqns):
            with ExitStack() as stack:
                stack.enter_context(eqn.ctx.manager)
                if scope := str(eqn.source_info.name_stack):
                    stack.enter_context(jax.named_scope(scope))
                operands = [read(atom) for atom in eqn.invars]
                results = self._equation(eqn, operands, (*position, index))
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, args: Values, position: Position) -> Values:
        def body(jaxpr: ClosedJaxpr, where: int | str = "body") -> Body:
            return lambda *operands, given=None: (self.run(jaxpr, operands, (*position, where)), {})

        if eqn.primitive.name in PASS_THROUGH:
            return evaluate.bind(eqn, args)
        match nested(eqn):
            case None:
                return self._leaf(eqn, args, position)
            case Call(jaxpr, shards) if shards is not None:
                return evaluate.shard_map(eqn.params, args, body(jaxpr), {})[0]
            case Call(jaxpr) if eqn.primitive.name == "custom_jvp_call":
                return custom_jvp(self, eqn, args, body(jaxpr), position)
            case Call(jaxpr) if eqn.primitive.name.startswith("custom_vjp_call"):
                return custom_vjp(self, eqn, args, body(jaxpr), position)
            case Call(jaxpr):
                return evaluate.call(eqn, args, body(jaxpr))[0]
            case Scan() as scan:
                return _scan(eqn, args, scan, body(scan.body))
            case While() as loop:
                return _while(args, loop, body(loop.condition, "cond"), body(loop.body))
            case Branches(bodies):
                branches = [body(jaxpr, index) for index, jaxpr in enumerate(bodies)]
                return _branches(eqn, args, branches)
        raise AssertionError(f"{eqn.primitive.name} is not nested")

    def _leaf(self, eqn: JaxprEqn, args: Values, position: Position) -> Values:
        operands, results = self.walk.values[position]
        # Constants are still whole; everything else already has its new shape.
        args = [sliced(x, self.kept.shape(dims)) for x, dims in zip(args, operands, strict=True)]
        for which, number in self.numbers.get(position, {}).items():
            args[which] = jnp.full_like(args[which], number)
        changes = resized(self.kept, eqn, operands, results)
        params = eqn.primitive.get_bind_params({**eqn.params, **changes})
        made = eqn.primitive.bind(*args, **params)
        return list(made) if eqn.primitive.multiple_results else [made]


def _scan(eqn: JaxprEqn, args: Values, scan: Scan, body: Body) -> Values:
    start = scan.consts + scan.carry
    consts = args[: scan.consts]
    xs = args[start:]
    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    carry = _sliced_carry(
        lambda carry, first: body(*consts, *carry, *first)[0], args[scan.consts : start], first
    )

    def iteration(*operands: jax.Array, given: Any = None) -> tuple[Values, dict[str, Any]]:
        return _sliced_like(carry, body(*operands)[0]), {}

    return evaluate.scan(eqn, [*consts, *carry, *xs], scan, iteration, {})[0]


def _while(args: Values, loop: While, condition: Body, body: Body) -> Values:
    split = loop.condition_consts + loop.body_consts
    consts = args[loop.condition_consts : split]
    carry = _sliced_carry(lambda carry, _: body(*consts, *carry)[0], args[split:], [])

    def iteration(*operands: jax.Array) -> tuple[Values, dict[str, Any]]:
        return _sliced_like(carry, body(*operands)[0]), {}

    operands = [*args[:split], *carry]
    return evaluate.while_loop(operands, loop, condition, iteration, lambda old, new: new, False)[0]


def _branches(eqn: JaxprEqn, args: Values, bodies: list[Body]) -> Values:
    """Run branches that return equal shapes: a constant result is sliced as the others are."""
    made = [jax.eval_shape(lambda *a, body=body: body(*a)[0], *args[1:]) for body in bodies]
    least = [min(options, key=lambda x: x.size) for options in zip(*made, strict=True)]

    def alike(body: Body) -> Body:
        return lambda *operands: (_sliced_like(least, body(*operands)[0]), {})

    return evaluate.branches(eqn, args, [alike(body) for body in bodies])[0]


def _sliced_carry(iteration: Callable[..., Values], carry: Values, rest: Sequence[Any]) -> Values:
    """Return the initial carry of a loop, sliced to the shapes that an iteration returns.

    A constant that the loop starts from is still whole, and may make other results whole, so this
    repeats until nothing changes.
    """
    while True:
        results = jax.eval_shape(iteration, carry, rest)[: len(carry)]
        pairs = zip(carry, results, strict=True)
        shapes = [tuple(map(min, np.shape(x), y.shape)) for x, y in pairs]
        if all(np.shape(x) == shape for x, shape in zip(carry, shapes, strict=True)):
            return carry
        carry = [sliced(x, shape) for x, shape in zip(carry, shapes, strict=True)]


def _sliced_like(like: Sequence[Any], results: Values) -> Values:
    """Slice the first results, of which constants are still whole, to given shapes."""
    first = [sliced(x, np.shape(y)) for x, y in zip(results, like, strict=False)]
    return [*first, *results[len(like) :]]


# Custom derivative rules: the author's rule is traced and resized like the function itself.


def custom_jvp(plan: Plan, eqn: JaxprEqn, args: Values, body: Body, position: Position) -> Values:
    """Run a shorter body under the shorter tangent rule.

    Args:
      plan: how the surrounding jaxpr is run.
      eqn: the call.
      args: its operands, shorter.
      body: its shorter body.
      position: of the equation.

    Returns:
      The results.
    """
    run, consts = _closed(body, args)

    @jax.custom_jvp
    def function(consts: Sequence[jax.Array], args: Sequence[jax.Array]) -> Values:
        return run(consts, args)

    @function.defjvp
    def _(primals: PyTree, tangents: PyTree) -> tuple[Values, Values]:
        results = function(*primals)
        made = _rule(plan, eqn, position, primals[1], _moving(eqn, tangents[1]), _forward)
        return results, _at_moving(made, results, lambda x: np.zeros(x.shape, jax.dtypes.float0))

    return function(consts, tuple(args))


def custom_vjp(plan: Plan, eqn: JaxprEqn, args: Values, body: Body, position: Position) -> Values:
    """Run a shorter body under the shorter cotangent rule, with the operands as residuals.

    Arguments are those of `custom_jvp`.
    """
    run, consts = _closed(body, args)

    @jax.custom_vjp
    def function(consts: Sequence[jax.Array], args: Sequence[jax.Array]) -> Values:
        return run(consts, args)

    def backward(
        args: Sequence[jax.Array], cotangents: Values
    ) -> tuple[None, tuple[jax.Array | None, ...]]:
        given = [g for g, var in zip(cotangents, eqn.outvars, strict=True) if _inexact(var.aval)]
        made = _rule(plan, eqn, position, args, given, _backward)
        return None, tuple(_at_moving(made, args, lambda x: None))

    function.defvjp(lambda consts, args: (run(consts, args), args), backward)
    return function(consts, tuple(args))


def _closed(body: Body, args: Values) -> tuple[Callable[..., Values], Values]:
    """Return a body as a function of what it captures, and the captured values.

    Functions with custom rules must not close over values of other traces.
    """
    made = jax.make_jaxpr(lambda *a: body(*a)[0])(*args)
    flat = jaxpr_as_fun(opened(made))
    return lambda consts, args: list(flat(*consts, *args)), list(made.consts)


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _moving(eqn: JaxprEqn, values: Sequence[T]) -> list[T]:
    """Return what belongs to operands that have derivatives."""
    return [value for value, var in zip(values, eqn.invars, strict=True) if _inexact(var.aval)]


def _at_moving(
    values: Sequence[Any], like: Sequence[jax.Array], other: Callable[[jax.Array], Any]
) -> list[Any]:
    """Put derivatives in the places of inexact values, and ``other`` in those of integers."""
    rest = iter(values)
    return [next(rest) if _inexact(x) else other(x) for x in like]


def _function(eqn: JaxprEqn, args: Sequence[jax.Array]) -> Callable[..., Values]:
    """Return a call as a function from its inexact operands to its inexact results."""

    def function(*moving: jax.Array) -> Values:
        rest = iter(moving)
        pairs = zip(args, eqn.invars, strict=True)
        operands = [next(rest) if _inexact(var.aval) else x for x, var in pairs]
        return [x for x in evaluate.bind(eqn, operands) if _inexact(x)]

    return function


def _forward(eqn: JaxprEqn, args: Sequence[jax.Array], tangents: Sequence[jax.Array]) -> Values:
    return jax.jvp(_function(eqn, args), tuple(_moving(eqn, args)), tuple(tangents))[1]


def _backward(eqn: JaxprEqn, args: Sequence[jax.Array], cotangents: Sequence[jax.Array]) -> Values:
    return list(jax.vjp(_function(eqn, args), *_moving(eqn, args))[1](list(cotangents)))


def _rule(
    plan: Plan,
    eqn: JaxprEqn,
    position: Position,
    args: Sequence[jax.Array],
    given: Sequence[jax.Array],
    rule: Callable[..., Values],
) -> Values:
    """Run a rule on shorter values.

    The rule is traced on the old shapes, its axes are unified with those of the call, and it is run
    under a plan of its own. ``given`` are the tangents of the operands (`_forward`) or the
    cotangents of the results (`_backward`).
    """
    old = _shapes(eqn.invars)
    results = _shapes(eqn.outvars)
    forward = rule is _forward
    into = _moving(eqn, old) if forward else list(filter(_inexact, results))
    made = jax.make_jaxpr(lambda args, given: rule(eqn, args, given))(old, into)
    # The rule's axes start as those of the call, in a copy: what the rule unifies or freezes must
    # not reach the rest of the function.
    walk = Walk(_copied(plan.walk.axes))
    operand_dims, result_dims = plan.followed.calls[position]
    dims = [walk.fresh(x) if d is None else d for x, d in zip(old, operand_dims, strict=True)]
    ends = [walk.fresh(x) if d is None else d for x, d in zip(results, result_dims, strict=True)]
    moving = _moving(eqn, dims)
    inexact = [d for x, d in zip(results, ends, strict=True) if _inexact(x)]
    # Derivatives have the axes of their values: tangents in and out (forward), or cotangents.
    starts = [*dims, *(moving if forward else inexact)]
    for a, b in zip(interpret(walk, made, starts), inexact if forward else moving, strict=True):
        walk.join(b, a)
    indices = _translated(plan.kept, walk.axes, [*dims, *ends], eqn)
    again = Plan.of(walk, indices, made, list(map(Known, starts)))
    return again.run(made, [*args, *given])


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in variables]


def _copied(axes: Axes) -> Axes:
    """Return a copy of axes, to which facts can be added without changing the original."""
    made = copy.copy(axes)
    made.bound = dict(axes.bound)
    made.reasons = dict(axes.reasons)
    return made


def _translated(
    kept: KeptCoordinates, axes: Axes, values: Sequence[Dims], eqn: JaxprEqn
) -> dict[Leaf, np.ndarray]:
    """Return the kept coordinates by the leaves of axes that a rule has refined.

    Raises a ShapeError if the rule has frozen or split a leaf that is shortened.
    """
    leaves: set[Leaf] = set()
    for axis in itertools.chain.from_iterable(values):
        leaves.update(leaf for leaf in kept.axes.leaves(axis) if leaf in kept.indices)
    found: dict[Leaf, np.ndarray] = {}
    for leaf in leaves:
        own = kept.indices[leaf]
        now = axes.find(leaf)
        reason = axes.reason(leaf)
        same = isinstance(now, Leaf) and np.array_equal(found.get(now, own), own)
        if not same or reason:
            why = reason or "it is split there"
            rule = eqn.params.get("name", eqn.primitive.name)
            raise ShapeError(f"the derivative rule of {rule} cannot be shortened: {why}")
        assert isinstance(now, Leaf)
        found[now] = own
    return found
