"""Evaluate a jaxpr as it stands, but for chosen contractions: they go through a hook.

`evaluate` rebuilds the equations around a chosen contraction, each by the public transformation
that made it (jit, remat, scan, while, cond, custom derivatives, shard_map), with a body that also
returns statistics.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.sharding import PartitionSpec, Sharding

from compress_jax.core.types import Array, PyTree
from compress_jax.trace._jaxpr.primitives import (
    JITS,
    REMATS,
    Branches,
    Call,
    Scan,
    While,
    manual_axes,
    nested,
    opened,
)
from compress_jax.trace._jaxpr.site import EqnParams, Position, Site

Statistics = dict[str, PyTree]
Values = tuple[list[jax.Array], Statistics]
"""``(results, statistics by site)``."""
Body = Callable[..., Values]
Captured = list[jax.Array]
"""The arrays that a body closes over, made arguments of it."""
Pullback = Callable[[list[jax.Array]], tuple[jax.Array, ...]]
"""From cotangents of the results to cotangents of the operands."""


@dataclass(frozen=True)
class Hooks:
    """What is done at the chosen sites.

    Attributes:
      sites: the chosen sites by position.
      apply: ``(site, eqn, operands, given) -> (results, statistics)``; statistics may be ``{}``.
      merge: ``(old, new) -> statistics`` of one site, from one iteration of a ``while`` loop to the
        next.
      around: every position that has a chosen site inside.
    """

    sites: Mapping[Position, Site]
    apply: Callable[[Site, JaxprEqn, list[jax.Array], PyTree], Values]
    merge: Callable[[PyTree, PyTree], PyTree] = lambda old, new: new
    around: frozenset[Position] = field(init=False)

    def __post_init__(self) -> None:
        """Gather the positions that lead to chosen sites."""
        # The site (3, "body", 1) is inside the equation (3,) and its body (3, "body").
        around: set[Position] = set()
        for position in self.sites:
            around.update(position[:end] for end in range(1, len(position)))
        object.__setattr__(self, "around", frozenset(around))  # the dataclass is frozen


def evaluate(
    jaxpr: ClosedJaxpr,
    args: Sequence[jax.Array],
    hooks: Hooks,
    given: Mapping[Position, PyTree],
    position: Position = (),
) -> Values:
    """Run a jaxpr with hooks.

    An equation without a chosen site inside is bound as it stands: custom derivative rules, random
    numbers, sharding constraints and effects are those of the original. One that leads to a chosen
    site is rebuilt by the public transformation that made it.

    Args:
      jaxpr: the computation.
      args: an array for each of its inputs.
      hooks: what to do where.
      given: a tree for some of the chosen sites, an argument of their hook; loops around a site run
        along its leading axes.
      position: where the computation stands, if it is nested.

    Returns:
      ``(results, statistics by site)``.
    """
    statistics: Statistics = {}

    def run(index: int, eqn: JaxprEqn, operands: list[jax.Array]) -> list[jax.Array]:
        results, own = _equation(eqn, operands, hooks, given, (*position, index))
        statistics.update(own)
        return results

    return replay(jaxpr, args, run), statistics


T = TypeVar("T")


def replay(
    jaxpr: ClosedJaxpr, args: Sequence[T], run: Callable[[int, JaxprEqn, list[T]], Sequence[T]]
) -> list[T]:
    """Run a jaxpr, each equation by a function.

    Args:
      jaxpr: the computation.
      args: a value for each of its inputs.
      run: ``(index, eqn, operands) -> results``.

    Returns:
      Its results.
    """
    env: dict[Var, Any] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))

    def read(atom: Var | Literal) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for index, eqn in enumerate(jaxpr.jaxpr.eqns):
        # Mesh contexts and named scopes of the original equation hold for its copy too.
        with ExitStack() as stack:
            stack.enter_context(eqn.ctx.manager)
            if scope := str(eqn.source_info.name_stack):
                stack.enter_context(jax.named_scope(scope))
            results = run(index, eqn, [read(atom) for atom in eqn.invars])
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.jaxpr.outvars]


def _equation(
    eqn: JaxprEqn,
    args: list[jax.Array],
    hooks: Hooks,
    given: Mapping[Position, PyTree],
    position: Position,
) -> Values:
    # A chosen site: its hook computes the results.
    if position in hooks.sites:
        return hooks.apply(hooks.sites[position], eqn, args, given.get(position))
    # No chosen site inside: as it stands.
    if position not in hooks.around:
        return bind(eqn, args), {}

    # A site inside: rebuild the equation around it. Only what is given for sites inside goes along:
    # a scan takes slices of all that it is handed.
    inside = {place: tree for place, tree in given.items() if place[: len(position)] == position}

    # `scan` and `shard_map` pass a slice or a shard as `given`; the other calls pass it on whole.
    def body(jaxpr: ClosedJaxpr, where: int | str = "body") -> Body:
        return lambda *operands, given=inside: evaluate(
            jaxpr, operands, hooks, given, (*position, where)
        )

    match nested(eqn):
        case Call(jaxpr, None):
            return call(eqn, args, body(jaxpr))
        case Call(jaxpr):
            return shard_map(eqn.params, args, body(jaxpr), inside)
        case Scan() as loop:
            return scan(eqn, args, loop, body(loop.body), inside)
        case While() as loop:
            condition = body(loop.condition, "cond")
            in_condition = (*position, "cond") in hooks.around
            return while_loop(args, loop, condition, body(loop.body), hooks.merge, in_condition)
        case Branches(bodies):
            return branches(eqn, args, [body(jaxpr, index) for index, jaxpr in enumerate(bodies)])
        case _:
            raise AssertionError(f"{eqn.primitive.name} has sites inside, but cannot be rebuilt")


def custom_jvp(
    original: Callable[..., Sequence[jax.Array]], args: Sequence[jax.Array], body: Body
) -> Values:
    """Run another body under the tangent rule of the original.

    Args:
      original: the function with its rule.
      args: its operands.
      body: the new body. What it captures (a learned scale) gets no gradient here: the rule does
        not have it.

    Returns:
      The body's results.
    """
    run, consts = _closed(body, args)

    @jax.custom_jvp
    def function(consts: Captured, args: Sequence[jax.Array]) -> Values:
        return run(consts, args)

    @function.defjvp
    def _(primals: PyTree, tangents: PyTree) -> tuple[Values, Values]:
        results = function(*primals)
        # The author's rule, applied to the author's function. It has no place for the tangents of
        # the captured arrays, tangents[0], and gives none to the statistics.
        _, tangent = jax.jvp(original, primals[1], tangents[1])
        return results, (list(tangent), jax.tree.map(_no_tangent, results[1]))

    return function(consts, tuple(args))


def custom_vjp(
    original: Callable[..., Sequence[jax.Array]], args: Sequence[jax.Array], body: Body
) -> Values:
    """Run another body under the cotangent rule of the original; arguments as for `custom_jvp`."""
    run, consts = _closed(body, args)

    @jax.custom_vjp
    def function(consts: Captured, args: Sequence[jax.Array]) -> Values:
        return run(consts, args)

    # The residual is the pullback of the author's function, which holds the author's residuals.
    def forward(consts: Captured, args: Sequence[jax.Array]) -> tuple[Values, Pullback]:
        return run(consts, args), jax.vjp(original, *args)[1]

    def backward(pullback: Pullback, cotangents: Values) -> tuple[None, tuple[jax.Array, ...]]:
        return None, pullback(cotangents[0])  # None: the captured arrays get a gradient of zero

    function.defvjp(forward, backward)
    return function(consts, tuple(args))


def _closed(
    body: Callable[..., Values], args: Sequence[jax.Array]
) -> tuple[Callable[[Captured, Sequence[jax.Array]], Values], Captured]:
    """Make what a body captures an argument of it; return the function and what it captures.

    Functions with custom rules must not close over values of other traces.
    """
    made, shape = jax.make_jaxpr(body, return_shape=True)(*args)
    flat = jaxpr_as_fun(opened(made))
    tree = jax.tree.structure(shape)

    def run(consts: Captured, args: Sequence[jax.Array]) -> Values:
        return jax.tree.unflatten(tree, flat(*consts, *args))

    return run, list(made.consts)


def _no_tangent(x: jax.Array) -> Array:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)  # JAX's dtype for tangents of integers


def bind(eqn: JaxprEqn, args: Sequence[jax.Array]) -> list[jax.Array]:
    """Run an equation as it stands; return its results as a list."""
    results = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


# Calls that are more than their body, beside `JITS` and `REMATS`.
CUSTOM_JVPS = ("custom_jvp_call",)
CUSTOM_VJPS = ("custom_vjp_call", "custom_vjp_call_jaxpr")


def call(eqn: JaxprEqn, args: Sequence[jax.Array], body: Body) -> Values:
    """Rebuild a call; jit, remat and custom derivatives keep their options and rules."""
    name = eqn.primitive.name
    if name in JITS:
        return _jit(eqn.params, body)(*args)
    if name in REMATS:
        return _remat(eqn, args, body)
    if name in CUSTOM_JVPS:
        return custom_jvp(lambda *a: bind(eqn, a), args, body)
    if name in CUSTOM_VJPS:
        return custom_vjp(lambda *a: bind(eqn, a), args, body)
    return body(*args)


def _jit(params: EqnParams, body: Body) -> Body:
    def named(*args: jax.Array) -> Values:
        return body(*args)

    named.__name__ = params["name"]
    # Where no sharding was asked for the equation holds a marker; `jax.jit` takes None for it.
    inputs = [each if isinstance(each, Sharding) else None for each in params["in_shardings"]]
    outputs = [each if isinstance(each, Sharding) else None for each in params["out_shardings"]]
    shardings: dict[str, PyTree] = {}
    if any(each is not None for each in (*inputs, *outputs)):
        # (results, statistics): the compiler chooses the sharding of the statistics.
        shardings = {"in_shardings": tuple(inputs), "out_shardings": (outputs, None)}
    return jax.jit(named, keep_unused=params["keep_unused"], inline=params["inline"], **shardings)


def _remat(eqn: JaxprEqn, args: Sequence[jax.Array], body: Body) -> Values:
    """Bind the primitive: no public function sets both ``differentiated`` and ``prevent_cse``."""
    made, shape = jax.make_jaxpr(body, return_shape=True)(*args)
    params = {**eqn.params, "jaxpr": opened(made).jaxpr}
    # One flag for each operand, or one for all; the captured arrays come first.
    if isinstance(params["prevent_cse"], tuple):
        params["prevent_cse"] = (True,) * len(made.consts) + params["prevent_cse"]
    results = eqn.primitive.bind(*made.consts, *args, **params)
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def shard_map(params: EqnParams, args: Sequence[jax.Array], body: Body, given: PyTree) -> Values:
    """Rebuild a shard_map; the first axis of what is given, and of statistics, is the device."""
    axes = manual_axes(params)

    # A device has [1, ...] of what is given as [devices, ...], and returns statistics likewise.
    def shard(given: PyTree, *args: jax.Array) -> Values:
        results, statistics = body(*args, given=jax.tree.map(lambda x: jnp.squeeze(x, 0), given))
        return results, jax.tree.map(lambda x: jnp.expand_dims(x, 0), statistics)

    return jax.shard_map(
        shard,
        mesh=params["mesh"],
        # All manual axes cut the first axis of what is given; the operands keep their own specs.
        in_specs=(PartitionSpec(axes), *params["in_specs"]),
        out_specs=(list(params["out_specs"]), PartitionSpec(axes)),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )(given, *args)


def scan(eqn: JaxprEqn, args: Sequence[jax.Array], loop: Scan, body: Body, given: PyTree) -> Values:
    """Rebuild a scan; iterations take slices of what is given, and statistics come back stacked."""
    consts = args[: loop.consts]
    carry = list(args[loop.consts :][: loop.carry])
    xs = list(args[loop.consts + loop.carry :])

    # What is given is one more xs and the statistics one more ys, stacked to [length, ...].
    def iteration(
        carry: list[jax.Array], slices: tuple[list[jax.Array], PyTree]
    ) -> tuple[list[jax.Array], Values]:
        own, given = slices
        results, statistics = body(*consts, *carry, *own, given=given)
        return results[: loop.carry], (results[loop.carry :], statistics)

    names = ("reverse", "unroll", "_split_transpose")
    options = {name: eqn.params[name] for name in names if name in eqn.params}
    carried, (ys, statistics) = jax.lax.scan(
        iteration, carry, (xs, given), length=loop.length, **options
    )
    return [*carried, *ys], statistics


def while_loop(
    args: Sequence[jax.Array],
    loop: While,
    condition: Body,
    body: Body,
    merge: Callable[[PyTree, PyTree], PyTree],
    sites_in_condition: bool,
) -> Values:
    """Rebuild a while loop; statistics are merged, as the number of iterations is not known.

    A condition with sites inside is evaluated in the body, after the carry: a while loop's own
    condition returns no statistics.
    """
    split = loop.condition_consts + loop.body_consts
    head = args[: loop.condition_consts]
    consts = args[loop.condition_consts : split]
    carry = list(args[split:])

    def check(carry: list[jax.Array]) -> tuple[jax.Array, Statistics]:
        (more,), statistics = condition(*head, *carry)
        return more, statistics

    def check_in_body(carry: list[jax.Array]) -> tuple[jax.Array | None, Statistics]:
        return check(carry) if sites_in_condition else (None, {})

    def iteration(state: PyTree) -> PyTree:
        carry, _, old = state
        carry, new = body(*consts, *carry)
        more, last = check_in_body(carry)  # decides on the next iteration
        merged = {site: merge(old[site], value) for site, value in {**new, **last}.items()}
        return carry, more, merged

    # The state of the loop: (carry, whether the condition holds, statistics by site).
    def proceed(state: PyTree) -> jax.Array:
        carry, more, _ = state
        return more if sites_in_condition else check(carry)[0]

    # The condition runs before the first iteration, its sites with it. The state has a fixed
    # structure: sites of the body begin as unobserved.
    more, first = check_in_body(carry)
    shapes = jax.eval_shape(lambda carry: body(*consts, *carry)[1], carry)
    start = {**unobserved(shapes), **first}
    carry, _, statistics = jax.lax.while_loop(proceed, iteration, (carry, more, start))
    return carry, statistics


def branches(eqn: JaxprEqn, args: Sequence[jax.Array], bodies: Sequence[Body]) -> Values:
    """Rebuild a cond; sites of the branches that were not taken are unobserved."""
    index, *operands = args
    # All branches must return the same structure: each has the statistics of the sites of all.
    every: Statistics = {}
    for body in bodies:
        every |= jax.eval_shape(lambda *a, body=body: body(*a)[1], *operands)

    def complete(body: Body) -> Body:
        def branch(*operands: jax.Array) -> Values:
            results, statistics = body(*operands)
            return results, {**unobserved(every), **statistics}

        return branch

    made = [jax.make_jaxpr(complete(body), return_shape=True)(*operands) for body in bodies]
    tree = jax.tree.structure(made[0][1])
    return _choose(eqn, index, [jaxpr for jaxpr, _ in made], operands, tree)


def _choose(
    eqn: JaxprEqn,
    index: jax.Array,
    bodies: Sequence[ClosedJaxpr],
    operands: Sequence[jax.Array],
    tree: PyTree,
) -> Values:
    """Bind the primitive: lax.switch would clamp an index that is already clamped."""
    captured = list(itertools.chain.from_iterable(body.consts for body in bodies))

    def with_all_captured(body: ClosedJaxpr, start: int) -> ClosedJaxpr:
        """Return a branch that takes what any of them captures, and uses its own part."""
        run = jaxpr_as_fun(opened(body))
        end = start + len(body.consts)

        def branch(*args: jax.Array) -> list[jax.Array]:
            return run(*args[start:end], *args[len(captured) :])

        return jax.make_jaxpr(branch)(*captured, *operands)

    # Branch i uses captured[starts[i] : starts[i + 1]].
    starts = itertools.accumulate((len(body.consts) for body in bodies), initial=0)
    params = {**eqn.params, "branches": tuple(map(with_all_captured, bodies, starts))}
    results = eqn.primitive.bind(index, *captured, *operands, **params)
    return jax.tree.unflatten(tree, results)


def unobserved(shapes: PyTree) -> PyTree:
    """Return statistics of a site that did not run: NaN where they are floating, else 0."""

    def nothing(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0, x.dtype)

    return jax.tree.map(nothing, shapes)
