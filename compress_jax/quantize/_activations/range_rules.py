"""Range rules: which range of activations the levels of a static grid should span.

A rule is ``(statistics of calibration batches, grid) -> (low, high)``, float32 and stacked as the
statistics are; NaN without any statistics, or where they are not finite. `stable_scale_from_range`
then places the grid.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.types import PyTree
from compress_jax.quantize._activations.quantizer import stable_scale_from_range
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import normal_clip
from compress_jax.quantize._scales.search import kl_clip_ratio
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.reducer import (
    Reducer,
    add_counts,
    channels,
    expand_count,
    per_input,
)
from compress_jax.trace.reducers import Histogram, MinMax, edges, magnitudes
from compress_jax.trace.reducers import percentile as quantile

BINS = 4096  # of a histogram: at least a quarter lie on one side of zero, 8 for each of 128 levels

T = TypeVar("T")
Ends = tuple[jax.Array, jax.Array]
RangeRule = Callable[[PyTree, Grid], Ends]


class Spread(NamedTuple):
    """How far values lie from zero: float32, scalars or per channel.

    Attributes:
      mean: of x.
      magnitude: mean of its magnitudes.
      square: mean of its squares.
      low: smallest value.
      high: largest value.
      count: rows counted, int32.
    """

    mean: jax.Array
    magnitude: jax.Array
    square: jax.Array
    low: jax.Array
    high: jax.Array
    count: jax.Array


def spread(per_channel: bool = False) -> Reducer:
    """Return the reducer that keeps a `Spread` of each operand.

    Args:
      per_channel: one for each channel instead of one for all.

    Returns:
      The reducer.

    Example:
      >>> from compress_jax.trace import calibrate
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[-3.0, 4.0]])]
      >>> statistics = calibrate(lambda w, x: x @ w, spread(), jnp.eye(2), batches)
      >>> [float(x) for x in next(iter(statistics.values()))["input"]]
      [1.0, 2.5, 7.5, -3.0, 4.0, 2.0]
    """

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Spread:
        table = channels(site, index, x, mask)
        values = table.values  # float32; masked entries are 0
        axes = table.rows if per_channel else tuple(range(values.ndim))
        flat = table.flat if per_channel else lambda x: x
        share = _mean_weight(values, table.mask, axes)

        def mean(x: jax.Array) -> jax.Array:
            return flat(x.sum(axes) * share)

        low = flat(table.reduced(jnp.min, values, jnp.inf, axes))
        high = flat(table.reduced(jnp.max, values, -jnp.inf, axes))
        return Spread(mean(values), mean(jnp.abs(values)), mean(values**2), low, high, table.count)

    def combine(old: Spread, new: Spread) -> Spread:
        count = add_counts(old.count, new.count)
        share = new.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)

        def pooled(a: jax.Array, b: jax.Array) -> jax.Array:
            # The mean of two means, weighted by their counts.
            return a + expand_count(share, a) * (b - a)

        return Spread(
            mean=pooled(old.mean, new.mean),
            magnitude=pooled(old.magnitude, new.magnitude),
            square=pooled(old.square, new.square),
            low=jnp.minimum(old.low, new.low),
            high=jnp.maximum(old.high, new.high),
            count=count,
        )

    return per_input(measure, combine)


def _mean_weight(
    values: jax.Array, there: jax.Array | None, axes: tuple[int, ...]
) -> jax.Array | np.float32:
    """Return one over the number of values along some axes, masked ones not counted."""
    if there is None:
        return np.float32(1 / max(math.prod(values.shape[axis] for axis in axes), 1))
    counted = jnp.broadcast_to(there, values.shape).sum(axes, dtype=jnp.float32)
    return 1 / jnp.maximum(counted, 1)


def extremes(statistics: MinMax | Spread, grid: Grid) -> Ends:
    """Return the extremes themselves, or their moving averages if that is what was kept.

    Args:
      statistics: `MinMax` or `Spread`.
      grid: not used.

    Returns:
      ``(low, high)``.
    """
    return statistics.low, statistics.high


def rms(statistics: Spread, grid: Grid) -> Ends:
    """Return the optimal range of a normal distribution with the same moments, cut to the extremes.

    With k of `normal_clip`: symmetric, k times the root mean square to both sides; asymmetric,
    mean -+ k standard deviations.

    Args:
      statistics: the moments.
      grid: the levels.

    Returns:
      ``(low, high)``.

    Example:
      >>> statistics = Spread(*map(jnp.float32, (0, 0.8, 1, -9, 2)), jnp.int32(5))
      >>> [round(float(end), 2) for end in rms(statistics, Grid(4))]
      [-2.37, 2.0]
    """
    mean = jnp.zeros_like(statistics.mean) if grid.symmetric else statistics.mean
    reach = normal_clip(grid) * jnp.sqrt(jnp.maximum(statistics.square - mean**2, 0))
    known = jnp.isfinite(statistics.low) & jnp.isfinite(statistics.high)
    low = jnp.maximum(statistics.low, mean - reach)
    high = jnp.minimum(statistics.high, mean + reach)
    return jnp.where(known, low, jnp.nan), jnp.where(known, high, jnp.nan)


def percentile(histogram: Histogram, grid: Grid, percent: float | None = None) -> Ends:
    """Return the range that holds a percentage of the entries.

    Of what is cut on an asymmetric grid, half lies on either side.

    Args:
      histogram: of the activations.
      grid: the levels.
      percent: how much is inside. By default as much as of a normal distribution in its optimal
        range, as in `quantize.percentile`.

    Returns:
      ``(low, high)``.
    """
    if percent is None:
        percent = 100 * math.erf(normal_clip(grid) / math.sqrt(2))
    if grid.symmetric:
        bound = quantile(magnitudes(histogram), percent)
        return -bound, bound
    return quantile(histogram, (100 - percent) / 2), quantile(histogram, 50 + percent / 2)


def entropy(histogram: Histogram, grid: Grid, stride: int = 8) -> Ends:
    """Clip where the distribution on the grid is nearest to the true one, by relative entropy.

    The search is that of `kl_clip_ratio`.

    Args:
      histogram: of the activations.
      grid: the levels.
      stride: of the search, in bins, of which there are at least 2048 and 16 for each level, so
        that the range can shrink to a 16th.

    Returns:
      ``(low, high)``.

    References:
      Migacz, "8-bit Inference with TensorRT", 2017, slides 25 to 38.
    """
    groups = grid.qmax + 1 if grid.symmetric else grid.top + 1
    bins = max(2048, 16 * groups)
    # On a symmetric grid only magnitudes matter: a histogram from 0, with half as many groups.
    if grid.symmetric:
        histogram = magnitudes(histogram)
        low = 0 * histogram.high
        high = histogram.high
    else:
        low = jnp.minimum(histogram.low, 0)
        high = jnp.maximum(histogram.high, 0)
    counts = _without_zeros(histogram.counts.to_float(), histogram.counts.low.shape[-1] // 2)
    counts = _rebin(edges(histogram), counts, low, high, bins)  # [..., bins]
    # The bin edge nearest to 0: both ends shrink towards it by the same factor.
    zero = jnp.round(bins * -low / jnp.where(high > low, high - low, 1)).astype(jnp.int32)
    ratio = kl_clip_ratio(counts, zero, groups, stride)
    low = _nan_if_unknown(histogram, ratio * low)
    high = _nan_if_unknown(histogram, ratio * high)
    return (-high, high) if grid.symmetric else (low, high)


def _without_zeros(counts: jax.Array, half: int) -> jax.Array:
    """Return counts ``[..., bins]`` whose two bins beside zero hold what their neighbours hold.

    Zeros are exact on any grid, and after a ReLU they would outweigh everything.
    """
    above = counts.at[..., half].set(counts[..., half + 1])
    return above.at[..., half - 1].set(counts[..., half - 2])


def _rebin(
    edges: jax.Array, counts: jax.Array, low: jax.Array, high: jax.Array, bins: int
) -> jax.Array:
    """Spread counts over even bins from low to high: int32 ``[..., bins]``, sum at most 2**30."""
    counts = counts * jnp.minimum(1, 2.0**30 / jnp.maximum(counts.sum(-1, keepdims=True), 1))
    # The cumulative counts at the old edges, read off linearly at the new ones.
    before = jnp.pad(jnp.cumsum(counts, -1), [(0, 0)] * (counts.ndim - 1) + [(1, 0)])
    steps = jnp.arange(bins + 1, dtype=jnp.float32).reshape(*(1,) * low.ndim, -1) / bins
    wanted = low[..., None] + steps * (high - low)[..., None]  # [..., bins + 1] edges
    cumulative = _vmap_leading(jnp.interp, low.ndim)(wanted, edges, before)
    return jnp.diff(jnp.round(cumulative).astype(jnp.int32), axis=-1)


def _vmap_leading(fn: Callable[..., T], axes: int) -> Callable[..., T]:
    """Map a function over so many leading axes of all its arguments."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


def mse(histogram: Histogram, grid: Grid) -> Ends:
    r"""Return the range of least mean squared error, by search.

    On an asymmetric grid both ends are searched. The error of a candidate is exact for the density
    that the histogram describes, even within each bin: with :math:`t = x / s` and
    :math:`n = clip(round(t))` the antiderivative of :math:`(t - n)^2` is
    :math:`n / 12 + (t - n)^3 / 3`, continuous everywhere.

    Args:
      histogram: of the activations.
      grid: the levels.

    Returns:
      ``(low, high)``.
    """
    low, high = _vmap_leading(partial(_least_squares, grid=grid), histogram.low.ndim)(histogram)
    return _nan_if_unknown(histogram, low), _nan_if_unknown(histogram, high)


def _least_squares(histogram: Histogram, grid: Grid) -> Ends:
    low = jnp.minimum(histogram.low, 0)
    high = jnp.maximum(histogram.high, 0)
    if grid.symmetric:
        lower = jnp.minimum(low, -high)
        high = jnp.maximum(high, -low)
        low = lower
    # In units of the largest magnitude, so that no cube over- or underflows.
    bound = jnp.maximum(jnp.maximum(high, -low), 2.0**-100)
    counts = histogram.counts.to_float()
    density = counts / jnp.maximum(counts.sum(), 1)  # [bins]
    places = edges(histogram) * (1 / bound)  # [bins + 1], in [-1, 1]

    def error(low: jax.Array, high: jax.Array) -> jax.Array:
        scale, zero_point = stable_scale_from_range(low, high, grid)
        levels = grid.levels(places, scale, zero_point)
        residual = places * (1 / scale) - levels  # t - n at the bins' edges
        # The density is constant in a bin, so its error is a difference of the antiderivative.
        return scale**3 * (density * jnp.diff(levels / 12 + residual**3 / 3)).sum()

    def search(start: Ends, factors: np.ndarray) -> Ends:
        def body(i: jax.Array, best: tuple[jax.Array, Ends]) -> tuple[jax.Array, Ends]:
            low = start[0] * jnp.asarray(factors)[i, 0]
            high = start[1] * jnp.asarray(factors)[i, 1]
            now = error(low, high)
            # Of equally good ranges the first stays.
            return jax.tree.map(partial(jnp.where, now < best[0]), (now, (low, high)), best)

        return jax.lax.fori_loop(0, len(factors), body, (error(*start), start))[1]

    unit = low * (1 / bound), high * (1 / bound)
    # The coarse search starts from the extremes, the fine one from what it found.
    for factors in _factors(grid.symmetric):
        unit = search(unit, factors)
    return unit[0] * bound, unit[1] * bound


def _factors(symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of both ends, ``[trials, 2]``: over all sizes, then near the best."""
    coarse = np.geomspace(1, 1 / 128, 128 if symmetric else 32)
    fine = np.geomspace(coarse[1], 1 / coarse[1], 17)
    pairs = _same_factors if symmetric else _all_pairs
    return pairs(coarse), pairs(fine)


def _same_factors(factors: np.ndarray) -> np.ndarray:
    return np.stack([factors] * 2, 1).astype(np.float32)


def _all_pairs(factors: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(factors, factors), -1).reshape(-1, 2).astype(np.float32)


def _nan_if_unknown(histogram: Histogram, end: jax.Array) -> jax.Array:
    finite = jnp.isfinite(histogram.low) & jnp.isfinite(histogram.high)
    return jnp.where(finite & (histogram.count > 0), end, jnp.nan)
