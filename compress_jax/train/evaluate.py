"""Language models on text: perplexity, and how far a compressed one is from the original.

Every token is predicted once, from at least ``context - stride`` tokens before it where there are
so many; sums are kept in float64 and divided last.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ArgumentError, DataError, NonFiniteError, ShapeError
from compress_jax.core.types import Array, Params
from compress_jax.distill import kl
from compress_jax.train._progress import progress

LogitsFn: TypeAlias = Callable[[Params, jax.Array], jax.Array]
"""``(params, tokens [batch, length]) -> logits [batch, length, vocabulary]``."""

Tokens: TypeAlias = Array | Sequence[Array | Sequence[int]]
"""One text, ``[length]``, or several of any lengths, none of which is seen from another."""


class Perplexity(NamedTuple):
    """How well a model predicts texts.

    Attributes:
      perplexity: exp of ``nats``.
      nats: mean negative log-likelihood of a token.
      tokens: how many were predicted.
      bits_per_byte: bits that the model needs for a byte of text; None where the bytes are unknown.
    """

    perplexity: float
    nats: float
    tokens: int
    bits_per_byte: float | None = None


class Agreement(NamedTuple):
    """How far a model's predictions are from another's, on the same texts.

    Attributes:
      kl: mean Kullback-Leibler divergence of a token's prediction from the reference's, in nats.
      top_1: share of tokens for which both find the same token most likely.
      top_k: mean share of the reference's k most likely tokens that are among the model's.
      reference: perplexity of the reference.
      model: perplexity of the model.
      k: of ``top_k``.
    """

    kl: float
    top_1: float
    top_k: float
    reference: Perplexity
    model: Perplexity
    k: int = 5


def perplexity(
    fn: LogitsFn,
    params: Params,
    tokens: Tokens,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 4,
    nbytes: int | None = None,
    title: str = "",
) -> Perplexity:
    r"""Measure how well a model predicts each next token.

    .. math:: \exp\Big(-\frac{1}{N} \sum_t \log p(x_t \mid x_{<t})\Big)

    Args:
      fn: ``(params, tokens) -> logits``, causal: ``lambda p, x: model.apply({"params": p}, x)``.
        Compiled once a function: pass the same one again rather than a new lambda.
      params: its first argument.
      tokens: integers ``[length]``, or several texts.
      context: tokens that the model sees at once.
      stride: by how many tokens windows move on; smaller ones give more context and take longer.
        None for ``context``: windows side by side.
      batch_size: windows at once.
      nbytes: bytes of the texts, for ``bits_per_byte``.
      title: of a progress bar on standard error; empty for none.

    Returns:
      `Perplexity`.

    Raises:
      ArgumentError: for a stride that skips tokens.
      DataError: if there is no token to predict.
      NonFiniteError: if a prediction is not finite.

    Example:
      >>> import compress_jax as cj
      >>> uniform = lambda params, x: jnp.zeros((*x.shape, 8))
      >>> found = cj.train.evaluate.perplexity(uniform, {}, np.arange(7), context=4)
      >>> round(found.perplexity, 4), found.tokens
      (8.0, 6)
    """
    total = np.zeros(2)
    for batch in _shown(title, _batches(tokens, context, stride, batch_size)):
        total += np.asarray(_likelihood(fn, params, *batch), np.float64)
    nats, count = total.tolist()
    return _perplexity(nats, count, nbytes)


def agreement(
    reference_fn: LogitsFn,
    reference_params: Params,
    fn: LogitsFn,
    params: Params,
    tokens: Tokens,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 4,
    k: int = 5,
    nbytes: int | None = None,
    title: str = "",
) -> Agreement:
    r"""Measure how far a model's predictions are from those of a reference, token by token.

    .. math:: \frac{1}{N} \sum_t KL(p_t^{ref} \,\|\, p_t)

    Args:
      reference_fn: as `perplexity` takes it: the original.
      reference_params: its first argument.
      fn: the compressed model.
      params: its first argument.
      tokens: as `perplexity` takes them.
      context: tokens that the models see at once.
      stride: by how many tokens windows move on; None for ``context``.
      batch_size: windows at once.
      k: how many of the likeliest tokens are compared.
      nbytes: bytes of the texts.
      title: of a progress bar on standard error; empty for none.

    Returns:
      `Agreement`.

    Raises:
      ShapeError: if the models have different vocabularies.
      ArgumentError, DataError, NonFiniteError: as `perplexity` does.

    Example:
      >>> import compress_jax as cj
      >>> fn = lambda table, x: table[x]
      >>> table = jax.random.normal(jax.random.key(0), (8, 8))
      >>> found = cj.train.evaluate.agreement(fn, table, fn, table, np.arange(7), context=4, k=2)
      >>> round(found.kl, 6), found.top_1, found.top_k
      (0.0, 1.0, 1.0)
    """
    whole("k", k, 1)
    total = np.zeros(6)
    for batch in _shown(title, _batches(tokens, context, stride, batch_size)):
        sums = _differences(reference_fn, fn, k, reference_params, params, *batch)
        total += np.asarray(sums, np.float64)
    theirs, ours, divergence, first, several, count = total.tolist()
    one = _perplexity(theirs, count, nbytes)
    other = _perplexity(ours, count, nbytes)
    return Agreement(divergence / count, first / count, several / count, one, other, k)


def _perplexity(total: float, count: float, nbytes: int | None) -> Perplexity:
    if not math.isfinite(total):
        raise NonFiniteError("a prediction is NaN or infinite; look at the model's logits")
    nats = float(total / count)
    bits = None if nbytes is None else float(total / math.log(2) / nbytes)
    perplexity = math.exp(nats) if nats < 700 else math.inf
    return Perplexity(perplexity, nats, int(count), bits)


Windows: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Tokens ``[batch_size, context + 1]``, and which places of the first ``context`` count."""


def _shown(title: str, batches: list[Windows]) -> Iterator[Windows]:
    """Yield batches, with a progress bar if it has a title."""
    with progress(title, len(batches)) if title else contextlib.nullcontext() as report:
        for number, batch in enumerate(batches, 1):
            yield batch
            if report is not None:
                report(number, {})


def _batches(tokens: Tokens, context: int, stride: int | None, batch_size: int) -> list[Windows]:
    """Return windows, and which of their tokens count as predicted."""
    whole("context", context, 1)
    whole("batch_size", batch_size, 1)
    step = context if stride is None else stride
    whole("stride", step, 1)
    if step > context:
        raise ArgumentError(f"stride={step} skips tokens: it must be at most context={context}")
    rows = [row for text in _texts(tokens) for row in _windows(text, context, step)]
    if not rows:
        raise DataError("there is no token to predict: a text needs two tokens")
    # Texts that are shorter than a window, or fewer than a batch, are not padded to one.
    batch_size = min(batch_size, len(rows))
    context = max(len(window) for window, _ in rows) - 1
    found = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        windows = np.zeros((batch_size, context + 1), np.int32)
        counts = np.zeros((batch_size, context), bool)
        for i, (window, first) in enumerate(part):
            windows[i, : len(window)] = window
            counts[i, first : len(window) - 1] = True
        found.append((windows, counts))
    return found


def _texts(tokens: Tokens) -> list[np.ndarray]:
    one = isinstance(tokens, np.ndarray | jax.Array) and tokens.ndim == 1
    one |= (
        not isinstance(tokens, np.ndarray | jax.Array)
        and bool(len(tokens))
        and not np.ndim(tokens[0])
    )
    texts = [np.asarray(each) for each in ([tokens] if one else tokens)]
    for text in texts:
        if text.ndim != 1 or (text.size and not np.issubdtype(text.dtype, np.integer)):
            raise ShapeError(f"a text is integers [length], got {text.dtype}{list(text.shape)}")
    return texts


def _windows(text: np.ndarray, context: int, step: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield windows of a text, and where the tokens begin whose next one is not yet predicted."""
    done = 0  # tokens that were predicted, the first of the text left out
    start = 0
    while done < len(text) - 1:
        window = text[start : start + context + 1]
        yield window, done - start
        done = start + len(window) - 1
        start += step


def _nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the negative log-probability of each target, float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


@partial(jax.jit, static_argnums=0)
def _likelihood(fn: LogitsFn, params: Params, windows: jax.Array, counts: jax.Array) -> jax.Array:
    nats = _nats(fn(params, windows[:, :-1]), windows[:, 1:])
    return jnp.stack([jnp.sum(nats, where=counts), counts.sum().astype(jnp.float32)])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _differences(
    reference_fn: LogitsFn,
    fn: LogitsFn,
    k: int,
    reference_params: Params,
    params: Params,
    windows: jax.Array,
    counts: jax.Array,
) -> jax.Array:
    """Return sums: both models' nats, divergence, equal first tokens, equal first k, tokens."""
    theirs = reference_fn(reference_params, windows[:, :-1])
    ours = fn(params, windows[:, :-1])
    if theirs.shape != ours.shape:
        raise ShapeError(
            f"the reference has logits {theirs.shape} and the model {ours.shape}: they cannot be "
            "compared token by token"
        )
    if k > ours.shape[-1]:
        raise ArgumentError(f"k={k} is more than the vocabulary of {ours.shape[-1]}")
    first = jax.lax.top_k(theirs, k)[1]  # [batch, context, k]
    other = jax.lax.top_k(ours, k)[1]
    common = (first[..., :, None] == other[..., None, :]).any(-1).mean(-1)
    alike = first[..., 0] == other[..., 0]
    targets = windows[:, 1:]
    parts = (_nats(theirs, targets), _nats(ours, targets), kl(ours, theirs), alike, common, counts)
    return jnp.stack([jnp.sum(x, where=counts, dtype=jnp.float32) for x in parts])
