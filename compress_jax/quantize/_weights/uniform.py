"""Uniform quantization: weights on an evenly spaced grid of 4 to 256 levels."""

from functools import partial

import jax
import jax.numpy as jnp

from compress_jax.core._leafwise import LeafState, leafwise
from compress_jax.core.arguments import flag, sharing, whole
from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, Pointwise
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import saturate
from compress_jax.core.layout import Granularity, Layout
from compress_jax.core.packed import Quantized
from compress_jax.core.types import PyTree
from compress_jax.quantize._scales import rules
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.least_squares import mse
from compress_jax.quantize._scales.levels import Fixed
from compress_jax.quantize._scales.search import entropy, pnorm


def uniform(
    bits: int = 4,
    symmetric: bool = True,
    granularity: Granularity = "tensor",
    scale: str | rules.Rule | None = None,
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
    narrow: bool = False,
) -> Compression:
    r"""Round weights to evenly spaced levels through a straight-through estimator.

    .. math:: \hat w = s \, (clip(round(w / s) + z, 0, 2^{bits} - 1) - z)

    The scale s and zero point z of every tensor, channel or group are the state: `init` and
    `update` derive them from the weights by a scale rule, `view` and `pack` share them, so the
    packed model is the trained one bit for bit. Updating at every step follows the weights;
    ``every(n, uniform(...))`` or ``between(...)`` hold the scales still. The gradient of the view
    is that of the identity.

    Args:
      bits: 2 to 8.
      symmetric: the levels are ``-2**(bits-1) .. 2**(bits-1) - 1`` and z is fixed; else z is an
        integer for every scale, and the range always includes 0. Zero is exact in both. Where no
        entry is negative, an asymmetric grid by minmax has z = 0: unsigned integers.
      granularity: ``"tensor"``, ``"channel"``, or the number of entries of a channel that form a
        group.
      scale: ``"absmax"``, ``"minmax"``, ``"percentile"``, ``"rms"``, ``"mse"``, ``"pnorm"``,
        ``"entropy"`` or a function ``(w, layout, grid) -> (scale, zero_point)`` such as
        ``partial(quantize.percentile, percent=99.9)``. Default: absmax if symmetric, else minmax.
      axis: the axis or axes of output channels. Default: what a trace says (`cj.bind`), else the
        last, where Flax kernels keep theirs. Arrays of rank 1 are one channel.
      pad: allow a last group that is not full.
      narrow: leave out the level ``-2**(bits-1)`` of a symmetric grid, as integer kernels for
        weights often demand.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32, "zero_point": uint8}``. Packs to
      `Quantized`.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if groups do not divide a leaf and ``pad`` is False, or a leaf has no
        such axis.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.array([[0.9, -3.0], [-1.5, 0.2]])}
      >>> c = cj.quantize.uniform(bits=3, granularity="channel")
      >>> state = c.init(params)
      >>> c.view(params, state)["kernel"]
      Array([[ 1. , -3. ],
             [-1.5,  0. ]], dtype=float32)
      >>> c.pack(params, state)["kernel"].codes.unpack().tolist()
      [[6, 1], [1, 4]]

    References:
      Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018,
      sections 2.1 to 2.4. Bengio, Leonard and Courville, "Estimating or Propagating Gradients
      Through Stochastic Neurons", 2013.
    """
    grid = _checked_grid(bits, symmetric, narrow)
    rule = scale_rule(scale, symmetric)
    granularity, axis, pad = sharing(granularity, axis, pad)
    Layout.of((), granularity, pad=True)  # refuses a wrong granularity before there is any leaf

    def layout_of(axes: Axes) -> Layout:
        return Layout.of(axes.shape, granularity, axes.outputs, pad=pad, stack=axes.stack)

    def init(x: jax.Array, key: jax.Array | None, axes: Axes) -> LeafState:
        layout = layout_of(axes)
        scale, zero_point = rule(layout.arrange(x.astype(jnp.float32)), layout, grid)
        return None, {"scale": scale, "zero_point": zero_point}

    def update(x: jax.Array, learned: None, fixed: Fixed, *, axes: Axes, **_: PyTree) -> LeafState:
        return init(x, None, axes)

    def view(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> jax.Array:
        return _rounded(layout_of(axes), grid, x, fixed["scale"], fixed["zero_point"])

    def pack(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> Quantized:
        layout = layout_of(axes)
        scale = fixed["scale"]
        zero = fixed["zero_point"]
        codes = _codes(layout, grid, x, scale, zero)
        if grid.symmetric:
            zero = grid.middle  # one scalar; the state of a stack holds it once a layer
        return Quantized.pack(codes, grid.bits, scale, zero, layout=layout, dtype=x.dtype)

    # Built once: solvers compile once for all leaves whose function is the same object.
    quantize_fn = partial(_on_grid, grid)

    def pointwise(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> Pointwise:
        layout = layout_of(axes)
        operands = (layout.spread(fixed["scale"]), layout.spread(fixed["zero_point"]))
        return Pointwise(quantize_fn, operands)

    # Checkpoints hold this text and are refused if it differs: its names must not change.
    call = call_of("uniform", view, rule=rule, see=quantize_fn, axis=axis)
    return leafwise(
        view,
        init=init,
        update=update,
        pack=pack,
        pointwise=pointwise,
        layout=True,
        axis=axis,
        call=call,
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _rounded(
    layout: Layout, grid: Grid, x: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> jax.Array:
    """Return an array on its grid, with the derivative of the identity."""
    # By way of the codes, as pack and unpack compute it: what trains is what ships.
    codes = grid.encode(layout.arrange(x), scale, zero_point)
    return saturate(layout.restore(grid.decode(codes, scale, zero_point)), x.dtype)


@_rounded.defjvp
def _(
    layout: Layout, grid: Grid, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return _rounded(layout, grid, *primals), tangents[0]


# Compiled once for all leaves of a shape.
@partial(jax.jit, static_argnums=(0, 1))
def _codes(
    layout: Layout, grid: Grid, x: jax.Array, scale: jax.Array, zero_point: jax.Array
) -> jax.Array:
    # Codes are kept in the shape of the leaf, not as the layout arranges it.
    return layout.restore(grid.encode(layout.arrange(x), scale, layout.expand(zero_point)))


def _on_grid(grid: Grid, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    return grid.round(x, scale, zero_point)


def _checked_grid(bits: int, symmetric: bool, narrow: bool) -> Grid:
    # True is the integer 1 in Python; as a number of bits it is refused below.
    if bits is not True and isinstance(bits, int) and bits == 1:
        raise ArgumentError(
            "bits=1 leaves no level above zero on a grid that contains zero; use 2 to 8, or "
            "quantize.binary()"
        )
    bits = whole("bits", bits, 2, 8)
    symmetric = flag("symmetric", symmetric)
    if not isinstance(narrow, bool) or (narrow and not symmetric):
        raise ArgumentError(
            f"narrow must be True or False, and True only for a symmetric grid, got {narrow!r}"
        )
    return Grid(bits, symmetric, narrow)


def scale_rule(scale: str | rules.Rule | None, symmetric: bool) -> rules.Rule:
    """Return the scale rule of a name; a rule that is a function already stays as it is.

    Args:
      scale: a name, a function, or None for the default.
      symmetric: whether the zero point is fixed.

    Returns:
      The rule.

    Raises:
      ArgumentError: if there is no such rule; the message lists them.
    """
    if callable(scale):
        return scale
    named = {
        None: rules.absmax if symmetric else rules.minmax,
        "absmax": rules.absmax,
        "minmax": rules.minmax,
        "percentile": rules.percentile,
        "rms": rules.rms,
        "mse": mse,
        "pnorm": pnorm,
        "entropy": entropy,
    }
    if scale is not None and not (isinstance(scale, str) and scale in named):
        names = ", ".join(repr(name) for name in named if name)
        raise ArgumentError(
            f"scale must be {names} or a function (w, layout, grid) -> (scale, zero_point), got "
            f"{scale!r}"
        )
    return named[scale]
