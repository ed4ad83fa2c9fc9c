"""`resize`: run a function with shorter parameters, whatever shapes are written down inside it.

`Plan` runs the function's jaxpr with every equation resized. `resized_numbers` lists which numbers
in it (the n of a mean) follow the new width, and why.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, jaxpr_as_fun

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import flatten, matches
from compress_jax.core.types import Leaves, ModelFn, PyTree, Variables
from compress_jax.trace._groups.analyze import Analysis, analyze
from compress_jax.trace._groups.axes import Dims, Leaf
from compress_jax.trace._groups.groups import Groups
from compress_jax.trace._jaxpr.interpret import uniform_operands
from compress_jax.trace._jaxpr.primitives import (
    bodies,
    nested,
)
from compress_jax.trace._jaxpr.site import Position, Shape
from compress_jax.trace._resize.counts import Count, Known, counted
from compress_jax.trace._resize.run import Plan
from compress_jax.trace._resize.widths import (
    differences,
    leaves_of,
    own_width,
    sliced,
)

KeptByGroup = Mapping[str, Sequence[int] | np.ndarray]  # coordinates to keep, by name of a group
Numbers = Mapping[str, bool]  # whether numbers follow the width, by globs over their names
CODE = "as in the same code at the new width"
MEAN = (
    "it makes a mean of a sum over {}; the code does not run at the new width, so this is by its "
    "value"
)
SCALE = "it may be a scale: it multiplies a sum of products over {}, not a mean"
GIVEN = "as given by numbers="


class Number(NamedTuple):
    """A number in a computation whose axes are shortened.

    Attributes:
      name: its scope and its operation, numbered where there are several: ``"block/norm/div"``,
        ``"mul#2"``.
      old: its value at the old width.
      new: its value at the new width.
      follows: whether the two may differ.
      counts: names of the groups that it counts or seems to count; empty if only the code shows
        that it depends on a width.
      reason: why it follows or stays.

    Example:
      >>> import compress_jax as cj
      >>> print(cj.trace.Number("div", 4.0, 2.0, True, ("a:1",), "it makes a mean"))
      div: 4 -> 2 (it makes a mean)
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
        counts = ", ".join(self.counts)
        return (
            f"{self.name}: {self.old:.6g} stays, though it looks like a count of {counts} "
            f"({self.reason})"
        )


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
        full = {path: jax.ShapeDtypeStruct(old[path].shape, x.dtype) for path, x in leaves.items()}
        analysis = analyze(self.fn, rebuild(full), *inputs)
        indices = _indices(analysis, self.groups, self.kept)
        plan = Plan.of(analysis.walk, indices, analysis.traced.jaxpr, _known(analysis))
        code = own_width(self.fn, analysis, plan.kept, variables, inputs) if indices else None
        found, changed, differ = decided(analysis, plan, code, self.groups, self.numbers)
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
        reasons = [reason for leaf in leaves if (reason := analysis.walk.axes.reason(leaf))]
        if not leaves or reasons:
            why = reasons[0] if reasons else "its axes are made of other axes"
            raise ShapeError(
                f"for inputs of these shapes group {name!r} cannot be shortened: {why}"
            )
        found |= dict.fromkeys(leaves, coordinates)
    return found


# The numbers that count what is shortened.


def decided(
    analysis: Analysis, plan: Plan, code: ClosedJaxpr | None, groups: Groups, given: Numbers
) -> tuple[tuple[Number, ...], dict[Position, dict[int, float]], bool]:
    """Decide what numbers become at the new width.

    Args:
      analysis: of the function at its old width.
      plan: how it is run, with the counts that were found.
      code: the jaxpr of its own code at the new width, if that does the same.
      groups: of its parameters.
      given: what the user decides, by globs over names.

    Returns:
      The numbers; what they become, by position and operand; whether that differs from the code.
    """
    jaxpr = analysis.traced.jaxpr
    by_code = {} if code is None else differences(jaxpr, code)
    before = uniform_operands(jaxpr)
    counts = plan.followed.counts
    places = {(at, count.which) for at, count in counts.items()}
    for at, operands in by_code.items():
        places |= {(at, which) for which in operands}
    found = []
    changed: dict[Position, dict[int, float]] = {}
    differ = False
    for (at, which), name in _named(jaxpr, places).items():
        count = counts.get(at)
        if count is not None and count.which != which:
            count = None
        if code is not None:
            own = by_code.get(at, {}).get(which)
        else:
            own = count.now if count and count.proven else None
        follows = next((answer for glob, answer in given.items() if matches(glob, name)), None)
        new = _new(own, count, follows)
        differ |= new != own
        old = before[at][which] or 0.0
        over = () if count is None else _over(analysis, plan, groups, count)
        reason = _why(count, over) if code is None else CODE
        if follows is not None:
            reason = GIVEN
        found.append(Number(name, old, old if new is None else new, new is not None, over, reason))
        if new is not None:
            changed.setdefault(at, {})[which] = new
    return tuple(found), changed, differ


def _new(own: float | None, count: Count | None, follows: bool | None) -> float | None:
    """Return what a number becomes, or None if it stays; ``follows`` is what the user decides."""
    if follows is None or (follows and own is not None):
        return own
    return count.now if follows and count else None


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
    uses: Counter[str] = Counter()
    named = {}
    for position, eqn in _equations(jaxpr):
        for which in range(len(eqn.invars)):
            if (position, which) in places:
                base = "/".join(filter(None, (str(eqn.source_info.name_stack), eqn.primitive.name)))
                uses[base] += 1
                named[position, which] = base if uses[base] == 1 else f"{base}#{uses[base]}"
    return named


def _equations(jaxpr: ClosedJaxpr, position: Position = ()) -> Iterator[tuple[Position, JaxprEqn]]:
    """Yield the equations of a jaxpr and of those inside it, with their positions."""
    for index, eqn in enumerate(jaxpr.eqns):
        at = (*position, index)
        yield at, eqn
        for step, body in bodies(nested(eqn)).items():
            yield from _equations(body, (*at, step))
