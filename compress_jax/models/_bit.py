"""BiT's residual networks: group norms, standardized kernels, and what is done in which order."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.paths import flatten
from compress_jax.core.types import DType, Params
from compress_jax.models._head import head
from compress_jax.models._imagenet_resnet import AROUND


class BiT(nn.Module):
    """A residual network of the second kind, as of "Big Transfer": norms before convolutions.

    Group norms take the place of batch norms, so that no example depends on its batch, and every
    kernel is standardized where it is used: each output channel has mean 0 and variance 1. The
    defaults are ResNet-50 (25,549,352 parameters); ``blocks=(3, 8, 36, 3), width=128`` is
    ResNet-152x2 (236,335,208). `pretrained.bit` loads published weights.

    What compresses kernels compresses those that are stored, and what is stored is standardized
    after: a pruned weight is not zero in the convolution, but its channel's mean with the other
    sign. `standardized_kernels` and ``standardize=False`` give the same network without that.

    Attributes:
      blocks: the number of blocks in each stage.
      width: the channels of the first stage; 64 times the factor of the name.
      classes: the number of logits.
      groups: of channels that are normalized together, a divisor of the width.
      standardize: whether kernels are standardized where they are used.
      dtype: the dtype of the layers' computation; logits are float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.BiT(blocks=(1, 1), width=4, groups=2)
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> sorted(shapes["params"])
      ['block_0_0', 'block_1_0', 'head', 'norm', 'stem']

    References:
      Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning", ECCV 2020;
      He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016; Qiao et al., "Micro-Batch
      Training with Batch-Channel Normalization and Weight Standardization", 2019, equation 6.
    """

    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    classes: int = 1000
    groups: int = 32
    standardize: bool = True
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits ``[batch, classes]``.

        Args:
          x: images ``[batch, height, width, 3]``; the published weights want pixels from -1 to 1.
          train: has no effect.
        """
        conv = partial(_Conv, standardize=self.standardize, dtype=self.dtype)
        # Variances in two passes, as those of which the published weights are.
        norm = partial(
            nn.GroupNorm, self.groups, epsilon=1e-5, dtype=self.dtype, use_fast_variance=False
        )
        x = conv(self.width, 7, 2, name="stem")(x.astype(self.dtype))
        # Zeros around, not the lowest float: they win where all pixels of a window are negative.
        x = nn.max_pool(jnp.pad(x, ((0, 0), *AROUND, (0, 0))), (3, 3), (2, 2))
        for stage, blocks in enumerate(self.blocks):
            for i in range(blocks):
                # Each stage but the first halves the sides in its first block.
                stride = 2 if stage > 0 and i == 0 else 1
                width = self.width * 2**stage
                x = _Block(width, stride, conv, norm, name=f"block_{stage}_{i}")(x)
        x = nn.relu(norm(name="norm")(x))
        return head(self.classes, self.dtype)(x.mean(axis=(1, 2)))


class _Block(nn.Module):
    """Norm, ReLU and convolution, three times; the shortcut begins after the first ReLU."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        outputs = 4 * self.width
        y = nn.relu(self.norm(name="norm_0")(x))
        if self.stride > 1 or x.shape[-1] != outputs:
            x = self.conv(outputs, 1, self.stride, name="projection")(y)
        y = self.conv(self.width, 1, name="conv_0")(y)
        y = nn.relu(self.norm(name="norm_1")(y))
        y = self.conv(self.width, 3, self.stride, name="conv_1")(y)
        y = nn.relu(self.norm(name="norm_2")(y))
        return x + self.conv(outputs, 1, name="conv_2")(y)


class _Conv(nn.Module):
    """A convolution without a bias, padded around, whose kernel is standardized in float32."""

    width: int
    window: int
    stride: int = 1
    standardize: bool = True
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.window, self.window, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        if self.standardize:
            kernel = _standardized(kernel)
        around = self.window // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            ((around, around), (around, around)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def _standardized(kernel: jax.Array) -> jax.Array:
    """Return a kernel ``[rows, columns, in, out]`` whose outputs have mean 0 and variance 1."""
    axes = (0, 1, 2)
    centered = kernel - kernel.mean(axes, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(axes, keepdims=True) + 1e-10)


def standardized_kernels(params: Params) -> Params:
    r"""Return the params of a `BiT` for ``standardize=False``: the same function of images.

    .. math:: \hat w_o = \frac{w_o - \text{mean}(w_o)}{\sqrt{\text{var}(w_o) + 10^{-10}}}

    of each output channel o of each convolution. A weight that is pruned after is zero in the
    convolution too.

    Args:
      params: of a `BiT`.

    Returns:
      Params of the same shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> kernel = jnp.array([2.0, 4.0]).reshape(1, 1, 2, 1)
      >>> found = cj.models.standardized_kernels({"stem": {"kernel": kernel}})
      >>> found["stem"]["kernel"].ravel().tolist()
      [-1.0, 1.0]
    """
    leaves, rebuild = flatten(params)
    for path, x in leaves.items():
        if path.endswith("/kernel") and x.ndim == 4:
            leaves[path] = _standardized(x)
    return rebuild(leaves)
