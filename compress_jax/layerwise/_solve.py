"""What the layer-wise solvers share: the loop over leaves, the two levels around a weight, the better of two roundings."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Pointwise, bound
from compress_jax.core.paths import flatten
from compress_jax.core.types import Params
from compress_jax.layerwise import _problem
from compress_jax.layerwise._problem import MatrixForm, Problem, column_errors, problems, unit
from compress_jax.trace import Calibration
from compress_jax.trace._jaxpr.site import layouts_of_sites

# What a post-training solver returns, and the error it lowers.


class Solved(NamedTuple):
    """New params whose view under the compression, with this state, is exact: ``view(params, state) == params``.

    Attributes:
      params: plain arrays, as before; the solved leaves lie on their grids.
      state: of the compression that was solved for.
      skipped: ``{path: reason}``: leaves that the solver left to plain rounding.
      notes: ``{path: what was out of the ordinary}``, such as a damping that had to be raised.
      compression: the one that was solved for, bound to the layouts that the calibrated sites tell:
        pack with this one.
    """

    params: Params
    state: CompressionState
    skipped: dict[str, str]
    notes: dict[str, str]
    compression: Compression | None = None


def output_error(kernel: jax.Array, rounded: jax.Array, gram: jax.Array) -> jax.Array:
    r"""Return the mean squared error of a layer's outputs, :math:`tr(\Delta^\top G \Delta)`, :math:`\Delta = \hat W - W`.

    Args:
      kernel: ``[..., k, n]``.
      rounded: of the same shape.
      gram: ``[..., k, k]``, the mean of x x^T over calibration rows.

    Returns:
      ``[...]``, summed over the n outputs, a mean over rows.

    Example:
      >>> float(output_error(jnp.zeros((2, 1)), jnp.ones((2, 1)), jnp.eye(2)))
      2.0
    """
    delta = (rounded - kernel).astype(jnp.float32)
    return jnp.einsum(
        "...kn,...kl,...ln->...", delta, gram, delta, precision=jax.lax.Precision.HIGHEST
    )


HIGHEST = jax.lax.Precision.HIGHEST
RUNGS, RATIO = (
    48,
    1.5,
)  # of the ladder on which the next level is searched: from 2e-9 of the largest magnitude to it


Solve = Callable[[str, jax.Array, Pointwise, Problem], tuple[jax.Array, str | None]]


def layerwise(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None,
    solve: Solve,
    held_out: Calibration | None = None,
) -> Solved:
    """Solve every leaf that a compression sees entry by entry and that is calibrated; list the others.

    A leaf is solved in as many problems as it has: as a whole, or slice by slice where constant
    indices pick slices of it. A matrix (each layer of a stack by itself) whose solution errs no
    less than rounding to nearest keeps the latter, and so do weights that calibration says nothing
    about: those of inputs that were always zero, of experts or branches that were never reached.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: what the weights are to be seen through.
      state: its state; by default that of `init` once the compression is bound to the layouts the
        calibrated sites tell.
      solve: ``(path, array, how it is seen, what it is fed) -> (new array, a note or None)``.
      held_out: statistics of other batches, by which solutions are compared with rounding to
        nearest; by default those of the calibration itself.

    Returns:
      ``Solved``: exact under the compression.
    """
    leaves, rebuild = flatten(params)
    tasks, skipped = problems(calibration, leaves)
    if state is None:
        compression = bound(compression, layouts_of_sites(calibration.sites.values(), leaves))
        state = compression.init(params)
    judges = problems(held_out, leaves)[0] if held_out is not None else {}
    notes: dict[str, str] = {}
    new = dict(leaves)
    for path, how in compression.pointwise(params, state).items():
        if path not in tasks:
            skipped.setdefault(path, "no calibrated site uses it")
            continue
        _problem.check_finite(path, (*tasks[path], *judges.get(path, ())))
        said: list[str] = []
        for problem in tasks[path]:
            part, operands = (
                problem.box.take(leaves[path]),
                [problem.box.take(x) for x in how.operands],
            )
            own = replace(problem, gram=unit(problem.gram))
            solved, note = solve(path, part, Pointwise(how.see, tuple(operands)), own)
            judge = _problem.judge(problem, judges.get(path, ()))
            kept, won, same = _better_matrices(
                part, operands, solved, own.gram, judge, problem.form, how.see
            )
            new[path] = problem.box.put(new[path], kept)
            said += [note] if note else []
            said += _problem.notes(problem, path, "rounded to nearest")
            lost = _problem.not_better(problem.names(path), won, same)
            said += [f"{lost}: rounded to nearest"] if lost else []
        said += _problem.asides(tasks[path], "rounded to nearest")
        if left := _problem.unused(tasks[path]):
            skipped[path] = (
                f"only a part of the parameter is used, and solved; {left} of its entries are "
                "rounded to nearest"
            )
        notes |= {path: "; ".join(dict.fromkeys(said))} if said else {}
    seen, skipped = (
        compression.view(rebuild(new), state),
        {**compression.skipped(params), **skipped},
    )
    return Solved(seen, state, skipped, notes, compression)


@partial(jax.jit, static_argnames=("form", "see"))
def _better_matrices(
    x: jax.Array,
    operands: Sequence[jax.Array],
    solved: jax.Array,
    gram: jax.Array,
    judge: jax.Array,
    form: MatrixForm,
    see: Callable[..., Any],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the array rounded to nearest where that is no worse; which are, and which are alike."""
    w, new = (form.matrices(each.astype(jnp.float32)) for each in (x, solved))
    nearest = (
        see(w, *(form.matrices(each) for each in operands)).astype(x.dtype).astype(jnp.float32)
    )
    dead = jnp.diagonal(gram, axis1=1, axis2=2) == 0
    new = jnp.where(dead[:, :, None], nearest, new)
    errors = [column_errors(each - w, judge).sum(1) for each in (new, nearest)]
    won = errors[0] < errors[1]
    kept = form.stored(jnp.where(won[:, None, None], new, nearest))
    return kept.astype(x.dtype), won, (new == nearest).all((1, 2))


def neighbours(
    w: jax.Array, see: Callable[..., Any], operands: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the highest level at most w and the lowest level at least w, of any grid that is seen entry by entry.

    The next level is found by moving the nearest one until it is seen as another: by steps that
    grow by half, so that the first that suffices is shorter than three quarters of the gap and
    cannot pass by the next level.

    Args:
      w: float32 array.
      see: of a `Pointwise`.
      operands: of a `Pointwise`, in the shape of ``w``.

    Returns:
      ``(low, high)``; both are the nearest level where w is one, or lies beyond the last.

    Example:
      >>> low, high = neighbours(jnp.array([0.2, 0.9, 2.0]), lambda x: jnp.clip(jnp.round(x), -1, 1), [])
      >>> low.tolist(), high.tolist()
      ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    """
    nearest = see(w, *operands)
    toward = jnp.sign(w - nearest)
    largest = jnp.maximum(jnp.abs(w), jnp.abs(nearest)).max()
    for operand in operands:  # a scale may be larger than every weight
        if jnp.issubdtype(operand.dtype, jnp.floating):
            largest = jnp.maximum(largest, jnp.abs(operand).max())

    def climb(i: Any, found: jax.Array) -> jax.Array:
        moved = see(nearest + toward * largest * RATIO ** (i - RUNGS + 2.0), *operands)
        return jnp.where((found == nearest) & (moved != nearest), moved, found)

    other = jax.lax.fori_loop(0, RUNGS, climb, nearest)
    return jnp.minimum(nearest, other), jnp.maximum(nearest, other)


def better(w: jax.Array, gram: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Return, column by column, whichever rounding of weights has the lower output error; the first if they tie."""
    errors = [column_errors(q - w, gram) for q in (first, second)]
    return jnp.where((errors[1] < errors[0])[:, None], second, first)
