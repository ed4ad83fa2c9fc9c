"""SET: sparse evolutionary training, whose weights are grown at random."""

import jax
import optax

from compress_jax.core.compression import Compression
from compress_jax.prune.masked import Seen
from compress_jax.prune.regrow import Growth, regrowing
from compress_jax.prune.target import Sparsity


def set(  # noqa: A001
    sparsity: Sparsity,
    steps: int,
    key: jax.Array,
    *,
    drop: float | optax.Schedule = 0.3,
    every: int = 100,
    until: float = 0.75,
) -> Compression:
    """Train sparse from the start: the smallest kept weights are replaced by others, drawn by lot.

    See `regrowing` for the rule. With ``drop=0`` the first mask stays: static sparse training.

    Args:
      sparsity: as of `magnitude`: a number, a schedule, or a map such as `erk` returns.
      steps: length of the training.
      key: typed PRNG key.
      drop: the first drop fraction, falling by a cosine; or a schedule of it.
      every: weights are replaced at steps divisible by it.
      until: share of the training after which the mask stays.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "grown": what the last update grew}``.

    Raises:
      ValueError: for impossible arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> c, params = set(0.9, 1000, jax.random.key(0)), {"w": jnp.ones((10, 10))}
      >>> int(c.view(params, c.init(params))["w"].sum())
      10

    References:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
      science", 2018, algorithm 1.
    """
    return regrowing(Growth(_draw), sparsity, steps, key, drop=drop, every=every, until=until)


def _draw(seen: Seen) -> jax.Array:
    return jax.random.uniform(seen.key, seen.x.shape)
