"""`resize`: run a function with shorter parameters, whatever shapes are written down inside it."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import flatten, matches
from compress_jax.core.types import Leaves, ModelFn, PyTree, Variables
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
    bodies,
    nested,
    opened,
)
from compress_jax.trace._jaxpr.site import Position, Shape
from compress_jax.trace._resize.counts import Count, Followed, Follower, Known, counted
from compress_jax.trace._resize.widths import Kept, cut, differences, leaves_of, own_width, resized

Body = Callable[..., tuple[list[Any], dict[str, Any]]]

# Custom rules for derivatives on shorter values: the author's rule is traced, walked over and
# resized as the function is.


def custom_jvp(
    plan: Any, eqn: JaxprEqn, args: list[Any], body: Body, position: Position
) -> list[Any]:
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
    def _(primals: PyTree, tangents: PyTree) -> tuple[list[Any], list[Any]]:
        results = function(*primals)
        made = _rule(plan, eqn, position, primals[1], _moving(eqn, tangents[1]), _forward)
        return results, _at_moving(made, results, lambda x: np.zeros(x.shape, jax.dtypes.float0))

    return function(consts, tuple(args))


def custom_vjp(
    plan: Any, eqn: JaxprEqn, args: list[Any], body: Body, position: Position
) -> list[Any]:
    """Run a shorter body under the shorter cotangent rule, which starts from the operands; see `custom_jvp`."""
    run, consts = _closed(body, args)

    @jax.custom_vjp
    def function(consts: Any, args: Any) -> list[Any]:
        return run(consts, args)

    def backward(args: Any, cotangents: list[Any]) -> Any:
        given = [g for g, var in zip(cotangents, eqn.outvars, strict=True) if _inexact(var.aval)]
        return None, tuple(
            _at_moving(_rule(plan, eqn, position, args, given, _backward), args, lambda x: None)
        )

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


def _at_moving(
    values: Sequence[Any], like: Sequence[Any], other: Callable[[Any], Any]
) -> list[Any]:
    """Put derivatives where they belong, and something else where there are none."""
    rest = iter(values)
    return [next(rest) if _inexact(x) else other(x) for x in like]


def _function(eqn: JaxprEqn, args: Sequence[Any]) -> Callable[..., list[Any]]:
    """Return a call as a function of those operands that have derivatives, with those results that do."""

    def function(*moving: Any) -> list[Any]:
        rest = iter(moving)
        operands = [
            next(rest) if _inexact(var.aval) else x for x, var in zip(args, eqn.invars, strict=True)
        ]
        return [x for x in evaluate.bind(eqn, operands) if _inexact(x)]

    return function


def _forward(eqn: JaxprEqn, args: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    return jax.jvp(_function(eqn, args), tuple(_moving(eqn, args)), tuple(tangents))[1]


def _backward(eqn: JaxprEqn, args: Sequence[Any], cotangents: Sequence[Any]) -> Any:
    return list(jax.vjp(_function(eqn, args), *_moving(eqn, args))[1](list(cotangents)))


def _rule(
    plan: Any,
    eqn: JaxprEqn,
    position: Position,
    args: Sequence[Any],
    given: Sequence[Any],
    rule: Callable[..., Any],
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
    moving, inexact = (
        _moving(eqn, dims),
        [d for x, d in zip(results, ends, strict=True) if _inexact(x)],
    )
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


def _translated(
    kept: Kept, axes: Axes, values: Sequence[Dims], eqn: JaxprEqn
) -> dict[Leaf, np.ndarray]:
    """Return what is kept in terms of axes that a rule has told more about; it must not have taken them apart."""
    found: dict[Leaf, np.ndarray] = {}
    for leaf in {
        leaf
        for dims in values
        for axis in dims
        for leaf in kept.axes.leaves(axis)
        if leaf in kept.indices
    }:
        now, reason = axes.find(leaf), axes.reason(leaf)
        same = isinstance(now, Leaf) and np.array_equal(
            found.get(now, kept.indices[leaf]), kept.indices[leaf]
        )
        if not (isinstance(now, Leaf) and same) or reason:
            why = reason or "it is taken apart there"
            rule = eqn.params.get("name", eqn.primitive.name)
            raise ShapeError(f"the derivative rule of {rule} cannot be shortened: {why}")
        found[now] = kept.indices[leaf]
    return found


# Run a jaxpr on shorter values: each equation with its own parameters resized, each nested one
# built again around that.


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
    def of(
        cls, walk: Walk, indices: dict[Leaf, np.ndarray], jaxpr: ClosedJaxpr, args: Sequence[Known]
    ) -> "Plan":
        """Make the plan of a jaxpr that has been walked over: numbers that make a mean of a sum follow its terms."""
        kept = Kept(walk.axes, indices)
        follower = Follower(walk, kept, uniform_operands(jaxpr))
        follower.run(jaxpr, args)
        counts = follower.noted.counts
        return cls(
            walk,
            kept,
            follower.noted,
            {at: {each.which: each.now} for at, each in counts.items() if each.proven},
        )

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
                results = self._equation(
                    eqn, [read(atom) for atom in eqn.invars], (*position, index)
                )
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, args: list[Any], position: Position) -> list[Any]:
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
                return _branches(
                    eqn, args, [body(jaxpr, index) for index, jaxpr in enumerate(bodies)]
                )
        raise AssertionError(f"{eqn.primitive.name} has no form")

    def _leaf(self, eqn: JaxprEqn, args: list[Any], position: Position) -> list[Any]:
        operands, results = self.walk.values[position]
        args = [cut(x, self.kept.shape(dims)) for x, dims in zip(args, operands, strict=True)]
        for which, number in self.numbers.get(position, {}).items():
            args[which] = jnp.full_like(args[which], number)
        params = eqn.primitive.get_bind_params(
            {**eqn.params, **resized(self.kept, eqn, operands, results)}
        )
        made = eqn.primitive.bind(*args, **params)
        return list(made) if eqn.primitive.multiple_results else [made]


def _scan(eqn: JaxprEqn, args: list[Any], scan: Scan, body: Body) -> list[Any]:
    start = scan.consts + scan.carry
    consts, xs = args[: scan.consts], args[start:]
    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    carry = _settled(
        lambda carry, first: body(*consts, *carry, *first)[0], args[scan.consts : start], first
    )

    def turn(*operands: Any, given: Any = None) -> tuple[list[Any], dict[str, Any]]:
        return _as_carried(body(*operands)[0], carry), {}

    return evaluate.scan(eqn, [*consts, *carry, *xs], scan, turn, {})[0]


def _while(args: list[Any], loop: While, condition: Body, body: Body) -> list[Any]:
    split = loop.condition_consts + loop.body_consts
    consts = args[loop.condition_consts : split]
    carry = _settled(lambda carry, _: body(*consts, *carry)[0], args[split:], [])

    def turn(*operands: Any) -> tuple[list[Any], dict[str, Any]]:
        return _as_carried(body(*operands)[0], carry), {}

    return evaluate.while_loop(
        [*args[:split], *carry], loop, condition, turn, lambda old, new: new, False
    )[0]


def _branches(eqn: JaxprEqn, args: list[Any], bodies: list[Body]) -> list[Any]:
    """Where one branch returns a constant, which is still whole, the others tell how much of it is left."""
    made = [jax.eval_shape(lambda *a, body=body: body(*a)[0], *args[1:]) for body in bodies]
    least = [min(options, key=lambda x: x.size) for options in zip(*made, strict=True)]

    def alike(body: Body) -> Body:
        return lambda *operands: (_as_carried(body(*operands)[0], least), {})

    return evaluate.branches(eqn, args, [alike(body) for body in bodies])[0]


def _settled(
    turn: Callable[[list[Any], list[Any]], list[Any]], carry: list[Any], rest: list[Any]
) -> list[Any]:
    """Return what a loop carries, cut as a turn of it leaves it: a constant it starts from is still whole."""
    while True:
        results = jax.eval_shape(turn, carry, rest)[: len(carry)]
        shapes = [
            tuple(map(min, np.shape(x), y.shape)) for x, y in zip(carry, results, strict=True)
        ]
        if all(np.shape(x) == shape for x, shape in zip(carry, shapes, strict=True)):
            return carry
        carry = [cut(x, shape) for x, shape in zip(carry, shapes, strict=True)]


def _as_carried(results: list[Any], like: Sequence[Any]) -> list[Any]:
    """Cut those of the first results that are constants and still whole."""
    return [
        *(cut(x, np.shape(y)) for x, y in zip(results, like, strict=False)),
        *results[len(like) :],
    ]


# What numbers become when the axes that they count, or seem to count, get shorter: decided, and
# listed with the reason.


Numbers = Mapping[str, bool]
CODE = "as in the same code at the new width"
MEAN = "it makes a mean of a sum over {}; the code does not run at the new width, so this is by its value"
SCALE = "it may be a scale: it stands beside a product that is summed over {}, not a mean"
SAID = "as was said"


class Number(NamedTuple):
    """A number in a computation of which an axis was shortened.

    Attributes:
      name: the scope it stands in and its operation, numbered where there are several:
        ``"block/norm/div"``, ``"mul#2"``.
      old: its value at the old width.
      new: its value now.
      follows: whether it is another number now.
      counts: names of the groups that it counts or seems to count; empty if only the code shows
        that it depends on a width.
      reason: why.
    """

    name: str
    old: float
    new: float
    follows: bool
    counts: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        """Return a line of text."""
        if self.follows:
            return f"{self.name}: {self.old:.6g} -> {self.new:.6g} ({self.reason})"
        return f"{self.name}: {self.old:.6g} stays, though it looks like a count of {', '.join(self.counts)} ({self.reason})"


def decided(
    analysis: Analysis, plan: Plan, code: ClosedJaxpr | None, groups: Groups, said: Numbers
) -> tuple[tuple[Number, ...], dict[Position, dict[int, float]], bool]:
    """Decide what becomes of numbers.

    Args:
      analysis: of the function at its old width.
      plan: how it is run, with the counts that were noted.
      code: the jaxpr of its own code at the new width, if that does the same.
      groups: of its parameters.
      said: what the user says, by globs over names.

    Returns:
      The numbers; what they become, by position and operand; whether that differs from the code.
    """
    jaxpr = analysis.traced.jaxpr
    by_code = {} if code is None else differences(jaxpr, code)
    before, counts = uniform_operands(jaxpr), plan.followed.counts
    places = {(at, which) for at, each in by_code.items() for which in each} | {
        (at, c.which) for at, c in counts.items()
    }
    named = _named(jaxpr, places)
    found, changed, differ = [], {}, False
    for (at, which), name in named.items():
        old, count = before[at][which] or 0.0, counts.get(at)
        count = count if count is not None and count.which == which else None
        own = (
            by_code.get(at, {}).get(which)
            if code is not None
            else count.now
            if count and count.proven
            else None
        )
        follows = next((answer for glob, answer in said.items() if matches(glob, name)), None)
        new = own if follows is None else _new(own, count) if follows else None
        over = () if count is None else _over(analysis, plan, groups, count)
        reason = SAID if follows is not None else CODE if code is not None else _why(count, over)
        found.append(Number(name, old, old if new is None else new, new is not None, over, reason))
        differ |= new != own
        if new is not None:
            changed.setdefault(at, {})[which] = new
    return tuple(found), changed, differ


def _new(own: float | None, count: Count | None) -> float | None:
    return own if own is not None else count and count.now


def _why(count: Count | None, over: tuple[str, ...]) -> str:
    return (MEAN if count and count.proven else SCALE).format(", ".join(over))


def _over(analysis: Analysis, plan: Plan, groups: Groups, count: Count) -> tuple[str, ...]:
    """Return the names of the groups that a number counts."""
    axes = set(counted(plan.kept, count))
    return tuple(group.name for group in groups if axes & set(leaves_of(analysis, group)))


def _named(
    jaxpr: ClosedJaxpr, places: set[tuple[Position, int]]
) -> dict[tuple[Position, int], str]:
    """Return a name for each operand, in program order."""
    seen: Counter[str] = Counter()
    named = {}
    for position, eqn in _equations(jaxpr):
        for which in range(len(eqn.invars)):
            if (position, which) in places:
                base = "/".join(filter(None, (str(eqn.source_info.name_stack), eqn.primitive.name)))
                seen[base] += 1
                named[position, which] = base if seen[base] == 1 else f"{base}#{seen[base]}"
    return named


def _equations(jaxpr: ClosedJaxpr, position: Position = ()) -> Iterator[tuple[Position, JaxprEqn]]:
    for index, eqn in enumerate(jaxpr.eqns):
        at = (*position, index)
        yield at, eqn
        for step, body in bodies(nested(eqn)).items():
            yield from _equations(body, (*at, step))


KeptByGroup = Mapping[str, Sequence[int] | np.ndarray]


def resize(
    fn: ModelFn,
    variables: Variables,
    groups: Groups,
    kept: KeptByGroup,
    numbers: Numbers | None = None,
) -> Callable[..., Any]:
    r"""Return the function that ``fn`` is when only some coordinates of some groups are left.

    ``fn`` is traced for variables of the old shapes, and every equation is run with shapes, limits,
    slices and counts of groups as they are on what is left; loops, branches, calls and rules for
    derivatives are built again around it. So it does not matter which shapes the model has written
    down, and none of its code is changed. Constants must be the same along what is shortened, or it
    would be frozen.

    Which numbers count what gets shorter (the n of a mean), and which only look like it? Where
    ``fn`` itself takes the shorter variables and does the same, equation for equation, it says so
    itself, and it is what is run: the same code at the new width. Where it does not (a module with
    its widths written down), a number becomes the new count if it makes a mean of a sum over a
    shortened axis, by its value: :math:`n^{-p}` on the p-th power of a sum over n terms (means,
    variances, norms, sums by ones); every other number stays, that of attention's scores among
    them. `resized_numbers` lists them all; ``numbers`` overrules.

    The gradient of a mean divides too, but where no sum shows it: shrink a function, then
    differentiate, not the reverse.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays or ``ShapeDtypeStruct``, of the old shapes.
      groups: what `compress_jax.trace.groups` found in ``fn``.
      kept: by name of a group the coordinates to keep, in any order (their old order stays); others
        stay whole.
      numbers: ``{glob over names of numbers: whether they follow the width}``, first match wins;
        others as above.

    Returns:
      ``smaller(smaller variables, *inputs)``, compiled, for inputs of any shapes that ``fn`` takes;
      for the variables see `Groups.keep`.

    Raises:
      NoMatchError: if there is no group of a name.
      ShapeError: if a coordinate is not one of the group's or none is kept; and, when it is called,
        if the variables do not have the shapes of what is kept, or if with inputs of these shapes
        the axes cannot be shortened.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace._groups.groups import groups
      >>> params = {"a": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "b": jnp.ones((4, 1))}
      >>> def fn(params, x):
      ...     x = (x @ params["a"]).reshape(-1, 2, 2)
      ...     return (x - x.mean((1, 2), keepdims=True)).reshape(-1, 4) ** 2 @ params["b"]
      >>> found = groups(fn, params, jnp.ones((1, 1)))
      >>> [(group.name, group.size) for group in found]
      [('a:1', 2), ('a:1#2', 2)]
      >>> left = {"a:1": [0]}
      >>> resize(fn, params, found, left)(found.keep(params, left), jnp.ones((1, 1)))  # 1 and 2 less their mean, squared
      Array([[0.5]], dtype=float32)
    """
    work = _Work.of(fn, variables, groups, kept, numbers)

    def smaller(variables: Variables, *inputs: PyTree) -> Any:
        leaves = flatten(variables)[0]
        work.check(leaves)
        flat = [*leaves.values(), *jax.tree.leaves(inputs)]
        analysis, plan, code, _ = work.plan(variables, inputs)
        results = (
            plan.run(analysis.traced.jaxpr, flat) if code is None else jaxpr_as_fun(code)(*flat)
        )
        outputs, rebuild_output = flatten(analysis.traced.out)
        made = dict(zip(outputs, results, strict=True))
        return rebuild_output(
            made
            | {out: cut(made[out], work.expected[path]) for out, path in analysis.state.items()}
        )

    smaller.whole = jax.jit(
        getattr(fn, "whole", fn), inline=True
    )  # for the next time: see `own_width`
    return jax.jit(smaller, inline=True)


def resized_numbers(
    fn: ModelFn,
    variables: Variables,
    *inputs: PyTree,
    groups: Groups,
    kept: KeptByGroup,
    numbers: Numbers | None = None,
) -> tuple[Number, ...]:
    """List the numbers in a function that count, or look as if they counted, what `resize` shortens, and what they become.

    Args:
      fn: as for `resize`.
      variables: as for `resize`.
      inputs: trees of arrays or ``ShapeDtypeStruct``.
      groups: as for `resize`.
      kept: as for `resize`.
      numbers: as for `resize`.

    Returns:
      The numbers, in the order of the computation.

    Raises:
      NoMatchError: if there is no group of a name, or a glob matches no number.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace._groups.groups import groups
      >>> params = {"a": jnp.ones((1, 4)), "b": jnp.ones((4, 1))}
      >>> def fn(params, x):
      ...     h = x @ params["a"]
      ...     return (h - h.mean(1, keepdims=True)) @ params["b"] + 0.25 * h.sum(1, keepdims=True)
      >>> found = groups(fn, params, jnp.ones((1, 1)))
      >>> for number in resized_numbers(fn, params, jnp.ones((1, 1)), groups=found, kept={"a:1": [0, 1]}):
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
    """What is to be done, whatever the inputs: the arguments of `resize`, with the shapes before and after."""

    fn: ModelFn
    full: Any
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
            lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.numpy.result_type(x)), variables
        )
        left = {
            name: np.unique(np.asarray(list(coordinates), int))
            for name, coordinates in kept.items()
        }
        short = flatten(jax.eval_shape(lambda v: groups.keep(v, left), full))[0]
        return cls(
            fn, full, {path: x.shape for path, x in short.items()}, groups, left, numbers or {}
        )

    def check(self, leaves: Leaves) -> None:
        if leaves.keys() != self.expected.keys():
            odd = sorted(leaves.keys() ^ self.expected.keys())
            raise ShapeError(
                f"these variables are not those shortened: {', '.join(odd)} is only in one of the "
                "two"
            )
        for path, x in leaves.items():
            if np.shape(x) != self.expected[path]:
                raise ShapeError(
                    f"{path!r} has shape {np.shape(x)}, but what is kept of it has shape "
                    f"{self.expected[path]}"
                )

    def plan(
        self, variables: Variables, inputs: Sequence[Any]
    ) -> tuple[Analysis, Plan, ClosedJaxpr | None, tuple[Number, ...]]:
        """Return the analysis at the old width, the plan, the jaxpr of the function's own code if it does, the numbers."""
        leaves, (old, rebuilt) = flatten(variables)[0], flatten(self.full)
        wide = rebuilt(
            {path: jax.ShapeDtypeStruct(old[path].shape, x.dtype) for path, x in leaves.items()}
        )
        analysis = analyze(self.fn, wide, *inputs)
        indices = _indices(analysis, self.groups, self.kept)
        plan = Plan.of(analysis.walk, indices, analysis.traced.jaxpr, _known(analysis))
        code = own_width(self.fn, analysis, plan.kept, variables, inputs) if indices else None
        found, changed, differ = decided(analysis, plan, code, self.groups, self.numbers)
        return analysis, replace(plan, numbers=changed), None if differ else code, found


def _known(analysis: Analysis) -> list[Known]:
    """Return the axes of a trace's inputs: parameters have theirs, those of data stay as they are."""
    rest = analysis.traced.jaxpr.jaxpr.invars[len(analysis.params) :]
    data = [Known(tuple(Leaf(size, -1) for size in getattr(var.aval, "shape", ()))) for var in rest]
    return [*map(Known, analysis.params.values()), *data]


def _indices(
    analysis: Analysis, groups: Groups, kept: Mapping[str, np.ndarray]
) -> dict[Leaf, np.ndarray]:
    found: dict[Leaf, np.ndarray] = {}
    for name, coordinates in kept.items():
        leaves = leaves_of(analysis, groups[name])
        reasons = [reason for leaf in leaves if (reason := analysis.walk.axes.reason(leaf))]
        if not leaves or reasons:
            why = reasons[0] if reasons else "its axes are made of other parts"
            raise ShapeError(
                f"for inputs of these shapes group {name!r} cannot be shortened: {why}"
            )
        found |= dict.fromkeys(leaves, coordinates)
    return found
