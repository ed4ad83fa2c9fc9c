"""Build an equation again around another body that also returns statistics, by the public transformation that made it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.sharding import PartitionSpec, Sharding

from compress_jax.core.types import PyTree
from compress_jax.trace._jaxpr.primitives import (
    Branches,
    Call,
    Scan,
    While,
    manual_axes,
    nested,
    opened,
)
from compress_jax.trace._jaxpr.site import Position, Site

Results = tuple[list[Any], dict[str, Any]]
Body = Callable[..., Results]

# Keep custom derivative rules on a function whose body is changed: the value is the new body's, the
# rule the author's.


def custom_jvp(
    original: Callable[..., Any], args: Sequence[Any], body: Callable[..., Results]
) -> Results:
    """Run another body under the tangent rule of the original.

    Args:
      original: the function with its rule.
      args: its operands.
      body: the new body. What it captures (a learned scale) gets no gradient here: the rule knows
        nothing of it.

    Returns:
      The body's results.
    """
    run, consts = _closed(body, args)

    @jax.custom_jvp
    def function(consts: Any, args: Any) -> Results:
        return run(consts, args)

    @function.defjvp
    def _(primals: PyTree, tangents: PyTree) -> tuple[Results, Results]:
        results = function(*primals)
        _, tangent = jax.jvp(original, primals[1], tangents[1])
        return results, (list(tangent), jax.tree.map(_no_tangent, results[1]))

    return function(consts, tuple(args))


def custom_vjp(
    original: Callable[..., Any], args: Sequence[Any], body: Callable[..., Results]
) -> Results:
    """Run another body under the cotangent rule of the original; arguments as for `custom_jvp`."""
    run, consts = _closed(body, args)

    @jax.custom_vjp
    def function(consts: Any, args: Any) -> Results:
        return run(consts, args)

    def forward(consts: Any, args: Any) -> Any:
        return run(consts, args), jax.vjp(original, *args)[1]

    def backward(pullback: Any, cotangents: Results) -> Any:
        return None, pullback(cotangents[0])

    function.defvjp(forward, backward)
    return function(consts, tuple(args))


def _closed(
    body: Callable[..., Results], args: Sequence[Any]
) -> tuple[Callable[[Any, Any], Results], list[Any]]:
    """Make what a body captures its argument: functions with custom rules must not close over values of other traces."""
    made, shape = jax.make_jaxpr(body, return_shape=True)(*args)
    flat = jaxpr_as_fun(opened(made))
    tree = jax.tree.structure(shape)
    return lambda consts, args: jax.tree.unflatten(tree, flat(*consts, *args)), list(made.consts)


def _no_tangent(x: jax.Array) -> Any:
    return (
        jnp.zeros_like(x)
        if jnp.issubdtype(x.dtype, jnp.inexact)
        else np.zeros(x.shape, jax.dtypes.float0)
    )


def bind(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Run an equation as it stands; return its results as a list."""
    results = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def call(eqn: JaxprEqn, args: Sequence[Any], body: Body) -> Results:
    """Build a call again: jit, remat and custom derivatives keep what makes them more than a call."""
    name = eqn.primitive.name
    if name in ("jit", "pjit"):
        return _jit(eqn.params, body)(*args)
    if name in ("remat", "remat2", "checkpoint"):
        return _remat(eqn, args, body)
    if name == "custom_jvp_call":
        return custom_jvp(lambda *a: bind(eqn, a), args, body)
    if name.startswith("custom_vjp_call"):
        return custom_vjp(lambda *a: bind(eqn, a), args, body)
    return body(*args)


def _jit(params: dict[str, Any], body: Body) -> Body:
    def named(*args: Any) -> Results:
        return body(*args)

    named.__name__ = params["name"]
    places: dict[str, Any] = {}
    if any(
        isinstance(each, Sharding) for each in (*params["in_shardings"], *params["out_shardings"])
    ):
        given = {
            side: [each if isinstance(each, Sharding) else None for each in params[side]]
            for side in SIDES
        }
        places = {
            "in_shardings": tuple(given["in_shardings"]),
            "out_shardings": (given["out_shardings"], None),
        }
    return jax.jit(named, keep_unused=params["keep_unused"], inline=params["inline"], **places)


SIDES = ("in_shardings", "out_shardings")


def _remat(eqn: JaxprEqn, args: Sequence[Any], body: Body) -> Results:
    """Bind the primitive itself, whose ``differentiated`` and ``prevent_cse`` no public function sets both."""
    made, shape = jax.make_jaxpr(body, return_shape=True)(*args)
    params = {**eqn.params, "jaxpr": opened(made).jaxpr}
    if isinstance(params["prevent_cse"], tuple):
        params["prevent_cse"] = (True,) * len(made.consts) + params["prevent_cse"]
    return jax.tree.unflatten(
        jax.tree.structure(shape), eqn.primitive.bind(*made.consts, *args, **params)
    )


def shard_map(params: dict[str, Any], args: Sequence[Any], body: Body, given: Any) -> Results:
    """Build a shard_map again: each device has its entry of what is given, and of the statistics, along a first axis."""
    axes = manual_axes(params)

    def piece(given: Any, *args: Any) -> Results:
        results, statistics = body(*args, given=jax.tree.map(lambda x: jnp.squeeze(x, 0), given))
        return results, jax.tree.map(lambda x: jnp.expand_dims(x, 0), statistics)

    return jax.shard_map(
        piece,
        mesh=params["mesh"],
        in_specs=(PartitionSpec(axes), *params["in_specs"]),
        out_specs=(list(params["out_specs"]), PartitionSpec(axes)),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )(given, *args)


def scan(eqn: JaxprEqn, args: Sequence[Any], form: Scan, body: Body, given: Any) -> Results:
    """Build a scan again; its turns take slices of what is given, and their statistics come back stacked likewise."""
    consts, carry, xs = (
        args[: form.consts],
        args[form.consts :][: form.carry],
        args[form.consts + form.carry :],
    )

    def turn(carry: list[Any], slices: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        results, statistics = body(*consts, *carry, *slices[0], given=slices[1])
        return results[: form.carry], (results[form.carry :], statistics)

    options = {
        key: eqn.params[key]
        for key in ("reverse", "unroll", "_split_transpose")
        if key in eqn.params
    }
    carried, (ys, statistics) = jax.lax.scan(
        turn, list(carry), (list(xs), given), length=form.length, **options
    )
    return [*carried, *ys], statistics


def while_loop(
    args: Sequence[Any],
    form: While,
    condition: Body,
    body: Body,
    merge: Callable[[Any, Any], Any],
    sites_in_condition: bool,
) -> Results:
    """Build a while loop again; what its turns see is merged, as the number of turns is not known."""
    split = form.condition_consts + form.body_consts
    head, consts, carry = (
        args[: form.condition_consts],
        args[form.condition_consts : split],
        list(args[split:]),
    )

    def check(carry: list[Any]) -> tuple[Any, dict[str, Any]]:
        (more,), statistics = condition(*head, *carry)
        return more, statistics

    def turn(state: PyTree) -> Any:
        carry, _, seen = state
        carry, new = body(*consts, *carry)
        more, last = check(carry) if sites_in_condition else (None, {})
        return (
            carry,
            more,
            {site: merge(seen[site], value) for site, value in {**new, **last}.items()},
        )

    more, seen = check(carry) if sites_in_condition else (None, {})
    seen = {**unobserved(jax.eval_shape(lambda c: body(*consts, *c)[1], carry)), **seen}
    keep_on = (lambda state: state[1]) if sites_in_condition else lambda state: check(state[0])[0]
    carry, _, seen = jax.lax.while_loop(keep_on, turn, (carry, more, seen))
    return carry, seen


def branches(eqn: JaxprEqn, args: Sequence[Any], bodies: Sequence[Body]) -> Results:
    """Build a choice again; sites of the branches that were not taken are unobserved."""
    index, *operands = args
    every: dict[str, Any] = {}
    for body in bodies:
        every |= jax.eval_shape(lambda *a, body=body: body(*a)[1], *operands)

    def complete(body: Body) -> Body:
        def branch(*operands: Any) -> Results:
            results, statistics = body(*operands)
            return results, {**unobserved(every), **statistics}

        return branch

    made = [jax.make_jaxpr(complete(body), return_shape=True)(*operands) for body in bodies]
    return _choose(
        eqn, index, [jaxpr for jaxpr, _ in made], operands, jax.tree.structure(made[0][1])
    )


def _choose(
    eqn: JaxprEqn, index: Any, bodies: Sequence[ClosedJaxpr], operands: Sequence[Any], tree: PyTree
) -> Results:
    """Bind the primitive itself: lax.switch would clamp an index that is already clamped."""
    captured = [const for body in bodies for const in body.consts]

    def alone(body: ClosedJaxpr, start: int) -> ClosedJaxpr:
        """Every branch takes what any of them captures, and uses its own part."""
        run = jaxpr_as_fun(opened(body))
        end = start + len(body.consts)
        return jax.make_jaxpr(lambda *a: run(*a[start:end], *a[len(captured) :]))(
            *captured, *operands
        )

    starts = itertools.accumulate((len(body.consts) for body in bodies), initial=0)
    alike = tuple(map(alone, bodies, starts))
    return jax.tree.unflatten(
        tree, eqn.primitive.bind(index, *captured, *operands, **{**eqn.params, "branches": alike})
    )


def unobserved(shapes: PyTree) -> Any:
    """Return statistics of a site that did not run: NaN where they are floating, else 0."""

    def nothing(x: Any) -> jax.Array:
        return jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0, x.dtype)

    return jax.tree.map(nothing, shapes)


# Evaluate a jaxpr as it stands, but for chosen contractions: they go through a hook, however deep
# they are nested.


Statistics = dict[str, Any]
Values = tuple[list[Any], Statistics]


@dataclass(frozen=True)
class Hooks:
    """What is done at the chosen sites.

    Attributes:
      sites: the chosen sites by position.
      apply: ``(site, eqn, operands, given) -> (results, statistics)``; statistics may be ``{}``.
      merge: ``(old, new) -> statistics`` of one site, from one turn of a ``while`` loop to the
        next.
      around: every position that has a chosen site inside.
    """

    sites: Mapping[Position, Site]
    apply: Callable[[Site, JaxprEqn, list[Any], Any], Values]
    merge: Callable[[Any, Any], Any] = lambda old, new: new
    around: frozenset[Position] = field(init=False)

    def __post_init__(self) -> None:
        """Gather the positions that lead to chosen sites."""
        inner = frozenset(
            position[:end] for position in self.sites for end in range(1, len(position))
        )
        object.__setattr__(self, "around", inner)


def evaluate(
    jaxpr: ClosedJaxpr,
    args: Sequence[Any],
    hooks: Hooks,
    given: Mapping[Position, Any],
    position: Position = (),
) -> Values:
    """Run a jaxpr with hooks.

    An equation without a chosen site inside is bound as it stands: custom derivative rules, random
    numbers, sharding constraints and effects are those of the original. One that leads to a chosen
    site is built again by the public transformation that made it.

    Args:
      jaxpr: the computation.
      args: an array for each of its inputs.
      hooks: what to do where.
      given: a tree for some of the chosen sites, handed to their hook; loops around a site run
        along its leading axes.
      position: where the computation stands, for nested ones.

    Returns:
      ``(results, statistics by site)``.
    """
    env: dict[Any, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))
    statistics: Statistics = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        with ExitStack() as stack:
            stack.enter_context(eqn.ctx.manager)
            if scope := str(eqn.source_info.name_stack):
                stack.enter_context(jax.named_scope(scope))
            results, seen = _equation(
                eqn, [read(atom) for atom in eqn.invars], hooks, given, (*position, index)
            )
        env |= dict(zip(eqn.outvars, results, strict=True))
        statistics |= seen
    return [read(atom) for atom in jaxpr.jaxpr.outvars], statistics


def _equation(
    eqn: JaxprEqn, args: list[Any], hooks: Hooks, given: Mapping[Position, Any], position: Position
) -> Values:
    if position in hooks.sites:
        return hooks.apply(hooks.sites[position], eqn, args, given.get(position))
    if position not in hooks.around:
        return bind(eqn, args), {}

    inside = {place: tree for place, tree in given.items() if place[: len(position)] == position}

    def body(jaxpr: ClosedJaxpr, where: int | str = "body") -> Callable[..., Values]:
        return lambda *operands, given=inside: evaluate(
            jaxpr, operands, hooks, given, (*position, where)
        )

    match nested(eqn):
        case Call(jaxpr, shards) if shards is None:
            return call(eqn, args, body(jaxpr))
        case Call(jaxpr):
            return shard_map(eqn.params, args, body(jaxpr), inside)
        case Scan() as form:
            return scan(eqn, args, form, body(form.body), inside)
        case While() as loop:
            condition = (*position, "cond") in hooks.around
            return while_loop(
                args, loop, body(loop.condition, "cond"), body(loop.body), hooks.merge, condition
            )
        case Branches(bodies):
            return branches(eqn, args, [body(jaxpr, index) for index, jaxpr in enumerate(bodies)])
        case _:
            raise AssertionError(f"{eqn.primitive.name} has sites inside but no form")
