"""Clip weights before their scales are derived, as far as it lowers the error of the layers' outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, bound
from compress_jax.core.paths import flatten
from compress_jax.core.types import Params
from compress_jax.layerwise import _problem
from compress_jax.layerwise._problem import Problem, column_errors, problems
from compress_jax.layerwise._solve import Solved
from compress_jax.trace import Calibration
from compress_jax.trace._jaxpr.site import layouts_of_sites

FAR = 3e38
RATIOS = tuple(1 - 0.05 * i for i in range(11))


def clip(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    ratios: tuple[float, ...] = RATIOS,
) -> Solved:
    r"""Choose for every output of a layer how far its weights' ranges are cut, by the error of the layer's outputs.

    All weights are clipped to :math:`r` times the first and last level they could be rounded to,
    and the compression derives its scales anew. Of all r, each column of weights takes the one with
    the least :math:`\delta^\top G \delta`, G being the mean of :math:`x x^\top`; a leaf for which
    one r for all of it does better (a scale for the whole tensor) takes that. Never worse than not
    clipping. An input that was always zero counts as an average one, and a matrix that calibration
    did not reach (an expert without tokens) is not clipped: notes say where. The state serves any
    other solver: ``gptq(params, seen, c, clip(params, seen, c).state)``.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: what the weights are to be seen through.
      ratios: candidates, among which should be 1.

    Returns:
      ``Solved``: clipped weights, rounded to nearest. Leaves without calibration are not clipped,
        and listed.

    Example:
      >>> from compress_jax.quantize import output_error, uniform
      >>> from compress_jax.trace import calibrate, gram
      >>> params = {"kernel": jnp.array([[1.0], [0.5], [-0.5]])}
      >>> x = jnp.array([[0.1, 1.0, 0.0], [0.0, 0.0, 1.0]])
      >>> seen = calibrate(lambda p, x: x @ p["kernel"], gram(), params, [x])
      >>> clip(params, seen, uniform(bits=2)).params["kernel"].round(2).tolist()
      [[0.5], [0.5], [-0.5]]

    References:
      Lin et al., "AWQ", 2024, arXiv:2306.00978; its implementation searches clipping in this way.
    """
    leaves = flatten(params)[0]
    tasks, skipped = problems(calibration, leaves)
    compression = bound(compression, layouts_of_sites(calibration.sites.values(), leaves))
    seen = compression.pointwise(params, compression.init(params))
    skipped = {
        path: skipped.get(path, "no calibrated site uses it") for path in seen if path not in tasks
    }
    tasks = {path: own for path, own in tasks.items() if path in seen}
    state = clipped_state(params, compression, tasks, ratios)
    notes = {path: said for path, own in tasks.items() if (said := unseen(path, own))}
    skipped = {**compression.skipped(params), **skipped}
    return Solved(compression.view(params, state), state, skipped, notes, compression)


def unseen(path: str, tasks: Sequence[Problem]) -> str:
    """Say what calibration does not know of a leaf whose range is chosen by its outputs; empty if all was seen."""
    said = [note for task in tasks for note in _problem.notes(task, path, "taken for average ones")]
    return "; ".join([*said, *_problem.asides(tasks, "taken for average ones")])


def _ends(see: Any, x: jax.Array, operands: Any) -> tuple[jax.Array, jax.Array]:
    far = jnp.full(x.shape, FAR, jnp.float32)
    return see(-far, *operands), see(far, *operands)


def clipped_state(
    params: Params,
    compression: Compression,
    tasks: Mapping[str, Sequence[Problem]],
    ratios: tuple[float, ...] = RATIOS,
) -> CompressionState:
    """Return the state of the compression on weights clipped as is best; under it the weights as they are round likewise.

    Args:
      params: tree of arrays.
      compression: what the weights are to be seen through.
      tasks: the layer-wise problems of leaves that it sees entry by entry.
      ratios: candidates.

    Returns:
      The state.
    """
    start = compression.init(params)
    leaves, rebuild = flatten(params)
    seen = compression.pointwise(params, start)
    bounds = {path: _ends(seen[path].see, leaves[path], seen[path].operands) for path in tasks}
    if not tasks:
        return start

    def cut(by: Mapping[str, Any]) -> Params:
        ends = {
            path: [(end * by[path]).astype(leaves[path].dtype) for end in bounds[path]]
            for path in by
        }
        return rebuild({**leaves, **{path: jnp.clip(leaves[path], *ends[path]) for path in by}})

    def errors(by: Mapping[str, Any]) -> dict[str, list[jax.Array]]:
        viewed = flatten(compression.view(params, compression.init(cut(by))))[0]
        return {
            path: output_errors((viewed[path] - leaves[path]).astype(jnp.float32), tasks[path])
            for path in by
        }

    tried = [errors(dict.fromkeys(tasks, ratio)) for ratio in ratios]
    columns, whole = {}, {}
    plain = min(range(len(ratios)), key=lambda i: abs(1 - ratios[i]))
    for path, own in tasks.items():
        columns[path] = jnp.full(leaves[path].shape, ratios[plain], jnp.float32)
        for i, task in enumerate(own):
            table = jnp.stack([each[path][i] for each in tried])
            best = jnp.where(task.dead.all(1)[:, None], plain, table.argmin(0))
            chosen = jnp.asarray(ratios, jnp.float32)[best][:, None]
            parts = jnp.broadcast_to(chosen, (*task.gram.shape[:2], chosen.shape[-1]))
            columns[path] = task.box.put(columns[path], task.form.stored(parts))
        total = sum(
            jnp.stack([each[path][i] for each in tried]).sum((1, 2)) for i in range(len(own))
        )
        whole[path] = jnp.full(leaves[path].shape, ratios[int(jnp.argmin(total))], jnp.float32)
    totals = [
        {path: sum(float(x.sum()) for x in each) for path, each in errors(by).items()}
        for by in (columns, whole)
    ]
    best = {
        path: columns[path] if totals[0][path] <= totals[1][path] else whole[path] for path in tasks
    }
    return compression.init(cut(best))


def output_errors(delta: jax.Array, tasks: Sequence[Problem]) -> list[jax.Array]:
    """Return the output errors of a leaf's columns, problem by problem; inputs that were never seen count as average."""
    return [column_errors(task.form.matrices(task.box.take(delta)), task.filled) for task in tasks]
