"""The vision transformer."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType
from compress_jax.models._attention import Gelu, PreNorm
from compress_jax.models._head import head


class ViT(nn.Module):
    """Vision transformer: square patches become tokens, pre-norm layers mix them, a linear layer reads the result.

    The defaults suit 32x32 images. With ``patch=16, classes=1000, pool="token"`` on 224x224x3
    images, ViT-Ti is ``width=192, depth=12, heads=3`` (5,717,416 parameters), ViT-S is
    ``384, 12, 6`` (22,050,664) and ViT-B is ``768, 12, 12`` (86,567,656). There is no dropout.

    Attributes:
      classes: number of logits.
      patch: side of a patch in pixels; it divides height and width.
      width: numbers a token holds.
      depth: number of layers.
      heads: heads of attention.
      hidden: units of the perceptrons; None for 4 times the width.
      pool: what the last layer reads: the ``"mean"`` of all tokens, or a ``"token"`` of its own
        that is prepended.
      gelu: ``"tanh"`` (fast everywhere) or ``"exact"``.
      dtype: what the layers compute in; logits are float32.

    Example:
      >>> model = ViT(width=16, depth=1, heads=2)
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
        """Return logits of images ``[batch, height, width, channels]``; ``train`` changes nothing."""
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"patches of {self.patch} pixels do not tile images of {x.shape[1]}x{x.shape[2]}"
            )
        side = (self.patch, self.patch)
        x = nn.Conv(
            self.width, side, strides=side, padding="VALID", dtype=self.dtype, name="patches"
        )(x)
        x = x.reshape(x.shape[0], -1, self.width)
        if self.pool == "token":
            token = self.param("token", nn.initializers.zeros, (1, 1, self.width)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + positions.astype(x.dtype)
        for i in range(self.depth):
            layer = PreNorm(
                self.heads,
                self.hidden or 4 * self.width,
                self.gelu,
                dtype=self.dtype,
                name=f"layer_{i}",
            )
            x = layer(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return head(self.classes, self.dtype)(x[:, 0] if self.pool == "token" else x.mean(axis=1))
