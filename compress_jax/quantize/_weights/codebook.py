"""Quantization to levels that are not evenly spaced, times a scale: the one Compression behind all such formats."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.arguments import number, sharing
from compress_jax.core.axes import Axes
from compress_jax.core.codebook import Tabled
from compress_jax.core.compression import Compression, Pointwise
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import saturate, where_finite
from compress_jax.core.layout import Granularity, Layout
from compress_jax.core.leafwise import LeafState, leafwise
from compress_jax.core.levels import Float, Levels, Table
from compress_jax.core.straight_through import pass_within
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

    As `uniform` in all else: the scales of tensors, channels or groups are the state, the gradient
    of the view is that of the identity, and the packed model is the trained one bit for bit.

    Args:
      levels: a `Float` from `float_format`, or a `Table` of one's own.
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
      >>> powers = codebook(Table((-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)))  # products with these are shifts
      >>> params = {"kernel": jnp.array([0.3, -4.0, 1.2, 0.9])}
      >>> powers.view(params, powers.init(params))["kernel"].tolist()
      [0.0, -4.0, 1.0, 1.0]
    """
    rules = {"absmax": level_rules.absmax, "mse": level_rules.mse}
    return on_levels(_checked(levels), choice(scale, rules), granularity, axis, pad)


def on_levels(
    levels: Levels,
    rule: LevelRule,
    granularity: Granularity,
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
    *,
    scale_dtype: jax.typing.DTypeLike = jnp.float32,
    clip: float | None = None,
) -> Compression:
    """Return the Compression to some levels with the scales of a rule; what every format here is made of.

    Args:
      levels: what scaled weights are rounded to.
      rule: returns the state of a leaf.
      granularity: as of `codebook`.
      axis: as of `codebook`.
      pad: as of `codebook`.
      scale_dtype: what scales are packed as; those of the rule must be exact in it.
      clip: the gradient passes only where magnitudes are at most this; None for everywhere.

    Returns:
      The Compression.
    """
    granularity, axis, pad = sharing(granularity, axis, pad)
    clip = None if clip is None else number("clip", clip, 0, above=True)

    def layout_of(axes: Axes) -> Layout:
        return Layout.of(axes.shape, granularity, axes.outputs, pad=pad, stack=axes.stack)

    def init(x: jax.Array, key: Any, axes: Axes) -> LeafState:
        layout = layout_of(axes)
        return None, rule(layout.arrange(x.astype(jnp.float32)), layout, levels)

    def update(x: jax.Array, learned: None, fixed: Fixed, *, axes: Axes, **_: Any) -> LeafState:
        return init(x, None, axes)

    see = partial(
        _nearest, levels
    )  # one object, so that what is compiled for one leaf serves the next

    def view(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> jax.Array:
        return _rounded(layout_of(axes), levels, pass_within(x, clip), *_factors(fixed))

    def pack(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> Tabled:
        layout = layout_of(axes)
        codes = layout.restore(
            levels.encode(_scaled(layout.arrange(x), _factors(fixed, layout)[1]))
        )
        scale, tensor = fixed["scale"].astype(scale_dtype), fixed.get("tensor_scale")
        return Tabled.pack(codes, scale, tensor, levels=levels, layout=layout, dtype=x.dtype)

    def pointwise(x: jax.Array, _: None, fixed: Fixed, axes: Axes) -> Pointwise:
        layout = layout_of(axes)
        return Pointwise(see, tuple(map(layout.spread, _factors(fixed, layout))))

    made = call_of("", view, rule=rule, scale_dtype=scale_dtype, axis=axis)
    return leafwise(
        view,
        init=init,
        update=update,
        pack=pack,
        pointwise=pointwise,
        layout=True,
        axis=axis,
        call=made,
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _rounded(
    layout: Layout, levels: Levels, x: jax.Array, scale: jax.Array, step: jax.Array
) -> jax.Array:
    """Return an array on its levels, with the derivative of the identity."""
    return layout.restore(_nearest(levels, layout.arrange(x), scale, step))


@_rounded.defjvp
def _(
    layout: Layout, levels: Levels, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    return _rounded(layout, levels, *primals), tangents[0]


def _nearest(levels: Levels, x: jax.Array, scale: jax.Array, step: jax.Array) -> jax.Array:
    return where_finite(x, saturate(levels.round(_scaled(x, step)) * scale, x.dtype))


def _scaled(x: jax.Array, step: jax.Array) -> jax.Array:
    # Not a division: XLA turns one into this product where it can, and compiled or not the bits
    # should be the same.
    return x.astype(jnp.float32) * (1 / step)


def _factors(fixed: Fixed, layout: Layout | None = None) -> tuple[jax.Array, jax.Array]:
    """Return what levels are multiplied by, with the arithmetic of ``Tabled.unpack``, and what weights are divided by."""
    scale = fixed["scale"]
    if "tensor_scale" in fixed:
        tensor = fixed["tensor_scale"]
        scale = scale * (
            tensor if layout is None else layout.expand(tensor)
        )  # [layers] against [layers, ...]
    return scale, fixed.get("step", scale)


def choice(given: str | LevelRule, rules: dict[str, Callable[..., Fixed]]) -> LevelRule:
    """Return the scale rule of a name; a rule that is a function already stays as it is.

    Args:
      given: a name or a function.
      rules: the rules that have names.

    Returns:
      The rule.

    Raises:
      ArgumentError: if there is no such rule; names all there are.
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


def _checked(levels: Levels) -> Levels:
    """Return a format as it is, and a table with its numbers as float32 has them."""
    if isinstance(levels, Float):
        return levels
    if not isinstance(levels, Table):
        raise ArgumentError(
            "levels must be a Float, as float_format returns, or a Table of ascending numbers, "
            f"got {levels!r}"
        )
    values = np.array(levels.values, np.float32)
    if values.size < 2 or not np.isfinite(values).all() or not (np.diff(values) > 0).all():
        raise ArgumentError(
            "a Table takes at least two ascending numbers that float32 can tell apart, got "
            f"{levels.values}"
        )
    return Table(tuple(values.tolist()))
