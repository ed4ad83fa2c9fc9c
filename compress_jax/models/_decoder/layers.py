"""A decoder's layer: attention with shared heads of keys and values, and a perceptron."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType
from compress_jax.models._decoder.cache import Past, extended
from compress_jax.models._decoder.config import DecoderConfig
from compress_jax.models._decoder.packed_cache import PackedPair, Part
from compress_jax.models._decoder.rope import Angles, rotate

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
}


class View(NamedTuple):
    """What a layer's queries may see.

    Attributes:
      mask: true where a query (row) may attend to a key, ``[batch or 1, 1, 1, length, keys]``.
      angles: of rotary positions; None for none.
    """

    mask: jax.Array
    angles: Angles | None


def norm_of(config: DecoderConfig, dtype: DType, name: str) -> nn.Module:
    """Return a norm of the config's kind."""
    if config.norm == "rms":
        return nn.RMSNorm(config.epsilon, dtype=dtype, name=name)
    return nn.LayerNorm(config.epsilon, dtype=dtype, name=name)


class GroupedAttention(nn.Module):
    """Causal self-attention in which several heads of queries share keys and values.

    Its kernels are matrices ``[in, out]``; the columns of ``query`` are grouped by head, and heads
    that share keys lie side by side. The softmax is in float32 for any ``dtype``.

    Attributes:
      config: the decoder's shape.
      dtype: the dtype of the products.
      scatter: whether a cache is written in place, see `Decoder`.
    """

    config: DecoderConfig
    dtype: DType = jnp.float32
    scatter: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, view: View, past: Past | None = None) -> tuple[jax.Array, Any]:
        """Return an array in the shape of ``x``, and keys and values with those of ``x``.

        Args:
          x: ``[batch, length, width]``.
          view: masks and positions.
          past: keys and values of the tokens before; None for no cache.
        """
        c = self.config
        shape = x.shape[:-1]
        query = self._heads("query", c.heads, x)  # [batch, length, heads, head_width]
        key = self._heads("key", c.kv_heads, x)
        value = self._heads("value", c.kv_heads, x)
        if c.qk_norm:
            query = norm_of(c, self.dtype, "query_norm")(query)
            key = norm_of(c, self.dtype, "key_norm")(key)
        if view.angles is not None:
            query = rotate(query, view.angles)
            key = rotate(key, view.angles)
        seen: Any = (key, value)
        parts = [Part(key, value, view.mask)]
        if past is not None:
            seen, parts = extended(past, key, value, view.mask, self.scatter)
            if isinstance(seen, PackedPair):
                query = seen.grid.rotated(query)
        scale = c.head_width**-0.5 if c.query_scale is None else c.query_scale
        # [batch, length, kv_heads, groups, head_width]
        query = (query * scale).reshape(*shape, c.kv_heads, c.groups, c.head_width)
        mixed = attend(query, parts).reshape(*shape, c.heads * c.head_width)
        out = nn.Dense(c.width, use_bias=c.out_bias, dtype=self.dtype, name="out")(mixed)
        return out, seen

    def _heads(self, name: str, heads: int, x: jax.Array) -> jax.Array:
        c = self.config
        dense = nn.Dense(heads * c.head_width, use_bias=c.qkv_bias, dtype=self.dtype, name=name)
        return dense(x).reshape(*x.shape[:-1], heads, c.head_width)


def attend(query: jax.Array, parts: Sequence[Part]) -> jax.Array:
    """Return the mean of the values that queries see, weighted by the softmax over all parts.

    Args:
      query: ``[batch, length, kv_heads, groups, head_width]``, scaled.
      parts: keys and values.

    Returns:
      An array in the shape of ``query``.

    Example:
      >>> x = jnp.ones((1, 1, 1, 1, 2))
      >>> part = Part(x[0], 3 * x[0], jnp.ones((1, 1, 1, 1, 1), bool))
      >>> attend(x, [part, part._replace(values=5 * x[0])]).tolist()
      [[[[[4.0, 4.0]]]]]
    """
    found = []
    for part in parts:
        scores = jnp.einsum("btkgd,bskd->bkgts", query, part.keys.astype(query.dtype))
        # The lowest float and not -inf: a query that may attend to nothing must not become NaN.
        scores = scores.astype(jnp.float32)
        found.append(jnp.where(part.mask, scores, jnp.finfo(scores.dtype).min))
    scores = found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)
    attention = nn.softmax(scores).astype(query.dtype)
    mixed = []
    begin = 0
    for part in parts:
        own = attention[..., begin : begin + part.keys.shape[1]]
        begin += part.keys.shape[1]
        mixed.append(jnp.einsum("bkgts,bskd->btkgd", own, part.values.astype(query.dtype)))
    return sum(mixed[1:], start=mixed[0])


class GatedPerceptron(nn.Module):
    """``down(activation(gate(x)) * up(x))``, or without a gate ``down(activation(up(x)))``.

    Attributes:
      config: the decoder's shape.
      dtype: the dtype of the products.
    """

    config: DecoderConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array in the shape of ``x``."""
        c = self.config
        activation = ACTIVATIONS[c.activation]

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=c.mlp_bias, dtype=self.dtype, name=name)

        up = dense(c.hidden, "up")(x)
        hidden = activation(dense(c.hidden, "gate")(x)) * up if c.gated else activation(up)
        return dense(c.width, "down")(hidden)


class DecoderLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + perceptron(norm(x))``.

    Attributes:
      config: the decoder's shape.
      dtype: the dtype of the products.
      scatter: whether a cache is written in place, see `Decoder`.
    """

    config: DecoderConfig
    dtype: DType = jnp.float32
    scatter: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, view: View, past: Past | None = None) -> tuple[jax.Array, Any]:
        """Return an array in the shape of ``x``, and keys and values; see `GroupedAttention`."""
        c = self.config
        normed = norm_of(c, self.dtype, "attention_norm")(x)
        y, seen = GroupedAttention(c, self.dtype, self.scatter, name="attention")(
            normed, view, past
        )
        if c.post_norms:
            y = norm_of(c, self.dtype, "attention_post_norm")(y)
        x = x + y
        normed = norm_of(c, self.dtype, "mlp_norm")(x)
        y = GatedPerceptron(c, self.dtype, name="mlp")(normed)
        if c.post_norms:
            y = norm_of(c, self.dtype, "mlp_post_norm")(y)
        return x + y, seen
