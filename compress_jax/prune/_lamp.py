"""LAMP: one threshold for all layers, on magnitudes relative to what else is left of their layer."""

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression
from compress_jax.prune.masked import Score, Seen, masked
from compress_jax.prune.target import Sparsity


def lamp(sparsity: Sparsity, *, every: int = 1) -> Compression:
    r"""Prune the weights of lowest layer-adaptive magnitude, over all leaves together.

    With a layer's weights in ascending order of magnitude, weight u scores
    :math:`w_u^2 / \sum_{v \ge u} w_v^2`: within a layer the order is that of magnitudes, the largest weight of each layer
    scores 1, and no layer vanishes before all have only one weight left. How many each layer loses is the allocation of
    LAMP; `shares` tells it, for other methods.

    This sorts every leaf, unlike the other methods: use ``every``, or its `shares` with `magnitude`.

    Args:
      sparsity: share of all weights to prune, a number or a schedule.
      every: masks are chosen anew at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is the mask.

    Raises:
      ValueError: for impossible arguments.

    Example:
      >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([10.0, 11.0])}
      >>> c = lamp(0.5)
      >>> [x.tolist() for x in c.view(params, c.init(params)).values()]
      [[0.0, 2.0], [0.0, 11.0]]

    References:
      Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", 2021, equation 4.
    """
    return masked(Score(_lamp), sparsity, scope="global", every=every)


def _lamp(seen: Seen) -> jax.Array:
    magnitudes = jnp.abs(seen.x.astype(jnp.float32)).ravel()
    order = jnp.argsort(magnitudes, stable=True)
    squares = jnp.square(magnitudes / jnp.maximum(magnitudes.max(), jnp.finfo(jnp.float32).tiny))[order]
    left = jnp.cumsum(squares[::-1])[::-1]
    scores = jnp.where(left > 0, squares / jnp.where(left > 0, left, 1.0), 0.0)
    return jnp.zeros_like(scores).at[order].set(scores).reshape(seen.x.shape)
