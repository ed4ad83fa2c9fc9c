"""Random pruning, the baseline: weights drawn by lot are seen as zero."""

from typing import Any

import jax

from compress_jax.core.compression import Compression
from compress_jax.core.leafwise import fold_path
from compress_jax.prune.masked import Score, Seen, masked
from compress_jax.prune.structures import Structure
from compress_jax.prune.target import Sparsity


def random(
    sparsity: Sparsity | None, key: jax.Array, structure: Structure | None = None, *, scope: str = "leaf", every: int = 1
) -> Compression:
    """Prune weights drawn at random, exactly as many as the sparsity says.

    Each weight draws a number once, from the key and the leaf's name; the lowest are pruned. So the mask stays as it is
    while the sparsity stays (static sparse training), and with a rising one nothing comes back.

    Args:
      sparsity: as of `magnitude`.
      key: typed PRNG key, from ``jax.random.key(seed)``.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"`` or ``"global"``.
      every: masks are looked at anew at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is the mask.

    Raises:
      ValueError: for impossible arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> c, params = random(0.75, jax.random.key(0)), {"w": jnp.ones((4, 5))}
      >>> int(c.view(params, c.init(params))["w"].sum())
      5

    References:
      Liu et al., "The Unreasonable Effectiveness of Random Pruning", 2022.
    """

    def measure(seen: Seen) -> jax.Array:
        own: Any = fold_path(key, seen.path)
        own = own if seen.layer is None else jax.random.fold_in(own, seen.layer)  # else all layers would have one mask
        return jax.random.uniform(own, seen.x.shape)

    return masked(Score(measure), sparsity, structure, scope=scope, every=every)
