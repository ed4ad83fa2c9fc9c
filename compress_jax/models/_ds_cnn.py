"""DS-CNN, the depthwise separable network of keyword spotting."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType
from compress_jax.models._depthwise import ShiftedDepthwise
from compress_jax.models._head import head


class DSCNN(nn.Module):
    """A convolution, then blocks of a depthwise 3x3 and a pointwise convolution.

    Each convolution has batch norm and ReLU. The defaults are the small network of MLPerf Tiny on
    49x10x1 spectrograms: 23,756 parameters, 1,152 statistics.

    Attributes:
      classes: the number of logits.
      width: the number of channels.
      blocks: the number of depthwise separable blocks.
      window: the window of the first convolution, in frames and in bands.
      stride: the stride of the first convolution.
      depthwise: how the depthwise convolutions are computed, from the same parameters. ``"conv"``
        is one grouped convolution, which `trace` and exporters recognize. ``"shifts"`` adds nine
        shifted products: equal but for rounding, and faster to train on CPU, where XLA's grouped
        convolution is slow.
      dtype: the dtype of the layers' computation; logits are float32.
      axis_name: as of `ResNet`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.DSCNN(width=8, blocks=1)
      >>> spectrograms = jnp.zeros((2, 49, 10, 1))
      >>> variables = jax.jit(model.init)(jax.random.key(0), spectrograms)
      >>> jax.jit(model.apply)(variables, spectrograms).shape
      (2, 12)

    References:
      Zhang, Suda, Lai and Chandra, "Hello Edge: Keyword Spotting on Microcontrollers", 2017,
      section 4.5; Banbury et al., "MLPerf Tiny Benchmark", 2021.
    """

    classes: int = 12
    width: int = 64
    blocks: int = 4
    window: tuple[int, int] = (10, 4)
    stride: int = 2
    depthwise: Literal["conv", "shifts"] = "conv"
    dtype: DType = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits ``[batch, classes]``.

        Args:
          x: spectrograms ``[batch, frames, bands, 1]``.
          train: normalize by the statistics of the batch, and update the running averages.
        """
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        norm = partial(norm, axis_name=self.axis_name)
        conv = partial(
            nn.Conv, self.width, dtype=self.dtype, kernel_init=nn.initializers.he_normal()
        )
        # [batch, ceil(frames / stride), ceil(bands / stride), width]; blocks keep this shape.
        x = nn.relu(norm(name="stem_norm")(conv(self.window, strides=self.stride, name="stem")(x)))
        for i in range(self.blocks):
            # Either way the kernel is [3, 3, 1, width].
            if self.depthwise == "conv":
                depthwise = conv((3, 3), feature_group_count=self.width, name=f"depthwise_{i}")
            else:
                depthwise = ShiftedDepthwise(self.width, dtype=self.dtype, name=f"depthwise_{i}")
            x = nn.relu(norm(name=f"depthwise_{i}_norm")(depthwise(x)))
            x = nn.relu(norm(name=f"pointwise_{i}_norm")(conv((1, 1), name=f"pointwise_{i}")(x)))
        return head(self.classes, self.dtype)(x.mean(axis=(1, 2)))  # of [batch, width]
