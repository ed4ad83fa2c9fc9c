"""Mathematics without parameters that the zoo's Linen and NNX models share."""

import math

import jax
import jax.numpy as jnp


def max_pool(x: jax.Array) -> jax.Array:
    """Return the largest of each 2x2 window of ``[batch, height, width, channels]``."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def heads(x: jax.Array, count: int) -> jax.Array:
    """Return ``[batch, tokens, heads, width]`` of ``[batch, tokens, heads * width]``."""
    return x.reshape(*x.shape[:2], count, -1)


def rope(x: jax.Array) -> jax.Array:
    """Rotate pairs of channels of ``[batch, tokens, heads, width]`` by angles of the position."""
    half = x.shape[-1] // 2
    frequency = 1e4 ** (-jnp.arange(half, dtype=x.dtype) / half)
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None, None] * frequency[None, None, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1
    )


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return ``[batch, tokens, channels]``; keys and values of fewer heads are repeated."""
    k, v = (jnp.repeat(each, q.shape[2] // each.shape[2], axis=2) for each in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1)
