"""LeNet-300-100 and LeNet-5, the first benchmarks of most compression methods."""

from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType
from compress_jax.models._head import head


class LeNet300100(nn.Module):
    """Fully connected network with hidden layers of 300 and 100 units.

    It has 266,610 parameters on 28x28 images.

    Attributes:
      classes: the number of logits.
      hidden: the widths of the hidden layers.
      dtype: the dtype of the hidden layers' computation; logits are float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.LeNet300100()
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
        """Return logits ``[batch, classes]``.

        Args:
          x: inputs ``[batch, ...]``, flattened to vectors.
          train: has no effect.
        """
        x = _dense(x.reshape(x.shape[0], -1), self.hidden, self.dtype)
        return head(self.classes, self.dtype)(x)


class LeNet5(nn.Module):
    """Two 5x5 convolutions, each with ReLU and 2x2 max pooling, then hidden layers.

    The defaults are LeCun's widths: 61,706 parameters on 32x32x1 images.
    ``features=(20, 50), hidden=(500,)`` on 28x28x1 is the Caffe variant of the compression
    literature, with 431,080.

    Attributes:
      classes: the number of logits.
      features: the numbers of channels of the convolutions.
      hidden: the widths of the hidden layers.
      padding: the padding of the convolutions: ``"VALID"`` as published, or ``"SAME"``, which also
        suits images smaller than 16x16.
      dtype: the dtype of the layers' computation; logits are float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.LeNet5()
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
        """Return logits ``[batch, classes]``.

        Args:
          x: images ``[batch, height, width, channels]``.
          train: has no effect.
        """
        for i, width in enumerate(self.features):
            conv = nn.Conv(width, (5, 5), padding=self.padding, dtype=self.dtype, name=f"conv_{i}")
            x = max_pool(nn.relu(conv(x)))  # half the sides
        x = _dense(x.reshape(x.shape[0], -1), self.hidden, self.dtype)
        return head(self.classes, self.dtype)(x)


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """Take the maximum over square windows that do not overlap.

    Where the windows tile the image exactly this is a reshape and maxima of two, whose gradient is
    faster on CPU than that of a window reduction. Equal maxima share the gradient.

    Args:
      x: images ``[batch, height, width, channels]``.
      window: the side of the window and the stride, in pixels.

    Returns:
      ``[batch, height // window, width // window, channels]``.

    Example:
      >>> import jax.numpy as jnp
      >>> image = jnp.arange(16.0).reshape(1, 4, 4, 1)
      >>> max_pool(image)[0, ..., 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    batch, height, width, channels = x.shape
    # Rows and columns that fill no window are dropped, as "VALID" padding does.
    if height % window or width % window:
        return nn.max_pool(x, (window, window), strides=(window, window))
    # [batch, rows of windows, window, columns of windows, window, channels]
    tiles = x.reshape(batch, height // window, window, width // window, window, channels)
    # Not tiles.max((2, 4)): its gradient divides by the number of values that equal the largest,
    # and where XLA computes x twice, rounding differently, none does.
    rows = reduce(jnp.maximum, [tiles[:, :, i] for i in range(window)])
    return reduce(jnp.maximum, [rows[:, :, :, i] for i in range(window)])


def _dense(x: jax.Array, widths: Sequence[int], dtype: DType) -> jax.Array:
    """Apply hidden layers ``dense_0``, ``dense_1``, ... with ReLU."""
    for i, width in enumerate(widths):
        x = nn.relu(nn.Dense(width, dtype=dtype, name=f"dense_{i}")(x))
    return x
