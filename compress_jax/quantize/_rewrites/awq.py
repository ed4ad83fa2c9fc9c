"""AWQ: scale up the weights of large activations before rounding, then search how far to clip."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, bound
from compress_jax.core.deprecated import positional_arguments
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.layerwise import _problem
from compress_jax.layerwise._clip import clipped_state, output_errors, unreached
from compress_jax.layerwise._problem import Problem, problems
from compress_jax.layerwise._result import Rewritten
from compress_jax.quantize._rewrites.smooth import Fold, folds
from compress_jax.trace._jaxpr.site import layouts_of_sites
from compress_jax.trace._statistics.calibration import Calibration
from compress_jax.trace._symmetry.scaling import Part

EPSILON = 1e-4

Tasks = Mapping[str, Sequence[Problem]]


@positional_arguments("calibration", "compression", after=2)
def awq(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    calibration: Calibration,
    compression: Compression,
    points: int = 20,
    clipped: bool = True,
) -> Rewritten:
    r"""Scale the rows of kernels by how large their inputs are, fold the inverse, clip, and round.

    :math:`s = \bar x^r / (\bar w^{1 - r} + 10^{-4})`, normalized by
    :math:`\sqrt{\max s \min s}`, :math:`\bar x_j` being the root mean square of channel j and
    :math:`\bar w_j` the mean of :math:`|W_{jn}| / \max_i |W_{in}|`. Of the grid
    :math:`r = 0, 1/20, \dots` each group of kernels with the same inputs takes the r for which
    rounding to nearest has the least output error, or no scaling if that is better still. The
    inverse moves into what produces the inputs. Then `clip` searches the ranges.

    Kernels without a producer that can take the inverse are only clipped and rounded, with a note.
    The producers are found in the function's jaxpr, as `smooth` does.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: one example of them; only shapes matter.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``. It and ``compression``
        may also be given before ``inputs``.
      compression: the grid or format to round to.
      points: the number of values of r.
      clipped: whether to search the ranges.

    Returns:
      ``Rewritten``: exact under the compression. Parameters that are not compressed (norms, biases)
      may have taken up scales.

    Raises:
      NonFiniteError: if calibration or weights are not finite.

    Example:
      >>> import compress_jax as cj
      >>> fn = lambda p, x: (x * p["scale"]) @ p["kernel"]
      >>> kernel = jnp.array([[0.3, 0.1], [1.0, -0.9]])
      >>> params = {"scale": jnp.array([100.0, 1.0]), "kernel": kernel}
      >>> x = jax.random.normal(jax.random.key(0), (64, 2))
      >>> c = cj.at("kernel", cj.quantize.uniform(bits=3, granularity="channel"))
      >>> grams = cj.trace.calibrate(fn, cj.trace.gram(), params, [x])
      >>> solved = cj.quantize.awq(fn, params, x, calibration=grams, compression=c)
      >>> error = lambda p: float(jnp.abs(fn(p, x) - fn(params, x)).max())
      >>> error(solved.params) < 0.3 * error(c.view(params, c.init(params)))
      True

    References:
      Lin et al., "AWQ", 2024, arXiv:2306.00978, equations 4 and 5, and its implementation (the
      normalization, the part of the weights in s).
    """
    leaves, rebuild = flatten(params)
    tasks, reasons = problems(calibration, leaves)
    compression = bound(compression, layouts_of_sites(calibration.sites.values(), leaves))
    rounded = compression.pointwise(params, compression.init(params))
    tasks = {path: task for path, task in tasks.items() if path in rounded}
    missing = [path for path in rounded if path not in tasks]
    skipped = {path: reasons.get(path, "no calibrated site uses it") for path in missing}
    for path, own in tasks.items():
        _problem.check_finite(path, own)
    found, why = folds(fn, params, inputs, calibration.sites)
    # One factor scales all kernels with the same inputs, so all of them must be rounded here.
    found = [fold for fold in found if all(part.path in tasks for part in fold.consumers)]
    notes = {path: _not_scaled(path, why) for path in tasks}
    changed: dict[str, tuple[str, ...]] = dict.fromkeys(tasks, ())
    scaled = dict(leaves)
    best = _search(rebuild, compression, found, leaves, tasks, points)
    for fold, (r, factors) in zip(found, best, strict=True):
        paths = [part.path for part in fold.consumers]
        scaled |= fold.scaling.apply(scaled, factors)
        producers = ", ".join(fold.producers)
        note = "no scaling was better" if r is None else f"scaled with r = {r:g}, into {producers}"
        notes |= dict.fromkeys(paths, note)
        changed |= dict.fromkeys(paths, () if r is None else fold.producers)
        # Larger rows have smaller inputs: `clip` needs the Gram matrices of these.
        tasks |= {
            part.path: _shrunk(tasks[part.path], fold, part, leaves, factors)
            for part in fold.consumers
        }
    for path, note in notes.items():
        notes[path] = "; ".join(filter(None, (note, unreached(path, tasks[path]))))
    tree = rebuild(scaled)
    state = clipped_state(tree, compression, tasks) if clipped else compression.init(tree)
    skipped = {**compression.skipped(params), **skipped}
    return Rewritten(compression.view(tree, state), state, changed, skipped, notes, compression)


def _not_scaled(path: str, why: Mapping[str, str]) -> str:
    reason = why.get(path, "not all kernels that share its inputs are compressed")
    return f"not scaled: {reason}"


def _search(
    rebuild: Callable[..., Params],
    compression: Compression,
    found: list[Fold],
    leaves: Leaves,
    tasks: Tasks,
    points: int,
) -> list[tuple[float | None, jax.Array]]:
    """Return ``(r, factors)`` of each fold with the least output error; r is None for factors 1."""
    ones = [jnp.ones((*fold.scaling.stack, fold.scaling.size)) for fold in found]
    # No scaling comes first: argmin takes the first of equal errors.
    candidates: list[tuple[float | None, list[jax.Array]]] = [(None, ones)]
    for i in range(points):
        r = i / points
        candidates.append((r, [_factors(fold, leaves, tasks, r) for fold in found]))
    # One pass for each r scales all folds at once; each fold is judged by its own kernels.
    errors = [_errors(rebuild, compression, found, leaves, tasks, each) for _, each in candidates]
    best = []
    for i in range(len(found)):
        index = int(jnp.argmin(jnp.stack([own[i] for own in errors])))
        r, factors = candidates[index]
        best.append((r, factors[i]))
    return best


def _factors(fold: Fold, leaves: Leaves, tasks: Tasks, r: float) -> jax.Array:
    """Return the factors of a fold for one r, ``[*stack, size]``."""
    inputs = []
    weights = []
    for part in fold.consumers:
        squares, sizes = _squares_and_sizes(leaves[part.path].astype(jnp.float32), tasks[part.path])
        inputs.append(fold.scaling.mean(part, squares))
        weights.append(fold.scaling.mean(part, sizes))
    x = jnp.stack(inputs).mean(0)  # mean squares, [*stack, size]
    w = jnp.stack(weights).mean(0)  # [*stack, size]
    s = jnp.sqrt(x) ** r / (w ** (1 - r) + EPSILON)
    # Channels that are always zero would decide the normalization; they keep the factor 1.
    live = (x > 0) & (s > 0)
    largest = jnp.where(live, s, 0).max(-1, keepdims=True)
    smallest = jnp.where(live, s, jnp.inf).min(-1, keepdims=True)
    s = s / jnp.sqrt(largest * smallest)
    return fold.factors(jnp.where(live, s, 1.0))


def _squares_and_sizes(x: jax.Array, tasks: Sequence[Problem]) -> tuple[jax.Array, jax.Array]:
    """Return the mean square of each weight's input, and its size relative to its column's largest.

    Both have the shape of ``x``, and are 0 for weights that no product uses.
    """
    squares = jnp.zeros_like(x)
    sizes = jnp.zeros_like(x)
    for task in tasks:
        w = jnp.abs(task.form.matrices(task.box.take(x)))  # [batch, k, n]
        means = jnp.diagonal(task.gram, axis1=1, axis2=2)[..., None]  # [batch, k, 1]
        largest = w.max(1, keepdims=True)
        relative = w / jnp.where(largest > 0, largest, 1)
        squares = task.box.put(squares, task.form.stored(jnp.broadcast_to(means, w.shape)))
        sizes = task.box.put(sizes, task.form.stored(relative))
    return squares, sizes


def _errors(
    rebuild: Callable[..., Params],
    compression: Compression,
    found: list[Fold],
    leaves: Leaves,
    tasks: Tasks,
    factors: list[jax.Array],
) -> list[jax.Array]:
    """Return the output error of each fold's kernels if all folds are scaled.

    The rounded kernels are divided by their factors, so that the original inputs apply.
    """
    # Ones that are scaled like the leaves: what each entry has been multiplied by, in all folds.
    grown: dict[str, jax.Array] = {}
    for fold in found:
        grown |= {part.path: jnp.ones_like(leaves[part.path]) for part in fold.scaling.parts}
    scaled = dict(leaves)
    for fold, own in zip(found, factors, strict=True):
        scaled |= fold.scaling.apply(scaled, own)
        grown |= fold.scaling.apply(grown, own)
    tree = rebuild(scaled)
    viewed = flatten(compression.view(tree, compression.init(tree)))[0]

    def error(path: str) -> jax.Array:
        effective = viewed[path].astype(jnp.float32) / grown[path].astype(jnp.float32)
        delta = effective - leaves[path].astype(jnp.float32)
        return jnp.stack([each.sum() for each in output_errors(delta, tasks[path])]).sum()

    return [jnp.stack([error(part.path) for part in fold.consumers]).sum() for fold in found]


def _shrunk(
    tasks: Sequence[Problem], fold: Fold, part: Part, leaves: Leaves, factors: jax.Array
) -> tuple[Problem, ...]:
    """Return the problems of a kernel whose rows have grown: its inputs have shrunk as much."""
    kernel = leaves[part.path]
    grown = jnp.broadcast_to(fold.scaling.spread(part, kernel.ndim, factors), kernel.shape)
    shrunk = []
    for task in tasks:
        rows = task.form.matrices(task.box.take(grown))[..., 0]  # [batch, k]
        # G_ij / (f_i f_j): the second moments of the inputs x_i / f_i.
        shrunk.append(replace(task, gram=task.gram / (rows[:, :, None] * rows[:, None, :])))
    return tuple(shrunk)
