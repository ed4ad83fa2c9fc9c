"""A depthwise convolution as a sum of shifted products, which is faster to train on a CPU."""

from functools import reduce

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType


class ShiftedDepthwise(nn.Module):
    """A depthwise convolution with padding "SAME", as a sum of shifted products.

    Its parameters are those of ``nn.Conv(width, (window, window), feature_group_count=width)``.

    Attributes:
      width: the number of channels.
      window: the side of the square window.
      stride: in both directions.
      use_bias: whether to add a bias.
      dtype: the dtype of the computation.
    """

    width: int
    window: int = 3
    stride: int = 1
    use_bias: bool = True
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``[batch, ceil(height / stride), ceil(width / stride), channels]``."""
        side = self.window
        kernel = self.param("kernel", nn.initializers.he_normal(), (side, side, 1, self.width))
        kernel = kernel.astype(self.dtype)
        padding = jax.lax.padtype_to_pads(x.shape[1:3], (side, side), (self.stride,) * 2, "SAME")
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), *padding, (0, 0)))
        height, width = (-(-n // self.stride) for n in x.shape[1:3])
        # The last place of each axis that a window begins at, and one.
        rows, columns = ((n - 1) * self.stride + 1 for n in (height, width))
        products = []
        for i in range(side):
            for j in range(side):
                # kernel[i, j] weighs one pixel of each window, for all channels at once.
                shifted = padded[:, i : i + rows : self.stride, j : j + columns : self.stride]
                products.append(shifted * kernel[i : i + 1, j : j + 1])
        total = reduce(jnp.add, products)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
            total = total + bias[None, None, None]
        return total
