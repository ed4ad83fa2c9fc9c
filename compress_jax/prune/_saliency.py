"""Saliency pruning: the weights whose removal changes the loss least, to first order, are seen as zero."""

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import number
from compress_jax.core.compression import Compression
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import saturate
from compress_jax.prune.masked import Score, Seen, masked
from compress_jax.prune.structures import Structure
from compress_jax.prune.target import Sparsity


def saliency(
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
    decay: float = 0.0,
) -> Compression:
    r"""Prune the weights of smallest first-order effect on the loss, ``|w * g|``.

    The Taylor expansion of the loss at ``w_i = 0`` says that removing a weight changes it by :math:`-w_i g_i`. With a
    decay d the score is the running mean :math:`s \leftarrow d\,s + (1 - d) |w g|`, which one noisy batch moves less.

    `update` needs ``grads``, the gradient at the weights the model used, dense where a mask is on. Until the first update
    everything is kept, whatever the sparsity.

    Args:
      sparsity: as of `magnitude`.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights. Units are scored by their entries' scores.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are chosen anew at steps divisible by it; the running mean follows every step.
      decay: of the running mean, 0 to below 1; 0 remembers nothing and stores nothing.

    Returns:
      The Compression. ``fixed[path]`` is the mask, or with a decay ``{"mask": mask, "carried": running mean, float32}``.

    Raises:
      ArgumentError: for impossible arguments; in `update`, if there are no gradients.

    Example:
      >>> c, params = saliency(0.5), {"w": jnp.array([3.0, 1.0])}
      >>> state = c.update(params, c.init(params), step=0, grads={"w": jnp.array([0.1, -1.0])})
      >>> c.view(params, state)["w"].tolist()
      [0.0, 1.0]

    References:
      Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017, equation 7.
      Mozer and Smolensky, "Skeletonization: a technique for trimming the fat from a network", 1988.
    """
    decay = number("decay", decay)
    if not 0 <= decay < 1:
        raise ArgumentError(f"decay lies between 0 and 1, 1 not included, got {decay}")
    if decay == 0:
        return masked(Score(_effect, needs_grads=True), sparsity, structure, scope=scope, every=every)

    def follow(seen: Seen) -> jax.Array:
        return saturate(decay * seen.carried + (1 - decay) * _effect(seen), jnp.float32)

    score = Score(lambda seen: seen.carried, lambda seen: jnp.zeros_like(seen.x, jnp.float32), follow, needs_grads=True)
    return masked(score, sparsity, structure, scope=scope, every=every)


def _effect(seen: Seen) -> jax.Array:
    return jnp.abs(seen.x.astype(jnp.float32) * seen.grad.astype(jnp.float32))
