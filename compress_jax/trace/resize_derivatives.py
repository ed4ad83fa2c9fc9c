"""Custom rules for derivatives on shorter values: the author's rule is traced, walked over and resized as the function is.

It is traced when something differentiates, no sooner: a rule that cannot be resized does not stand in a function's way.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, jaxpr_as_fun

from compress_jax.core.errors import ShapeError
from compress_jax.trace import rebuild
from compress_jax.trace._analyse import Walk
from compress_jax.trace.axes import Axes, Leaf
from compress_jax.trace.axis_moves import Dims
from compress_jax.trace.counts import Known
from compress_jax.trace.interpret import interpret
from compress_jax.trace.kept import Kept
from compress_jax.trace.nested import opened
from compress_jax.trace.site import Position

Body = Callable[..., tuple[list[Any], dict[str, Any]]]


def custom_jvp(plan: Any, eqn: JaxprEqn, args: list[Any], body: Body, position: Position) -> list[Any]:
    """Run a shorter body under the shorter tangent rule.

    Args:
      plan: how to run what is around.
      eqn: the call.
      args: its operands, shorter.
      body: its shorter body.
      position: of the equation.

    Returns:
      The results.
    """
    run, consts = _closed(body, args)

    @jax.custom_jvp
    def function(consts: Any, args: Any) -> list[Any]:
        return run(consts, args)

    @function.defjvp
    def _(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        results = function(*primals)
        made = _rule(plan, eqn, position, primals[1], _moving(eqn, tangents[1]), _forward)
        return results, _at_moving(made, results, lambda x: np.zeros(x.shape, jax.dtypes.float0))

    return function(consts, tuple(args))


def custom_vjp(plan: Any, eqn: JaxprEqn, args: list[Any], body: Body, position: Position) -> list[Any]:
    """Run a shorter body under the shorter cotangent rule, which starts from the operands; see `custom_jvp`."""
    run, consts = _closed(body, args)

    @jax.custom_vjp
    def function(consts: Any, args: Any) -> list[Any]:
        return run(consts, args)

    def backward(args: Any, cotangents: list[Any]) -> Any:
        given = [g for g, var in zip(cotangents, eqn.outvars, strict=True) if _inexact(var.aval)]
        return None, tuple(_at_moving(_rule(plan, eqn, position, args, given, _backward), args, lambda x: None))

    function.defvjp(lambda consts, args: (run(consts, args), args), backward)
    return function(consts, tuple(args))


def _closed(body: Body, args: list[Any]) -> tuple[Callable[[Any, Any], list[Any]], list[Any]]:
    """Make what a body captures its argument: functions with custom rules must not close over values of other traces."""
    made = jax.make_jaxpr(lambda *a: body(*a)[0])(*args)
    flat = jaxpr_as_fun(opened(made))
    return lambda consts, args: list(flat(*consts, *args)), list(made.consts)


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _moving(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Return what belongs to operands that have derivatives."""
    return [value for value, var in zip(values, eqn.invars, strict=True) if _inexact(var.aval)]


def _at_moving(values: Sequence[Any], like: Sequence[Any], other: Callable[[Any], Any]) -> list[Any]:
    """Put derivatives where they belong, and something else where there are none."""
    rest = iter(values)
    return [next(rest) if _inexact(x) else other(x) for x in like]


def _function(eqn: JaxprEqn, args: Sequence[Any]) -> Callable[..., list[Any]]:
    """Return a call as a function of those operands that have derivatives, with those results that do."""

    def function(*moving: Any) -> list[Any]:
        rest = iter(moving)
        operands = [next(rest) if _inexact(var.aval) else x for x, var in zip(args, eqn.invars, strict=True)]
        return [x for x in rebuild.bind(eqn, operands) if _inexact(x)]

    return function


def _forward(eqn: JaxprEqn, args: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    return jax.jvp(_function(eqn, args), tuple(_moving(eqn, args)), tuple(tangents))[1]


def _backward(eqn: JaxprEqn, args: Sequence[Any], cotangents: Sequence[Any]) -> Any:
    return list(jax.vjp(_function(eqn, args), *_moving(eqn, args))[1](list(cotangents)))


def _rule(
    plan: Any, eqn: JaxprEqn, position: Position, args: Sequence[Any], given: Sequence[Any], rule: Callable[..., Any]
) -> list[Any]:
    """Run a rule on shorter values: ``given`` are tangents of the operands (forward) or cotangents of the results."""
    old, results = _shapes(eqn.invars), _shapes(eqn.outvars)
    forward = rule is _forward
    into = _moving(eqn, old) if forward else list(filter(_inexact, results))
    made = jax.make_jaxpr(lambda args, given: rule(eqn, args, given))(old, into)
    walk = Walk(_copied(plan.walk.axes))
    operand_dims, result_dims = plan.followed.calls[position]
    dims = [walk.fresh(x) if d is None else d for x, d in zip(old, operand_dims, strict=True)]
    ends = [walk.fresh(x) if d is None else d for x, d in zip(results, result_dims, strict=True)]
    moving, inexact = _moving(eqn, dims), [d for x, d in zip(results, ends, strict=True) if _inexact(x)]
    starts = [*dims, *(moving if forward else inexact)]
    for a, b in zip(interpret(walk, made, starts), inexact if forward else moving, strict=True):
        walk.join(b, a)
    indices = _translated(plan.kept, walk.axes, [*dims, *ends], eqn)
    again = type(plan).of(walk, indices, made, list(map(Known, starts)))
    return again.run(made, [*args, *given])


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in variables]


def _copied(axes: Axes) -> Axes:
    """Return axes to which more can be added without a trace."""
    made = copy.copy(axes)
    made.bound, made.reasons = dict(axes.bound), dict(axes.reasons)
    return made


def _translated(kept: Kept, axes: Axes, values: Sequence[Dims], eqn: JaxprEqn) -> dict[Leaf, np.ndarray]:
    """Return what is kept in terms of axes that a rule has told more about; it must not have taken them apart."""
    found: dict[Leaf, np.ndarray] = {}
    for leaf in {leaf for dims in values for axis in dims for leaf in kept.axes.leaves(axis) if leaf in kept.indices}:
        now, reason = axes.find(leaf), axes.reason(leaf)
        same = isinstance(now, Leaf) and np.array_equal(found.get(now, kept.indices[leaf]), kept.indices[leaf])
        if not (isinstance(now, Leaf) and same) or reason:
            why = reason or "it is taken apart there"
            rule = eqn.params.get("name", eqn.primitive.name)
            raise ShapeError(f"the derivative rule of {rule} cannot be shortened: {why}")
        found[now] = kept.indices[leaf]
    return found
