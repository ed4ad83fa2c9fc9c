"""The residual networks for ImageNet-sized images, as torchvision publishes weights of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType
from compress_jax.models._head import head

AROUND: Any = (
    (1, 1),
    (1, 1),
)  # a strided 3x3 window begins one pixel outside, where "SAME" would begin inside


class ImageNetResNet(nn.Module):
    """A 7x7 convolution and pooling, four stages of residual blocks, a linear layer.

    The defaults are ResNet-18 (11,689,512 parameters); ``blocks=(3, 4, 6, 3)`` is ResNet-34
    (21,797,672), and with ``bottleneck=True`` ResNet-50 (25,557,032), whose stride is in the 3x3
    convolution. `pretrained.resnet` fills it.

    Attributes:
      blocks: number of blocks in each stage.
      bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions, four times as wide at their ends, rather
        than of two 3x3.
      width: channels of the first stage.
      classes: number of logits.
      dtype: what the layers compute in; logits are float32.
      axis_name: as of `ResNet`.

    Example:
      >>> model = ImageNetResNet(blocks=(1, 1), width=4)
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
        """Return logits of images ``[batch, height, width, 3]``; ``train`` normalises by the batch itself."""
        conv = partial(
            nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal()
        )
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        norm = partial(norm, axis_name=self.axis_name)
        x = conv(self.width, (7, 7), strides=2, padding=((3, 3), (3, 3)), name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=AROUND)
        for stage, blocks in enumerate(self.blocks):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                block = _Block(
                    self.width * 2**stage,
                    stride,
                    self.bottleneck,
                    conv,
                    norm,
                    name=f"block_{stage}_{i}",
                )
                x = block(x)
        return head(self.classes, self.dtype)(x.mean(axis=(1, 2)))


class _Block(nn.Module):
    """Either block; the shortcut is a strided 1x1 convolution where the shape changes."""

    width: int
    stride: int
    bottleneck: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.width * (4 if self.bottleneck else 1)
        basic = ((self.width, 3, self.stride), (self.width, 3, 1))
        layers = (
            ((self.width, 1, 1), (self.width, 3, self.stride), (wide, 1, 1))
            if self.bottleneck
            else basic
        )
        y = x
        for i, (width, window, stride) in enumerate(layers):
            padding = AROUND if window == 3 else "VALID"
            y = self.conv(
                width, (window, window), strides=stride, padding=padding, name=f"conv_{i}"
            )(y)
            y = self.norm(name=f"norm_{i}")(y)
            y = nn.relu(y) if i < len(layers) - 1 else y
        if self.stride > 1 or x.shape[-1] != wide:
            x = self.conv(wide, (1, 1), strides=self.stride, padding="VALID", name="projection")(x)
            x = self.norm(name="projection_norm")(x)
        return nn.relu(x + y)
