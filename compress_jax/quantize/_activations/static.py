"""Static quantization of activations: ranges from calibration, fixed or moving in training."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.arguments import flag, number
from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.types import PyTree
from compress_jax.quantize._activations import range_rules
from compress_jax.quantize._activations.quantizer import (
    ActivationQuantizer,
    OperandState,
    activation_grid,
    round_to_grid,
    stable_scale_from_range,
)
from compress_jax.quantize._scales.rules import Scale
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.reducer import Reducer
from compress_jax.trace.reducers import histogram, minmax


def static(
    bits: int = 8,
    symmetric: bool = True,
    granularity: Literal["tensor", "channel"] = "tensor",
    range: Literal["minmax", "ema", "percentile", "entropy", "mse", "rms"] = "minmax",
    *,
    momentum: float = 0.99,
    percent: float | None = None,
    clipped: bool = True,
) -> ActivationQuantizer:
    r"""Quantize an operand by a range that calibration chose; what lies beyond is clipped.

    The state of an operand is ``{"low", "high"}``. An asymmetric grid has the zero point 0 where no
    activation is negative: after a ReLU all codes stand for values that occur.

    Args:
      bits: 2 to 8.
      symmetric: whether the grid's zero is its middle.
      granularity: ``"tensor"``, or ``"channel"`` for a range for each contracted channel; one that
        was always zero takes the widest of all. Ranges for channels can only be simulated: their
        scales cannot be taken out of an integer product's sum.
      range: ``"minmax"``, the extremes of all batches; ``"ema"``, moving averages of the extremes
        of each batch; ``"percentile"``; ``"entropy"``, least relative entropy; ``"mse"``, least
        squared error; ``"rms"``, as for a normal distribution with the same moments. Per channel:
        ``"minmax"``, ``"ema"``, ``"rms"``.
      momentum: of ``"ema"``; and of every range but ``"minmax"``, which only ever widens, when
        ranges move in training.
      percent: of ``"percentile"``: the percentage of entries within. Default: by bits, 99.99 at 8
        and 98.2 at 4 (see `quantize.percentile`).
      clipped: whether what is clipped gets no gradient.

    Returns:
      The quantizer.

    Raises:
      ArgumentError: if an argument is none of the above.

    Example:
      >>> import compress_jax as cj
      >>> relu = lambda w, x: jax.nn.relu(x) @ w["kernel"]
      >>> params, x = {"kernel": jnp.eye(2)}, jnp.array([[-3.0, 0.4], [1.2, 3.0]])
      >>> quantized = cj.quantize.activations(relu, cj.quantize.static(bits=2, symmetric=False))
      >>> ranges = quantized.init(params, [x])
      >>> quantized.apply(params, ranges, x).tolist()
      [[0.0, 0.0], [1.0, 3.0]]

    References:
      Jacob et al., "Quantization and Training of Neural Networks", 2018, arXiv:1712.05877, section
      3.1 (moving averages). Migacz, "8-bit Inference with TensorRT", 2017 (entropy).
    """
    grid = activation_grid(bits, symmetric)
    clipped = flag("clipped", clipped)
    reducer, range_rule = _range_rule(range, granularity, momentum, percent)

    def scale_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> Scale:
        low = jax.lax.stop_gradient(state["low"])
        high = jax.lax.stop_gradient(state["high"])
        # [*batch, k] -> the operand's rank, so that each contracted channel has its own scale.
        if granularity == "channel":
            low, high = _widen_unused(low, high)
            low = broadcast_channels(site, index, x, low)
            high = broadcast_channels(site, index, x, high)
        return stable_scale_from_range(low, high, grid)

    def quantize_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> jax.Array:
        return round_to_grid(grid, clipped, x, *scale_fn(site, index, x, state))

    def ranges(site: Site, statistics: PyTree) -> OperandState:
        low, high = range_rule(statistics, grid)
        return {"low": low, "high": high}

    def merge(old: OperandState, new: OperandState) -> OperandState:
        # Extremes of all batches only widen; every other range is a moving average.
        if range == "minmax":
            low = jnp.minimum(old["low"], new["low"])
            return {"low": low, "high": jnp.maximum(old["high"], new["high"])}
        return {end: old[end] + (1 - momentum) * (new[end] - old[end]) for end in old}

    call = (
        f"static(bits={bits}, symmetric={symmetric}, granularity={granularity!r}, range={range!r})"
    )
    return ActivationQuantizer(grid, scale_fn, quantize_fn, reducer, ranges, merge, call=call)


def _widen_unused(low: jax.Array, high: jax.Array) -> range_rules.Ends:
    """Give channels that were always zero the widest range of all, so that nothing is clipped."""
    unused = (low == 0) & (high == 0)
    return jnp.where(unused, low.min(), low), jnp.where(unused, high.max(), high)


def _range_rule(
    kind: str, granularity: str, momentum: float, percent: float | None
) -> tuple[Reducer, range_rules.RangeRule]:
    """Return the statistics to collect, and the rule that makes a range of them."""
    if granularity not in ("tensor", "channel"):
        raise ArgumentError(
            f"granularity must be 'tensor' or 'channel', got {granularity!r}; 'token' is "
            "`dynamic`'s"
        )
    momentum = number("momentum", momentum, 0, 1, below=True)
    percent = None if percent is None else number("percent", percent)
    if percent is not None and not (kind == "percentile" and 0 < percent <= 100):
        raise ArgumentError(
            f"percent must be above 0, at most 100, and for 'percentile' only; got {percent} for "
            f"{kind!r}"
        )
    # The cheapest statistics that a rule can do with: extremes, moments, or a histogram.
    if kind in ("minmax", "ema"):
        reducer = minmax(momentum if kind == "ema" else None, granularity)  # pyright: ignore[reportArgumentType]
        return reducer, range_rules.extremes
    if kind == "rms":
        return range_rules.spread(granularity == "channel"), range_rules.rms
    rules = {
        "percentile": partial(range_rules.percentile, percent=percent),
        "entropy": range_rules.entropy,
        "mse": range_rules.mse,
    }
    if not isinstance(kind, str) or kind not in rules:
        raise ArgumentError(
            f"range must be 'minmax', 'ema', 'percentile', 'entropy', 'mse' or 'rms', got {kind!r}"
        )
    if granularity == "channel":
        raise ArgumentError(
            f"range={kind!r} needs a histogram, which is kept of a whole operand; use 'minmax', "
            "'ema' or 'rms'"
        )
    return histogram(range_rules.BINS), rules[kind]


def broadcast_channels(site: Site, index: int, x: jax.Array, channels: jax.Array) -> jax.Array:
    """Return one number a channel in the shape that broadcasts against the operand.

    Args:
      site: the contraction.
      index: which operand.
      x: the operand.
      channels: ``[*batch, k]``, as reducers order them.

    Returns:
      An array of the operand's rank.

    Raises:
      ShapeError: for the kernel of a convolution that is an activation.

    Example:
      >>> shapes, float32 = ((2, 5, 3), (3, 4), (2, 5, 4)), ["float32"] * 3
      >>> site = Site("a", "dot", None, None, *shapes, *float32, ((2,), (0,)))
      >>> broadcast_channels(site, 0, jnp.ones((2, 5, 3)), jnp.arange(3.0)).shape
      (1, 1, 3)
    """
    if site.kind == "conv" and index == 1:
        raise ShapeError(
            f"site {site.name!r} convolves with an activation as kernel; use granularity='tensor' "
            "for it"
        )
    axes = site.batch[index] + site.contracting[index]
    table = channels.reshape([x.shape[axis] for axis in axes])  # [*batch, *contracted]
    table = table.transpose(np.argsort(axes))  # into the order of the operand's axes
    return table.reshape([size if axis in axes else 1 for axis, size in enumerate(x.shape)])
