"""The loop over leaves that layer-wise solvers of roundings share, and two steps that they need."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Pointwise, bound
from compress_jax.core.paths import flatten
from compress_jax.core.types import Params
from compress_jax.layerwise import _problem
from compress_jax.layerwise._problem import MatrixForm, Problem, column_errors, problems, unit
from compress_jax.layerwise._result import Rewritten
from compress_jax.trace._jaxpr.site import layouts_of_sites
from compress_jax.trace._statistics.calibration import Calibration

HIGHEST = jax.lax.Precision.HIGHEST
INSTEAD = "rounded to nearest"  # what notes say of weights that are not solved

# The ladder on which the next level is searched: from 2e-9 of the largest magnitude up to it.
LADDER_STEPS = 48
LADDER_RATIO = 1.5

QuantizeFn = Callable[..., jax.Array]
SolveLeaf = Callable[[str, jax.Array, Pointwise, Problem], tuple[jax.Array, str | None]]


def solve_leaves(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None,
    solve: SolveLeaf,
    held_out: Calibration | None = None,
) -> Rewritten:
    """Solve every calibrated leaf that a compression treats entry by entry; list the others.

    A leaf is solved in as many problems as it has: as a whole, or slice by slice where constant
    indices pick slices of it. A matrix (each layer of a stack by itself) whose solution has no
    lower error than rounding to nearest is rounded to nearest. So are weights that calibration
    says nothing about: those of inputs that were always zero, of experts or branches that it never
    reached.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: the one to solve for.
      state: its state; by default that of `init` once the compression is bound to the layouts of
        the calibrated sites.
      solve: ``(path, array, the compression of its entries, problem) -> (new array, note or
        None)``.
      held_out: statistics of other batches, by which solutions are compared with rounding to
        nearest; by default those of the calibration itself.

    Returns:
      ``Rewritten``: exact under the compression.
    """
    leaves, rebuild = flatten(params)
    tasks, skipped = problems(calibration, leaves)
    judges = problems(held_out, leaves)[0] if held_out is not None else {}
    if state is None:
        compression = bound(compression, layouts_of_sites(calibration.sites.values(), leaves))
        state = compression.init(params)
    notes: dict[str, str] = {}
    new = dict(leaves)
    changed: dict[str, tuple[str, ...]] = {}
    for path, pointwise in compression.pointwise(params, state).items():
        if path not in tasks:
            skipped.setdefault(path, "no calibrated site uses it")
            continue
        others = judges.get(path, ())
        new[path], found = _solve_leaf(path, leaves[path], pointwise, tasks[path], others, solve)
        changed[path] = ()
        if found:
            notes[path] = "; ".join(dict.fromkeys(found))
        if left := _problem.unused(tasks[path]):
            skipped[path] = (
                f"only a part of the parameter is used, and solved; {left} of its entries are "
                f"{INSTEAD}"
            )
    skipped = {**compression.skipped(params), **skipped}
    viewed = compression.view(rebuild(new), state)
    return Rewritten(viewed, state, changed, skipped, notes, compression)


def _solve_leaf(
    path: str,
    x: jax.Array,
    pointwise: Pointwise,
    tasks: Sequence[Problem],
    others: Sequence[Problem],
    solve: SolveLeaf,
) -> tuple[jax.Array, list[str]]:
    """Solve all problems of a leaf; return it, and notes."""
    _problem.check_finite(path, (*tasks, *others))
    notes: list[str] = []
    new = x
    # Problems share no entry, so each writes its own part of the leaf.
    for task in tasks:
        part = task.box.take(x)
        operands = [task.box.take(each) for each in pointwise.operands]
        own = replace(task, gram=unit(task.gram))  # the scale of the inputs changes no solution
        solved, note = solve(path, part, Pointwise(pointwise.fn, tuple(operands)), own)
        judge = _problem.judge(task, others)
        best, won, same = _better_matrices(
            part, operands, solved, own.gram, judge, task.form, pointwise.fn
        )
        new = task.box.put(new, best)
        if note:
            notes.append(note)
        notes += _problem.notes(task, path, INSTEAD)
        if lost := _problem.not_better(task.names(path), won, same):
            notes.append(f"{lost}: {INSTEAD}")
    return new, notes + _problem.asides(tasks, INSTEAD)


@partial(jax.jit, static_argnames=("form", "quantize_fn"))
def _better_matrices(
    x: jax.Array,
    operands: Sequence[jax.Array],
    solved: jax.Array,
    gram: jax.Array,
    judge: jax.Array,
    form: MatrixForm,
    quantize_fn: QuantizeFn,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compare each matrix with its rounding to nearest.

    Returns ``(array of the better ones, which solutions won, which equal rounding to nearest)``.
    """
    w = form.matrices(x.astype(jnp.float32))  # [batch, k, n]
    new = form.matrices(solved.astype(jnp.float32))
    nearest = quantize_fn(w, *(form.matrices(each) for each in operands))
    # Rounded to the leaf's dtype, as it will be stored: errors are those of what ships.
    nearest = nearest.astype(x.dtype).astype(jnp.float32)
    dead = jnp.diagonal(gram, axis1=1, axis2=2) == 0  # [batch, k]
    new = jnp.where(dead[:, :, None], nearest, new)
    error = column_errors(new - w, judge).sum(1)  # [batch]
    won = error < column_errors(nearest - w, judge).sum(1)
    best = form.stored(jnp.where(won[:, None, None], new, nearest))
    return best.astype(x.dtype), won, (new == nearest).all((1, 2))


def output_error(kernel: jax.Array, rounded: jax.Array, gram: jax.Array) -> jax.Array:
    r"""Return the mean squared error of a layer's outputs.

    It is :math:`tr(\Delta^\top G \Delta)` with :math:`\Delta = \hat W - W`.

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
    return jnp.einsum("...kn,...kl,...ln->...", delta, gram, delta, precision=HIGHEST)


def neighboring_levels(
    w: jax.Array, quantize_fn: QuantizeFn, operands: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return the highest level at most w and the lowest level at least w.

    This works for any grid that is given as a function of single entries. The next level is found
    by moving the nearest one until it is rounded to another: by steps that grow by half, so that
    the first that suffices is shorter than three quarters of the gap and cannot pass by the next
    level.

    Args:
      w: float32 array.
      quantize_fn: ``(w, *operands) -> levels``.
      operands: arrays in the shape of ``w``.

    Returns:
      ``(low, high)``; both are the nearest level where w is one, or lies beyond the last.

    Example:
      >>> ternary = lambda x: jnp.clip(jnp.round(x), -1, 1)
      >>> low, high = neighboring_levels(jnp.array([0.2, 0.9, 2.0]), ternary, [])
      >>> low.tolist(), high.tolist()
      ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    """
    nearest = quantize_fn(w, *operands)
    toward = jnp.sign(w - nearest)
    largest = jnp.maximum(jnp.abs(w), jnp.abs(nearest)).max()
    for operand in operands:  # a scale may be larger than every weight
        if jnp.issubdtype(operand.dtype, jnp.floating):
            largest = jnp.maximum(largest, jnp.abs(operand).max())

    def climb(i: jax.Array, found: jax.Array) -> jax.Array:
        distance = largest * LADDER_RATIO ** (i - LADDER_STEPS + 2.0)
        moved = quantize_fn(nearest + toward * distance, *operands)
        return jnp.where((found == nearest) & (moved != nearest), moved, found)

    other = jax.lax.fori_loop(0, LADDER_STEPS, climb, nearest)
    return jnp.minimum(nearest, other), jnp.maximum(nearest, other)


def better_columns(w: jax.Array, gram: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Return, column by column, the rounding with the lower output error; the first if they tie."""
    better = column_errors(second - w, gram) < column_errors(first - w, gram)  # [batch, n]
    return jnp.where(better[:, None], second, first)
