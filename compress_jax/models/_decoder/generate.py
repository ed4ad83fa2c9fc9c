"""Let a decoder write: the prompts at once, then a token at a time from its cache."""

import time
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.arguments import number, whole
from compress_jax.core.errors import ArgumentError, NonFiniteError
from compress_jax.core.packed import unpack
from compress_jax.core.types import Array, Key, Params
from compress_jax.models._decoder.cache import Cache
from compress_jax.models._decoder.decoder import Decoder
from compress_jax.quantize import KVGrid


class Sampling(NamedTuple):
    """How the next token is drawn.

    Attributes:
      temperature: of the distribution; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; None for all.
      top_p: only the likeliest tokens whose probabilities reach p together; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


class Generated(NamedTuple):
    """What a decoder wrote.

    Attributes:
      tokens: of each prompt, those that follow it, up to a stop token, which is left out.
      prefill_seconds: for the prompts, without compilation.
      decode_seconds: for what follows, without compilation.
      tokens_per_second: of what follows, over all rows.
    """

    tokens: list[list[int]]
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


def generate(
    model: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    steps: int,
    *,
    key: Key = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] | None = None,
    grid: KVGrid | None = None,
) -> Generated:
    """Continue prompts, with keys and values of earlier tokens from a cache.

    Rows are independent: a prompt is continued alike whatever stands beside it. All steps are one
    compiled program, which ends early when each row has met a stop token.

    Args:
      model: the decoder.
      params: its weights, arrays or packed.
      prompts: tokens of each; of any lengths, at least one.
      steps: tokens to write, at most.
      key: typed PRNG key, for a temperature above 0.
      temperature: 0 takes the likeliest token.
      top_k: draw from the k likeliest tokens alone.
      top_p: draw from the likeliest tokens whose probabilities reach this share together.
      stop: tokens that end a row; None for those of the model's config.
      grid: of the cache's keys and values in few bits; None for floats.

    Returns:
      `Generated`.

    Raises:
      ArgumentError: for an empty prompt, a missing key, or more tokens than learned positions.
      NonFiniteError: if what the model predicts after a prompt is not finite.

    Example:
      >>> import compress_jax as cj
      >>> config = cj.models.DecoderConfig(50, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=8)
      >>> model = cj.models.Decoder(config)
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
      >>> written = cj.models.generate(model, params, [[3, 4], [7]], steps=5)
      >>> [len(row) for row in written.tokens]
      [5, 5]
    """
    stop = model.config.stop if stop is None else tuple(np.atleast_1d(stop).tolist())
    prompts = _rows(prompts)
    sampling = Sampling(temperature, top_k, top_p)
    _check(model, prompts, steps, sampling, key)
    lengths = np.array([len(each) for each in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    dense = jax.jit(unpack)(params)
    cache = model.cache(len(prompts), int(lengths.max()) + steps, grid=grid)
    key = jax.random.key(0) if key is None else key
    ends = jnp.asarray(stop or [-1], jnp.int32)
    leaves, form = jax.tree.flatten((dense, tokens, lengths, cache, ends, key))
    shapes = tuple(map(_shape, leaves))
    # Modules are hashed by their fields, which types do not say.
    prefill, decode = _programs(model, steps, sampling, shapes, form)  # pyright: ignore
    began = time.perf_counter()
    logits, cache = jax.block_until_ready(prefill(dense, tokens, lengths, cache))
    first = time.perf_counter() - began
    if not np.isfinite(np.asarray(logits)).all():
        raise NonFiniteError("the model's logits after a prompt are NaN or infinite")
    began = time.perf_counter()
    written, count = jax.block_until_ready(decode(dense, logits, cache, ends, key))
    seconds = time.perf_counter() - began
    rows = [_until(row.tolist(), stop) for row in np.asarray(written)]
    rate = len(prompts) * int(count) / max(seconds, 1e-9)
    return Generated(rows, first, seconds, rate)


def _rows(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return prompts as lists of whole numbers."""
    rows = []
    for prompt in prompts:
        row = np.asarray(prompt)
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            raise ArgumentError(
                "prompts are tokens of each, such as tokenizer.encode(['Once upon a time']); one "
                f"of them is {prompt!r:.60}"
            )
        rows.append(row.tolist())
    return rows


def _shape(x: Array) -> jax.ShapeDtypeStruct:
    sharding = x.sharding if isinstance(x, jax.Array) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


@lru_cache(maxsize=16)
def _programs(
    model: Decoder,
    steps: int,
    sampling: Sampling,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    form: Hashable,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return both programs, compiled ahead, so that seconds are those of the work."""
    params, tokens, lengths, cache, ends, key = jax.tree.unflatten(form, leaves)  # pyright: ignore
    prefill = _prefill.lower(model, params, tokens, lengths, cache)
    logits, filled = jax.eval_shape(_prefill, model, params, tokens, lengths, cache)
    decode = _decode.lower(model, steps, sampling, params, logits, filled, ends, key)
    return prefill.compile(), decode.compile()


def _check(
    model: Decoder, prompts: Sequence[Sequence[int]], steps: int, sampling: Sampling, key: Key
) -> None:
    whole("steps", steps, 1)
    if not prompts or not all(len(each) for each in prompts):
        raise ArgumentError("each prompt needs a token; give the one that begins a text")
    number("temperature", sampling.temperature, 0)
    if sampling.temperature and key is None:
        raise ArgumentError("a temperature above 0 draws tokens: give a key, jax.random.key(0)")
    if sampling.top_k is not None:
        whole("top_k", sampling.top_k, 1)
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ArgumentError(f"top_p must be above 0 and at most 1, got {sampling.top_p}")
    vocabulary = model.config.vocabulary
    bad = [t for prompt in prompts for t in prompt if not 0 <= t < vocabulary]
    if bad:
        raise ArgumentError(f"token {bad[0]} is none of the vocabulary of {vocabulary:,}")
    most = model.config.positions
    longest = max(map(len, prompts)) + steps
    if most is not None and longest > most:
        raise ArgumentError(f"{longest} tokens are more than the {most} learned positions")


def _until(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Return the tokens before the first stop token; -1 was never written."""
    end = next((i for i, t in enumerate(tokens) if t in stop or t < 0), len(tokens))
    return tokens[:end]


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _prefill(
    model: Decoder, params: Params, tokens: jax.Array, lengths: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Return the logits after each prompt, ``[batch, vocabulary]``, and the cache with it."""
    found: Any = model.apply(
        {"params": params}, tokens, cache=cache, at=lengths - 1, lengths=lengths
    )
    # What the padding left in the cache is overwritten before it can be seen.
    logits, filled = found
    return logits[:, 0], filled


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    model: Decoder,
    steps: int,
    sampling: Sampling,
    params: Params,
    logits: jax.Array,
    cache: Cache,
    ends: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return tokens ``[batch, steps]``, -1 where none was written, and how many steps were run."""
    rows = len(logits)
    written = jnp.full((rows, steps), -1, jnp.int32)

    def going(state: tuple) -> jax.Array:
        i, done, *_ = state
        return (i < steps) & ~done.all()

    def step(state: tuple) -> tuple:
        i, done, written, logits, cache = state
        token = drawn(logits, sampling, jax.random.fold_in(key, i))
        written = written.at[:, i].set(jnp.where(done, -1, token))
        done |= (token[:, None] == ends[None]).any(-1)
        logits, cache = model.apply({"params": params}, token[:, None], cache=cache)
        return i + 1, done, written, logits[:, 0], cache

    begin = (jnp.int32(0), jnp.zeros(rows, bool), written, logits, cache)
    count, _, written, _, _ = jax.lax.while_loop(going, step, begin)
    return written, count


def drawn(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Draw a token of each row, int32 ``[batch]``.

    Args:
      logits: ``[batch, vocabulary]``.
      sampling: how.
      key: typed PRNG key; each row has its own part of it.

    Example:
      >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
      >>> drawn(logits, Sampling(), jax.random.key(0)).tolist()
      [0]
      >>> {int(drawn(logits, Sampling(1.0, top_p=0.6), jax.random.key(i))[0]) for i in range(50)}
      {0, 1}
    """
    if not sampling.temperature:
        return logits.argmax(-1).astype(jnp.int32)
    scaled = logits.astype(jnp.float32) / sampling.temperature
    lowest = jnp.finfo(jnp.float32).min
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(scaled, sampling.top_k)[0][:, -1:]
        scaled = jnp.where(scaled < least, lowest, scaled)
    if sampling.top_p is not None:
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        shares = jax.nn.softmax(ordered)
        before = jnp.cumsum(shares, axis=-1) - shares  # what likelier tokens reach together
        least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        scaled = jnp.where(scaled < least, lowest, scaled)
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(logits)))
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
