"""LSQ: the step sizes of weights and of activations are trained together with the weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.arguments import flag, function, sharing
from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, Pointwise
from compress_jax.core.describe import call_of
from compress_jax.core.layout import Granularity, Layout
from compress_jax.core.leafwise import LeafState, leafwise
from compress_jax.core.packed import Quantized
from compress_jax.quantize._activations import range_rules
from compress_jax.quantize._activations.quantizer import (
    ActivationQuantizer,
    Own,
    Placed,
    checked,
    spanned,
)
from compress_jax.quantize._learned.learned_step import positive, shifted, stepped, zero_of
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import Rule, counts, usable
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace.reducers import histogram


def lsq(
    bits: int = 4,
    granularity: Granularity = "tensor",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
    narrow: bool = False,
    start: Rule | None = None,
) -> Compression:
    r"""Round weights to evenly spaced levels whose step s the optimizer trains.

    :math:`\hat w = s \, clip(round(w / s), -2^{bits - 1}, 2^{bits - 1} - 1)`, with the paper's derivative in s
    (`learned_step.stepped`), scaled by :math:`g = 1 / \sqrt{N Q_P}`, N being the number of weights
    that share the step. A step that the optimizer turns negative counts by its magnitude.

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
      ValueError: if an argument is none of the above.
      ShapeError: in `init`, if groups do not divide a leaf and ``pad`` is False, or a leaf has no
        such axis.

    Example:
      >>> params = {"kernel": jnp.array([0.9, -3.0, -1.5, 0.2])}
      >>> c = lsq(bits=3)
      >>> state = c.init(params)
      >>> round(float(state.learned["kernel"]["scale"][0]), 4)
      1.6166
      >>> (c.view(params, state)["kernel"] * (1 / state.learned["kernel"]["scale"])).round(3).tolist()
      [1.0, -2.0, -1.0, 0.0]

    References:
      Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, equations 1 to 5 and
      section 2.2.
    """
    grid = checked(bits, True)._replace(narrow=flag("narrow", narrow))
    granularity, axis, pad = sharing(granularity, axis, pad)
    if start is not None:
        function(
            "start", start, "a rule (w, layout, grid) -> (scale, zero_point) such as quantize.mse"
        )

    def layout_of(axes: Axes) -> Layout:
        return Layout.of(axes.shape, granularity, axes.outputs, pad=pad, stack=axes.stack)

    def init(x: jax.Array, key: Any, axes: Axes) -> LeafState:
        layout = layout_of(axes)
        arranged = layout.arrange(x.astype(jnp.float32))
        if start is not None:
            return {"scale": start(arranged, layout, grid)[0]}, None
        mean = jnp.abs(arranged).sum(layout.reduced, keepdims=True) * (1 / counts(layout)).astype(
            np.float32
        )
        return {"scale": usable(mean * np.float32(2 / grid.qmax**0.5))}, None

    def view(x: jax.Array, learned: Own, fixed: None, axes: Axes) -> jax.Array:
        layout = layout_of(axes)
        gain = (1 / np.sqrt(counts(layout) * grid.qmax)).astype(np.float32)
        return layout.restore(
            stepped(
                grid, layout.arrange(x), positive(learned["scale"]), grid.middle, jnp.asarray(gain)
            )
        )

    def pack(x: jax.Array, learned: Own, fixed: None, axes: Axes) -> Quantized:
        layout, scale = layout_of(axes), positive(learned["scale"])
        codes = layout.restore(grid.encode(layout.arrange(x), scale, grid.middle))
        return Quantized.pack(codes, grid.bits, scale, grid.middle, layout, x.dtype)

    see = partial(
        _on_grid, grid
    )  # one object, so that what is compiled for one leaf serves the next

    def pointwise(x: jax.Array, learned: Own, fixed: None, axes: Axes) -> Pointwise:
        return Pointwise(see, (layout_of(axes).spread(positive(learned["scale"])),))

    made = call_of("", view, start=start, axis=axis)
    return leafwise(
        view, init=init, pack=pack, pointwise=pointwise, layout=True, axis=axis, call=made
    )


def _on_grid(grid: Grid, x: jax.Array, scale: jax.Array) -> jax.Array:
    return grid.round(x, scale, grid.middle)


def lsq_inputs(bits: int = 4, offset: bool = False) -> ActivationQuantizer:
    r"""Quantize activations by a step that is trained, and with ``offset`` by a trained offset too (LSQ+).

    The derivatives are those of the papers (`learned_step.stepped`, `learned_step.shifted`), scaled
    by :math:`g = 1 / \sqrt{N Q_P}`, N being the entries of one example: of the operand, its first
    axis left out.

    Without offset the step starts at :math:`2 \, mean|x| / \sqrt{Q_P}`, on an unsigned grid if
    calibration saw nothing below zero, else on a signed one. With offset both start from the range
    of least squared error; the offset is used as the nearest multiple of the step, so that zero is
    exact and the codes are those of integers.

    Args:
      bits: 2 to 8.
      offset: whether an offset is trained: for activations such as those of swish or GELU, which
        are skewed.

    Returns:
      The quantizer; what belongs to an operand is ``{"scale", "zero_point"}``, or
      ``{"scale", "offset"}``.

    Raises:
      ValueError: if bits is not such a number.

    Example:
      >>> from compress_jax.quantize._activations.activations import activations
      >>> fn, params = lambda w, x: jax.nn.relu(x) @ w["kernel"], {"kernel": jnp.eye(2)}
      >>> x = jnp.array([[-3.0, 0.5], [1.2, 3.0]])
      >>> learning = activations(fn, lsq_inputs(bits=2))
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
    grid, offset = checked(bits, False), flag("offset", offset)
    call = f"lsq_inputs(bits={bits}, offset={offset})"
    if offset:
        return _shifted(grid, call)

    def place(site: Site, index: int, x: jax.Array, own: Own) -> Placed:
        return positive(own["scale"]), jax.lax.stop_gradient(own["zero_point"]).astype(jnp.uint8)

    def see(site: Site, index: int, x: jax.Array, own: Own) -> jax.Array:
        scale, zero_point = place(site, index, x, own)
        return stepped(
            grid, x, scale, zero_point, _gain(x, grid.top - zero_point.astype(jnp.float32))
        )

    def ranges(site: Site, seen: range_rules.Spread) -> Own:
        zero_point = zero_by_sign(grid, seen.low)
        scale = usable(2 * seen.magnitude / jnp.sqrt(grid.top - zero_point))
        return {
            "scale": jnp.where(jnp.isfinite(seen.high - seen.low), scale, jnp.nan),
            "zero_point": zero_point,
        }

    return ActivationQuantizer(
        grid, place, see, range_rules.spread(), ranges, learned=("scale",), call=call
    )


def _shifted(grid: Grid, call: str) -> ActivationQuantizer:
    def place(site: Site, index: int, x: jax.Array, own: Own) -> Placed:
        scale = positive(own["scale"])
        return scale, zero_of(grid, scale, own["offset"])

    def see(site: Site, index: int, x: jax.Array, own: Own) -> jax.Array:
        return shifted(
            grid, x, positive(own["scale"]), own["offset"], _gain(x, jnp.float32(grid.top))
        )

    def ranges(site: Site, seen: Any) -> Own:
        low, high = range_rules.least_squares(seen, grid)
        scale, zero_point = spanned(low, high, grid)
        return {"scale": scale, "offset": -scale * zero_point.astype(jnp.float32)}

    return ActivationQuantizer(
        grid,
        place,
        see,
        histogram(range_rules.BINS),
        ranges,
        learned=("scale", "offset"),
        call=call,
    )


def zero_by_sign(grid: Grid, low: jax.Array) -> jax.Array:
    """Return the zero point 0 where no activation is negative, else the middle: float32, NaN where nothing is known.

    Args:
      grid: the levels.
      low: smallest value seen.

    Returns:
      Of the shape of ``low``.

    Example:
      >>> zero_by_sign(Grid(4, False), jnp.array([0.0, -0.1])).tolist()
      [0.0, 8.0]
    """
    zero_point = jnp.where(low >= 0, 0.0, 2.0 ** (grid.bits - 1))
    return jnp.where(jnp.isfinite(low), zero_point, jnp.nan)


def _gain(x: jax.Array, highest: jax.Array) -> jax.Array:
    return 1 / jnp.sqrt(np.float32(max(x.size // max(x.shape[0], 1), 1)) * highest)
