"""Ternary weights: a scale, its negative, or zero."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.compression import Compression
from compress_jax.core.layout import Granularity, Layout
from compress_jax.core.levels import Levels, Table
from compress_jax.quantize._scales.levels import Fixed, LevelRule
from compress_jax.quantize._scales.rules import (
    flatten_groups,
    group_absmax,
    group_counts,
    safe_scale,
)
from compress_jax.quantize._weights.codebook import from_levels, scale_rule

TERNARY = Table((-1.0, 0.0, 1.0))


def ternary(
    granularity: Granularity = "channel",
    scale: str | LevelRule = "twn",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
    *,
    clip: float | None = None,
) -> Compression:
    r"""Round weights to -s, 0 or s, two bits a weight.

    .. math:: \hat w = s \, sign(w) \, [|w| > \Delta]

    Args:
      granularity: ``"tensor"``, ``"channel"``, or the number of entries of a channel that form a
        group.
      scale: ``"twn"``, the threshold :math:`\Delta = 0.7 \, mean |w|` and for s the mean of the
        magnitudes above it; ``"mse"``, both of least squared error; or a function
        ``(w, layout, levels) -> {"scale": float32}``.
      axis: the axis or axes of output channels.
      pad: allow a last group that is not full.
      clip: the gradient passes only where ``|w| <= clip``, BinaryConnect's is 1; None passes it
        everywhere.

    Returns:
      The Compression; ``fixed[path]`` is
      ``{"scale": float32, "step": float32, twice the threshold}``, without ``"step"`` where the
      threshold is half the scale. Packs to `Tabled`.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if groups do not divide a leaf and ``pad`` is False, or a leaf has no
        such axis.

    Example:
      >>> import compress_jax as cj
      >>> params, c = {"kernel": jnp.array([1.0, -0.25, -0.5, 0.25])}, cj.quantize.ternary()
      >>> c.view(params, c.init(params))["kernel"].tolist()  # above 0.7 * 0.5
      [0.75, 0.0, -0.75, 0.0]

    References:
      Li, Zhang and Liu, "Ternary Weight Networks", 2016, equations 5 and 6.
    """
    rule = scale_rule(scale, {"twn": twn, "mse": best_ternary})
    return from_levels(TERNARY, rule, granularity, axis, pad, clip=clip)


@partial(jax.jit, static_argnames=("layout", "levels"))
def twn(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Return the scale and step of Ternary Weight Networks.

    The threshold is :math:`\Delta = 0.7 \, mean|w|` (eq. 6), and the scale is the mean of the
    magnitudes above it (eq. 5).

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: -1, 0, 1.

    Returns:
      ``{"scale": float32, "step": float32}``, the step being twice the threshold.

    Example:
      >>> fixed = twn(jnp.array([1.0, -3.0, 0.5, -0.5]), Layout((4,)), TERNARY)
      >>> fixed["scale"].tolist(), fixed["step"].round(4).tolist()
      ([2.0], [1.75])
    """
    total = partial(jnp.sum, axis=layout.reduced, keepdims=True)
    bound = safe_scale(group_absmax(w, layout))
    size = jnp.abs(w) * (1 / bound)  # in [0, 1], so that no sum overflows
    step = safe_scale(total(size) * (1.4 / group_counts(layout)).astype(np.float32))
    nonzero = levels.round(size * (1 / step))  # 1 above the threshold, half a step, else 0
    scale = safe_scale(total(size * nonzero) / jnp.maximum(total(nonzero), 1))
    return {"scale": safe_scale(scale * bound), "step": safe_scale(step * bound)}


@partial(jax.jit, static_argnames=("layout", "levels"))
def best_ternary(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Return the scale of least squared error, exactly.

    If the k largest magnitudes become s, the best s is their mean, and it reduces the error by
    :math:`k s^2 = (\sum_{i \le k} |w|_{(i)})^2 / k`, which is maximised over k. At the best k the
    threshold lies at half the scale. Sorts the entries.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: -1, 0, 1.

    Returns:
      ``{"scale": float32}``.

    Example:
      >>> best_ternary(jnp.array([0.9, -1.1, 0.2, -0.1]), Layout((4,)), TERNARY)
      {'scale': Array([1.], dtype=float32)}

    References:
      Li, Zhang and Liu, "Ternary Weight Networks", 2016, equation 4, which they approximate.
    """
    bound = safe_scale(group_absmax(w, layout))
    magnitudes = flatten_groups(jnp.abs(w) * (1 / bound), layout)  # [..., entries]
    descending = jnp.sort(magnitudes, axis=-1, descending=True)
    k = np.arange(1, descending.shape[-1] + 1, dtype=np.float32)
    k = k.reshape((1,) * (descending.ndim - 1) + (-1,))  # [1, ..., entries]
    # Padding is 0 and comes last: it lowers the mean, so that no k that includes it is best.
    means = jnp.cumsum(descending, axis=-1) / k
    best = jnp.argmax(means**2 * k, axis=-1, keepdims=True)
    scale = jnp.take_along_axis(means, best, axis=-1).reshape(layout.scale_shape)
    return {"scale": safe_scale(scale * bound)}
