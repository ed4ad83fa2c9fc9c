"""Quantization to levels that are not evenly spaced: `from_levels` is behind all such formats."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core._leafwise import LeafState, leafwise
from compress_jax.core._straight_through import pass_within
from compress_jax.core.arguments import number, sharing
from compress_jax.core.axes import Axes
from compress_jax.core.codebook import Tabled
from compress_jax.core.compression import Compression, Pointwise
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import saturate, where_finite
from compress_jax.core.layout import Granularity, Layout
from compress_jax.core.levels import Float, Levels, Table
from compress_jax.core.types import PyTree
from compress_jax.quantize._scales import levels as level_rules
from compress_jax.quantize._scales.levels import Fixed, LevelRule


def codebook(
    levels: Levels,
    granularity: Granularity = "tensor",
    scale: str | LevelRule = "absmax",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
) -> Compression:
    r"""Round weights to the nearest of any levels times a scale, :math:`\hat w = s \, \ell(w / s)`.

    The scale s of every tensor, channel or group is the state. As in `uniform`, the gradient of the
    view is that of the identity, and the packed model is the trained one bit for bit.

    Args:
      levels: a `Float` from `float_format`, or a `Table` of ascending numbers.
      granularity: ``"tensor"``, ``"channel"``, or the number of entries of a channel that form a
        group.
      scale: ``"absmax"``, ``"mse"``, or a function ``(w, layout, levels) -> {"scale": float32}``.
      axis: the axis or axes of output channels.
      pad: allow a last group that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32}``. Packs to `Tabled`.

    Raises:
      ArgumentError: if an argument is none of the above, or a table is not ascending.
      ShapeError: in `init`, if groups do not divide a leaf and ``pad`` is False, or a leaf has no
        such axis.

    Example:
      Products with powers of two are shifts.

      >>> import compress_jax as cj
      >>> powers = cj.quantize.Table((-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0))
      >>> c = cj.quantize.codebook(powers)
      >>> params = {"kernel": jnp.array([0.3, -4.0, 1.2, 0.9])}
      >>> c.view(params, c.init(params))["kernel"].tolist()
      [0.0, -4.0, 1.0, 1.0]
    """
    rules = {"absmax": level_rules.absmax, "mse": level_rules.mse}
    return from_levels(_checked_levels(levels), scale_rule(scale, rules), granularity, axis, pad)


def from_levels(
    levels: Levels,
    rule: LevelRule,
    granularity: Granularity,
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
    *,
    scale_dtype: jax.typing.DTypeLike = jnp.float32,
    clip: float | None = None,
) -> Compression:
    """Return the Compression that rounds to levels with the scales of a rule.

    Args:
      levels: what scaled weights are rounded to.
      rule: returns the state of a leaf: ``"scale"``; where the format has them ``"tensor_scale"``,
        a factor of all scales of the tensor, and ``"step"``, which weights are divided by instead
        of the scale.
      granularity: as in `codebook`.
      axis: as in `codebook`.
      pad: as in `codebook`.
      scale_dtype: dtype of the packed scales; those of the rule must be exact in it.
      clip: the gradient passes only where magnitudes are at most this; None for everywhere.

    Returns:
      The Compression.
    """
    granularity, axis, pad = sharing(granularity, axis, pad)
    clip = None if clip is None else number("clip", clip, 0, above=True)

    def layout_of(axes: Axes) -> Layout:
        return Layout.of(axes.shape, granularity, axes.outputs, pad=pad, stack=axes.stack)

    def init(x: jax.Array, key: jax.Array | None, axes: Axes) -> LeafState:
        layout = layout_of(axes)
        return None, rule(layout.arrange(x.astype(jnp.float32)), layout, levels)

    def update(x: jax.Array, learned: None, fixed: Fixed, *, axes: Axes, **_: PyTree) -> LeafState:
        return init(x, None, axes)

    def view(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> jax.Array:
        return _rounded(layout_of(axes), levels, pass_within(x, clip), *_scale_and_step(fixed))

    def pack(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> Tabled:
        layout = layout_of(axes)
        # The weights are divided as in the view, so that codes and levels agree.
        step = _scale_and_step(fixed, layout)[1]
        codes = layout.restore(levels.encode(_divided(layout.arrange(x), step)))
        scale = fixed["scale"].astype(scale_dtype)
        tensor_scale = fixed.get("tensor_scale")
        return Tabled.pack(codes, scale, tensor_scale, levels=levels, layout=layout, dtype=x.dtype)

    # Built once: solvers compile once for all leaves whose function is the same object.
    quantize_fn = partial(_nearest, levels)

    def pointwise(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> Pointwise:
        layout = layout_of(axes)
        return Pointwise(quantize_fn, tuple(map(layout.spread, _scale_and_step(fixed, layout))))

    # Checkpoints hold this text and are refused if it differs: its names must not change.
    call = call_of("on_levels", view, rule=rule, scale_dtype=scale_dtype, axis=axis)
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
    layout: Layout, levels: Levels, x: jax.Array, scale: jax.Array, step: jax.Array
) -> jax.Array:
    """Return an array on its levels, with the derivative of the identity."""
    return layout.restore(_nearest(levels, layout.arrange(x), scale, step))


@_rounded.defjvp
def _(
    layout: Layout, levels: Levels, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return _rounded(layout, levels, *primals), tangents[0]


def _nearest(levels: Levels, x: jax.Array, scale: jax.Array, step: jax.Array) -> jax.Array:
    return where_finite(x, saturate(levels.round(_divided(x, step)) * scale, x.dtype))


def _divided(x: jax.Array, step: jax.Array) -> jax.Array:
    # Not a division: XLA turns one into this product where it can, and compiled or not the bits
    # should be the same.
    return x.astype(jnp.float32) * (1 / step)


def _scale_and_step(fixed: Fixed, layout: Layout | None = None) -> tuple[jax.Array, jax.Array]:
    """Return the factor of the levels, as ``Tabled.unpack`` computes it, and the weights' divisor.

    With a layout, for a whole leaf whose state may have the axes of stacked layers in front.
    """
    scale = fixed["scale"]
    if "tensor_scale" in fixed:
        tensor_scale = fixed["tensor_scale"]
        if layout is not None:
            tensor_scale = layout.expand(tensor_scale)  # [layers] -> [layers, 1, ...]
        scale = scale * tensor_scale
    return scale, fixed.get("step", scale)


def scale_rule(given: str | LevelRule, rules: dict[str, Callable[..., Fixed]]) -> LevelRule:
    """Return the scale rule of a name; a rule that is a function already stays as it is.

    Args:
      given: a name or a function.
      rules: the rules that have names.

    Returns:
      The rule.

    Raises:
      ArgumentError: if there is no such rule; the message lists them.
    """
    if callable(given):
        return given
    if not isinstance(given, str) or given not in rules:
        names = ", ".join(map(repr, rules))
        raise ArgumentError(
            f"scale must be {names} or a function (w, layout, levels) -> {{'scale': ...}}, got "
            f"{given!r}"
        )
    return rules[given]


def _checked_levels(levels: Levels) -> Levels:
    """Return a float format as it is, and a table with its numbers rounded to float32."""
    if isinstance(levels, Float):
        return levels
    if not isinstance(levels, Table):
        raise ArgumentError(
            "levels must be a Float, as float_format returns, or a Table of ascending numbers, "
            f"got {levels!r}"
        )
    # Packed levels are float32: two numbers that become one there would be one level.
    values = np.array(levels.values, np.float32)
    if values.size < 2 or not np.isfinite(values).all() or not (np.diff(values) > 0).all():
        raise ArgumentError(
            "a Table takes at least two ascending numbers that float32 can tell apart, got "
            f"{levels.values}"
        )
    return Table(tuple(values.tolist()))
