"""Straight-through pruning: the model sees pruned weights, and all weights are trained."""

import jax

from compress_jax.core.compression import Compression, CompressionState, Params, bound
from compress_jax.core.describe import describe
from compress_jax.core.paths import flatten
from compress_jax.core.straight_through import straight_through


def ste(compression: Compression) -> Compression:
    """Give the view of a pruning method the derivative of the identity, also where weights are pruned.

    A pruned weight then follows the gradient at its zero, and comes back once it has grown, as the mask is updated.

    Args:
      compression: a method whose view holds masks, such as `magnitude`; what it learns itself gets no gradient.

    Returns:
      The Compression; its values, state and packed form are those of the method.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.prune import magnitude
      >>> c, params = ste(magnitude(0.5)), {"w": jnp.array([1.0, 2.0])}
      >>> jax.grad(lambda p: c.view(p, c.init(params))["w"].sum())(params)["w"].tolist()
      [1.0, 1.0]

    References:
      Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, section 3.
      Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021, section 3.
    """

    def view(params: Params, state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        seen, left = flatten(compression.view(params, state))[0], compression.skipped(params)
        return rebuild({path: x if path in left else _through(x, seen[path]) for path, x in leaves.items()})

    return compression._replace(
        view=view, call=f"ste({describe(compression)})", bind=lambda known: ste(bound(compression, known))
    )


@straight_through
def _through(x: jax.Array, seen: jax.Array) -> jax.Array:
    return seen
