"""The vision transformer."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import DType
from compress_jax.models._attention import Gelu, PreNorm
from compress_jax.models._head import head


class ViT(nn.Module):
    """Vision transformer: patches as tokens, pre-norm layers, a linear classifier.

    The defaults suit 32x32 images. With ``patch=16, classes=1000, pool="token"`` on 224x224x3
    images, ViT-Ti is ``width=192, depth=12, heads=3`` (5,717,416 parameters), ViT-S is
    ``384, 12, 6`` (22,050,664) and ViT-B is ``768, 12, 12`` (86,567,656). There is no dropout.

    Attributes:
      classes: the number of logits.
      patch: the side of a patch in pixels, a divisor of height and width.
      width: the size of a token's vector.
      depth: the number of layers.
      heads: the number of attention heads.
      hidden: the number of hidden units of the perceptrons; None for 4 times the width.
      pool: the input of the classifier: the ``"mean"`` of all tokens, or a learned ``"token"`` that
        is prepended.
      gelu: ``"tanh"`` (fast everywhere) or ``"exact"``.
      dtype: the dtype of the layers' computation; logits are float32.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.ViT(width=16, depth=1, heads=2)
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> variables = jax.jit(model.init)(jax.random.key(0), images)
      >>> jax.jit(model.apply)(variables, images).shape
      (2, 10)

    References:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, equations 1 to 4; Touvron et
      al., "Training data-efficient image transformers", ICML 2021, table 1, for the smaller widths.
    """

    classes: int = 10
    patch: int = 4
    width: int = 192
    depth: int = 6
    heads: int = 3
    hidden: int | None = None
    pool: Literal["mean", "token"] = "mean"
    gelu: Gelu = "tanh"
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return logits ``[batch, classes]``.

        Args:
          x: images ``[batch, height, width, channels]``.
          train: has no effect.
        """
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ArgumentError(
                f"patches of {self.patch} pixels do not tile images of {x.shape[1]}x{x.shape[2]}"
            )
        side = (self.patch, self.patch)
        conv = partial(nn.Conv, padding="VALID", dtype=self.dtype, name="patches")
        x = conv(self.width, side, strides=side)(x)  # [batch, rows, columns, width]
        x = x.reshape(x.shape[0], -1, self.width)  # [batch, patches, width]
        if self.pool == "token":
            # [batch, 1 + patches, width]
            token = self.param("token", nn.initializers.zeros, (1, 1, self.width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + positions.astype(x.dtype)
        hidden = self.hidden or 4 * self.width
        for i in range(self.depth):
            x = PreNorm(self.heads, hidden, self.gelu, dtype=self.dtype, name=f"layer_{i}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        # [batch, width]
        pooled = x[:, 0] if self.pool == "token" else x.mean(axis=1)
        return head(self.classes, self.dtype)(pooled)
