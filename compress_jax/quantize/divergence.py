"""How far a clipped histogram on few levels is from the whole: the relative entropy of Migacz's calibration."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class _Sums(NamedTuple):
    """Sums over the bins before each of the n + 1 edges, so that every sum over bins is a difference of two."""

    counts: jax.Array
    filled: jax.Array
    entropies: jax.Array


def least_divergent(counts: jax.Array, zero: jax.Array, groups: int, stride: int = 1) -> jax.Array:
    r"""Return to which share of its range a histogram should be clipped before its bins are joined to a few groups.

    A share f keeps the bins of the range about ``zero`` shrunk by f. P is the histogram of those, what lies beyond added to
    the bins at its ends. Q has the sum of each group of bins, what lies beyond left out, spread evenly over those of them
    that are not empty in P. The share is that of least

    .. math:: KL(P \| Q) = \sum_k p_k \log \frac{p_k}{q_k}

    Args:
      counts: int32 ``[..., bins]``, how many entries fell into each bin of evenly spaced ones.
      zero: int32 ``[...]``, the edge of bins, 0 to ``bins``, that the range shrinks towards; 0 for histograms of magnitudes.
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
        stop = jnp.round(zero.astype(jnp.float32) + (bins - zero).astype(jnp.float32) * share).astype(jnp.int32)
        now = _divergence(sums, start, stop, groups)
        return jnp.minimum(now, best[0]), jnp.where(now < best[0], share, best[1])

    least = jnp.full(counts.shape[:-1], jnp.inf)
    return jax.lax.fori_loop(0, (bins - groups) // stride + 1, body, (least, jnp.ones_like(least)))[1]


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
    beyond = _between(sums.counts, jnp.zeros_like(start), start), every - _between(sums.counts, jnp.zeros_like(stop), stop)
    first, last = _between(sums.counts, start, start + 1), _between(sums.counts, stop - 1, stop)

    steps = jnp.arange(groups + 1).reshape(*(1,) * (start.ndim - 1), -1)
    edges = start + (stop - start) * steps // groups
    inner = _between(sums.counts, edges[..., :-1], edges[..., 1:])
    filled = _between(sums.filled, edges[..., :-1], edges[..., 1:])
    outer = inner.at[..., :1].add(beyond[0]).at[..., -1:].add(beyond[1])
    filled = filled.at[..., :1].add(((first == 0) & (beyond[0] > 0)).astype(jnp.int32))
    filled = filled.at[..., -1:].add(((last == 0) & (beyond[1] > 0)).astype(jnp.int32))

    total = jnp.maximum(every, 1).astype(jnp.float32)
    ends = _entropy(first + beyond[0]) - _entropy(first) + _entropy(last + beyond[1]) - _entropy(last)
    own = (_between(sums.entropies, start, stop) + ends) / total - jnp.log(total)
    density = inner.astype(jnp.float32) / (jnp.maximum(filled, 1) * jnp.maximum(kept, 1)).astype(jnp.float32)
    cross = jnp.where(outer > 0, outer.astype(jnp.float32) / total * jnp.log(density), 0).sum(-1)
    return jnp.where(stop[..., 0] - start[..., 0] < groups, jnp.inf, own[..., 0] - cross)


def _between(sums: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    return jnp.take_along_axis(sums, stop, axis=-1) - jnp.take_along_axis(sums, start, axis=-1)
