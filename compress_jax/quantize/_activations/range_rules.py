"""Which range of activations the levels of a static grid should span, from statistics of calibration batches.

A rule is ``(statistics, grid) -> (low, high)``, float32 and stacked as the statistics are; NaN
where nothing was seen, or where something was not finite. `activation.spanned` then places the
grid.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.types import ModelFn
from compress_jax.quantize._activations.quantizer import spanned
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import normal_clip
from compress_jax.quantize._scales.search import least_divergent
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace._statistics.reducer import Reducer, aligned, channels, of_inputs, total
from compress_jax.trace.reducers import Histogram, edges, magnitudes
from compress_jax.trace.reducers import percentile as quantile

BINS = 4096  # of a histogram: at least a quarter of them serve one side of zero, 8 for each of 128 levels
Ends = tuple[jax.Array, jax.Array]


class Spread(NamedTuple):
    """How far values lie from zero: float32, scalars or per channel.

    Attributes:
      mean: of x.
      magnitude: mean of its magnitudes.
      square: mean of its squares.
      low: smallest value.
      high: largest value.
      count: rows seen, int32.
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
      >>> seen = calibrate(lambda w, x: x @ w, spread(), jnp.eye(2), batches)
      >>> [float(x) for x in next(iter(seen.values()))["input"]]
      [1.0, 2.5, 7.5, -3.0, 4.0, 2.0]
    """

    def measure(site: Site, index: int, x: jax.Array, mask: jax.Array | None) -> Spread:
        table = channels(site, index, x, mask)
        flat = table.flat if per_channel else lambda x: x
        axes, values = table.rows if per_channel else tuple(range(table.values.ndim)), table.values
        share: Any = np.float32(1 / max(math.prod(values.shape[axis] for axis in axes), 1))
        if table.there is not None:
            share = 1 / jnp.maximum(
                jnp.broadcast_to(table.there, values.shape).sum(axes, dtype=jnp.float32), 1
            )

        def mean(x: jax.Array) -> jax.Array:
            return flat(x.sum(axes) * share)

        low, high = (
            flat(table.reduced(each, values, start, axes))
            for each, start in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
        )
        return Spread(mean(values), mean(jnp.abs(values)), mean(values**2), low, high, table.count)

    def combine(old: Spread, new: Spread) -> Spread:
        count = total(old.count, new.count)
        share = new.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)

        def pooled(a: jax.Array, b: jax.Array) -> jax.Array:
            return a + aligned(share, a) * (b - a)

        low, high = jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high)
        means = (
            pooled(old.mean, new.mean),
            pooled(old.magnitude, new.magnitude),
            pooled(old.square, new.square),
        )
        return Spread(means[0], means[1], means[2], low, high, count)

    return of_inputs(measure, combine)


def widest(seen: Any, grid: Grid) -> Ends:
    """Return the extremes themselves, or their moving averages if that is what was kept.

    Args:
      seen: `MinMax` or `Spread`.
      grid: not looked at.

    Returns:
      ``(low, high)``.
    """
    return seen.low, seen.high


def root_mean_square(seen: Spread, grid: Grid) -> Ends:
    """Return the range that is optimal for a normal distribution with the same moments, cut to the extremes.

    Symmetric: k times the root mean square to both sides; asymmetric: mean -+ k standard
      deviations; k of `normal_clip`.

    Args:
      seen: the moments.
      grid: the levels.

    Returns:
      ``(low, high)``.

    Example:
      >>> seen = Spread(*map(jnp.float32, (0, 0.8, 1, -9, 2)), jnp.int32(5))
      >>> [round(float(end), 2) for end in root_mean_square(seen, Grid(4))]
      [-2.37, 2.0]
    """
    mean = jnp.zeros_like(seen.mean) if grid.symmetric else seen.mean
    reach = normal_clip(grid) * jnp.sqrt(jnp.maximum(seen.square - mean**2, 0))
    known = jnp.isfinite(seen.low) & jnp.isfinite(seen.high)
    ends = jnp.maximum(seen.low, mean - reach), jnp.minimum(seen.high, mean + reach)
    return jnp.where(known, ends[0], jnp.nan), jnp.where(known, ends[1], jnp.nan)


def percentiles(seen: Histogram, grid: Grid, percent: float | None = None) -> Ends:
    """Return the range that holds a share of the entries; of what is cut on an asymmetric grid, half lies on either side.

    Args:
      seen: the histogram.
      grid: the levels.
      percent: the share. By default that of a normal distribution within its optimal range, as in
        `scales.percentile`.

    Returns:
      ``(low, high)``.
    """
    share = 100 * math.erf(normal_clip(grid) / math.sqrt(2)) if percent is None else percent
    if grid.symmetric:
        bound = quantile(magnitudes(seen), share)
        return -bound, bound
    return quantile(seen, (100 - share) / 2), quantile(seen, 50 + share / 2)


def least_entropy(seen: Histogram, grid: Grid, stride: int = 8) -> Ends:
    """Clip where the distribution on the grid is nearest to the true one, by relative entropy (`least_divergent`).

    The two bins that touch zero hold what their neighbours hold: zeros are exact on any grid, and
    after a ReLU they would outweigh everything.

    Args:
      seen: the histogram.
      grid: the levels.
      stride: of the search, in bins, of which there are at least 2048 and 16 for each level: so
        small can the share be.

    Returns:
      ``(low, high)``.

    References:
      Migacz, "8-bit Inference with TensorRT", 2017, slides 25 to 38.
    """
    groups = grid.qmax + 1 if grid.symmetric else grid.top + 1
    bins = max(2048, 16 * groups)
    if grid.symmetric:
        seen = magnitudes(seen)
    low, high = (
        (jnp.minimum(seen.low, 0), jnp.maximum(seen.high, 0))
        if not grid.symmetric
        else (0 * seen.high, seen.high)
    )
    counts, half = seen.counts.to_float(), seen.counts.low.shape[-1] // 2
    counts = (
        counts.at[..., half].set(counts[..., half + 1]).at[..., half - 1].set(counts[..., half - 2])
    )
    counts = _over(edges(seen), counts, low, high, bins)
    zero = jnp.round(bins * -low / jnp.where(high > low, high - low, 1)).astype(jnp.int32)
    share = least_divergent(counts, zero, groups, stride)
    low, high = (_known(seen, share * end) for end in (low, high))
    return (-high, high) if grid.symmetric else (low, high)


def _over(
    edges: jax.Array, counts: jax.Array, low: jax.Array, high: jax.Array, bins: int
) -> jax.Array:
    """Spread counts over even bins from low to high: int32 ``[..., bins]``, at most 2**30 in all."""
    counts = counts * jnp.minimum(1, 2.0**30 / jnp.maximum(counts.sum(-1, keepdims=True), 1))
    before = jnp.pad(jnp.cumsum(counts, -1), [(0, 0)] * (counts.ndim - 1) + [(1, 0)])
    steps = jnp.arange(bins + 1, dtype=jnp.float32).reshape(*(1,) * low.ndim, -1) / bins
    wanted = low[..., None] + steps * (high - low)[..., None]
    return jnp.diff(
        jnp.round(_each(jnp.interp, low.ndim)(wanted, edges, before)).astype(jnp.int32), axis=-1
    )


def _each(fn: ModelFn, axes: int) -> Callable[..., Any]:
    """Map a function over so many leading axes of all its arguments."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


def least_squares(seen: Histogram, grid: Grid) -> Ends:
    r"""Return the range of least mean squared error, by search; both ends are searched on an asymmetric grid.

    The error of a candidate is exact for the density that the histogram describes, even within each
    bin: with :math:`t = x / s` and :math:`n = clip(round(t))` the antiderivative of
    :math:`(t - n)^2` is :math:`n / 12 + (t - n)^3 / 3`, continuous everywhere.

    Args:
      seen: the histogram.
      grid: the levels.

    Returns:
      ``(low, high)``.
    """
    ends = _each(partial(_searched, grid=grid), seen.low.ndim)(seen)
    return _known(seen, ends[0]), _known(seen, ends[1])


def _searched(seen: Histogram, grid: Grid) -> Ends:
    low, high = jnp.minimum(seen.low, 0), jnp.maximum(seen.high, 0)
    if grid.symmetric:
        low, high = jnp.minimum(low, -high), jnp.maximum(high, -low)
    bound = jnp.maximum(jnp.maximum(high, -low), 2.0**-100)
    counts = seen.counts.to_float()
    density, places = counts / jnp.maximum(counts.sum(), 1), edges(seen) * (1 / bound)

    def error(low: jax.Array, high: jax.Array) -> jax.Array:
        scale, zero_point = spanned(low, high, grid)
        levels = grid.levels(places, scale, zero_point)
        left = places * (1 / scale) - levels
        return scale**3 * (density * jnp.diff(levels / 12 + left**3 / 3)).sum()

    def search(best: Any, factors: np.ndarray) -> Any:
        around = best[1], best[2]

        def body(i: jax.Array, found: Any) -> Any:
            low, high = (end * jnp.asarray(factors)[i, j] for j, end in enumerate(around))
            now = error(low, high)
            return jax.tree.map(partial(jnp.where, now < found[0]), (now, low, high), found)

        return jax.lax.fori_loop(0, len(factors), body, best)

    unit = low * (1 / bound), high * (1 / bound)
    for factors in _factors(grid.symmetric):
        unit = search((error(*unit), *unit), factors)[1:]
    return unit[0] * bound, unit[1] * bound


def _factors(symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return what to multiply both ends with, ``[trials, 2]``: over all sizes, then near the best."""
    coarse = np.geomspace(1, 1 / 128, 128 if symmetric else 32)
    fine = np.geomspace(coarse[1], 1 / coarse[1], 17)
    if symmetric:
        return np.stack([coarse] * 2, 1).astype(np.float32), np.stack([fine] * 2, 1).astype(
            np.float32
        )
    both = (
        np.stack(np.meshgrid(each, each), -1).reshape(-1, 2).astype(np.float32)
        for each in (coarse, fine)
    )
    first, second = both
    return first, second


def _known(seen: Histogram, end: jax.Array) -> jax.Array:
    return jnp.where(
        jnp.isfinite(seen.low) & jnp.isfinite(seen.high) & (seen.count > 0), end, jnp.nan
    )
