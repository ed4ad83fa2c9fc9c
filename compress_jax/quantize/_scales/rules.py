"""Scale rules: which range of a weight distribution the levels of a grid should span.

A rule is a pure function ``(w, layout, grid) -> (scale, zero_point)`` of an array in the
arrangement of a `Layout`, float32. It first calibrates (what range?) and then places the grid on
that range (`spanning`); rounding is the grid's own business.
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
Rule = Callable[[jax.Array, Layout, Grid], Scale]

# The step that minimises the mean squared error of a unit normal on the symmetric grid of 2, 3, ...
# 8 bits, which has one level more below zero than above. By numerical minimisation of the exact
# integral; the tests repeat it. Max, "Quantizing for Minimum Distortion", 1960, table II, has those
# of the narrow grids, with as many levels on either side.
_NORMAL_STEP = (1.0483852, 0.6018242, 0.3386079, 0.1887922, 0.1041794, 0.0568873, 0.0307656)
_NARROW_STEP = (1.2240064, 0.6507697, 0.3534113, 0.1932485, 0.1054876, 0.0572613, 0.0308701)

_compiled = partial(jax.jit, static_argnames=("layout", "grid"))


def normal_clip(grid: Grid) -> float:
    """Return how many standard deviations of a normal distribution the grid should reach, ``qmax * step``.

    Args:
      grid: gives the number of bits, and whether it is narrow.

    Returns:
      The optimal clipping range of a unit normal.

    Example:
      >>> [round(normal_clip(Grid(bits)), 2) for bits in (2, 4, 8)]
      [1.05, 2.37, 3.91]
    """
    return grid.qmax * (_NARROW_STEP if grid.narrow else _NORMAL_STEP)[grid.bits - 2]


def extremes(w: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Return the smallest and the largest entry of every set that shares a scale, each of shape ``layout.scale_shape``."""
    return w.min(layout.reduced, keepdims=True), w.max(layout.reduced, keepdims=True)


def spanning(low: jax.Array, high: jax.Array, grid: Grid) -> Scale:
    r"""Place the levels of a grid on a range of values.

    Symmetric: :math:`s = \max(-low, high) / q_{max}`, so that the range ends on a level and never
      on a rounding tie.
    Asymmetric: :math:`s = (high - low) / (2^{bits} - 1)` and :math:`z = round(-low / s)`, the range
    widened to include 0. A set of zeros only has the scale 1; no scale is so small that its inverse
    is infinite.

    Args:
      low: float32 of the shape of the scales.
      high: likewise.
      grid: the levels.

    Returns:
      ``(scale, zero_point)``: float32 of the shape of ``low``; uint8 of that shape, or a scalar if
        symmetric.

    Example:
      >>> scale, zero_point = spanning(jnp.array([-1.0]), jnp.array([5.0]), Grid(bits=2, symmetric=False))
      >>> scale.round(4).tolist(), zero_point.tolist()
      ([2.0], [0])
    """
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    if grid.symmetric:
        return usable(jnp.maximum(-low, high) * np.float32(1 / grid.qmax)), grid.middle
    scale = usable((high * np.float32(1 / grid.top)) - (low * np.float32(1 / grid.top)))
    return scale, jnp.clip(jnp.round(-low * (1 / scale)), 0, grid.top).astype(jnp.uint8)


def usable(scale: jax.Array) -> jax.Array:
    """Return 1 for a scale of 0, and no scale that is not a normal number or whose inverse is none (XLA makes 0 of such).

    Args:
      scale: float32, not negative.

    Returns:
      float32 from 2^-126 to 2^126.
    """
    return jnp.where(scale == 0, 1.0, jnp.clip(scale, 2.0**-126, 2.0**126))


@_compiled
def absmax(w: jax.Array, layout: Layout, grid: Grid) -> Scale:
    """Span ``[-max|w|, max|w|]``: no entry is clipped, and zero lies in the middle even of an asymmetric grid.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.

    Returns:
      ``(scale, zero_point)``.

    Example:
      >>> absmax(jnp.array([0.5, -7.0]), Layout.of((2,), "tensor"), Grid(4))
      (Array([1.], dtype=float32), Array(8, dtype=uint8))
    """
    bound = jnp.abs(w).max(layout.reduced, keepdims=True)
    scale, middle = spanning(-bound, bound, grid._replace(symmetric=True))
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
    """
    low, high = extremes(w, layout)
    return spanning(low, high, grid)


def percentile(w: jax.Array, layout: Layout, grid: Grid, *, percent: float | None = None) -> Scale:
    """Span the range that holds a given share of the entries: a clipping that a few outliers cannot widen.

    On a symmetric grid the share of magnitudes up to the bound; on an asymmetric one, half of what
    is cut lies below and half above. Sorts the entries. Interpolates linearly between neighbours,
    as ``numpy.percentile``.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.
      percent: between 0 and 100. Default: the share of a normal distribution within its optimal
        range (`normal_clip`), which is 70.6, 92.9, 98.2, 99.5, 99.9, 99.97, 99.99 at 2 to 8 bits.

    Returns:
      ``(scale, zero_point)``.

    Raises:
      ArgumentError: if ``percent`` is not in (0, 100].

    Example:
      >>> w = jnp.array([1.0, -1.0, 1.0, -1.0, 100.0])
      >>> scale, _ = percentile(w, Layout(w.shape), Grid(4), percent=75.0)
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
        bound = _from_top(jnp.abs(w), layout, cut)
        return spanning(-bound, bound, grid)
    return spanning(-_from_top(-w, layout, cut / 2), _from_top(w, layout, cut / 2), grid)


def _from_top(w: jax.Array, layout: Layout, cut: float) -> jax.Array:
    """Return the value that a share ``cut`` of the entries exceeds, or 0: so padding, being zeros, cannot matter."""
    descending = jnp.maximum(jnp.sort(as_sets(w, layout), axis=-1, descending=True), 0)
    last = descending.shape[-1] - 1
    place = np.broadcast_to((counts(layout) - 1) * cut, layout.scale_shape).reshape(
        *descending.shape[:-1], 1
    )
    before, part = np.floor(place).astype(np.int32), (place % 1).astype(np.float32)
    ends = (
        jnp.take_along_axis(descending, np.minimum(at, last), axis=-1)
        for at in (before, before + 1)
    )
    upper, lower = ends
    return (upper + part * (lower - upper)).reshape(layout.scale_shape)


@_compiled
def rms(w: jax.Array, layout: Layout, grid: Grid) -> Scale:
    """Span the range that is optimal for a normal distribution of the same second moment, but no more than there is.

    Symmetric: ``[-k r, k r]`` with ``r = sqrt(mean(w^2))`` and k from `normal_clip`. Asymmetric:
    ``mean -+ k std``. Both are cut to the smallest and largest entries.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.

    Returns:
      ``(scale, zero_point)``.
    """
    total = partial(jnp.sum, axis=layout.reduced, keepdims=True)
    bound = jnp.maximum(jnp.abs(w).max(layout.reduced, keepdims=True), jnp.finfo(jnp.float32).tiny)
    unit, n = w * (1 / bound), counts(layout).astype(np.float32)
    low, high = extremes(unit, layout)
    mean = jnp.zeros_like(low) if grid.symmetric else total(unit) / n
    reach = normal_clip(grid) * jnp.sqrt(jnp.maximum(total(unit**2) / n - mean**2, 0))
    return spanning(
        jnp.maximum(low, mean - reach) * bound, jnp.minimum(high, mean + reach) * bound, grid
    )


def as_sets(w: jax.Array, layout: Layout) -> jax.Array:
    """Return an arranged array with what shares a scale along one last axis, padding included.

    Args:
      w: arranged by ``layout``.
      layout: which entries share a scale.

    Returns:
      ``[..., entries]``; the axes before are those of the scales that are not reduced.
    """
    axes = layout.reduced
    kept = tuple(n for a, n in enumerate(w.shape) if a not in axes)
    return jnp.moveaxis(w, axes, range(-len(axes), 0)).reshape(*kept, -1)


def counts(layout: Layout) -> np.ndarray:
    """Return how many entries, padding not counted, share each scale: float64, broadcasts against the scales.

    Args:
      layout: which entries share a scale.

    Returns:
      The counts.
    """
    shape = (1,) * len(layout.scale_shape)
    if not layout.group_size:
        return np.full(shape, math.prod(layout.shape) / math.prod(layout.scale_shape))
    left = layout.contracting - layout.group_size * np.arange(layout.groups)
    return np.minimum(left, layout.group_size).astype(np.float64).reshape(-1, 1, 1)
