"""Binary weights: a scale or its negative."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.compression import Compression
from compress_jax.core.errors import ArgumentError
from compress_jax.core.layout import Granularity, Layout
from compress_jax.core.levels import Levels, Table
from compress_jax.quantize._scales.levels import Fixed, LevelRule
from compress_jax.quantize._scales.rules import group_absmax, group_counts, safe_scale
from compress_jax.quantize._weights.codebook import from_levels, scale_rule

BINARY = Table((-1.0, 1.0))


def binary(
    granularity: Granularity = "channel",
    scale: str | float | LevelRule = "mse",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
    *,
    clip: float | None = None,
) -> Compression:
    r"""Round weights to s or -s, one bit a weight: :math:`\hat w = s \, sign(w)`, sign(0) = 1.

    There is no zero among these levels, so pruned weights come back as s: prune after,
    ``chain(binary(), magnitude(...))``, or use `ternary`.

    Args:
      granularity: ``"tensor"``, ``"channel"``, or the number of entries of a channel that form a
        group.
      scale: ``"mse"``, the mean magnitude, which is the scale of least squared error (XNOR-Net); a
        number for all groups (1 in BinaryConnect); or a function
        ``(w, layout, levels) -> {"scale": float32}``.
      axis: the axis or axes of output channels.
      pad: allow a last group that is not full.
      clip: the gradient passes only where ``|w| <= clip``, BinaryConnect's is 1; None passes it
        everywhere.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32}``. Packs to `Tabled`.

    Raises:
      ArgumentError: if an argument is none of the above, or a scale is not above 0.
      ShapeError: in `init`, if groups do not divide a leaf and ``pad`` is False, or a leaf has no
        such axis.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.array([0.5, -4.0, 0.0])}
      >>> xnor, connect = cj.quantize.binary(), cj.quantize.binary(scale=1.0, clip=1.0)
      >>> [c.view(params, c.init(params))["kernel"].tolist() for c in (xnor, connect)]
      [[1.5, -1.5, 1.5], [1.0, -1.0, 1.0]]

    References:
      Rastegari et al., "XNOR-Net", 2016, equation 6. Courbariaux, Bengio and David,
      "BinaryConnect", 2015, section 2.
    """
    if isinstance(scale, (int, float, np.number)):
        rule = _constant(scale)
    else:
        rule = scale_rule(scale, {"mse": mean_magnitude})
    return from_levels(BINARY, rule, granularity, axis, pad, clip=clip)


@partial(jax.jit, static_argnames=("layout", "levels"))
def mean_magnitude(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Return the scale :math:`mean |w|`, which minimises :math:`\sum (w - s \, sign(w))^2`.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: -1, 1.

    Returns:
      ``{"scale": float32}``.
    """
    bound = safe_scale(group_absmax(w, layout))
    # Divided by the largest magnitude, so that the sum cannot overflow; padding adds 0 to it.
    total = (jnp.abs(w) * (1 / bound)).sum(layout.reduced, keepdims=True)
    mean = total * (1 / group_counts(layout)).astype(np.float32) * bound
    # Not `safe_scale`, which is 1 for a group of zeros: here a zero becomes the scale itself.
    return {"scale": jnp.clip(mean, 2.0**-126, 2.0**126)}


def _constant(scale: float | np.number) -> LevelRule:
    if isinstance(scale, bool) or not 0 < scale < np.inf:
        raise ArgumentError(f"a scale that is a number must be above 0 and finite, got {scale!r}")
    return lambda w, layout, levels: {"scale": jnp.full(layout.scale_shape, scale, jnp.float32)}
