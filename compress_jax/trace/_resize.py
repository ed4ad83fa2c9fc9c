"""`resize`: run a function with shorter parameters, whatever shapes are written down inside it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten
from compress_jax.trace._analyse import Analysis, analyse
from compress_jax.trace.axes import Leaf
from compress_jax.trace.group import Groups
from compress_jax.trace.kept import cut, leaves_of
from compress_jax.trace.means import Known
from compress_jax.trace.resize_run import Plan
from compress_jax.trace.site import Shape


def resize(
    fn: Callable[..., Any], variables: Any, groups: Groups, kept: Mapping[str, Sequence[int] | np.ndarray]
) -> Callable[..., Any]:
    r"""Return the function that ``fn`` is when only some coordinates of some groups are left.

    ``fn`` is traced for variables of the old shapes, and every equation is run with shapes, limits, slices and counts of
    groups as they are on what is left; loops, branches, calls and rules for derivatives are built again around it. So it
    does not matter which shapes the model has written down, and none of its code is changed. What a mean over a shortened
    axis divides by becomes the new number of its terms (``jnp.mean``, ``jnp.var``, the norms), as it would in a model
    declared at the new width; every other number stays (attention scores are still divided by the root of the old width).
    Constants must be the same along what is shortened, or it would be frozen.

    The gradient of a mean divides too, but where no sum shows it: shrink a function, then differentiate, not the reverse.

    Args:
      fn: a pure function of ``(variables, *inputs)``.
      variables: tree of arrays or ``ShapeDtypeStruct``, of the old shapes.
      groups: what `compress_jax.trace.groups` found in ``fn``.
      kept: by name of a group the coordinates to keep, in any order (their old order stays); others stay whole.

    Returns:
      ``smaller(smaller variables, *inputs)``, compiled, for inputs of any shapes that ``fn`` takes; for the variables see
      `Groups.keep`.

    Raises:
      NoMatchError: if there is no group of a name.
      ShapeError: if a coordinate is not one of the group's or none is kept; and, when it is called, if the variables do not
        have the shapes of what is kept, or if with inputs of these shapes the axes cannot be shortened.

    Example:
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
    full = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), variables)
    left = {name: np.unique(np.asarray(list(coordinates), int)) for name, coordinates in kept.items()}
    expected = {path: x.shape for path, x in flatten(jax.eval_shape(lambda v: groups.keep(v, left), full))[0].items()}

    def smaller(variables: Any, *inputs: Any) -> Any:
        leaves = flatten(variables)[0]
        _check(leaves, expected)
        old, rebuilt = flatten(full)
        wide = rebuilt({path: jax.ShapeDtypeStruct(old[path].shape, x.dtype) for path, x in leaves.items()})
        analysis = analyse(fn, wide, *inputs)
        plan = Plan.of(analysis.walk, _indices(analysis, groups, left), analysis.traced.jaxpr, _known(analysis))
        results = plan.run(analysis.traced.jaxpr, [*leaves.values(), *jax.tree.leaves(inputs)])
        outputs, rebuild_output = flatten(analysis.traced.out)
        made = dict(zip(outputs, results, strict=True))
        return rebuild_output(made | {out: cut(made[out], expected[path]) for out, path in analysis.state.items()})

    return jax.jit(smaller, inline=True)


def _check(leaves: dict[str, Any], expected: dict[str, Shape]) -> None:
    if leaves.keys() != expected.keys():
        odd = sorted(leaves.keys() ^ expected.keys())
        raise ShapeError(f"these variables are not those that were shortened: {', '.join(odd)} is only in one of the two")
    for path, x in leaves.items():
        if np.shape(x) != expected[path]:
            raise ShapeError(f"{path!r} has shape {np.shape(x)}, but what is kept of it has shape {expected[path]}")


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
