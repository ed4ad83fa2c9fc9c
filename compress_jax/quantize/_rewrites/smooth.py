"""SmoothQuant: move the range of activations into the weights, where it is easier to quantize."""

from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError, NonFiniteError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.layerwise._problem import beside, fed, met, why_not
from compress_jax.quantize._rewrites.folding import Fold, Folded, folds
from compress_jax.trace import Calibration
from compress_jax.trace._statistics.calibration import require

FLOOR = 1e-5


def smooth(
    fn: ModelFn,
    params: Params,
    calibration: Calibration,
    *inputs: PyTree,
    strength: float = 0.5,
) -> Folded:
    r"""Divide the channels of activations by factors that balance their ranges with those of the weights they meet.

    :math:`s_j = \max|X_j|^\alpha / \max|W_j|^{1 - \alpha}`, over all data and all kernels that the channel is fed to; row j
    of these kernels is multiplied by it, and whatever makes the channel (a norm's scale and bias, a
    kernel's outputs) is divided by it. The float function stays as it is; quantizing its
    activations and weights loses less.

    What can be folded where is read off the function's jaxpr (``trace.scaling``): through norms,
    relu, pooling, gates, residual sums, from values through attention, under ``scan`` with factors
    for each layer. Kernels that nothing can make up for (fed by the input, by gelu or softmax) stay
    as they are and are listed with the reason.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      calibration: ``trace.calibrate(fn, trace.reducers.absmax("channel"), params, batches)``.
      inputs: one example of them; only shapes matter.
      strength: :math:`\alpha`, from 0 (balance the weights) to 1 (balance the activations).

    Returns:
      `Folded`: params of the same function, what was folded into what, and what was not and why.

    Raises:
      ArgumentError: if ``strength`` is not in [0, 1].
      NonFiniteError: if calibration statistics are not finite.
      StateError: if they are other statistics.

    Example:
      >>> import jax
      >>> from compress_jax.trace import calibrate
      >>> from compress_jax.trace.reducers import absmax
      >>> def fn(p, x):
      ...     return jax.nn.relu(x * p["scale"]) @ p["kernel"]
      >>> params = {"scale": jnp.array([1.0, 100.0]), "kernel": jnp.ones((2, 3))}
      >>> x = jnp.array([[1.0, 1.0]])
      >>> result = smooth(fn, params, calibrate(fn, absmax("channel"), params, [x]), x)
      >>> result.params["scale"].tolist(), result.folded
      ([1.0, 10.0], {'kernel': ('scale',)})

    References:
      Xiao et al., "SmoothQuant", 2023, arXiv:2211.10438, equation 4.
    """
    if not 0 <= strength <= 1:
        raise ArgumentError(f"strength must be from 0 to 1, got {strength}")
    leaves, rebuild = flatten(params)
    require(calibration, jax.Array, 'reducers.absmax("channel")')
    found, skipped = folds(fn, params, inputs, calibration.sites)
    ranges, unplaced, notes = _ranges(calibration, leaves)
    folded: dict[str, tuple[str, ...]] = {}
    for fold in found:
        paths = [part.path for part in fold.consumers]
        if missing := [path for path in paths if path not in ranges]:
            why = unplaced.get(missing[0], "no calibrated site uses it")
            skipped |= dict.fromkeys(paths, f"what {missing[0]} is fed cannot be told: {why}")
            continue
        leaves |= fold.scaling.apply(leaves, fold.factors(_balance(fold, leaves, ranges, strength)))
        folded |= dict.fromkeys(paths, fold.makers)
    return Folded(
        rebuild(leaves),
        folded,
        skipped,
        {path: note for path, note in notes.items() if path in folded},
    )


def _balance(fold: Fold, leaves: Leaves, ranges: dict[str, Any], strength: float) -> Any:
    """Return what the consumers' rows are multiplied by; 1 for channels that are always zero, or that nothing reads."""
    shape = lambda part: leaves[part.path].shape  # noqa: E731
    largest = fold.scaling.largest
    inputs = jnp.stack(
        [largest(part, jnp.broadcast_to(ranges[part.path], shape(part))) for part in fold.consumers]
    ).max(0)
    weights = jnp.stack([largest(part, jnp.abs(leaves[part.path])) for part in fold.consumers]).max(
        0
    )
    factors = inputs**strength / jnp.maximum(weights, FLOOR) ** (1 - strength)
    return jnp.where((inputs == 0) | (weights == 0), 1.0, jnp.maximum(factors, FLOOR))


def _ranges(
    calibration: Calibration, leaves: Leaves
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Return the largest magnitude of what every kernel's entries meet, in a shape that broadcasts against the kernel.

    Beside it why some have none, and what calibration never saw: the channels there are not scaled.
    """
    ranges: dict[str, Any] = {}
    unplaced: dict[str, str] = {}
    unseen: dict[str, int] = {}
    for site, largest in fed(calibration, leaves):
        seen = (
            jnp.where(jnp.isnan(largest), 0, largest) if site.conditional else largest
        )  # a branch may not have run
        if not bool(jnp.isfinite(seen).all()):
            raise NonFiniteError(
                f"the ranges of what {site.param!r} is fed are not finite; look at the "
                "calibration batches"
            )
        if reason := why_not(site):
            unplaced |= dict.fromkeys((str(site.param), *site.also), reason)
        for piece in site.pieces:
            answer = met(site, piece, seen, jnp.max)
            if isinstance(answer, str):
                unplaced[piece.path] = answer
                continue
            placed, path = beside(*answer), piece.path
            ranges[path] = jnp.maximum(ranges[path], placed) if path in ranges else placed
            unseen[path] = unseen.get(path, 0) + int((answer[2] == 0).sum())
    notes = {
        path: f"inputs that were always zero, {n}: not scaled" for path, n in unseen.items() if n
    }
    return {path: x for path, x in ranges.items() if path not in unplaced}, unplaced, notes
