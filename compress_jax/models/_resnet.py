"""The small residual networks of He et al. for CIFAR-sized images."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import DType
from compress_jax.models._head import head


class ResNet(nn.Module):
    """Residual network of depth ``6 n + 2``: three stages of n blocks, at widths w, 2 w and 4 w.

    Where a stage changes the shape, the shortcut is a strided 1x1 convolution with batch norm (the
    paper's option B), or with ``projection=False`` subsampling and zero channels (option A, used in
    its CIFAR table). ResNet-20 of width 16 on 32x32x3 images has 272,474
    parameters with projections and 269,722 without.

    Attributes:
      depth: the number of layers with kernels, without projections: 8, 14, 20, 26, 32, 44, 56, ...
      width: the number of channels of the first stage, w.
      classes: the number of logits.
      stem_stride: the stride of the first convolution; with 2 all later layers cost about a
        quarter.
      projection: option B if true, option A if false.
      dtype: the dtype of the layers' computation; logits are float32.
      axis_name: the mapped axis to average batch statistics over. Only `train.pmap_step` needs it
        (``model.clone(axis_name="data")``); under `train.jit_step` statistics are of the whole
        batch.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.ResNet(depth=8, width=4)
      >>> images = jnp.zeros((2, 28, 28, 1))
      >>> variables = jax.jit(model.init)(jax.random.key(0), images)
      >>> sorted(variables)
      ['batch_stats', 'params']
      >>> jax.jit(model.apply)(variables, images).shape
      (2, 10)

    References:
      He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section
      4.2.
    """

    depth: int = 20
    width: int = 16
    classes: int = 10
    stem_stride: int = 1
    projection: bool = True
    dtype: DType = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits ``[batch, classes]``.

        Args:
          x: images ``[batch, height, width, channels]``.
          train: normalize by the statistics of the batch, and update the running averages.
        """
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ArgumentError(
                f"a ResNet of this type has depth 6 n + 2 (8, 14, 20, ...), got depth={self.depth}"
            )
        conv = partial(
            nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal()
        )
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        norm = partial(norm, axis_name=self.axis_name)
        x = conv(self.width, (3, 3), strides=self.stem_stride, name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        # A stage has half the sides and twice the channels of the one before it.
        for stage in range(3):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                width = self.width * 2**stage
                name = f"block_{stage}_{i}"
                x = Block(width, stride, self.projection, conv, norm, name=name)(x)
        return head(self.classes, self.dtype)(x.mean(axis=(1, 2)))


class Block(nn.Module):
    """Basic block: ``relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))``.

    Attributes:
      width: the number of output channels.
      stride: the stride of the first convolution.
      projection: whether a shortcut that changes the shape is a 1x1 convolution; else it is
        subsampling and zero channels.
      conv: makes a convolution from width, window and name.
      norm: makes a normalization layer from its name.
    """

    width: int
    stride: int
    projection: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``[batch, height / stride, width / stride, channels]``."""
        y = self.conv(self.width, (3, 3), strides=self.stride, name="conv_0")(x)
        y = nn.relu(self.norm(name="norm_0")(y))
        y = self.norm(name="norm_1")(self.conv(self.width, (3, 3), name="conv_1")(y))
        return nn.relu(y + self._shortcut(x, y.shape))

    def _shortcut(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if x.shape == shape:
            return x
        if self.projection:
            x = self.conv(self.width, (1, 1), strides=self.stride, name="projection")(x)
            return self.norm(name="projection_norm")(x)
        # Option A: every other pixel, and zeros for the new channels.
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.width - x.shape[-1])))
