"""A decoder as its cache makes it, on whole texts: what quantized keys and values cost."""

from collections.abc import Callable
from typing import Any

import jax

from compress_jax.core.types import Params
from compress_jax.models._decoder.decoder import Decoder
from compress_jax.quantize import KVGrid


def with_cache(model: Decoder, grid: KVGrid | None) -> Callable[[Params, jax.Array], jax.Array]:
    """Return a decoder that reads texts through a cache.

    Each token attends to earlier ones as if they had come one at a time: to full blocks on the
    grid, to the tokens of its own block in floats.

    Args:
      model: the decoder.
      grid: of keys and values; None for floats.

    Returns:
      ``(params, tokens [batch, length]) -> logits [batch, length, vocabulary]``, as
      `train.evaluate.perplexity` takes it.

    Example:
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(50, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=8)
      >>> model = cj.models.Decoder(config)
      >>> tokens = jax.numpy.arange(9)
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens[None])["params"]
      >>> fn = cj.models.with_cache(model, cj.quantize.KVGrid(block=4))
      >>> cj.train.evaluate.perplexity(fn, params, tokens, context=8).tokens
      8
    """

    def fn(params: Params, tokens: jax.Array) -> jax.Array:
        rows, length = tokens.shape
        cache = model.cache(rows, length, grid=grid)
        logits, _ = model.apply({"params": params}, tokens, cache=cache)
        return logits

    return fn


def cached_step(model: Decoder) -> Callable[..., tuple[jax.Array, ...]]:
    """Return a step of a decoder whose cache goes in and out, for exports.

    `export.to_onnx` and the like take it with ``batch="example"``: the shapes of tokens and cache
    are those of the example. Programs for prompts and for single tokens are two files.

    Args:
      model: the decoder.

    Returns:
      ``(params, tokens, *cache) -> (logits, *cache)``, with the arrays of a `Cache` one by one, as
      `jax.tree.leaves` has them; without scatters.

    Example:
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(50, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=8)
      >>> model = cj.models.Decoder(config)
      >>> tokens = jax.numpy.array([[7]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> step = cj.models.cached_step(model)
      >>> cache = jax.tree.leaves(model.cache(1, capacity=8))
      >>> logits, *cache = step(params, tokens, *cache)
      >>> logits.shape, len(cache), cache[-1].tolist()
      ((1, 1, 50), 3, [1])
    """
    plain = model.clone(scatter=False)
    form = jax.tree.structure(jax.eval_shape(lambda: model.cache(1, 1)))

    def step(params: Params, tokens: jax.Array, *cache: jax.Array) -> tuple[jax.Array, ...]:
        past: Any = jax.tree.unflatten(form, cache)
        found: Any = plain.apply({"params": params}, tokens, cache=past)
        logits, after = found
        return logits, *jax.tree.leaves(after)

    return step
