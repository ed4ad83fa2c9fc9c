"""LeNet-300-100 and LeNet-5, on which most methods of model compression were first shown."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType
from compress_jax.models._head import head

# Max pooling whose gradient is fast on every backend.


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Take the maximum over square windows that do not overlap.

    Where the windows tile the image exactly this is a reshape and a maximum, whose gradient XLA
    computes several times faster on a CPU than that of a window reduction. Among equal maxima it
    shares the gradient equally.

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


def _dense(x: jax.Array, widths: Sequence[int], dtype: DType) -> jax.Array:
    """Apply hidden layers ``dense_0``, ``dense_1``, ... with ReLU."""
    for i, width in enumerate(widths):
        x = nn.relu(nn.Dense(width, dtype=dtype, name=f"dense_{i}")(x))
    return x


class LeNet300100(nn.Module):
    """Fully connected network with two hidden layers, of 300 and 100 units; 266,610 parameters on 28x28 images.

    Attributes:
      classes: number of logits.
      hidden: widths of the hidden layers.
      dtype: what the hidden layers compute in; logits are float32.

    Example:
      >>> model = LeNet300100()
      >>> images = jnp.zeros((2, 28, 28, 1))
      >>> variables = model.init(jax.random.key(0), images)
      >>> model.apply(variables, images).shape
      (2, 10)

    References:
      LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
      1998, section III-C.4.
    """

    classes: int = 10
    hidden: Sequence[int] = (300, 100)
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits ``[batch, classes]`` of inputs ``[batch, ...]``, which are flattened; ``train`` changes nothing."""
        x = _dense(x.reshape(x.shape[0], -1), self.hidden, self.dtype)
        return head(self.classes, self.dtype)(x)


class LeNet5(nn.Module):
    """Two 5x5 convolutions, each with ReLU and 2x2 max pooling, then hidden layers.

    The defaults are LeCun's widths: 61,706 parameters on 32x32x1 images.
    ``features=(20, 50), hidden=(500,)`` on 28x28x1 is the Caffe variant of the compression
    literature, with 431,080.

    Attributes:
      classes: number of logits.
      features: channels of the convolutions.
      hidden: widths of the hidden layers.
      padding: of the convolutions: ``"VALID"`` as published, or ``"SAME"``, which also suits images
        under 16x16.
      dtype: what the layers compute in; logits are float32.

    Example:
      >>> model = LeNet5()
      >>> images = jnp.zeros((2, 28, 28, 1))
      >>> variables = jax.jit(model.init)(jax.random.key(0), images)
      >>> sorted(variables["params"])
      ['conv_0', 'conv_1', 'dense_0', 'dense_1', 'head']

    References:
      LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
      1998, figure 2 (with ReLU for tanh, max pooling for subsampling and a full connection in the
      second convolution, as is usual now).
    """

    classes: int = 10
    features: Sequence[int] = (6, 16)
    hidden: Sequence[int] = (120, 84)
    padding: str = "VALID"
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits ``[batch, classes]`` of images ``[batch, height, width, channels]``; ``train`` changes nothing."""
        for i, width in enumerate(self.features):
            conv = nn.Conv(width, (5, 5), padding=self.padding, dtype=self.dtype, name=f"conv_{i}")
            x = max_pool(nn.relu(conv(x)))
        x = _dense(x.reshape(x.shape[0], -1), self.hidden, self.dtype)
        return head(self.classes, self.dtype)(x)
