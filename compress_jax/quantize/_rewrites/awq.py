"""AWQ: scale up the weights that large activations meet before they are rounded, then search how far to clip."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, bound
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.layerwise import _problem
from compress_jax.layerwise._problem import Problem, problems
from compress_jax.layerwise._solve import Solved
from compress_jax.quantize._rewrites.folding import Fold, folds
from compress_jax.quantize._solvers.clip import clipped_state, output_errors, unseen
from compress_jax.trace import Calibration
from compress_jax.trace._jaxpr.site import layouts_of_sites
from compress_jax.trace._symmetry.scaling import Part

EPSILON = 1e-4


def awq(
    fn: ModelFn,
    params: Params,
    calibration: Calibration,
    compression: Compression,
    *inputs: PyTree,
    points: int = 20,
    clipped: bool = True,
) -> Solved:
    r"""Scale the rows of kernels by how large their inputs are, fold the inverse into what comes before, clip, and round.

    :math:`s = \bar x^r / (\bar w^{1 - r} + 10^{-4})`, normalised by :math:`\sqrt{\max s \min s}`, :math:`\bar x_j` being the
    root mean square of channel j and :math:`\bar w_j` the mean of
    :math:`|W_{jn}| / \max_i |W_{in}|`. Of the grid :math:`r = 0, 1/20, \dots` each group of kernels
    that share their inputs takes the r with which rounding to nearest errs least in their outputs,
    or no scaling if that is better still. Then `clip` searches the ranges.

    Kernels whose inputs nothing can make up for are clipped and rounded only; a note says why. What
    can be folded where is read off the function's jaxpr, as `smooth` does.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: what the weights are to be seen through.
      inputs: one example of them; only shapes matter.
      points: of the grid of r.
      clipped: whether to search the ranges.

    Returns:
      ``Solved``: exact under the compression. What is not compressed (norms, biases) may have taken
        up scales.

    Raises:
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> import jax
      >>> from compress_jax import at
      >>> from compress_jax.quantize import uniform
      >>> from compress_jax.trace import calibrate, gram
      >>> fn = lambda p, x: (x * p["scale"]) @ p["kernel"]
      >>> params = {"scale": jnp.array([100.0, 1.0]), "kernel": jnp.array([[0.3, 0.1], [1.0, -0.9]])}
      >>> x = jax.random.normal(jax.random.key(0), (64, 2))
      >>> c = at("kernel", uniform(bits=3, granularity="channel"))
      >>> solved = awq(fn, params, calibrate(fn, gram(), params, [x]), c, x)
      >>> error = lambda p: float(jnp.abs(fn(p, x) - fn(params, x)).max())
      >>> error(solved.params) < 0.3 * error(c.view(params, c.init(params)))
      True

    References:
      Lin et al., "AWQ", 2024, arXiv:2306.00978, equations 4 and 5, and its implementation (the
      normalisation, the part of the weights in s).
    """
    leaves, rebuild = flatten(params)
    tasks, reasons = problems(calibration, leaves)
    compression = bound(compression, layouts_of_sites(calibration.sites.values(), leaves))
    seen = compression.pointwise(params, compression.init(params))
    tasks = {path: task for path, task in tasks.items() if path in seen}
    skipped = {
        path: reasons.get(path, "no calibrated site uses it") for path in seen if path not in tasks
    }
    for path, own in tasks.items():
        _problem.check_finite(path, own)
    found, why = folds(fn, params, inputs, calibration.sites)
    found = [fold for fold in found if all(part.path in tasks for part in fold.consumers)]
    grid = [[_factors(fold, leaves, tasks, i / points) for fold in found] for i in range(points)]
    ones = [jnp.ones((*fold.scaling.stack, fold.scaling.size)) for fold in found]
    errors = [
        _errors(rebuild, compression, found, leaves, tasks, factors) for factors in (ones, *grid)
    ]
    chosen = [int(jnp.argmin(jnp.stack(each))) for each in zip(*errors, strict=True)]
    scaled = dict(leaves)
    notes = {
        path: f"not scaled: {why.get(path, 'not all kernels that share its inputs are compressed')}"
        for path in tasks
    }
    for i, (fold, best) in enumerate(zip(found, chosen, strict=True)):
        scaled |= fold.scaling.apply(scaled, (ones, *grid)[best][i])
        note = (
            f"scaled with r = {(best - 1) / points:g}, into {', '.join(fold.makers)}"
            if best
            else "no scaling was better"
        )
        notes |= dict.fromkeys((part.path for part in fold.consumers), note)
        tasks |= {
            part.path: _shrunk(tasks[part.path], fold, part, leaves, (ones, *grid)[best][i])
            for part in fold.consumers
        }
    notes = {
        path: "; ".join(filter(None, (note, unseen(path, tasks[path]))))
        for path, note in notes.items()
    }
    tree = rebuild(scaled)
    state = clipped_state(tree, compression, tasks) if clipped else compression.init(tree)
    skipped = {**compression.skipped(params), **skipped}
    return Solved(compression.view(tree, state), state, skipped, notes, compression)


def _shrunk(
    own: Sequence[Problem], fold: Fold, part: Part, leaves: Leaves, factors: Any
) -> tuple[Problem, ...]:
    """Return the problems of a kernel whose rows have grown: its inputs have shrunk as much."""
    grown = jnp.broadcast_to(
        fold.scaling.spread(part, leaves[part.path].ndim, factors), leaves[part.path].shape
    )
    shrunk = []
    for task in own:
        rows = task.form.matrices(task.box.take(grown))[..., 0]
        shrunk.append(replace(task, gram=task.gram / (rows[:, :, None] * rows[:, None, :])))
    return tuple(shrunk)


def _factors(fold: Fold, leaves: Leaves, tasks: Mapping[str, Sequence[Problem]], r: float) -> Any:
    """Return the factors of a fold for one r, ``[*stack, size]``."""
    inputs, weights = [], []
    for part in fold.consumers:
        squares, sizes = _squares_and_sizes(leaves[part.path].astype(jnp.float32), tasks[part.path])
        inputs.append(fold.scaling.mean(part, squares))
        weights.append(fold.scaling.mean(part, sizes))
    x, w = (jnp.stack(each).mean(0) for each in (inputs, weights))
    s = jnp.sqrt(x) ** r / (w ** (1 - r) + EPSILON)
    live = (x > 0) & (s > 0)
    most = jnp.where(live, s, 0).max(-1, keepdims=True)
    s = s / jnp.sqrt(most * jnp.where(live, s, jnp.inf).min(-1, keepdims=True))
    return fold.factors(jnp.where(live, s, 1.0))


def _squares_and_sizes(x: jax.Array, own: Sequence[Problem]) -> tuple[jax.Array, jax.Array]:
    """Return for every weight the mean square of its input, and its size as a share of its column's largest; 0 if unused."""
    squares, sizes = jnp.zeros_like(x), jnp.zeros_like(x)
    for task in own:
        w = jnp.abs(task.form.matrices(task.box.take(x)))
        seen = jnp.broadcast_to(jnp.diagonal(task.gram, axis1=1, axis2=2)[..., None], w.shape)
        largest = w.max(1, keepdims=True)
        squares = task.box.put(squares, task.form.stored(seen))
        sizes = task.box.put(sizes, task.form.stored(w / jnp.where(largest > 0, largest, 1)))
    return squares, sizes


def _errors(
    rebuild: Callable[..., Any],
    compression: Compression,
    found: list[Fold],
    leaves: Leaves,
    tasks: Mapping[str, Sequence[Problem]],
    factors: list[Any],
) -> list[Any]:
    """Return the output error of every fold's kernels if all folds are scaled, seen in the scale they had."""
    scaled, grown = (
        dict(leaves),
        {
            part.path: jnp.ones_like(leaves[part.path])
            for fold in found
            for part in fold.scaling.parts
        },
    )
    for fold, each in zip(found, factors, strict=True):
        scaled |= fold.scaling.apply(scaled, each)
        grown |= fold.scaling.apply(grown, each)
    tree = rebuild(scaled)
    viewed = flatten(compression.view(tree, compression.init(tree)))[0]

    def error(path: str) -> Any:
        delta = viewed[path].astype(jnp.float32) / grown[path].astype(jnp.float32) - leaves[
            path
        ].astype(jnp.float32)
        return jnp.stack([each.sum() for each in output_errors(delta, tasks[path])]).sum()

    return [jnp.stack([error(part.path) for part in fold.consumers]).sum() for fold in found]
