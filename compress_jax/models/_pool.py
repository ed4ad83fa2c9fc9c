"""Max pooling whose gradient is fast on every backend."""

import jax
from flax import linen as nn


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Take the maximum over square windows that do not overlap.

    Where the windows tile the image exactly this is a reshape and a maximum, whose gradient XLA computes several times
    faster on a CPU than that of a window reduction. Among equal maxima it shares the gradient equally.

    Args:
      x: images ``[batch, height, width, channels]``.
      window: side of the window and distance between windows, in pixels.

    Returns:
      ``[batch, height // window, width // window, channels]``.

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, ..., 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    batch, height, width, channels = x.shape
    if height % window or width % window:
        return nn.max_pool(x, (window, window), strides=(window, window))
    tiles = x.reshape(batch, height // window, window, width // window, window, channels)
    return tiles.max(axis=(2, 4))
