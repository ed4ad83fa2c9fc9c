"""`resize`: run a function with shorter parameters, whatever shapes are written down inside it.

`Plan` runs the function's jaxpr with every equation, loop and custom derivative resized.
`resized_numbers` lists which numbers in it (the n of a mean) follow the new width, and why.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import flatten, matches
from compress_jax.core.types import Aval, Leaves, ModelFn, PyTree, Variables
from compress_jax.trace._groups.analyze import Analysis, Walk, analyze
from compress_jax.trace._groups.axes import Axes, Dims, Leaf
from compress_jax.trace._groups.groups import Groups
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
from compress_jax.trace._jaxpr.site import Position, Shape
from compress_jax.trace._resize.counts import (
    Followed,
    Follower,
    Known,
    Number,
    Numbers,
    decided,
)
from compress_jax.trace._resize.widths import (
    KeptCoordinates,
    leaves_of,
    own_width,
    resized,
    sliced,
)

KeptByGroup = Mapping[str, Sequence[int] | np.ndarray]  # coordinates to keep, by name of a group
T = TypeVar("T")
U = TypeVar("U")
Values = list[jax.Array]  # the operands or the results of an equation, traced or not
Body = Callable[..., tuple[Values, evaluate.Statistics]]  # (*operands) -> (results, {})


def resize(
    fn: ModelFn,
    variables: Variables,
    groups: Groups,
    kept: KeptByGroup,
    numbers: Numbers | None = None,
) -> ModelFn:
    r"""Return ``fn`` for variables that hold only some coordinates of some groups.

    ``fn`` is traced for variables of the old shapes, and every equation is run with the shapes,
    limits, slice sizes and group counts of the new ones; loops, branches, calls and custom
    derivative rules are rebuilt around it. So shapes that the model has written down do not matter,
    and none of its code is changed. Constants are equal along every axis that is shortened: other
    axes are frozen.

    Which numbers count a shortened axis (the n of a mean), and which only look like it? If ``fn``
    itself takes the shorter variables and does the same, equation for equation, then its own code
    at the new width is run and decides. If not (a module with its widths written down), a number
    becomes the new count if by its value it makes a mean of a sum over a shortened axis:
    :math:`n^{-p}` times the p-th power of a sum over n terms (means, variances, norms, products
    with ones). Every other number stays, the scale of attention's scores too. `resized_numbers`
    lists them all; ``numbers`` overrules.

    The gradient of a mean divides by a count as well, but without a sum next to it: first resize a
    function, then differentiate it, not the reverse.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays or ``ShapeDtypeStruct``, of the old shapes.
      groups: what `compress_jax.trace.groups` found in ``fn``.
      kept: by name of a group the coordinates to keep, in any order (they stay in their old order);
        other groups stay whole.
      numbers: ``{glob over names of numbers: whether they follow the width}``, first match wins;
        numbers that match no glob are decided as above.

    Returns:
      ``smaller(smaller variables, *inputs)``, compiled, for inputs of any shapes that ``fn`` takes;
      for the variables see `Groups.keep`.

    Raises:
      NoMatchError: if there is no group of a name.
      ShapeError: if a coordinate is not one of the group's or none is kept; and, when the result is
        called, if the variables do not have the new shapes, or if the axes cannot be shortened for
        inputs of these shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"a": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "b": jnp.ones((4, 1))}
      >>> def fn(params, x):
      ...     x = (x @ params["a"]).reshape(-1, 2, 2)
      ...     return (x - x.mean((1, 2), keepdims=True)).reshape(-1, 4) ** 2 @ params["b"]
      >>> found = cj.trace.groups(fn, params, jnp.ones((1, 1)))
      >>> [(group.name, group.size) for group in found]
      [('a:1', 2), ('a:1#2', 2)]
      >>> kept = {"a:1": [0]}
      >>> smaller = cj.trace.resize(fn, params, found, kept)
      >>> smaller(found.keep(params, kept), jnp.ones((1, 1)))  # 1 and 2 less their mean, squared
      Array([[0.5]], dtype=float32)
    """
    work = _Work.of(fn, variables, groups, kept, numbers)

    def smaller(variables: Variables, *inputs: PyTree) -> PyTree:
        leaves = flatten(variables)[0]
        work.check(leaves)
        flat = [*leaves.values(), *jax.tree.leaves(inputs)]
        analysis, plan, code, _ = work.plan(variables, inputs)
        if code is None:
            results = plan.run(analysis.traced.jaxpr, flat)
        else:
            results = jaxpr_as_fun(code)(*flat)
        outputs, rebuild_output = flatten(analysis.traced.out)
        made = dict(zip(outputs, results, strict=True))
        # An updated parameter that is a constant is still whole.
        for output, path in analysis.state.items():
            made[output] = sliced(made[output], work.expected[path])
        return rebuild_output(made)

    # `own_width` reads this attribute when the result is itself resized.
    smaller.whole = jax.jit(getattr(fn, "whole", fn), inline=True)
    return jax.jit(smaller, inline=True)


def resized_numbers(
    fn: ModelFn,
    variables: Variables,
    *inputs: PyTree,
    groups: Groups,
    kept: KeptByGroup,
    numbers: Numbers | None = None,
) -> tuple[Number, ...]:
    """List the numbers in a function that count what `resize` shortens, or look like it.

    Args:
      fn: as for `resize`.
      variables: as for `resize`.
      inputs: trees of arrays or ``ShapeDtypeStruct``.
      groups: as for `resize`.
      kept: as for `resize`.
      numbers: as for `resize`.

    Returns:
      The numbers, in the order of the computation, each with its new value and the reason.

    Raises:
      NoMatchError: if there is no group of a name, or a glob matches no number.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params = {"a": jnp.ones((1, 4)), "b": jnp.ones((4, 1))}
      >>> def fn(params, x):
      ...     h = x @ params["a"]
      ...     return (h - h.mean(1, keepdims=True)) @ params["b"] + 0.25 * h.sum(1, keepdims=True)
      >>> found = cj.trace.groups(fn, params, jnp.ones((1, 1)))
      >>> for number in cj.trace.resized_numbers(
      ...     fn, params, jnp.ones((1, 1)), groups=found, kept={"a:1": [0, 1]}
      ... ):
      ...     print(number)
      div: 4 -> 2 (as in the same code at the new width)
      mul: 0.25 stays, though it looks like a count of a:1 (as in the same code at the new width)
    """
    work = _Work.of(fn, variables, groups, kept, numbers)
    smaller = jax.eval_shape(lambda v: groups.keep(v, work.kept), work.full)
    found = work.plan(smaller, inputs)[3]
    for pattern in numbers or {}:
        if not any(matches(pattern, number.name) for number in found):
            listing = "\n  ".join(map(str, found)) or "(none)"
            raise NoMatchError(
                f"numbers: {pattern!r} matches no number that may count a width. They are:\n  "
                f"{listing}"
            )
    return found


@dataclass(frozen=True)
class _Work:
    """The arguments of `resize`, with the shapes before and after.

    Attributes:
      fn: the function.
      full: the variables before, as shapes.
      expected: by path, the shapes after.
      groups: of the function.
      kept: by name of a group, the coordinates to keep, ascending.
      numbers: see `resize`.
    """

    fn: ModelFn
    full: Variables
    expected: dict[str, Shape]
    groups: Groups
    kept: Mapping[str, np.ndarray]
    numbers: Numbers

    @classmethod
    def of(
        cls,
        fn: ModelFn,
        variables: Variables,
        groups: Groups,
        kept: KeptByGroup,
        numbers: Numbers | None,
    ) -> "_Work":
        full = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), variables
        )
        # Ascending and once each: what remains stays in its old order.
        indices = {
            name: np.unique(np.asarray(list(coordinates), int))
            for name, coordinates in kept.items()
        }
        short = flatten(jax.eval_shape(lambda v: groups.keep(v, indices), full))[0]
        expected = {path: x.shape for path, x in short.items()}
        return cls(fn, full, expected, groups, indices, numbers or {})

    def check(self, leaves: Leaves) -> None:
        """Raise a ShapeError if variables do not have the shapes after."""
        if leaves.keys() != self.expected.keys():
            odd = sorted(leaves.keys() ^ self.expected.keys())
            raise ShapeError(
                f"these variables are not the resized ones: {', '.join(odd)} is only in one of the "
                "two"
            )
        for path, x in leaves.items():
            if np.shape(x) != self.expected[path]:
                raise ShapeError(
                    f"{path!r} has shape {np.shape(x)}, but the coordinates to keep give it shape "
                    f"{self.expected[path]}"
                )

    def plan(
        self, variables: Variables, inputs: Sequence[PyTree]
    ) -> "tuple[Analysis, Plan, ClosedJaxpr | None, tuple[Number, ...]]":
        """Decide how to run the function for shorter variables.

        Returns:
          The analysis at the old width, the plan, the jaxpr of the function's own code if that is
          what is to be run, and the numbers.
        """
        leaves = flatten(variables)[0]
        old, rebuild = flatten(self.full)
        # The old shapes with the present dtypes: variables may have been cast since.
        full = {path: jax.ShapeDtypeStruct(old[path].shape, x.dtype) for path, x in leaves.items()}
        analysis = analyze(self.fn, rebuild(full), *inputs)
        indices = _indices(analysis, self.groups, self.kept)
        plan = Plan.of(analysis.walk, indices, analysis.traced.jaxpr, _known(analysis))
        code = own_width(self.fn, analysis, plan.kept, variables, inputs) if indices else None
        found, changed, differ = decided(
            analysis, plan.kept, plan.followed.counts, code, self.groups, self.numbers
        )
        # The code is run as it stands only if it has exactly the numbers decided on.
        return analysis, replace(plan, numbers=changed), None if differ else code, found


def _known(analysis: Analysis) -> list[Known]:
    """Return what is known of a trace's inputs: parameters have their axes, data has others."""
    rest = analysis.traced.jaxpr.jaxpr.invars[len(analysis.params) :]
    # One label for all of them: data is never shortened, and its axes are not compared.
    data = [Known(_unshortened(getattr(var.aval, "shape", ()))) for var in rest]
    return [*map(Known, analysis.params.values()), *data]


def _unshortened(shape: Shape) -> Dims:
    return tuple(Leaf(size, -1) for size in shape)


def _indices(
    analysis: Analysis, groups: Groups, kept: Mapping[str, np.ndarray]
) -> dict[Leaf, np.ndarray]:
    """Return the coordinates to keep by leaf; raise a ShapeError if a group cannot be shortened."""
    found: dict[Leaf, np.ndarray] = {}
    for name, coordinates in kept.items():
        leaves = leaves_of(analysis, groups[name])
        # Free for the inputs that `groups` saw, the axes may be frozen for inputs of other shapes.
        reasons = [reason for leaf in leaves if (reason := analysis.walk.axes.reason(leaf))]
        if not leaves or reasons:
            why = reasons[0] if reasons else "its axes are made of other axes"
            raise ShapeError(
                f"for inputs of these shapes group {name!r} cannot be shortened: {why}"
            )
        found |= dict.fromkeys(leaves, coordinates)
    return found


# The function run on shorter values.


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
        env: dict[Var, jax.Array] = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        env |= dict(zip(jaxpr.jaxpr.invars, args, strict=True))

        def read(atom: Var | Literal) -> jax.Array:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.jaxpr.eqns):
            # Mesh contexts and named scopes of the original hold for its shorter copy too.
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
            args[which] = jnp.full_like(args[which], number)  # in the dtype of the old count
        changes = resized(self.kept, eqn, operands, results)
        params = eqn.primitive.get_bind_params({**eqn.params, **changes})
        made = eqn.primitive.bind(*args, **params)
        return list(made) if eqn.primitive.multiple_results else [made]


def _scan(eqn: JaxprEqn, args: Values, scan: Scan, body: Body) -> Values:
    start = scan.consts + scan.carry
    consts = args[: scan.consts]
    xs = args[start:]
    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]  # one iteration's slices
    carry = _sliced_carry(
        lambda carry, first: body(*consts, *carry, *first)[0], args[scan.consts : start], first
    )

    # An iteration must return its carry in the shapes in which it was given.
    def iteration(*operands: jax.Array, given: PyTree = None) -> tuple[Values, evaluate.Statistics]:
        return _sliced_like(carry, body(*operands)[0]), {}

    return evaluate.scan(eqn, [*consts, *carry, *xs], scan, iteration, {})[0]


def _while(args: Values, loop: While, condition: Body, body: Body) -> Values:
    split = loop.condition_consts + loop.body_consts
    consts = args[loop.condition_consts : split]
    carry = _sliced_carry(lambda carry, _: body(*consts, *carry)[0], args[split:], [])

    def iteration(*operands: jax.Array) -> tuple[Values, evaluate.Statistics]:
        return _sliced_like(carry, body(*operands)[0]), {}

    operands = [*args[:split], *carry]
    # Nothing is observed, so that there are no statistics to merge.
    return evaluate.while_loop(operands, loop, condition, iteration, lambda old, new: new, False)[0]


def _branches(eqn: JaxprEqn, args: Values, bodies: list[Body]) -> Values:
    """Run branches that return equal shapes: a constant result is sliced as the others are."""
    made = [jax.eval_shape(lambda *a, body=body: body(*a)[0], *args[1:]) for body in bodies]
    # Of each result the smallest: what is larger in one branch is a whole constant there.
    least = [min(options, key=lambda x: x.size) for options in zip(*made, strict=True)]

    def alike(body: Body) -> Body:
        return lambda *operands: (_sliced_like(least, body(*operands)[0]), {})

    return evaluate.branches(eqn, args, [alike(body) for body in bodies])[0]


def _sliced_carry(
    iteration: Callable[..., Values], carry: Values, rest: Sequence[jax.ShapeDtypeStruct]
) -> Values:
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


def _sliced_like(like: Sequence[jax.Array | jax.ShapeDtypeStruct], results: Values) -> Values:
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
    def _(primals: PyTree, tangents: PyTree) -> tuple[Values, PyTree]:
        results = function(*primals)
        # Both are (consts, args). The author's rule knows no tangent of what the body captures.
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


def _inexact(x: Aval) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _moving(eqn: JaxprEqn, values: Sequence[T]) -> list[T]:
    """Return what belongs to operands that have derivatives."""
    return [value for value, var in zip(values, eqn.invars, strict=True) if _inexact(var.aval)]


def _at_moving(
    values: Sequence[T], like: Sequence[jax.Array], other: Callable[[jax.Array], U]
) -> list[T | U]:
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
    # The author's rule as a jaxpr, traced on the old shapes.
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


def _shapes(variables: Sequence[Var | Literal]) -> list[jax.ShapeDtypeStruct]:
    avals: list[Aval] = [var.aval for var in variables]
    return [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]


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
        # Two leaves that the rule has made one must keep the same coordinates.
        reason = axes.reason(leaf)
        same = isinstance(now, Leaf) and np.array_equal(found.get(now, own), own)
        if not same or reason:
            why = reason or "it is split there"
            rule = eqn.params.get("name", eqn.primitive.name)
            raise ShapeError(f"the derivative rule of {rule} cannot be shortened: {why}")
        assert isinstance(now, Leaf)
        found[now] = own
    return found
