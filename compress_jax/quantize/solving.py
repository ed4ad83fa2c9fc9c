"""What the layer-wise solvers share: the loop over leaves, the two levels around a weight, the better of two roundings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Params, Pointwise
from compress_jax.core.errors import NonFiniteError
from compress_jax.core.paths import flatten
from compress_jax.quantize.solved import Solved
from compress_jax.trace import Calibration
from compress_jax.trace.matrix import Problem, problems
from compress_jax.trace.site import Shape, Site

HIGHEST = jax.lax.Precision.HIGHEST
RUNGS, RATIO = 48, 1.5  # of the ladder on which the next level is searched: from 2e-9 of the largest magnitude to it


def layerwise(
    params: Params,
    calibration: Calibration,
    compression: Compression,
    state: CompressionState | None,
    solve: Callable[[str, jax.Array, Pointwise, Problem], tuple[jax.Array, str | None]],
) -> Solved:
    """Solve every leaf that a compression sees entry by entry and that is calibrated; list the others.

    Args:
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.gram(), params, batches)``.
      compression: what the weights are to be seen through.
      state: its state; by default ``compression.init(params)``.
      solve: ``(path, leaf, how it is seen, what it is fed) -> (new leaf, a note or None)``.

    Returns:
      ``Solved``: exact under the compression.
    """
    state = compression.init(params) if state is None else state
    leaves, rebuild = flatten(params)
    tasks, skipped = problems(calibration, leaves)
    notes: dict[str, str] = {}
    new = dict(leaves)
    for path, how in compression.pointwise(params, state).items():
        if path not in tasks:
            skipped.setdefault(path, "no calibrated site uses it")
            continue
        if not bool(_finite(tasks[path].gram)):
            raise NonFiniteError(
                f"the calibration statistics of {path!r} hold NaN or infinity; look at the calibration batches"
            )
        new[path], note = solve(path, leaves[path], how, tasks[path])
        if note:
            notes[path] = note
    return Solved(compression.view(rebuild(new), state), state, {**compression.skipped(params), **skipped}, notes)


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def neighbours(w: jax.Array, see: Callable[..., Any], operands: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the highest level at most w and the lowest level at least w, of any grid that is seen entry by entry.

    The next level is found by moving the nearest one until it is seen as another: by steps that grow by half, so that the
    first that suffices is shorter than three quarters of the gap and cannot pass by the next level.

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


def column_errors(delta: jax.Array, gram: jax.Array) -> jax.Array:
    r"""Return the output error of every column of weights, :math:`\delta^\top G \delta`: ``[batch, k, n] -> [batch, n]``."""
    fed = jnp.einsum("bkl,bln->bkn", gram, delta, precision=HIGHEST)
    return (fed * delta).sum(1)


def better(w: jax.Array, gram: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Return, column by column, whichever rounding of weights has the lower output error; the first if they tie."""
    errors = [column_errors(q - w, gram) for q in (first, second)]
    return jnp.where((errors[1] < errors[0])[:, None], second, first)


def fed(calibration: Calibration, leaves: Mapping[str, Any]) -> Iterator[tuple[str, Site, Any]]:
    """Yield ``(path, site, statistics of its input)`` of every calibrated site that a parameter feeds."""
    for name, site in calibration.sites.items():
        if site.param is not None and site.param in leaves:
            yield site.param, site, calibration[name]["input"]


def stored(site: Site, shape: Shape, channels: jax.Array, fold: Callable[..., jax.Array]) -> jax.Array | None:
    """Return a statistic of the input's channels where the parameter that meets them has them, axes of size 1 elsewhere.

    Args:
      site: where the parameter is used.
      shape: of the parameter.
      channels: ``[*loops, *batch, channels]``, as the reducers of channels keep it.
      fold: ``(x, axes) -> x`` over loops that do not run along the parameter, such as ``jnp.max``.

    Returns:
      An array that broadcasts against the parameter; None if its axes were mixed by a reshape.
    """
    if site.param_axes is None or site.batch_axes is None or None in site.stack_loops or site.groups > 1:
        return None
    added = tuple(loop for loop in range(len(site.loops)) if loop not in site.stack_loops)
    channels = fold(channels, added) if added else channels
    summed = site.param_axes
    if site.kind == "conv":
        contracting = site.contracting[1]
        into = site.params["dimension_numbers"].rhs_spec[1]
        if len(summed) != len(contracting):
            return None
        summed = (summed[contracting.index(into)],)
    stacked = [axis for _, axis in sorted(zip(site.stack_loops, site.stack_axes, strict=True))]
    axes = [*stacked, *site.batch_axes, *summed]
    x = channels.reshape([shape[axis] for axis in axes])
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return jnp.transpose(x, order).reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])
