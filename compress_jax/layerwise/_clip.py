"""Clip weights before their scales are derived, as far as it lowers the layers' output errors."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Pointwise, bound
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, Params, Shape
from compress_jax.layerwise import _problem
from compress_jax.layerwise._problem import MatrixForm, Problem, column_errors, problems
from compress_jax.layerwise._result import Rewritten
from compress_jax.layerwise._solve import QuantizeFn
from compress_jax.trace._jaxpr.site import layouts_of_sites
from compress_jax.trace._statistics.calibration import Calibration

BEYOND = 3e38  # a weight larger than any grid's last level
RATIOS = tuple(1 - 0.05 * i for i in range(11))
INSTEAD = "taken for average ones"

Ratios = float | jax.Array  # one for all of a leaf, or one for each entry


def clip(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    ratios: tuple[float, ...] = RATIOS,
) -> Rewritten:
    r"""Choose for every output of a layer how far its weights' ranges are cut.

    All weights are clipped to :math:`r` times the first and last level they could be rounded to,
    and the compression derives its scales anew. Of all r, each column of weights takes the one with
    the least output error :math:`\delta^\top G \delta`, G being the mean of :math:`x x^\top`. A
    leaf for which one r for all of it does better (a scale for the whole tensor) takes that one.
    The result is never worse than not clipping.

    An input that was always zero counts as an average one, and a matrix that calibration did not
    reach (an expert without tokens) is not clipped: notes say where. The state serves any other
    solver: ``gptq(params, calibration, c, clip(params, calibration, c).state)``.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: the grid or format to round to.
      ratios: candidates for r, among which should be 1.

    Returns:
      ``Rewritten``: clipped weights, rounded to nearest. Leaves without calibration are not
      clipped, and listed.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.array([[1.0], [0.5], [-0.5]])}
      >>> x = jnp.array([[0.1, 1.0, 0.0], [0.0, 0.0, 1.0]])
      >>> seen = cj.trace.calibrate(lambda p, x: x @ p["kernel"], cj.trace.gram(), params, [x])
      >>> clipped = cj.quantize.clip(params, seen, cj.quantize.uniform(bits=2))
      >>> clipped.params["kernel"].round(2).tolist()
      [[0.5], [0.5], [-0.5]]

    References:
      Lin et al., "AWQ", 2024, arXiv:2306.00978; its implementation searches clipping in this way.
    """
    leaves = flatten(params)[0]
    tasks, reasons = problems(calibration, leaves)
    compression = bound(compression, layouts_of_sites(calibration.sites.values(), leaves))
    rounded = compression.pointwise(params, compression.init(params))
    missing = [path for path in rounded if path not in tasks]
    skipped = {path: reasons.get(path, "no calibrated site uses it") for path in missing}
    tasks = {path: own for path, own in tasks.items() if path in rounded}
    state = clipped_state(params, compression, tasks, ratios)
    notes = {path: note for path, own in tasks.items() if (note := unreached(path, own))}
    skipped = {**compression.skipped(params), **skipped}
    changed = dict.fromkeys(tasks, ())
    return Rewritten(compression.view(params, state), state, changed, skipped, notes, compression)


def unreached(path: str, tasks: Sequence[Problem]) -> str:
    """Say what calibration does not know of a leaf whose ranges are searched; empty if nothing."""
    notes: list[str] = []
    for task in tasks:
        notes += _problem.notes(task, path, INSTEAD)
    return "; ".join([*notes, *_problem.asides(tasks, INSTEAD)])


def clipped_state(
    params: Params,
    compression: Compression,
    tasks: Mapping[str, Sequence[Problem]],
    ratios: tuple[float, ...] = RATIOS,
) -> CompressionState:
    """Return the state of the compression on weights clipped by the best ratios.

    Under it the weights themselves, not clipped, are rounded to the same levels.

    Args:
      params: tree of arrays.
      compression: the grid or format to round to.
      tasks: the layer-wise problems of leaves that it rounds entry by entry.
      ratios: candidates.

    Returns:
      The state.
    """
    start = compression.init(params)
    if not tasks:
        return start
    leaves, rebuild = flatten(params)
    pointwise = compression.pointwise(params, start)
    ends = {path: _ends(pointwise[path], leaves[path]) for path in tasks}

    # Clipped weights only serve to derive the scales; the errors are those of the weights as given.
    def state_of(by: Mapping[str, Ratios]) -> CompressionState:
        cut = {path: _cut(leaves[path], ends[path], ratio) for path, ratio in by.items()}
        return compression.init(rebuild({**leaves, **cut}))

    def errors(by: Mapping[str, Ratios]) -> dict[str, list[jax.Array]]:
        viewed = flatten(compression.view(params, state_of(by)))[0]
        deltas = {path: (viewed[path] - leaves[path]).astype(jnp.float32) for path in by}
        return {path: output_errors(delta, tasks[path]) for path, delta in deltas.items()}

    # One ratio for all at a time: each column of each leaf has an error of its own.
    tried = [errors(dict.fromkeys(tasks, ratio)) for ratio in ratios]
    columns = {path: _best_by_column(path, leaves, tasks[path], tried, ratios) for path in tasks}
    whole = {path: _best_of_leaf(path, leaves, tried, ratios) for path in tasks}
    by_column = errors(columns)
    by_leaf = errors(whole)
    best: dict[str, Ratios] = {}
    # Columns that share a scale cannot choose alone: the two choices are compared as they round.
    for path in tasks:
        better = _total(by_column[path]) <= _total(by_leaf[path])
        best[path] = columns[path] if better else whole[path]
    return state_of(best)


def _ends(pointwise: Pointwise, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the first and last level of every entry."""
    return _saturated(pointwise.operands, pointwise.fn, x.shape)


@partial(jax.jit, static_argnames=("quantize_fn", "shape"))
def _saturated(
    operands: Sequence[jax.Array], quantize_fn: QuantizeFn, shape: Shape
) -> tuple[jax.Array, jax.Array]:
    # Any grid or format saturates: what is far beyond it is rounded to its last level.
    far = jnp.full(shape, BEYOND, jnp.float32)
    return quantize_fn(-far, *operands), quantize_fn(far, *operands)


@jax.jit
def _cut(x: jax.Array, ends: tuple[jax.Array, jax.Array], ratio: Ratios) -> jax.Array:
    low, high = ends
    return jnp.clip(x, (low * ratio).astype(x.dtype), (high * ratio).astype(x.dtype))


def _best_by_column(
    path: str,
    leaves: Leaves,
    tasks: Sequence[Problem],
    tried: Sequence[Mapping[str, list[jax.Array]]],
    ratios: tuple[float, ...],
) -> jax.Array:
    """Return the best ratio of each entry's column; that next to 1 where nothing is known."""
    unclipped = min(range(len(ratios)), key=lambda i: abs(1 - ratios[i]))
    chosen = jnp.full(leaves[path].shape, ratios[unclipped], jnp.float32)
    for i, task in enumerate(tasks):
        table = jnp.stack([errors[path][i] for errors in tried])  # [ratios, batch, n]
        best = jnp.where(task.dead.all(1)[:, None], unclipped, table.argmin(0))  # [batch, n]
        columns = jnp.asarray(ratios, jnp.float32)[best][:, None]  # [batch, 1, n]
        entries = jnp.broadcast_to(columns, (*task.gram.shape[:2], columns.shape[-1]))
        chosen = task.box.put(chosen, task.form.stored(entries))
    return chosen


def _best_of_leaf(
    path: str,
    leaves: Leaves,
    tried: Sequence[Mapping[str, list[jax.Array]]],
    ratios: tuple[float, ...],
) -> jax.Array:
    """Return the one ratio that is best for all of a leaf, for every entry."""
    parts = len(tried[0][path])  # the problems of the leaf
    totals = sum(jnp.stack([errors[path][i] for errors in tried]).sum((1, 2)) for i in range(parts))
    return jnp.full(leaves[path].shape, ratios[int(jnp.argmin(totals))], jnp.float32)


def _total(errors: Sequence[jax.Array]) -> float:
    return sum(float(each.sum()) for each in errors)


def output_errors(delta: jax.Array, tasks: Sequence[Problem]) -> list[jax.Array]:
    """Return the output errors of a leaf's columns, problem by problem, each ``[batch, n]``.

    Inputs that were always zero count as average ones.
    """
    return [_columns(task.box.take(delta), task.filled, task.form) for task in tasks]


@partial(jax.jit, static_argnames="form")
def _columns(delta: jax.Array, gram: jax.Array, form: MatrixForm) -> jax.Array:
    return column_errors(form.matrices(delta), gram)
