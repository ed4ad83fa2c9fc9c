"""SmoothQuant: move the range of activations into the weights, where it is easier to quantize."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.deprecated import positional_arguments, renamed_arguments
from compress_jax.core.errors import ArgumentError, NonFiniteError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Leaves, ModelFn, Params, PyTree
from compress_jax.layerwise._problem import (
    channel_statistic,
    fed_sites,
    parameter_shaped,
    why_not,
)
from compress_jax.layerwise._result import Rewritten
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.calibration import Calibration, require
from compress_jax.trace._symmetry.scaling import Part, Scaling, scalings

FLOOR = 1e-5


@renamed_arguments(strength="alpha")
@positional_arguments("calibration", after=2)
def smooth(
    fn: ModelFn,
    params: Params,
    *inputs: PyTree,
    calibration: Calibration,
    alpha: float = 0.5,
) -> Rewritten:
    r"""Divide channels of activations by factors that balance their ranges with those of weights.

    :math:`s_j = \max|X_j|^\alpha / \max|W_j|^{1 - \alpha}`, over all data and all kernels that
    channel j enters. Row j of these kernels is multiplied by it, and whatever produces the channel
    (a norm's scale and bias, a kernel's outputs) is divided by it. The float function stays the
    same; quantizing its activations and weights loses less.

    The producers are found in the function's jaxpr (``trace.scaling``): through norms, relu,
    pooling, gates, residual sums, from values through attention, under ``scan`` with factors for
    each layer. Kernels without a producer that can be divided (after the input, gelu or softmax)
    are left alone and listed with the reason.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: one example of them; only shapes matter.
      calibration: ``trace.calibrate(fn, trace.reducers.absmax("channel"), params, batches)``. It
        may also be given before ``inputs``.
      alpha: :math:`\alpha`, from 0 (balance the weights) to 1 (balance the activations).

    Returns:
      ``Rewritten``: params of the same function. ``changed`` says which parameters each kernel's
      scale moved into.

    Raises:
      ArgumentError: if ``alpha`` is not in [0, 1].
      NonFiniteError: if calibration statistics are not finite.
      StateError: if they are other statistics.

    Example:
      >>> import compress_jax as cj
      >>> def fn(p, x):
      ...     return jax.nn.relu(x * p["scale"]) @ p["kernel"]
      >>> params = {"scale": jnp.array([1.0, 100.0]), "kernel": jnp.ones((2, 3))}
      >>> x = jnp.array([[1.0, 1.0]])
      >>> ranges = cj.trace.calibrate(fn, cj.trace.reducers.absmax("channel"), params, [x])
      >>> result = cj.quantize.smooth(fn, params, x, calibration=ranges)
      >>> result.params["scale"].tolist(), result.changed
      ([1.0, 10.0], {'kernel': ('scale',)})

    References:
      Xiao et al., "SmoothQuant", 2023, arXiv:2211.10438, equation 4.
    """
    if not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha must be from 0 to 1, got {alpha}")
    require(calibration, jax.Array, 'reducers.absmax("channel")')
    leaves, rebuild = flatten(params)
    found, skipped = folds(fn, params, inputs, calibration.sites)
    ranges, unplaced, notes = _ranges(calibration, leaves)
    changed: dict[str, tuple[str, ...]] = {}
    # In turn: a kernel may be a consumer in one fold and a producer in another.
    for fold in found:
        paths = [part.path for part in fold.consumers]
        if missing := [path for path in paths if path not in ranges]:
            why = unplaced.get(missing[0], "no calibrated site uses it")
            skipped |= dict.fromkeys(paths, f"the inputs of {missing[0]} are not known: {why}")
            continue
        leaves |= fold.scaling.apply(leaves, fold.factors(_balance(fold, leaves, ranges, alpha)))
        changed |= dict.fromkeys(paths, fold.producers)
    notes = {path: note for path, note in notes.items() if path in changed}
    return Rewritten(rebuild(leaves), changed=changed, skipped=skipped, notes=notes)


class Fold(NamedTuple):
    """A scaling, split into the kernels whose rows it multiplies and those that make up for it.

    Attributes:
      scaling: parameters whose scales cancel.
      consumers: its kernels that are summed over along it, all scaled by the same power.
    """

    scaling: Scaling
    consumers: tuple[Part, ...]

    @property
    def producers(self) -> tuple[str, ...]:
        """The paths of the other parameters."""
        others = (part.path for part in self.scaling.parts if part not in self.consumers)
        return tuple(dict.fromkeys(others))

    def factors(self, rows: jax.Array) -> jax.Array:
        """Return the scaling's factors that multiply the consumers' rows by ``rows``.

        Args:
          rows: float32 ``[*stack, size]``.
        """
        return rows ** (1 / self.consumers[0].power)


def folds(
    fn: ModelFn, params: Params, inputs: tuple[PyTree, ...], sites: Mapping[str, Site]
) -> tuple[list[Fold], dict[str, str]]:
    """Return scalings that can be folded, every kernel in at most one, and reasons for the rest.

    Args:
      fn: a pure function of ``(params, *inputs)``.
      params: tree of arrays.
      inputs: one example of them.
      sites: the calibrated sites by name.

    Returns:
      ``(folds, {path of a kernel: reason})``.
    """
    found, why = scalings(fn, params, *inputs)
    summed: dict[str, set[int]] = {}  # the axes of each kernel that a product sums over
    for site in sites.values():
        if site.param is not None:
            summed.setdefault(site.param, set()).update(site.param_axes or ())
    chosen: list[Fold] = []
    taken: set[str] = set()
    for scaling in found:
        # Parts along axes that a product sums over read the channels; all others produce them.
        consumers = tuple(
            part for part in scaling.parts if set(part.axes) <= summed.get(part.path, set())
        )
        paths = {part.path for part in consumers}
        # One power, so that one factor a row serves all consumers; and a part beside them, which
        # takes up the inverse.
        one_power = len({part.power for part in consumers}) == 1
        if one_power and not paths & taken and len(consumers) < len(scaling.parts):
            chosen.append(Fold(scaling, consumers))
            taken |= paths
    reasons = {path: _reason(path, axes, why) for path, axes in summed.items() if path not in taken}
    return chosen, reasons


def _reason(path: str, axes: set[int], why: Mapping[tuple[str, int], str]) -> str:
    """Say why no scale of a kernel's inputs can be folded."""
    if not axes:
        return "a reshape mixes the axes that are summed over with others"
    reasons = list(dict.fromkeys(why[path, axis] for axis in sorted(axes) if (path, axis) in why))
    # A convolution's window can never be scaled; why its channels cannot says more.
    reasons = [each for each in reasons if "window" not in each] or reasons
    text = ", ".join(reasons) or "another kernel takes it up"
    return f"nothing before it can make up for a scale: {text}"


def _balance(fold: Fold, leaves: Leaves, ranges: Leaves, alpha: float) -> jax.Array:
    """Return what the consumers' rows are multiplied by, float32 ``[*stack, size]``.

    It is 1 for channels that are always zero, or that no weight reads.
    """
    inputs = []
    weights = []
    for part in fold.consumers:
        kernel = leaves[part.path]
        activations = jnp.broadcast_to(ranges[part.path], kernel.shape)
        inputs.append(fold.scaling.largest(part, activations))
        weights.append(fold.scaling.largest(part, jnp.abs(kernel)))
    # One factor for all kernels with these inputs, so their largest weight counts.
    x = jnp.stack(inputs).max(0)  # [*stack, size]
    w = jnp.stack(weights).max(0)  # [*stack, size]
    factors = x**alpha / jnp.maximum(w, FLOOR) ** (1 - alpha)  # equation 4
    return jnp.where((x == 0) | (w == 0), 1.0, jnp.maximum(factors, FLOOR))


def _ranges(
    calibration: Calibration, leaves: Leaves
) -> tuple[dict[str, jax.Array], dict[str, str], dict[str, str]]:
    """Return the largest magnitude that each kernel's entries are multiplied by.

    Returns:
      ``(ranges, unplaced, notes)`` by path: arrays that broadcast against the kernel; why some
      kernels have none; how many channels were always zero, which are not scaled.
    """
    ranges: dict[str, jax.Array] = {}
    unplaced: dict[str, str] = {}
    zeros: dict[str, int] = {}
    for site, largest in fed_sites(calibration, leaves):
        if site.conditional:  # the branch may not have run
            largest = jnp.where(jnp.isnan(largest), 0, largest)
        if not bool(jnp.isfinite(largest).all()):
            raise NonFiniteError(
                f"the ranges of the inputs of {site.param!r} are not finite; look at the "
                "calibration batches"
            )
        if reason := why_not(site):
            unplaced |= dict.fromkeys((str(site.param), *site.also), reason)
        for piece in site.pieces:
            answer = channel_statistic(site, piece, largest, jnp.max)
            if isinstance(answer, str):
                unplaced[piece.path] = answer
                continue
            # A kernel that is used twice has the larger range of both uses.
            path = piece.path
            placed = parameter_shaped(*answer)
            ranges[path] = jnp.maximum(ranges[path], placed) if path in ranges else placed
            zeros[path] = zeros.get(path, 0) + int((answer[2] == 0).sum())
    notes = {
        path: f"inputs that were always zero, {n}: not scaled" for path, n in zeros.items() if n
    }
    return {path: x for path, x in ranges.items() if path not in unplaced}, unplaced, notes
