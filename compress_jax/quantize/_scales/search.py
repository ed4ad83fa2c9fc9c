"""Scale rules that search the clipping range by the p-norm of the error, or by relative entropy.

The rule of least squared error is in `least_squares`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError
from compress_jax.core.layout import Layout
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.rules import (
    Scale,
    flatten_groups,
    group_minmax,
    scale_from_range,
)


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
    a group stops after ``patience`` steps without a gain. With p above 2 large errors, hence
    clipping, weigh more.

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
      >>> import compress_jax as cj
      >>> w = jnp.concatenate([jnp.ones(40), -jnp.ones(40), jnp.array([1.1])])
      >>> scale, _ = cj.quantize.pnorm(w, Layout(w.shape), cj.quantize.Grid(bits=2))
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
    low, high = group_minmax(w, layout)  # of shape `layout.scale_shape`
    bound = jnp.maximum(jnp.maximum(-low, high), jnp.finfo(jnp.float32).tiny)

    def error(share: jax.Array) -> jax.Array:
        scale, zero_point = scale_from_range(low * share, high * share, grid)
        residual = w - grid.levels(w, scale, zero_point) * scale
        relative = residual * (1 / bound)  # at most about 1, so that no power overflows
        return (jnp.abs(relative) ** p).sum(layout.reduced, keepdims=True)

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        least, best, waited = carry
        share = 1 - i.astype(jnp.float32) * np.float32(1 / points)
        now = error(share)
        # A group that has waited for too long stops, though the loop goes on for the others.
        gains = (now < least) & (waited < patience)
        least = jnp.where(gains, now, least)
        best = jnp.where(gains, share, best)
        return least, best, jnp.where(gains, 0, waited + 1)

    whole = jnp.ones(layout.scale_shape)
    start = (error(jnp.ones(())), whole, jnp.zeros(layout.scale_shape, jnp.int32))
    share = jax.lax.fori_loop(1, round(maxshrink * points), body, start)[1]
    return scale_from_range(low * share, high * share, grid)


@partial(jax.jit, static_argnames=("layout", "grid", "bins", "stride"))
def entropy(
    w: jax.Array, layout: Layout, grid: Grid, *, bins: int = 2048, stride: int = 8
) -> Scale:
    r"""Clip the range where the quantized distribution is nearest to the true one.

    The threshold minimises :math:`KL(P \| Q)`: the histogram of magnitudes is clipped at every
    threshold in turn, and its bins are joined to as many groups as the grid has levels on one side
    of zero (`kl_clip_ratio`). On an asymmetric grid the histogram is that of the values, the groups
    are as many as there are levels, and both ends of the range are clipped by the same factor.

    Zeros are exact on any grid and are not counted. A histogram needs many entries: this rule is
    for whole tensors and was made for activations; for weights in channels `mse` is better founded.

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
      >>> import compress_jax as cj
      >>> w = jnp.append(jax.random.normal(jax.random.key(0), (100_000,)), 30.0)
      >>> scale, _ = cj.quantize.entropy(w, Layout(w.shape), cj.quantize.Grid(bits=8))
      >>> bool(127 * scale[0] < 6)  # the outlier is clipped
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
    low, high = group_minmax(w, layout)
    if grid.symmetric:
        w = jnp.abs(w)
        high = jnp.maximum(-low, high)
        low = jnp.zeros_like(low)
    low = jnp.minimum(low, 0)
    high = jnp.maximum(high, 0)
    # Bins per unit of w; a group of zeros has all its entries, which do not count, in bin 0.
    density = bins / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)
    zero = jnp.round(-low * density).astype(jnp.int32)
    positions = flatten_groups((w - low) * density, layout)  # [..., entries], in bins
    counts = _histogram(flatten_groups(w, layout), positions, bins)  # [..., bins]
    ratio = kl_clip_ratio(counts, zero.reshape(counts.shape[:-1]), groups, stride)
    ratio = ratio.reshape(layout.scale_shape)
    return scale_from_range(low * ratio, high * ratio, grid)


def _histogram(entries: jax.Array, positions: jax.Array, bins: int) -> jax.Array:
    """Count the entries of every group that are not 0 by bin: int32 ``[..., bins]``."""
    positions = jnp.clip(positions.astype(jnp.int32), 0, bins - 1)
    positions = positions.reshape(-1, entries.shape[-1])  # [groups, entries]
    rows = jnp.arange(len(positions))[:, None]
    counted = (entries != 0).astype(jnp.int32).reshape(positions.shape)
    counts = jnp.zeros((len(positions), bins), jnp.int32).at[rows, positions].add(counted)
    return counts.reshape(*entries.shape[:-1], bins)


class _PrefixSums(NamedTuple):
    """Sums over the bins before each of the n + 1 edges: any sum over bins is a difference of two.

    Attributes:
      counts: of entries.
      filled: of bins that are not empty.
      entropies: of ``n log n`` of the counts n.
    """

    counts: jax.Array
    filled: jax.Array
    entropies: jax.Array


def kl_clip_ratio(counts: jax.Array, zero: jax.Array, groups: int, stride: int = 1) -> jax.Array:
    r"""Return the factor by which to clip a histogram's range before joining its bins to groups.

    A factor f keeps the bins of the range about ``zero`` shrunk by f. P is the histogram of those,
    the clipped entries added to the bins at its ends. Q has the sum of each group of bins, clipped
    entries left out, spread evenly over those of them that are not empty in P. The factor is that
    of least

    .. math:: KL(P \| Q) = \sum_k p_k \log \frac{p_k}{q_k}

    Args:
      counts: int32 ``[..., bins]``, how many entries fell into each bin of evenly spaced ones.
      zero: int32 ``[...]``, the edge of bins, 0 to ``bins``, that the range shrinks towards; 0 for
        histograms of magnitudes.
      groups: the number of levels.
      stride: factors tried are ``stride / bins`` apart, from 1 down to where each group has one
        bin.

    Returns:
      float32 ``[...]`` above 0 and at most 1; the larger of equally good factors.

    Example:
      >>> counts = jnp.array([30, 30, 10, 9, 0, 2, 0, 1])
      >>> float(kl_clip_ratio(counts, jnp.int32(0), groups=2))
      0.5

    References:
      Migacz, "8-bit Inference with TensorRT", 2017, slides 25 to 38.
    """
    bins = counts.shape[-1]
    # With prefix sums a trial costs as much as there are groups, not bins.
    sums = _prefix_sums(counts)
    zero = zero[..., None]
    below = zero.astype(jnp.float32)
    above = (bins - zero).astype(jnp.float32)

    def body(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ratio = 1 - i.astype(jnp.float32) * jnp.float32(stride / bins)
        start = jnp.round(below * (1 - ratio)).astype(jnp.int32)
        stop = jnp.round(below + above * ratio).astype(jnp.int32)
        now = _divergence(sums, start, stop, groups)
        return jnp.minimum(now, best[0]), jnp.where(now < best[0], ratio, best[1])

    least = jnp.full(counts.shape[:-1], jnp.inf)
    trials = (bins - groups) // stride + 1
    return jax.lax.fori_loop(0, trials, body, (least, jnp.ones_like(least)))[1]


def _divergence(sums: _PrefixSums, start: jax.Array, stop: jax.Array, groups: int) -> jax.Array:
    """Return KL(P || Q) of the bins from ``start`` to ``stop``, int32 ``[..., 1]``.

    It is infinite where Q lacks what P has.
    """
    every = sums.counts[..., -1:]
    kept = _between(sums.counts, start, stop)
    clipped_below = _between(sums.counts, jnp.zeros_like(start), start)
    clipped_above = every - _between(sums.counts, jnp.zeros_like(stop), stop)
    first = _between(sums.counts, start, start + 1)
    last = _between(sums.counts, stop - 1, stop)

    # By group: entries of Q, bins that are not empty in P, entries of P.
    steps = jnp.arange(groups + 1).reshape(*(1,) * (start.ndim - 1), -1)
    edges = start + (stop - start) * steps // groups  # [..., groups + 1]
    inner = _between(sums.counts, edges[..., :-1], edges[..., 1:])
    filled = _between(sums.filled, edges[..., :-1], edges[..., 1:])
    filled = filled.at[..., :1].add(((first == 0) & (clipped_below > 0)).astype(jnp.int32))
    filled = filled.at[..., -1:].add(((last == 0) & (clipped_above > 0)).astype(jnp.int32))
    # `inner` is Q's: without the clipped entries; `outer` is P's: with them.
    outer = inner.at[..., :1].add(clipped_below).at[..., -1:].add(clipped_above)

    # sum p log p, from n log n of the counts: the two end bins have the clipped entries as well.
    total = jnp.maximum(every, 1).astype(jnp.float32)
    ends = (
        _n_log_n(first + clipped_below)
        - _n_log_n(first)
        + _n_log_n(last + clipped_above)
        - _n_log_n(last)
    )
    own = (_between(sums.entropies, start, stop) + ends) / total - jnp.log(total)
    # sum p log q: q is constant on the filled bins of a group.
    spread = (jnp.maximum(filled, 1) * jnp.maximum(kept, 1)).astype(jnp.float32)
    density = inner.astype(jnp.float32) / spread
    cross = jnp.where(outer > 0, outer.astype(jnp.float32) / total * jnp.log(density), 0).sum(-1)
    return jnp.where(stop[..., 0] - start[..., 0] < groups, jnp.inf, own[..., 0] - cross)


def _prefix_sums(counts: jax.Array) -> _PrefixSums:
    def before(x: jax.Array) -> jax.Array:
        return jnp.pad(jnp.cumsum(x, axis=-1), [(0, 0)] * (x.ndim - 1) + [(1, 0)])

    filled = (counts > 0).astype(jnp.int32)
    return _PrefixSums(before(counts), before(filled), before(_n_log_n(counts)))


def _between(sums: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Return the sum over the bins from ``start`` to ``stop``."""
    return jnp.take_along_axis(sums, stop, axis=-1) - jnp.take_along_axis(sums, start, axis=-1)


def _n_log_n(counts: jax.Array) -> jax.Array:
    """Return ``n log n``, and 0 of 0."""
    n = counts.astype(jnp.float32)
    return n * jnp.log(jnp.maximum(n, 1))
