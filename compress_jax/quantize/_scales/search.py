"""Scale rules that search the range: least p-norm of the error, and least relative entropy between the distributions.

Rules as in `compress_jax.quantize.scales`. The one of least squared error is
`compress_jax.quantize.least_squares.mse`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError
from compress_jax.core.layout import Layout
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import Scale, as_sets, extremes, spanning

# How far a clipped histogram on few levels is from the whole: the relative entropy of Migacz's
# calibration.


class _Sums(NamedTuple):
    """Sums over the bins before each of the n + 1 edges, so that every sum over bins is a difference of two."""

    counts: jax.Array
    filled: jax.Array
    entropies: jax.Array


def least_divergent(counts: jax.Array, zero: jax.Array, groups: int, stride: int = 1) -> jax.Array:
    r"""Return to which share of its range a histogram should be clipped before its bins are joined to a few groups.

    A share f keeps the bins of the range about ``zero`` shrunk by f. P is the histogram of those,
    what lies beyond added to the bins at its ends. Q has the sum of each group of bins, what lies
    beyond left out, spread evenly over those of them that are not empty in P. The share is that of
    least

    .. math:: KL(P \| Q) = \sum_k p_k \log \frac{p_k}{q_k}

    Args:
      counts: int32 ``[..., bins]``, how many entries fell into each bin of evenly spaced ones.
      zero: int32 ``[...]``, the edge of bins, 0 to ``bins``, that the range shrinks towards; 0 for
        histograms of magnitudes.
      groups: how many levels there are.
      stride: shares tried are ``stride / bins`` apart, from 1 down to where each group has one bin.

    Returns:
      float32 ``[...]`` above 0 and at most 1; the larger of equally good shares.

    Example:
      >>> counts = jnp.array([30, 30, 10, 9, 0, 2, 0, 1])
      >>> float(least_divergent(counts, jnp.int32(0), groups=2))
      0.5

    References:
      Migacz, "8-bit Inference with TensorRT", 2017, slides 25 to 38.
    """
    bins, sums = counts.shape[-1], _prefix(counts)
    zero = zero[..., None]

    def body(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        share = 1 - i.astype(jnp.float32) * jnp.float32(stride / bins)
        start = jnp.round(zero.astype(jnp.float32) * (1 - share)).astype(jnp.int32)
        stop = jnp.round(
            zero.astype(jnp.float32) + (bins - zero).astype(jnp.float32) * share
        ).astype(jnp.int32)
        now = _divergence(sums, start, stop, groups)
        return jnp.minimum(now, best[0]), jnp.where(now < best[0], share, best[1])

    least = jnp.full(counts.shape[:-1], jnp.inf)
    return jax.lax.fori_loop(0, (bins - groups) // stride + 1, body, (least, jnp.ones_like(least)))[
        1
    ]


def _prefix(counts: jax.Array) -> _Sums:
    def before(x: jax.Array) -> jax.Array:
        return jnp.pad(jnp.cumsum(x, axis=-1), [(0, 0)] * (x.ndim - 1) + [(1, 0)])

    return _Sums(before(counts), before((counts > 0).astype(jnp.int32)), before(_entropy(counts)))


def _entropy(counts: jax.Array) -> jax.Array:
    """Return ``n log n``, and 0 of 0."""
    n = counts.astype(jnp.float32)
    return n * jnp.log(jnp.maximum(n, 1))


def _divergence(sums: _Sums, start: jax.Array, stop: jax.Array, groups: int) -> jax.Array:
    """Return KL(P || Q) of the bins from ``start`` to ``stop``, int32 ``[..., 1]``; infinite where Q lacks what P has."""
    every, kept = sums.counts[..., -1:], _between(sums.counts, start, stop)
    beyond = (
        _between(sums.counts, jnp.zeros_like(start), start),
        every - _between(sums.counts, jnp.zeros_like(stop), stop),
    )
    first, last = _between(sums.counts, start, start + 1), _between(sums.counts, stop - 1, stop)

    steps = jnp.arange(groups + 1).reshape(*(1,) * (start.ndim - 1), -1)
    edges = start + (stop - start) * steps // groups
    inner = _between(sums.counts, edges[..., :-1], edges[..., 1:])
    filled = _between(sums.filled, edges[..., :-1], edges[..., 1:])
    outer = inner.at[..., :1].add(beyond[0]).at[..., -1:].add(beyond[1])
    filled = filled.at[..., :1].add(((first == 0) & (beyond[0] > 0)).astype(jnp.int32))
    filled = filled.at[..., -1:].add(((last == 0) & (beyond[1] > 0)).astype(jnp.int32))

    total = jnp.maximum(every, 1).astype(jnp.float32)
    ends = (
        _entropy(first + beyond[0]) - _entropy(first) + _entropy(last + beyond[1]) - _entropy(last)
    )
    own = (_between(sums.entropies, start, stop) + ends) / total - jnp.log(total)
    density = inner.astype(jnp.float32) / (jnp.maximum(filled, 1) * jnp.maximum(kept, 1)).astype(
        jnp.float32
    )
    cross = jnp.where(outer > 0, outer.astype(jnp.float32) / total * jnp.log(density), 0).sum(-1)
    return jnp.where(stop[..., 0] - start[..., 0] < groups, jnp.inf, own[..., 0] - cross)


def _between(sums: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    return jnp.take_along_axis(sums, stop, axis=-1) - jnp.take_along_axis(sums, start, axis=-1)


@partial(jax.jit, static_argnames=("layout", "grid", "p", "maxshrink", "points", "patience"))
def pnorm(
    w: jax.Array,
    layout: Layout,
    grid: Grid,
    *,
    p: float = 2.4,
    maxshrink: float = 0.2,
    points: int = 100,
    patience: int = 5,
) -> Scale:
    r"""Shrink the range step by step and keep the one of least :math:`\sum |w - \hat w|^p`.

    Both ends are multiplied by 1, 1 - 1/points, ... as long as more than ``1 - maxshrink`` is left;
    a set of entries stops after ``patience`` steps without a gain. With p above 2 large errors,
    hence clipping, weigh more.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.
      p: the exponent.
      maxshrink: by which share the range may shrink, above 0 and at most 1.
      points: steps in a whole range.
      patience: steps without a gain after which to stop.

    Returns:
      ``(scale, zero_point)``.

    Raises:
      ArgumentError: if ``p``, ``points`` or ``patience`` is not above 0, or ``maxshrink`` is out of
        range.

    Example:
      >>> w = jnp.concatenate([jnp.ones(40), -jnp.ones(40), jnp.array([1.1])])
      >>> scale, _ = pnorm(w, Layout(w.shape), Grid(bits=2))
      >>> scale.round(3).tolist()  # absmax would give 1.1 and an error of 0.1 to 80 entries
      [1.0010000467300415]

    References:
      The defaults are those of llm-compressor's MSE observer: p 2.4, maxshrink 0.2, 100 points,
      patience 5.
    """
    if not (p > 0 and 0 < maxshrink <= 1 and points > 0 and patience > 0):
        raise ArgumentError(
            f"need p, points, patience > 0 and 0 < maxshrink <= 1, got {p}, {points}, {patience}, "
            f"{maxshrink}"
        )
    low, high = extremes(w, layout)
    bound = jnp.maximum(jnp.maximum(-low, high), jnp.finfo(jnp.float32).tiny)

    def error(share: jax.Array) -> jax.Array:
        scale, zero_point = spanning(low * share, high * share, grid)
        left = (w - grid.levels(w, scale, zero_point) * scale) * (
            1 / bound
        )  # no power of it overflows
        return (jnp.abs(left) ** p).sum(layout.reduced, keepdims=True)

    def body(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        least, best, waited = found
        share = 1 - i.astype(jnp.float32) * np.float32(1 / points)
        now = error(share)
        gains = (now < least) & (waited < patience)
        return (
            jnp.where(gains, now, least),
            jnp.where(gains, share, best),
            jnp.where(gains, 0, waited + 1),
        )

    start = (
        error(jnp.ones(())),
        jnp.ones(layout.scale_shape),
        jnp.zeros(layout.scale_shape, jnp.int32),
    )
    share = jax.lax.fori_loop(1, round(maxshrink * points), body, start)[1]
    return spanning(low * share, high * share, grid)


@partial(jax.jit, static_argnames=("layout", "grid", "bins", "stride"))
def entropy(
    w: jax.Array, layout: Layout, grid: Grid, *, bins: int = 2048, stride: int = 8
) -> Scale:
    r"""Clip the range where the quantized distribution is nearest to the true one, :math:`\min KL(P \| Q)`.

    The histogram of magnitudes is clipped at every threshold in turn, and its bins are joined to as
    many groups as the grid has levels on one side of zero (`least_divergent`). On an asymmetric
    grid the histogram is that of the values, the groups are as many as there are levels, and both
    ends of the range are clipped by the same factor.

    Zeros are exact on any grid and are not counted. A histogram wants many entries: this is a rule
    for whole tensors, and for activations, which it was made for; for weights in channels `mse` is
    better founded.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.
      bins: of the histogram, at least as many as levels.
      stride: thresholds tried are ``stride`` bins apart; 1 tries all.

    Returns:
      ``(scale, zero_point)``.

    Raises:
      ArgumentError: if there are fewer bins than levels, or ``stride`` is below 1.

    Example:
      >>> w = jnp.append(jax.random.normal(jax.random.key(0), (100_000,)), 30.0)
      >>> scale, _ = entropy(w, Layout(w.shape), Grid(bits=8))
      >>> bool(127 * scale[0] < 6)  # the outlier does not hold the range
      True

    References:
      Migacz, "8-bit Inference with TensorRT", 2017, slides 25 to 38.
    """
    groups = grid.qmax + 1 if grid.symmetric else grid.top + 1
    if bins < groups or stride < 1:
        raise ArgumentError(
            f"entropy needs stride >= 1 and at {grid.bits} bits at least {groups} bins, got "
            f"{stride} and {bins}"
        )
    low, high = extremes(w, layout)
    if grid.symmetric:
        w, low, high = jnp.abs(w), jnp.zeros_like(low), jnp.maximum(-low, high)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    density = bins / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)
    zero = jnp.round(-low * density).astype(jnp.int32)
    counts = _histogram(as_sets(w, layout), as_sets((w - low) * density, layout), bins)
    share = least_divergent(counts, zero.reshape(counts.shape[:-1]), groups, stride).reshape(
        layout.scale_shape
    )
    return spanning(low * share, high * share, grid)


def _histogram(sets: jax.Array, places: jax.Array, bins: int) -> jax.Array:
    """Count the entries of every set that are not 0 by bin: int32 ``[..., bins]``."""
    places = jnp.clip(places.astype(jnp.int32), 0, bins - 1).reshape(-1, sets.shape[-1])
    rows, counted = jnp.arange(len(places))[:, None], (sets != 0).astype(jnp.int32)
    counts = (
        jnp.zeros((len(places), bins), jnp.int32)
        .at[rows, places]
        .add(counted.reshape(places.shape))
    )
    return counts.reshape(*sets.shape[:-1], bins)
