"""Residual networks for ImageNet-sized images, with the layers of torchvision's."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType
from compress_jax.models._head import head

# The padding of a 3x3 window in PyTorch. With a stride "SAME" would pad only at the end.
AROUND: Any = ((1, 1), (1, 1))


class ImageNetResNet(nn.Module):
    """A 7x7 convolution and pooling, four stages of residual blocks, a linear layer.

    The defaults are ResNet-18 (11,689,512 parameters); ``blocks=(3, 4, 6, 3)`` is ResNet-34
    (21,797,672), and with ``bottleneck=True`` ResNet-50 (25,557,032), whose stride is in the 3x3
    convolution. `pretrained.resnet` loads published weights.

    Attributes:
      blocks: the number of blocks in each stage.
      bottleneck: use blocks of 1x1, 3x3 and 1x1 convolutions with four times as many output
        channels; by default blocks of two 3x3 convolutions.
      width: the number of channels of the first stage.
      classes: the number of logits.
      dtype: the dtype of the layers' computation; logits are float32.
      axis_name: as of `ResNet`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.ImageNetResNet(blocks=(1, 1), width=4)
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> sorted(shapes["params"])
      ['block_0_0', 'block_1_0', 'head', 'stem', 'stem_norm']

    References:
      He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
    """

    blocks: Sequence[int] = (2, 2, 2, 2)
    bottleneck: bool = False
    width: int = 64
    classes: int = 1000
    dtype: DType = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits ``[batch, classes]``.

        Args:
          x: images ``[batch, height, width, 3]``.
          train: normalize by the statistics of the batch, and update the running averages.
        """
        conv = partial(
            nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal()
        )
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        norm = partial(norm, axis_name=self.axis_name)
        x = conv(self.width, (7, 7), strides=2, padding=((3, 3), (3, 3)), name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        # [batch, height / 4, width / 4, channels]
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=AROUND)
        for stage, blocks in enumerate(self.blocks):
            for i in range(blocks):
                # Each stage but the first halves the sides in its first block.
                stride = 2 if stage > 0 and i == 0 else 1
                width = self.width * 2**stage
                name = f"block_{stage}_{i}"
                x = _Block(width, stride, self.bottleneck, conv, norm, name=name)(x)
        return head(self.classes, self.dtype)(x.mean(axis=(1, 2)))


class _Block(nn.Module):
    """A basic or bottleneck block; its shortcut is a 1x1 convolution where the shape changes."""

    width: int
    stride: int
    bottleneck: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # The width, window and stride of each convolution.
        if self.bottleneck:
            outputs = 4 * self.width
            layers = ((self.width, 1, 1), (self.width, 3, self.stride), (outputs, 1, 1))
        else:
            outputs = self.width
            layers = ((self.width, 3, self.stride), (self.width, 3, 1))
        y = x
        for i, (width, window, stride) in enumerate(layers):
            padding = AROUND if window == 3 else "VALID"
            side = (window, window)
            y = self.conv(width, side, strides=stride, padding=padding, name=f"conv_{i}")(y)
            y = self.norm(name=f"norm_{i}")(y)
            # The last ReLU comes after the shortcut was added.
            if i < len(layers) - 1:
                y = nn.relu(y)
        if self.stride > 1 or x.shape[-1] != outputs:
            project = partial(self.conv, padding="VALID", name="projection")
            x = project(outputs, (1, 1), strides=self.stride)(x)
            x = self.norm(name="projection_norm")(x)
        return nn.relu(x + y)
