"""Where k-means starts: k-means++, and the point density that is optimal for many clusters."""

import jax
import jax.numpy as jnp

from compress_jax.cluster.fixed_point import prefix_sums, to_fixed

SKETCH = 4096


@jax.jit
def sketch(ordered: jax.Array, count: jax.Array) -> jax.Array:
    """Return at most 4096 order statistics, evenly spaced in rank, and both extremes: all values if there are fewer.

    Args:
      ordered: float32 ``[n]``, ascending in its first ``count`` entries, and copies of the last of them after that.
      count: int32 scalar, how many entries there are.

    Returns:
      float32 ``[min(n, 4096)]``, ascending; if ``count`` is less than that, all values, about equally often.

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

    The draw is the maximum of ``2 log distance + Gumbel noise``: maxima are exact where cumulative sums would not be.

    Args:
      key: typed PRNG key.
      y: float32 ``[m]``, the points.
      clusters: how many seeds.

    Returns:
      float32 ``[clusters]``, ascending. Once every distinct point is a seed, the others repeat the first point.

    Example:
      >>> plus_plus(jax.random.key(0), jnp.array([1.0, 1.0, 5.0, 7.0]), 3).tolist()
      [1.0, 5.0, 7.0]

    References:
      Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007, section 2.2.
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

    Between evenly ranked points the density is ``f = 1 / gap``, so each gap gets ``f**(1/3) * gap = gap**(2/3)`` of the
    seeds. The shares are added as integers.

    Args:
      y: float32 ``[m]``, ascending points.
      clusters: how many seeds.

    Returns:
      float32 ``[clusters]``, ascending.

    Example:
      >>> companded(jnp.linspace(0.0, 8.0, 9), 4).tolist()
      [1.0, 3.0, 5.0, 7.0]

    References:
      Panter and Dite, "Quantization Distortion in Pulse-Count Modulation with Nonuniform Spacing of Levels", 1951.
    """
    share = jnp.cbrt(jnp.diff(y, prepend=y[:1])) ** 2
    share = share / jnp.maximum(share.max(), jnp.finfo(jnp.float32).tiny)
    upto = prefix_sums(to_fixed(share, jnp.zeros((), jnp.int32))).to_float()[1:]
    wanted = (jnp.arange(clusters, dtype=jnp.float32) + 0.5) / clusters * upto[-1]
    return jnp.interp(wanted, upto, y)
