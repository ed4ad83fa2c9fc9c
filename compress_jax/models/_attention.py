"""The two halves of every transformer layer: attention over positions, and a perceptron at each of them."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType

Gelu = Literal["exact", "tanh"]


class Attention(nn.Module):
    """Multi-head self-attention, ``softmax(Q K^T / sqrt(d)) V`` per head; its four kernels are matrices ``[in, out]``.

    The columns of ``query``, ``key`` and ``value`` are grouped by head, as PyTorch implementations
    have them. The softmax is in float32 whatever the rest computes in.

    Attributes:
      heads: how many; they divide the width.
      dtype: what the layers compute in.
    """

    heads: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return ``[batch, length, width]`` of the same; ``mask`` is true where a query (row) may look at a key (column)."""
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"heads={self.heads} do not divide the width {width}")
        split = (*x.shape[:-1], self.heads, width // self.heads)
        query, key, value = (
            nn.Dense(width, dtype=self.dtype, name=n)(x).reshape(split)
            for n in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * (width // self.heads) ** -0.5, key).astype(
            jnp.float32
        )
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        attention = nn.softmax(scores).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, value)
        return nn.Dense(width, dtype=self.dtype, name="out")(mixed.reshape(x.shape))


class Perceptron(nn.Module):
    """Two dense layers, ``up`` and ``down``, with a GELU between them.

    Attributes:
      hidden: units of the first.
      gelu: ``"exact"``, or ``"tanh"`` for its approximation, which small devices compute with fewer
        operations.
      dtype: what the layers compute in.
    """

    hidden: int
    gelu: Gelu = "tanh"
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array in the shape of ``x``."""
        hidden = nn.Dense(self.hidden, dtype=self.dtype, name="up")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(
            nn.gelu(hidden, approximate=self.gelu == "tanh")
        )


class PreNorm(nn.Module):
    """The layer of ViT and GPT: ``x + attention(norm(x))``, then ``x + perceptron(norm(x))``.

    Attributes:
      heads: of the attention.
      hidden: units of the perceptron.
      gelu: which.
      epsilon: of the layer norms.
      dtype: what the layers compute in.
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
