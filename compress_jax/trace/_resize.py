"""`resize`: run a function with shorter parameters, whatever shapes are written down inside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import flatten, matches
from compress_jax.trace._analyse import Analysis, analyse
from compress_jax.trace.axes import Leaf
from compress_jax.trace.counts import Known
from compress_jax.trace.group import Groups
from compress_jax.trace.kept import cut, leaves_of
from compress_jax.trace.own_width import own_width
from compress_jax.trace.resize_run import Plan
from compress_jax.trace.resized_numbers import Number, Numbers, decided
from compress_jax.trace.site import Shape

Kept = Mapping[str, Sequence[int] | np.ndarray]


def resize(
    fn: Callable[..., Any], variables: Any, groups: Groups, kept: Kept, numbers: Numbers | None = None
) -> Callable[..., Any]:
    r"""Return the function that ``fn`` is when only some coordinates of some groups are left.

    ``fn`` is traced for variables of the old shapes, and every equation is run with shapes, limits, slices and counts of
    groups as they are on what is left; loops, branches, calls and rules for derivatives are built again around it. So it
    does not matter which shapes the model has written down, and none of its code is changed. Constants must be the same
    along what is shortened, or it would be frozen.

    Which numbers count what gets shorter (the n of a mean), and which only look like it? Where ``fn`` itself takes the
    shorter variables and does the same, equation for equation, it says so itself, and it is what is run: the same code at
    the new width. Where it does not (a module with its widths written down), a number becomes the new count if it makes a
    mean of a sum over a shortened axis, by its value: :math:`n^{-p}` on the p-th power of a sum over n terms (means,
    variances, norms, sums by ones); every other number stays, that of attention's scores among them. `resized_numbers` lists
    them all; ``numbers`` overrules.

    The gradient of a mean divides too, but where no sum shows it: shrink a function, then differentiate, not the reverse.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays or ``ShapeDtypeStruct``, of the old shapes.
      groups: what `compress_jax.trace.groups` found in ``fn``.
      kept: by name of a group the coordinates to keep, in any order (their old order stays); others stay whole.
      numbers: ``{glob over names of numbers: whether they follow the width}``, first match wins; others as above.

    Returns:
      ``smaller(smaller variables, *inputs)``, compiled, for inputs of any shapes that ``fn`` takes; for the variables see
      `Groups.keep`.

    Raises:
      NoMatchError: if there is no group of a name.
      ShapeError: if a coordinate is not one of the group's or none is kept; and, when it is called, if the variables do not
        have the shapes of what is kept, or if with inputs of these shapes the axes cannot be shortened.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.trace._groups import groups
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

    def smaller(variables: Any, *inputs: Any) -> Any:
        leaves = flatten(variables)[0]
        work.check(leaves)
        flat = [*leaves.values(), *jax.tree.leaves(inputs)]
        analysis, plan, code, _ = work.plan(variables, inputs)
        results = plan.run(analysis.traced.jaxpr, flat) if code is None else jaxpr_as_fun(code)(*flat)
        outputs, rebuild_output = flatten(analysis.traced.out)
        made = dict(zip(outputs, results, strict=True))
        return rebuild_output(made | {out: cut(made[out], work.expected[path]) for out, path in analysis.state.items()})

    smaller.whole = jax.jit(getattr(fn, "whole", fn), inline=True)  # for the next time: see `own_width`
    return jax.jit(smaller, inline=True)


def resized_numbers(
    fn: Callable[..., Any], variables: Any, *inputs: Any, groups: Groups, kept: Kept, numbers: Numbers | None = None
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
      >>> from compress_jax.trace._groups import groups
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
            raise NoMatchError(f"numbers: {pattern!r} matches no number that may count a width. They are:\n  {listing}")
    return found


@dataclass(frozen=True)
class _Work:
    """What is to be done, whatever the inputs: the arguments of `resize`, with the shapes before and after."""

    fn: Callable[..., Any]
    full: Any
    expected: dict[str, Shape]
    groups: Groups
    kept: Mapping[str, np.ndarray]
    numbers: Numbers

    @classmethod
    def of(cls, fn: Callable[..., Any], variables: Any, groups: Groups, kept: Kept, numbers: Numbers | None) -> "_Work":
        full = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.numpy.result_type(x)), variables)
        left = {name: np.unique(np.asarray(list(coordinates), int)) for name, coordinates in kept.items()}
        short = flatten(jax.eval_shape(lambda v: groups.keep(v, left), full))[0]
        return cls(fn, full, {path: x.shape for path, x in short.items()}, groups, left, numbers or {})

    def check(self, leaves: dict[str, Any]) -> None:
        if leaves.keys() != self.expected.keys():
            odd = sorted(leaves.keys() ^ self.expected.keys())
            raise ShapeError(f"these variables are not those shortened: {', '.join(odd)} is only in one of the two")
        for path, x in leaves.items():
            if np.shape(x) != self.expected[path]:
                raise ShapeError(f"{path!r} has shape {np.shape(x)}, but what is kept of it has shape {self.expected[path]}")

    def plan(self, variables: Any, inputs: Sequence[Any]) -> tuple[Analysis, Plan, ClosedJaxpr | None, tuple[Number, ...]]:
        """Return the analysis at the old width, the plan, the jaxpr of the function's own code if it does, the numbers."""
        leaves, (old, rebuilt) = flatten(variables)[0], flatten(self.full)
        wide = rebuilt({path: jax.ShapeDtypeStruct(old[path].shape, x.dtype) for path, x in leaves.items()})
        analysis = analyse(self.fn, wide, *inputs)
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


def _indices(analysis: Analysis, groups: Groups, kept: Mapping[str, np.ndarray]) -> dict[Leaf, np.ndarray]:
    found: dict[Leaf, np.ndarray] = {}
    for name, coordinates in kept.items():
        leaves = leaves_of(analysis, groups[name])
        reasons = [reason for leaf in leaves if (reason := analysis.walk.axes.reason(leaf))]
        if not leaves or reasons:
            why = reasons[0] if reasons else "its axes are made of other parts"
            raise ShapeError(f"for inputs of these shapes group {name!r} cannot be shortened: {why}")
        found |= dict.fromkeys(leaves, coordinates)
    return found
