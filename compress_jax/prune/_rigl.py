"""RigL: sparse training whose weights are grown where the gradient is largest."""

import jax
import optax

from compress_jax.core.compression import Compression
from compress_jax.prune.masked import Seen
from compress_jax.prune.regrow import Growth, regrowing
from compress_jax.prune.target import Sparsity


def rigl(
    sparsity: Sparsity,
    steps: int,
    key: jax.Array,
    *,
    drop: float | optax.Schedule = 0.3,
    every: int = 100,
    until: float = 0.75,
) -> Compression:
    """Train sparse from the start: the smallest kept weights are replaced by those of largest gradient.

    See `regrowing` for the rule. `update` needs ``grads``, the gradient at the weights the model used, dense where a mask is
    on. A weight that was just dropped may be grown again. With a rising schedule it prunes gradually and regrows (GraNet).

    Args:
      sparsity: as of `magnitude`: a number, a schedule, or a map such as `erk` returns.
      steps: length of the training.
      key: typed PRNG key of the first mask.
      drop: the first drop fraction, falling by a cosine; or a schedule of it.
      every: weights are replaced at steps divisible by it.
      until: share of the training after which the mask stays.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "grown": what the last update grew}``.

    Raises:
      ValueError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> c, params = rigl(0.75, 100, jax.random.key(0), every=1), {"w": jnp.ones(4)}
      >>> state = c.update(params, c.init(params), step=1, grads={"w": jnp.ones(4)})
      >>> int(c.view(params, state)["w"].sum())
      1

    References:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, algorithm 1.
      Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", 2021 (GraNet).
    """
    return regrowing(Growth(_slope, needs_grads=True), sparsity, steps, key, drop=drop, every=every, until=until)


def _slope(seen: Seen) -> jax.Array:
    return seen.grad
