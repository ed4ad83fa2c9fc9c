"""LSQ: the step sizes of weights and of activations are trained together with the weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core._leafwise import LeafState, leafwise
from compress_jax.core.arguments import flag, function, sharing
from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, Pointwise
from compress_jax.core.describe import call_of
from compress_jax.core.layout import Granularity, Layout
from compress_jax.core.packed import Quantized
from compress_jax.quantize._activations import range_rules
from compress_jax.quantize._activations.quantizer import (
    ActivationQuantizer,
    OperandState,
    activation_grid,
    stable_scale_from_range,
)
from compress_jax.quantize._learned.learned_step import (
    lsq_plus_round,
    lsq_round,
    positive,
    zero_point_from_offset,
    zero_point_from_sign,
)
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import Rule, Scale, group_counts, safe_scale
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace.reducers import Histogram, histogram


def lsq(
    bits: int = 4,
    granularity: Granularity = "tensor",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
    narrow: bool = False,
    start: Rule | None = None,
) -> Compression:
    r"""Round weights to evenly spaced levels whose step s the optimizer trains.

    .. math:: \hat w = s \, clip(round(w / s), -2^{bits - 1}, 2^{bits - 1} - 1)

    The derivative in s is that of the paper (`learned_step.lsq_round`), scaled by
    :math:`g = 1 / \sqrt{N Q_P}`, where N weights share the step. A step that the optimizer makes
    negative counts by its magnitude.

    Args:
      bits: 2 to 8.
      granularity: ``"tensor"`` (the paper's), ``"channel"``, or the number of entries of a channel
        that form a group.
      axis: the axis or axes of output channels.
      pad: allow a last group that is not full.
      narrow: leave out the level ``-2**(bits-1)``.
      start: rule for the first step, ``(w, layout, grid) -> (scale, zero_point)`` such as
        ``quantize.mse``. Default: the paper's :math:`2 \, mean|w| / \sqrt{Q_P}`. Weights that are
        all zero start with a step of 1.

    Returns:
      The Compression; ``learned[path]`` is ``{"scale": float32}``. Packs to `Quantized`.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if groups do not divide a leaf and ``pad`` is False, or a leaf has no
        such axis.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.array([0.9, -3.0, -1.5, 0.2])}
      >>> c = cj.quantize.lsq(bits=3)
      >>> state = c.init(params)
      >>> scale = state.learned["kernel"]["scale"]
      >>> round(float(scale[0]), 4)
      1.6166
      >>> (c.view(params, state)["kernel"] * (1 / scale)).round(3).tolist()
      [1.0, -2.0, -1.0, 0.0]

    References:
      Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, equations 1 to 5 and
      section 2.2.
    """
    grid = activation_grid(bits, True)._replace(narrow=flag("narrow", narrow))
    granularity, axis, pad = sharing(granularity, axis, pad)
    if start is not None:
        accepted = "a rule (w, layout, grid) -> (scale, zero_point) such as quantize.mse"
        function("start", start, accepted)

    def layout_of(axes: Axes) -> Layout:
        return Layout.of(axes.shape, granularity, axes.outputs, pad=pad, stack=axes.stack)

    def init(x: jax.Array, key: jax.Array | None, axes: Axes) -> LeafState:
        layout = layout_of(axes)
        arranged = layout.arrange(x.astype(jnp.float32))  # groups: [groups, size, channels]
        if start is not None:
            return {"scale": start(arranged, layout, grid)[0]}, None
        # 2 mean|w| / sqrt(Q_P); padding adds 0 to the sum and is not counted.
        total = jnp.abs(arranged).sum(layout.reduced, keepdims=True)
        mean = total * (1 / group_counts(layout)).astype(np.float32)
        return {"scale": safe_scale(mean * np.float32(2 / grid.qmax**0.5))}, None

    def view(x: jax.Array, learned: OperandState, fixed: None, axes: Axes) -> jax.Array:
        layout = layout_of(axes)
        # g = 1 / sqrt(N Q_P), section 2.2, N of each group.
        gain = jnp.asarray((1 / np.sqrt(group_counts(layout) * grid.qmax)).astype(np.float32))
        scale = positive(learned["scale"])
        return layout.restore(lsq_round(grid, layout.arrange(x), scale, grid.middle, gain))

    def pack(x: jax.Array, learned: OperandState, fixed: None, axes: Axes) -> Quantized:
        layout = layout_of(axes)
        scale = positive(learned["scale"])
        codes = layout.restore(grid.encode(layout.arrange(x), scale, grid.middle))
        return Quantized.pack(codes, grid.bits, scale, grid.middle, layout, x.dtype)

    # Built once: solvers compile once for all leaves whose function is the same object.
    quantize_fn = partial(_on_grid, grid)

    def pointwise(x: jax.Array, learned: OperandState, fixed: None, axes: Axes) -> Pointwise:
        return Pointwise(quantize_fn, (layout_of(axes).spread(positive(learned["scale"])),))

    made = call_of("", view, start=start, axis=axis)
    return leafwise(
        view, init=init, pack=pack, pointwise=pointwise, layout=True, axis=axis, call=made
    )


def _on_grid(grid: Grid, x: jax.Array, scale: jax.Array) -> jax.Array:
    return grid.round(x, scale, grid.middle)


def lsq_inputs(bits: int = 4, offset: bool = False) -> ActivationQuantizer:
    r"""Quantize activations by a trained step (LSQ), and with ``offset`` a trained offset (LSQ+).

    The derivatives are those of the papers (`learned_step.lsq_round`, `lsq_plus_round`), scaled by
    :math:`g = 1 / \sqrt{N Q_P}` where N is the number of entries of one example: of the operand
    without its first axis.

    Without offset the step starts at :math:`2 \, mean|x| / \sqrt{Q_P}`, on an unsigned grid if no
    calibration value is below zero, else on a signed one. With offset both start from the range of
    least squared error; the offset is used as the nearest multiple of the step, so that zero is
    exact and the codes are those of integers.

    Args:
      bits: 2 to 8.
      offset: whether an offset is trained: for activations such as those of swish or GELU, which
        are skewed.

    Returns:
      The quantizer; the state of an operand is ``{"scale", "zero_point"}``, or
      ``{"scale", "offset"}``.

    Raises:
      ArgumentError: if bits is not such a number.

    Example:
      >>> import compress_jax as cj
      >>> fn, params = lambda w, x: jax.nn.relu(x) @ w["kernel"], {"kernel": jnp.eye(2)}
      >>> x = jnp.array([[-3.0, 0.5], [1.2, 3.0]])
      >>> learning = cj.quantize.activations(fn, cj.quantize.lsq_inputs(bits=2))
      >>> ranges = learning.init(params, [x])
      >>> {name: round(float(value), 3) for name, value in ranges["kernel"]["input"].items()}
      {'scale': 1.357, 'zero_point': 0.0}
      >>> loss = lambda ranges: (learning.apply(params, ranges, x) ** 2).sum()
      >>> float(jax.grad(loss)(ranges)["kernel"]["input"]["scale"]) != 0
      True

    References:
      Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, section 2.
      Bhalgat et al., "LSQ+", 2020, arXiv:2004.09576, section 3.
    """
    # Asymmetric even for signed activations: the zero point chooses the grid, once calibrated.
    grid = activation_grid(bits, False)
    offset = flag("offset", offset)
    call = f"lsq_inputs(bits={bits}, offset={offset})"
    return _lsq_plus_inputs(grid, call) if offset else _lsq_inputs(grid, call)


def _lsq_inputs(grid: Grid, call: str) -> ActivationQuantizer:
    def scale_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> Scale:
        zero_point = jax.lax.stop_gradient(state["zero_point"]).astype(jnp.uint8)
        return positive(state["scale"]), zero_point

    def quantize_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> jax.Array:
        scale, zero_point = scale_fn(site, index, x, state)
        # Q_P is the highest level: 2^bits - 1 on the unsigned grid, 2^(bits - 1) - 1 on the signed.
        gain = _gain(x, grid.top - zero_point.astype(jnp.float32))
        return lsq_round(grid, x, scale, zero_point, gain)

    def ranges(site: Site, statistics: range_rules.Spread) -> OperandState:
        zero_point = zero_point_from_sign(grid, statistics.low)
        scale = safe_scale(2 * statistics.magnitude / jnp.sqrt(grid.top - zero_point))
        known = jnp.isfinite(statistics.high - statistics.low)
        return {"scale": jnp.where(known, scale, jnp.nan), "zero_point": zero_point}

    reducer = range_rules.spread()
    return ActivationQuantizer(
        grid, scale_fn, quantize_fn, reducer, ranges, learned=("scale",), call=call
    )


def _lsq_plus_inputs(grid: Grid, call: str) -> ActivationQuantizer:
    def scale_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> Scale:
        scale = positive(state["scale"])
        return scale, zero_point_from_offset(grid, scale, state["offset"])

    def quantize_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> jax.Array:
        gain = _gain(x, jnp.float32(grid.top))
        return lsq_plus_round(grid, x, positive(state["scale"]), state["offset"], gain)

    def ranges(site: Site, statistics: Histogram) -> OperandState:
        low, high = range_rules.mse(statistics, grid)
        scale, zero_point = stable_scale_from_range(low, high, grid)
        # b = -z s: the range's zero point as an offset that can be trained.
        return {"scale": scale, "offset": -scale * zero_point.astype(jnp.float32)}

    reducer = histogram(range_rules.BINS)
    return ActivationQuantizer(
        grid, scale_fn, quantize_fn, reducer, ranges, learned=("scale", "offset"), call=call
    )


def _gain(x: jax.Array, highest: jax.Array) -> jax.Array:
    """Return g = 1 / sqrt(N Q_P), N being the entries of one example."""
    entries = max(x.size // max(x.shape[0], 1), 1)
    return 1 / jnp.sqrt(np.float32(entries) * highest)
