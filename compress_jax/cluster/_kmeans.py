"""Weight sharing by k-means with trained centroids."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core import Clustered, Compression, leafwise
from compress_jax.core.arguments import flag, random_key, whole
from compress_jax.core.axes import Axes
from compress_jax.core.describe import call_of
from compress_jax.core.errors import ArgumentError
from compress_jax.core.exact import (
    Int64,
    from_fixed,
    prefix_sums,
    scale_exponent,
    subtract,
    to_fixed,
    total,
)
from compress_jax.core.finite import saturate

# Where k-means starts: k-means++, and the point density that is optimal for many clusters.


SKETCH = 4096


@jax.jit
def sketch(ordered: jax.Array, count: jax.Array) -> jax.Array:
    """Return at most 4096 order statistics, evenly spaced in rank, and both extremes: all values if there are fewer.

    Args:
      ordered: float32 ``[n]``, ascending in its first ``count`` entries, and copies of the last of
        them after that.
      count: int32 scalar, how many entries there are.

    Returns:
      float32 ``[min(n, 4096)]``, ascending; if ``count`` is less than that, all values, about
      equally often.

    Example:
      >>> sketch(jnp.array([1.0, 2.0, 2.0, 2.0]), jnp.array(2)).tolist()
      [1.0, 1.0, 2.0, 2.0]
    """
    size = min(ordered.size, SKETCH)
    i, step, rest = jnp.arange(size, dtype=jnp.int32), count // size, count % size
    # The rank is (2 * i + 1) * count // (2 * size), written so that it does not overflow.
    rank = i * step + step // 2 + ((2 * i + 1) * rest + step % 2 * size) // (2 * size)
    return ordered[rank].at[0].set(ordered[0]).at[-1].set(ordered[-1])


def plus_plus(key: jax.Array, y: jax.Array, clusters: int) -> jax.Array:
    """Return k-means++ seeds: each next one is a point drawn with probability proportional to its squared distance.

    The draw is the maximum of ``2 log distance + Gumbel noise``: maxima are exact where cumulative
    sums would not be.

    Args:
      key: typed PRNG key.
      y: float32 ``[m]``, the points.
      clusters: how many seeds.

    Returns:
      float32 ``[clusters]``, ascending. Once every distinct point is a seed, the others repeat the
      first point.

    Example:
      >>> plus_plus(jax.random.key(0), jnp.array([1.0, 1.0, 5.0, 7.0]), 3).tolist()
      [1.0, 5.0, 7.0]

    References:
      Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007, section
      2.2.
    """

    def draw(i: jax.Array | int, distance: jax.Array) -> jax.Array:
        noise = jax.random.gumbel(jax.random.fold_in(key, i), y.shape, jnp.float32)
        return y[jnp.argmax(2 * jnp.log(distance) + noise)]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seeds, distance = carry
        seed = draw(i, distance)
        return seeds.at[i].set(seed), jnp.minimum(distance, jnp.abs(y - seed))

    first = draw(0, jnp.ones_like(y))
    carry = jnp.full(clusters, first), jnp.abs(y - first)
    return jnp.sort(jax.lax.fori_loop(1, clusters, step, carry)[0])


def companded(y: jax.Array, clusters: int) -> jax.Array:
    """Return seeds whose density is the cube root of that of the points, which is optimal for many clusters.

    Between evenly ranked points the density is ``f = 1 / gap``, so each gap gets
    ``f**(1/3) * gap = gap**(2/3)`` of the seeds. The shares are added as integers.

    Args:
      y: float32 ``[m]``, ascending points.
      clusters: how many seeds.

    Returns:
      float32 ``[clusters]``, ascending.

    Example:
      >>> companded(jnp.linspace(0.0, 8.0, 9), 4).tolist()
      [1.0, 3.0, 5.0, 7.0]

    References:
      Panter and Dite, "Quantization Distortion in Pulse-Count Modulation with Nonuniform Spacing of
      Levels", 1951.
    """
    share = jnp.cbrt(jnp.diff(y, prepend=y[:1])) ** 2
    share = share / jnp.maximum(share.max(), jnp.finfo(jnp.float32).tiny)
    upto = prefix_sums(to_fixed(share, 0)).to_float()[1:]
    wanted = (jnp.arange(clusters, dtype=jnp.float32) + 0.5) / clusters * upto[-1]
    return jnp.interp(wanted, upto, y)


LARGEST = 2**16 - 1  # clusters: with the code for zero they fill 16 bits
LARGEST_PLUS_PLUS = (
    256  # clusters: beyond, k-means++ costs much and its seeds are no better than the density's
)
RESTARTS = 4


def kmeans(
    clusters: int, *, key: jax.Array | None = None, iterations: int = 100, keep_zeros: bool = True
) -> Compression:
    """Share each leaf's weights among ``clusters`` values: a codebook of its own for every leaf, trained by gradients.

    `init` minimises ``sum_i (w_i - codebook[code_i])**2`` by Lloyd's algorithm in float32 from five
    starts, four of k-means++ (up to 256 clusters) and the asymptotically optimal point density, and
    keeps the best. From then on the view is ``codebook[code]``: the codes stay, the codebook is
    ``learned`` and its gradient is the sum of those of its members,
    ``dL/dc_k = sum_{i: code_i = k} dL/dw_i``. The view does not depend on the params any more, so
    they get zero gradients.

    Exact zeros are kept apart: they have a code of their own (``clusters``), no centroid is fitted
    to them and none moves them. So ``chain(prune, kmeans)`` has the very zeros of ``prune`` when it
    was initialised; start it with `between` when the pruning is over. Leaves that are all zeros, as
    new biases are, would stay so for ever: choose kernels with `at`.

    The result does not depend on how the params are sharded, not in a single bit: all sums are in
    fixed point.

    Args:
      clusters: entries of a codebook, 2 to 65535; codes take ``ceil(log2(clusters))`` bits, or
        those of ``clusters + 1`` values if there are zeros.
      key: typed PRNG key of the seeding; each leaf derives its own. Default: ``jax.random.key(0)``.
      iterations: Lloyd iterations; after one sort of the leaf's n entries, each takes only
        O(clusters * log n).
      keep_zeros: False to treat zeros as any other weight, so that a few chance zeros do not cost a
        code.

    Returns:
      The Compression: ``learned[path]`` is the codebook, float32 ``[clusters]``, one for each layer
      of a stack; ``fixed[path]`` the codes, uint8 or uint16 in the shape of the leaf, layers in
      front. `init` may be run under `jit`. A leaf of at most ``clusters`` distinct values is
      reproduced exactly.

    Raises:
      ArgumentError: if ``clusters`` or ``iterations`` is out of range.

    Example:
      >>> from compress_jax.core import unpack
      >>> params = {"kernel": jnp.array([[0.9, 1.1, 0.0], [-2.0, -2.2, 0.0]])}
      >>> shared = kmeans(2)
      >>> state = shared.init(params)
      >>> state.learned["kernel"].tolist(), state.fixed["kernel"].tolist()
      ([-2.0999999046325684, 1.0], [[1, 1, 2], [0, 0, 2]])
      >>> unpack(shared.pack(params, state))["kernel"].round(2).tolist()
      [[1.0, 1.0, 0.0], [-2.0999999046325684, -2.0999999046325684, 0.0]]

    References:
      Han, Mao and Dally, "Deep Compression", ICLR 2016, section 3 (equation 2 is the objective, 3
      the gradient). Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA
      2007.
    """
    clusters, iterations = whole("clusters", clusters), whole("iterations", iterations)
    keep_zeros = flag("keep_zeros", keep_zeros)
    if key is not None:
        random_key("key", key)
    if not 2 <= clusters <= LARGEST:
        raise ArgumentError(f"clusters must be 2 to {LARGEST}, got {clusters}")
    if iterations < 1:
        raise ArgumentError(f"iterations must be at least 1, got {iterations}")

    def init(x: jax.Array, leaf_key: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
        return _fit(x, leaf_key, clusters, iterations, keep_zeros)

    def pack(x: jax.Array, codebook: jax.Array, codes: jax.Array, axes: Axes) -> Any:
        codes = jnp.moveaxis(codes, range(len(axes.stack)), axes.stack)  # in state, layers lead
        return Clustered.pack(codes, codebook, x.dtype, axes.stack)

    key = jax.random.key(0) if key is None else key
    call = call_of(
        "kmeans", clusters=clusters, key=key, iterations=iterations, keep_zeros=keep_zeros
    )
    return leafwise(_view, init=init, pack=pack, key=key, layout=True, call=call)


def _view(x: jax.Array, codebook: jax.Array, codes: jax.Array, axes: Axes) -> jax.Array:
    return saturate(jnp.append(codebook, jnp.zeros((), codebook.dtype))[codes], x.dtype)


def _fit(
    x: jax.Array, key: jax.Array, clusters: int, iterations: int, keep_zeros: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the codebook and the codes of one leaf; only the first and last line compile anew for each shape."""
    values = _values(x, keep_zeros)
    ordered, count = _in_order(values)
    points = sketch(ordered, count)
    found = _lloyd(ordered, count, _starts(points, key, clusters), iterations)
    codebook = _best(ordered, count, found)
    return codebook, _codes(x, codebook, keep_zeros)


@partial(jax.jit, static_argnames="keep_zeros")
def _values(x: jax.Array, keep_zeros: bool) -> jax.Array:
    """Return the entries to cluster, in float32, with infinity for the others and up to the next power of two."""
    flat = x.astype(jnp.float32).ravel()
    flat = jnp.where(flat == 0, jnp.inf, flat) if keep_zeros else flat
    size = max(SKETCH, 1 << (flat.size - 1).bit_length())
    return jnp.pad(flat, (0, size - flat.size), constant_values=jnp.inf)


@jax.jit
def _in_order(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the finite values in ascending order, padded with copies of the last, and how many they are."""
    ordered = jnp.sort(values)
    count = jnp.searchsorted(ordered, jnp.inf).astype(jnp.int32)
    last = jnp.where(count > 0, ordered[jnp.maximum(count - 1, 0)], 0)
    return jnp.minimum(ordered, last), count


@partial(jax.jit, static_argnames="clusters")
def _starts(points: jax.Array, key: jax.Array, clusters: int) -> jax.Array:
    """Return the centroids that Lloyd's algorithm starts from, ``[starts, clusters]``."""
    dense = companded(points, clusters)[None]
    if clusters > LARGEST_PLUS_PLUS:
        return dense
    seeds = jax.vmap(lambda each: plus_plus(each, points, clusters))(
        jax.random.split(key, RESTARTS)
    )
    return jnp.concatenate([dense, seeds])


@jax.jit
def _best(ordered: jax.Array, count: jax.Array, found: jax.Array) -> jax.Array:
    """Return the codebook of the least distortion, or the values themselves where they are few enough."""
    distinct, all_found = _distinct(ordered, found.shape[1])
    return jnp.where(all_found, distinct, found[jnp.argmin(_distortions(ordered, count, found))])


@partial(jax.jit, static_argnames="keep_zeros")
def _codes(x: jax.Array, codebook: jax.Array, keep_zeros: bool) -> jax.Array:
    """Return the index of each entry's centroid, and ``clusters`` for exact zeros."""
    x, clusters = x.astype(jnp.float32), codebook.size
    codes = _nearest(codebook, x)
    codes = jnp.where(x == 0, clusters, codes) if keep_zeros else codes
    return codes.astype(jnp.uint8 if clusters < 2**8 else jnp.uint16)


def _distinct(ordered: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
    """Return the ``limit`` least distinct values, the last one repeated if there are fewer, and whether they are all."""

    def step(value: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        following = jnp.searchsorted(ordered, value, side="right")
        return ordered[jnp.minimum(following, ordered.size - 1)], value

    past, values = jax.lax.scan(step, ordered[0], length=limit)
    return values, past == values[-1]


def _middles(centroids: jax.Array) -> jax.Array:
    """Return the borders between neighbouring cells; a border belongs to the lower cell, and never is the upper centroid."""
    lower, upper = centroids[:-1], centroids[1:]
    middle = 0.5 * lower + 0.5 * upper  # halves first: the sum of two large floats could overflow
    return jnp.where(
        (middle > lower) & (middle < upper), middle, lower
    )  # adjacent floats have nothing between them


def _nearest(centroids: jax.Array, x: jax.Array) -> jax.Array:
    """Return the index of the centroid nearest to each entry: a binary search, never an [n, clusters] table."""
    return jnp.searchsorted(_middles(centroids), x, side="left")


@jax.jit
def _lloyd(
    ordered: jax.Array, count: jax.Array, starts: jax.Array, iterations: int | jax.Array
) -> jax.Array:
    """Move each start's centroids to the means of their cells, again and again; ``[starts, clusters]``, ascending."""
    e = scale_exponent(ordered, largest=128)
    sums = prefix_sums(to_fixed(ordered, e))
    step = partial(_move, ordered, count, e, sums)
    return jax.lax.fori_loop(0, iterations, lambda _, centroids: jax.vmap(step)(centroids), starts)


def _move(
    ordered: jax.Array, count: jax.Array, e: jax.Array, sums: Int64, centroids: jax.Array
) -> jax.Array:
    """Return the means of the cells; an empty cell keeps its centroid."""
    inner = jnp.minimum(
        jnp.searchsorted(ordered, _middles(centroids), side="right").astype(jnp.int32), count
    )
    begin, end = jnp.pad(inner, (1, 0)), jnp.append(inner, count)
    cell_sums = subtract(sums.map(lambda word: word[end]), sums.map(lambda word: word[begin]))
    members = jnp.maximum(end - begin, 1).astype(jnp.float32)
    mean = from_fixed(cell_sums.to_float() / members, e)
    mean = jnp.clip(
        mean, ordered[begin], ordered[end - 1]
    )  # a mean lies among its members, however it was rounded
    return jnp.where(end > begin, mean, centroids)


def _distortions(ordered: jax.Array, count: jax.Array, found: jax.Array) -> jax.Array:
    """Return the summed squared error of each codebook, all in the same unit."""

    def error(centroids: jax.Array) -> jax.Array:
        distance = jnp.abs(ordered - centroids[_nearest(centroids, ordered)])
        return jnp.where(jnp.arange(ordered.size) < count, distance, 0)

    largest = jnp.maximum(
        jax.lax.map(lambda c: error(c).max(), found).max(), jnp.finfo(jnp.float32).tiny
    )

    def squares(centroids: jax.Array) -> jax.Array:
        return to_fixed((error(centroids) / largest) ** 2, 0)

    return jax.lax.map(lambda centroids: total(squares(centroids)).to_float(), found)
