"""Fisher pruning: the weights whose removal changes the loss least, to second order, are seen as zero."""

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import number
from compress_jax.core.compression import Compression
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import saturate
from compress_jax.prune.masked import Score, Seen, masked
from compress_jax.prune.structures import Structure
from compress_jax.prune.target import Sparsity


def fisher(
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
    decay: float = 0.99,
) -> Compression:
    r"""Prune the weights of smallest second-order effect on the loss, ``w**2 * F / 2``.

    At a minimum the gradient vanishes, and removing a weight costs :math:`w_i^2 H_{ii} / 2`. The diagonal of the Hessian
    is taken to be that of the empirical Fisher matrix, the mean of squared gradients,
    :math:`F \leftarrow d\,F + (1 - d) g^2` from 0; with ``decay=1`` their sum. Squares of a batch's mean gradient stand
    for those of single examples, which scales all of F alike where the batches are of one size.

    `update` needs ``grads``, the gradient at the weights the model used, dense where a mask is on. Until the first update
    everything is kept.

    Args:
      sparsity: as of `magnitude`.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are chosen anew at steps divisible by it; the mean follows every step.
      decay: of the running mean, 0 to 1; 1 for a plain sum.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": mask, "carried": F, float32}``.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> c, params = fisher(0.5), {"w": jnp.array([3.0, 1.0])}
      >>> state = c.update(params, c.init(params), step=0, grads={"w": jnp.array([0.1, -1.0])})
      >>> c.view(params, state)["w"].tolist()
      [0.0, 1.0]

    References:
      LeCun, Denker and Solla, "Optimal Brain Damage", 1989, equation 5.
      Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, equation 6.
    """
    decay = number("decay", decay)
    if not 0 <= decay <= 1:
        raise ArgumentError(f"decay lies between 0 and 1, got {decay}")
    fresh = 1 - decay if decay < 1 else 1.0

    def follow(seen: Seen) -> jax.Array:
        return saturate(decay * seen.carried + fresh * jnp.square(seen.grad.astype(jnp.float32)), jnp.float32)

    def measure(seen: Seen) -> jax.Array:
        squares = saturate(jnp.square(seen.x.astype(jnp.float32)), jnp.float32)  # not infinity, which times 0 is NaN
        return squares * seen.carried * 0.5

    score = Score(measure, lambda seen: jnp.zeros_like(seen.x, jnp.float32), follow, needs_grads=True)
    return masked(score, sparsity, structure, scope=scope, every=every)
