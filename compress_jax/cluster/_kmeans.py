"""Weight sharing by k-means with trained centroids.

`kmeans` sorts a leaf once. Lloyd's iterations then read the sums of cells off one prefix sum, and
start from k-means++ seeds (`plus_plus`) and from the asymptotically optimal density (`companded`),
both computed from a few thousand order statistics (`sketch`).
"""

from functools import partial

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

LARGEST = 2**16 - 1  # clusters: with the code for zero they fill 16 bits
LARGEST_PLUS_PLUS = 256  # clusters: beyond, k-means++ is slow and no better than `companded`
RESTARTS = 4  # of k-means++
SKETCH = 4096  # order statistics that starts are computed from


def kmeans(
    clusters: int, *, key: jax.Array | None = None, iterations: int = 100, keep_zeros: bool = True
) -> Compression:
    """Share each leaf's weights among ``clusters`` values, a codebook per leaf that is trained.

    `init` minimizes ``sum_i (w_i - codebook[code_i])**2`` by Lloyd's algorithm in float32 from five
    starts, four of k-means++ (up to 256 clusters) and the asymptotically optimal point density, and
    keeps the best. From then on the view is ``codebook[code]``: the codes stay, the codebook is
    ``learned`` and its gradient is the sum of those of its members,
    ``dL/dc_k = sum_{i: code_i = k} dL/dw_i``. The view does not depend on the params any more, so
    they get zero gradients.

    Exact zeros have a code of their own (``clusters``): no centroid is fitted to them, and they
    stay zero. So ``chain(prune, kmeans)`` has the zeros that ``prune`` had at `init`; start it with
    `between` when the pruning is over. Leaves that are all zeros, as new biases are, would stay
    zero: choose kernels with `at`.

    All sums are in fixed point, so the result is the same under every sharding, bit for bit.

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
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.array([[0.9, 1.1, 0.0], [-2.0, -2.2, 0.0]])}
      >>> shared = cj.cluster.kmeans(2)
      >>> state = shared.init(params)
      >>> state.learned["kernel"].tolist(), state.fixed["kernel"].tolist()
      ([-2.0999999046325684, 1.0], [[1, 1, 2], [0, 0, 2]])
      >>> cj.unpack(shared.pack(params, state))["kernel"].round(2).tolist()
      [[1.0, 1.0, 0.0], [-2.0999999046325684, -2.0999999046325684, 0.0]]

    References:
      Han, Mao and Dally, "Deep Compression", ICLR 2016, section 3 (equation 2 is the objective, 3
      the gradient). Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA
      2007.
    """
    clusters = whole("clusters", clusters)
    iterations = whole("iterations", iterations)
    keep_zeros = flag("keep_zeros", keep_zeros)
    if key is not None:
        random_key("key", key)
    if not 2 <= clusters <= LARGEST:
        raise ArgumentError(f"clusters must be 2 to {LARGEST}, got {clusters}")
    if iterations < 1:
        raise ArgumentError(f"iterations must be at least 1, got {iterations}")

    def init(x: jax.Array, leaf_key: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
        return _fit(x, leaf_key, clusters, iterations, keep_zeros)

    def pack(x: jax.Array, codebook: jax.Array, codes: jax.Array, axes: Axes) -> Clustered:
        # State has the layers of a stack in front; a packed leaf has them where the leaf has them.
        codes = jnp.moveaxis(codes, range(len(axes.stack)), axes.stack)
        return Clustered.pack(codes, codebook, x.dtype, axes.stack)

    key = jax.random.key(0) if key is None else key
    call = call_of(
        "kmeans", clusters=clusters, key=key, iterations=iterations, keep_zeros=keep_zeros
    )
    return leafwise(_view, init=init, pack=pack, key=key, layout=True, call=call)


def _view(x: jax.Array, codebook: jax.Array, codes: jax.Array, axes: Axes) -> jax.Array:
    levels = jnp.append(codebook, jnp.zeros((), codebook.dtype))  # [clusters + 1], zero last
    return saturate(levels[codes], x.dtype)


def _fit(
    x: jax.Array, key: jax.Array, clusters: int, iterations: int, keep_zeros: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the codebook and the codes of one leaf.

    Arrays are padded to a power of two in between, so that only `_values` and `_codes` are compiled
    anew for each shape.
    """
    values = _values(x, keep_zeros)  # [n], n a power of two
    ordered, count = _in_order(values)  # [n]
    starts = _starts(sketch(ordered, count), key, clusters)  # [starts, clusters]
    found = _lloyd(ordered, count, starts, iterations)  # [starts, clusters]
    codebook = _best(ordered, count, found)  # [clusters]
    return codebook, _codes(x, codebook, keep_zeros)


@partial(jax.jit, static_argnames="keep_zeros")
def _values(x: jax.Array, keep_zeros: bool) -> jax.Array:
    """Return the entries to cluster in float32, infinity for the others, padded with infinity."""
    flat = x.astype(jnp.float32).ravel()
    flat = jnp.where(flat == 0, jnp.inf, flat) if keep_zeros else flat
    size = max(SKETCH, 1 << (flat.size - 1).bit_length())
    return jnp.pad(flat, (0, size - flat.size), constant_values=jnp.inf)


@jax.jit
def _in_order(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the finite values in ascending order, padded with the last one, and their number."""
    ordered = jnp.sort(values)
    count = jnp.searchsorted(ordered, jnp.inf).astype(jnp.int32)
    last = jnp.where(count > 0, ordered[jnp.maximum(count - 1, 0)], 0)
    return jnp.minimum(ordered, last), count


@partial(jax.jit, static_argnames="clusters")
def _starts(points: jax.Array, key: jax.Array, clusters: int) -> jax.Array:
    """Return the centroids that Lloyd's algorithm starts from, ``[starts, clusters]``."""
    dense = companded(points, clusters)[None]  # [1, clusters]
    if clusters > LARGEST_PLUS_PLUS:
        return dense
    keys = jax.random.split(key, RESTARTS)
    seeds = jax.vmap(lambda key: plus_plus(key, points, clusters))(keys)  # [RESTARTS, clusters]
    return jnp.concatenate([dense, seeds])


@jax.jit
def _best(ordered: jax.Array, count: jax.Array, found: jax.Array) -> jax.Array:
    """Return the codebook of least distortion, or the values themselves if they are few enough."""
    distinct, all_found = _distinct(ordered, found.shape[1])
    return jnp.where(all_found, distinct, found[jnp.argmin(_distortions(ordered, count, found))])


@partial(jax.jit, static_argnames="keep_zeros")
def _codes(x: jax.Array, codebook: jax.Array, keep_zeros: bool) -> jax.Array:
    """Return the index of each entry's centroid, and ``clusters`` for exact zeros."""
    x = x.astype(jnp.float32)
    clusters = codebook.size
    codes = _nearest(codebook, x)
    codes = jnp.where(x == 0, clusters, codes) if keep_zeros else codes
    return codes.astype(jnp.uint8 if clusters < 2**8 else jnp.uint16)


def _distinct(ordered: jax.Array, limit: int) -> tuple[jax.Array, jax.Array]:
    """Return the ``limit`` least distinct values, and whether there are no others.

    If there are fewer, the last one is repeated.
    """

    def step(value: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        following = jnp.searchsorted(ordered, value, side="right")
        return ordered[jnp.minimum(following, ordered.size - 1)], value

    past, values = jax.lax.scan(step, ordered[0], length=limit)
    return values, past == values[-1]


def _middles(centroids: jax.Array) -> jax.Array:
    """Return the borders between neighboring cells; a border itself belongs to the lower cell."""
    lower = centroids[:-1]
    upper = centroids[1:]
    middle = 0.5 * lower + 0.5 * upper  # halves first: the sum of two large floats could overflow
    # Adjacent floats have nothing between them; the upper centroid must not be the border.
    return jnp.where((middle > lower) & (middle < upper), middle, lower)


def _nearest(centroids: jax.Array, x: jax.Array) -> jax.Array:
    """Return the index of the centroid nearest to each entry."""
    # A binary search: a table of distances [n, clusters] would not fit in memory.
    return jnp.searchsorted(_middles(centroids), x, side="left")


@jax.jit
def _lloyd(
    ordered: jax.Array, count: jax.Array, starts: jax.Array, iterations: int | jax.Array
) -> jax.Array:
    """Return the centroids of each start after Lloyd's iterations, ``[starts, clusters]``."""
    exponent = scale_exponent(ordered, largest=128)
    sums = prefix_sums(to_fixed(ordered, exponent))  # [n + 1]
    step = partial(_move, ordered, count, exponent, sums)
    return jax.lax.fori_loop(0, iterations, lambda _, centroids: jax.vmap(step)(centroids), starts)


def _move(
    ordered: jax.Array, count: jax.Array, exponent: jax.Array, sums: Int64, centroids: jax.Array
) -> jax.Array:
    """Return the means of the cells; an empty cell keeps its centroid."""
    inner = jnp.searchsorted(ordered, _middles(centroids), side="right")
    inner = jnp.minimum(inner.astype(jnp.int32), count)  # [clusters - 1]
    begin = jnp.pad(inner, (1, 0))  # [clusters]
    end = jnp.append(inner, count)
    members = jnp.maximum(end - begin, 1).astype(jnp.float32)
    cell_sums = subtract(sums.map(lambda word: word[end]), sums.map(lambda word: word[begin]))
    mean = from_fixed(cell_sums.to_float() / members, exponent)
    # Rounding must not move a mean past its members.
    mean = jnp.clip(mean, ordered[begin], ordered[end - 1])
    return jnp.where(end > begin, mean, centroids)


def _distortions(ordered: jax.Array, count: jax.Array, found: jax.Array) -> jax.Array:
    """Return the summed squared error of each codebook, all in the same unit."""

    def error(centroids: jax.Array) -> jax.Array:
        distance = jnp.abs(ordered - centroids[_nearest(centroids, ordered)])
        return jnp.where(jnp.arange(ordered.size) < count, distance, 0)

    # One codebook at a time: [n] values, not [starts, n].
    largest = jax.lax.map(lambda centroids: error(centroids).max(), found).max()
    largest = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)

    def squares(centroids: jax.Array) -> jax.Array:
        return to_fixed((error(centroids) / largest) ** 2, 0)

    return jax.lax.map(lambda centroids: total(squares(centroids)).to_float(), found)


@jax.jit
def sketch(ordered: jax.Array, count: jax.Array) -> jax.Array:
    """Return at most 4096 order statistics, evenly spaced in rank, both extremes among them.

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
    i = jnp.arange(size, dtype=jnp.int32)
    step = count // size
    rest = count % size
    # The rank is (2 * i + 1) * count // (2 * size), written so that it does not overflow.
    rank = i * step + step // 2 + ((2 * i + 1) * rest + step % 2 * size) // (2 * size)
    return ordered[rank].at[0].set(ordered[0]).at[-1].set(ordered[-1])


def plus_plus(key: jax.Array, y: jax.Array, clusters: int) -> jax.Array:
    """Return k-means++ seeds: points drawn with probabilities proportional to squared distances.

    The distance is that to the nearest seed drawn before. A draw is the maximum of
    ``2 log distance + Gumbel noise``: maxima are exact where cumulative sums would not be.

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
    """Return seeds whose density is the cube root of the points' density.

    That density is optimal for many clusters. Between evenly ranked points the density is
    ``f = 1 / gap``, so each gap gets ``f**(1/3) * gap = gap**(2/3)`` of the seeds. The shares are
    added as integers.

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
    # [m], the shares of all gaps up to each point
    upto = prefix_sums(to_fixed(share, 0)).to_float()[1:]
    wanted = (jnp.arange(clusters, dtype=jnp.float32) + 0.5) / clusters * upto[-1]
    return jnp.interp(wanted, upto, y)
