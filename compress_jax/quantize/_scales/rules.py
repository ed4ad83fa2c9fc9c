"""Scale rules: which range of a weight distribution the levels of a grid should span.

A rule is a pure function ``(w, layout, grid) -> (scale, zero_point)`` of a float32 array in the
arrangement of a `Layout`. It first calibrates (which range?) and then places the grid on that range
(`scale_from_range`); the grid itself rounds. Entries that share a scale are called a group here,
whether that is a tensor, a channel or a run of ``group_size`` entries.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError
from compress_jax.core.layout import Layout
from compress_jax.quantize._scales.grid import Grid

Scale = tuple[jax.Array, jax.Array]
"""``(scale float32, zero_point uint8)``, which broadcast against what they scale."""

Rule = Callable[[jax.Array, Layout, Grid], Scale]

# The step that minimises the mean squared error of a unit normal on the symmetric grid of 2, 3, ...
# 8 bits, which has one level more below zero than above. By numerical minimisation of the exact
# integral; the tests repeat it. Max, "Quantizing for Minimum Distortion", 1960, table II, has those
# of the narrow grids, with as many levels on either side.
_NORMAL_STEP = (1.0483852, 0.6018242, 0.3386079, 0.1887922, 0.1041794, 0.0568873, 0.0307656)
_NARROW_STEP = (1.2240064, 0.6507697, 0.3534113, 0.1932485, 0.1054876, 0.0572613, 0.0308701)

_compiled = partial(jax.jit, static_argnames=("layout", "grid"))


@_compiled
def absmax(w: jax.Array, layout: Layout, grid: Grid) -> Scale:
    """Span ``[-max|w|, max|w|]``: no entry is clipped.

    Zero lies in the middle even of an asymmetric grid.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.

    Returns:
      ``(scale, zero_point)``.

    Example:
      >>> import compress_jax as cj
      >>> w = jnp.array([0.5, -7.0])
      >>> cj.quantize.absmax(w, Layout.of((2,), "tensor"), cj.quantize.Grid(4))
      (Array([1.], dtype=float32), Array(8, dtype=uint8))
    """
    bound = jnp.abs(w).max(layout.reduced, keepdims=True)
    scale, middle = scale_from_range(-bound, bound, grid._replace(symmetric=True))
    return scale, middle if grid.symmetric else jnp.broadcast_to(middle, scale.shape)


@_compiled
def minmax(w: jax.Array, layout: Layout, grid: Grid) -> Scale:
    """Span ``[min w, max w]``, widened to include 0; on a symmetric grid the same as `absmax`.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.

    Returns:
      ``(scale, zero_point)``.

    Example:
      >>> import compress_jax as cj
      >>> w = jnp.array([0.0, 3.0])
      >>> cj.quantize.minmax(w, Layout.of((2,), "tensor"), cj.quantize.Grid(2, symmetric=False))
      (Array([1.], dtype=float32), Array([0], dtype=uint8))
    """
    low, high = group_minmax(w, layout)
    return scale_from_range(low, high, grid)


def percentile(w: jax.Array, layout: Layout, grid: Grid, *, percent: float | None = None) -> Scale:
    """Span the range that holds a given percentage of the entries: a few outliers cannot widen it.

    On a symmetric grid it is the percentage of magnitudes up to the bound. On an asymmetric one,
    half of what is cut lies below and half above. Sorts the entries, and interpolates linearly
    between neighbours as ``numpy.percentile`` does.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.
      percent: between 0 and 100. Default: that of a normal distribution within its optimal range
        (`normal_clip`), which is 70.6, 92.9, 98.2, 99.5, 99.9, 99.97, 99.99 at 2 to 8 bits.

    Returns:
      ``(scale, zero_point)``.

    Raises:
      ArgumentError: if ``percent`` is not in (0, 100].

    Example:
      >>> import compress_jax as cj
      >>> w = jnp.array([1.0, -1.0, 1.0, -1.0, 100.0])
      >>> scale, _ = cj.quantize.percentile(w, Layout(w.shape), cj.quantize.Grid(4), percent=75.0)
      >>> scale.round(4).tolist()
      [0.1428999900817871]
    """
    share = math.erf(normal_clip(grid) / math.sqrt(2)) if percent is None else percent / 100
    if not 0 < share <= 1:
        raise ArgumentError(f"percent must be above 0 and at most 100, got {percent}")
    return _percentile(w, layout, grid, 1 - share)


@partial(jax.jit, static_argnames=("layout", "grid", "cut"))
def _percentile(w: jax.Array, layout: Layout, grid: Grid, cut: float) -> Scale:
    if grid.symmetric:
        bound = _upper_quantile(jnp.abs(w), layout, cut)
        return scale_from_range(-bound, bound, grid)
    low = -_upper_quantile(-w, layout, cut / 2)
    return scale_from_range(low, _upper_quantile(w, layout, cut / 2), grid)


def _upper_quantile(w: jax.Array, layout: Layout, cut: float) -> jax.Array:
    """Return the value that a share ``cut`` of the entries of each group exceeds, at least 0."""
    # Below 0 nothing counts, so that padding, which is 0, cannot matter.
    descending = jnp.maximum(jnp.sort(flatten_groups(w, layout), axis=-1, descending=True), 0)
    last = descending.shape[-1] - 1
    place = np.broadcast_to((group_counts(layout) - 1) * cut, layout.scale_shape)
    place = place.reshape(*descending.shape[:-1], 1)
    before = np.floor(place).astype(np.int32)
    fraction = (place % 1).astype(np.float32)
    upper = jnp.take_along_axis(descending, np.minimum(before, last), axis=-1)
    lower = jnp.take_along_axis(descending, np.minimum(before + 1, last), axis=-1)
    return (upper + fraction * (lower - upper)).reshape(layout.scale_shape)


@_compiled
def rms(w: jax.Array, layout: Layout, grid: Grid) -> Scale:
    """Span the optimal range of a normal distribution with the moments of the entries.

    Symmetric: ``[-k r, k r]`` with ``r = sqrt(mean(w^2))`` and k from `normal_clip`. Asymmetric:
    ``mean -+ k std``. Both are cut to the smallest and largest entries.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.

    Returns:
      ``(scale, zero_point)``.

    Example:
      >>> import compress_jax as cj
      >>> w = jax.random.normal(jax.random.key(0), (4096,))
      >>> scale, _ = cj.quantize.rms(w, Layout(w.shape), cj.quantize.Grid(bits=4))
      >>> round(float(7 * scale[0]), 1)  # the range of 4 bits reaches 2.37 standard deviations
      2.4
    """
    total = partial(jnp.sum, axis=layout.reduced, keepdims=True)
    bound = jnp.abs(w).max(layout.reduced, keepdims=True)
    bound = jnp.maximum(bound, jnp.finfo(jnp.float32).tiny)
    unit = w * (1 / bound)  # in [-1, 1], so that no square overflows
    n = group_counts(layout).astype(np.float32)
    low, high = group_minmax(unit, layout)
    mean = jnp.zeros_like(low) if grid.symmetric else total(unit) / n
    reach = normal_clip(grid) * jnp.sqrt(jnp.maximum(total(unit**2) / n - mean**2, 0))
    low = jnp.maximum(low, mean - reach) * bound
    high = jnp.minimum(high, mean + reach) * bound
    return scale_from_range(low, high, grid)


def normal_clip(grid: Grid) -> float:
    """Return the optimal clipping range of a normal distribution, in standard deviations.

    It is ``qmax * step`` with the step of least mean squared error.

    Args:
      grid: gives the number of bits, and whether it is narrow.

    Returns:
      The upper end of the range; the lower is its negative.

    Example:
      >>> import compress_jax as cj
      >>> [round(cj.quantize.normal_clip(cj.quantize.Grid(bits)), 2) for bits in (2, 4, 8)]
      [1.05, 2.37, 3.91]
    """
    return grid.qmax * (_NARROW_STEP if grid.narrow else _NORMAL_STEP)[grid.bits - 2]


def scale_from_range(low: jax.Array, high: jax.Array, grid: Grid) -> Scale:
    r"""Return the scale and zero point that place the levels of a grid on a range of values.

    Symmetric: :math:`s = \max(-low, high) / q_{max}`, so that the range ends on a level and never
    on a rounding tie. Asymmetric: :math:`s = (high - low) / (2^{bits} - 1)` and
    :math:`z = round(-low / s)`, the range widened to include 0. A group of zeros has the scale 1.

    Args:
      low: float32 of the shape of the scales.
      high: likewise.
      grid: the levels.

    Returns:
      ``(scale, zero_point)``: float32 of the shape of ``low``; uint8 of that shape, or a scalar if
      symmetric. No scale is so small that its inverse is infinite.

    Example:
      >>> import compress_jax as cj
      >>> grid = cj.quantize.Grid(bits=2, symmetric=False)
      >>> low, high = jnp.array([-1.0]), jnp.array([5.0])
      >>> scale, zero_point = cj.quantize.scale_from_range(low, high, grid)
      >>> scale.round(4).tolist(), zero_point.tolist()
      ([2.0], [0])
    """
    low = jnp.minimum(low, 0)
    high = jnp.maximum(high, 0)
    if grid.symmetric:
        return safe_scale(jnp.maximum(-low, high) * np.float32(1 / grid.qmax)), grid.middle
    # Each end is divided before the subtraction: the difference of the ends may overflow.
    scale = safe_scale((high * np.float32(1 / grid.top)) - (low * np.float32(1 / grid.top)))
    return scale, jnp.clip(jnp.round(-low * (1 / scale)), 0, grid.top).astype(jnp.uint8)


def safe_scale(scale: jax.Array) -> jax.Array:
    """Return 1 for a scale of 0, and clip the others to numbers whose inverse is normal too.

    XLA flushes subnormal numbers to 0.

    Args:
      scale: float32, not negative.

    Returns:
      float32 from 2^-126 to 2^126.
    """
    return jnp.where(scale == 0, 1.0, jnp.clip(scale, 2.0**-126, 2.0**126))


def group_minmax(w: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Return the smallest and largest entry of every group, of shape ``layout.scale_shape``."""
    return w.min(layout.reduced, keepdims=True), w.max(layout.reduced, keepdims=True)


def group_absmax(w: jax.Array, layout: Layout) -> jax.Array:
    """Return the largest magnitude of every group, of shape ``layout.scale_shape``."""
    return jnp.abs(w).max(layout.reduced, keepdims=True)


def group_counts(layout: Layout) -> np.ndarray:
    """Return the number of entries of each group, padding not counted.

    Args:
      layout: which entries share a scale.

    Returns:
      float64; broadcasts against the scales.
    """
    shape = (1,) * len(layout.scale_shape)
    if not layout.group_size:
        return np.full(shape, math.prod(layout.shape) / math.prod(layout.scale_shape))
    left = layout.contracting - layout.group_size * np.arange(layout.groups)  # the last may be less
    return np.minimum(left, layout.group_size).astype(np.float64).reshape(-1, 1, 1)


def flatten_groups(w: jax.Array, layout: Layout) -> jax.Array:
    """Return an arranged array with the entries of each group along the last axis.

    Args:
      w: arranged by ``layout``.
      layout: which entries share a scale.

    Returns:
      ``[..., entries]``, padding included; the axes before are those of the scales that are not
      reduced.
    """
    axes = layout.reduced
    rest = tuple(n for axis, n in enumerate(w.shape) if axis not in axes)
    return jnp.moveaxis(w, axes, range(-len(axes), 0)).reshape(*rest, -1)
