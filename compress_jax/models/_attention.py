"""The two halves of a transformer layer: self-attention, and a perceptron at each position."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import DType

Gelu = Literal["exact", "tanh"]


class Attention(nn.Module):
    """Multi-head self-attention, ``softmax(Q K^T / sqrt(d)) V`` per head.

    Its four kernels are matrices ``[in, out]``. The columns of ``query``, ``key`` and ``value`` are
    grouped by head, as in PyTorch implementations. The softmax is in float32 for any ``dtype``.

    Attributes:
      heads: the number of heads, a divisor of the width.
      dtype: the dtype of the layers' computation.
    """

    heads: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return an array in the shape of ``x``.

        Args:
          x: ``[batch, length, width]``.
          mask: true where a query (row) may attend to a key (column), broadcast to
            ``[batch, heads, length, length]``; None for everywhere.
        """
        width = x.shape[-1]
        if width % self.heads:
            raise ArgumentError(f"heads={self.heads} do not divide the width {width}")
        split = (*x.shape[:-1], self.heads, width // self.heads)

        def project(name: str) -> jax.Array:
            projected = nn.Dense(width, dtype=self.dtype, name=name)(x)
            return projected.reshape(split)  # [batch, length, heads, width / heads]

        # Scaling the queries is cheaper than scaling the scores, of which there are more.
        query = project("query") * (width // self.heads) ** -0.5
        key = project("key")
        value = project("value")
        # [batch, heads, queries, keys]
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
        # The lowest float and not -inf: a query that may attend to nothing must not become NaN.
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        attention = nn.softmax(scores).astype(value.dtype)
        # [batch, length, heads, width / heads]
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, value)
        return nn.Dense(width, dtype=self.dtype, name="out")(mixed.reshape(x.shape))


class Perceptron(nn.Module):
    """Two dense layers, ``up`` and ``down``, with a GELU between them.

    Attributes:
      hidden: the number of units of the first layer.
      gelu: ``"exact"``, or ``"tanh"`` for its approximation, which needs fewer operations on small
        devices.
      dtype: the dtype of the layers' computation.
    """

    hidden: int
    gelu: Gelu = "tanh"
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array in the shape of ``x``."""
        hidden = nn.Dense(self.hidden, dtype=self.dtype, name="up")(x)
        hidden = nn.gelu(hidden, approximate=self.gelu == "tanh")
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(hidden)


class PreNorm(nn.Module):
    """The layer of ViT and GPT: ``x + attention(norm(x))``, then ``x + perceptron(norm(x))``.

    Attributes:
      heads: the number of attention heads.
      hidden: the number of hidden units of the perceptron.
      gelu: ``"exact"`` or ``"tanh"``, as of `Perceptron`.
      epsilon: the epsilon of the layer norms.
      dtype: the dtype of the layers' computation.
    """

    heads: int
    hidden: int
    gelu: Gelu = "tanh"
    epsilon: float = 1e-6
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return an array in the shape of ``x``."""
        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="attention_norm")(x)
        x = x + Attention(self.heads, self.dtype, name="attention")(y, mask)
        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="mlp_norm")(x)
        return x + Perceptron(self.hidden, self.gelu, self.dtype, name="mlp")(y)
