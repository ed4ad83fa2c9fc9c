"""Generated sequences: the student learns the teacher's, or is corrected on its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from compress_jax.core.types import Batch
from compress_jax.distill._losses.temperature import bounded

Logits = Callable[[jax.Array], jax.Array]


def generate(
    logits: Logits,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    end: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Continue prompts up to the width of their array, token by token, in one compiled loop.

    ``x[i + 1] ~ softmax(logits(x)[i] / temperature)`` for every position from the prompt's last on.
    Each step runs the model over the whole array: simple, right for any causal model, and as many
    forwards as there are positions. No gradient flows.

    Args:
      logits: ``tokens [batch, width] -> [batch, width, vocabulary]``, causal: position i depends
        on tokens up to i.
      tokens: integers ``[batch, width]``, prompts at the left; what is to the right of them is not
        read.
      lengths: integers ``[batch]``, of the prompts, at least 1.
      key: typed PRNG key.
      temperature: 0 takes the likeliest token: greedy, as sequence-level distillation takes the
        teacher's mode.
      end: the token that ends a sequence; what follows is ``end`` too, and does not count. None:
        none does.

    Returns:
      ``(tokens, mask)``: integers ``[batch, width]``; booleans ``[batch, width]``, at i whether
      token i + 1 was generated: the mask of the losses of logits ``[batch, width, vocabulary]``,
      ``end`` itself included. The last is False.

    Example:
      >>> follow = lambda tokens: 9.0 * jax.nn.one_hot((tokens + 1) % 5, 5)
      >>> prompt, lengths = jnp.array([[2, 0, 0, 0]]), jnp.array([2])
      >>> tokens, mask = generate(follow, prompt, lengths, jax.random.key(0), temperature=0.0)
      >>> tokens.tolist(), mask.tolist()
      ([[2, 0, 1, 2]], [[False, True, True, False]])

    References:
      Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, section 3.2 (there by beam
      search).
    """
    width = tokens.shape[1]

    def one(
        carry: tuple[jax.Array, jax.Array], at: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        tokens, ended = carry
        z = bounded(jax.lax.stop_gradient(logits(tokens))[:, at])  # [batch, vocabulary]
        if temperature == 0:
            drawn = z.argmax(-1)
        else:
            drawn = jax.random.categorical(jax.random.fold_in(key, at), z / temperature)
        drawn = drawn.astype(tokens.dtype)  # [batch]
        own = (at + 1 >= lengths) & ~ended  # [batch], whether token at + 1 is generated
        # Otherwise the prompt goes on, or the sequence has ended and is filled with `end`.
        after = tokens[:, at + 1]
        if end is not None:
            after = jnp.where(ended, jnp.asarray(end, tokens.dtype), after)
        new = jnp.where(own, drawn, after)
        if end is not None:
            ended = ended | (own & (drawn == end))
        return (tokens.at[:, at + 1].set(new), ended), own

    start = (tokens, jnp.zeros(len(tokens), bool))
    (tokens, _), own = jax.lax.scan(one, start, jnp.arange(width - 1))
    # The scan stacked own as [width - 1, batch]; no logits predict a token beyond the last.
    return tokens, jnp.concatenate([own.T, jnp.zeros((len(tokens), 1), bool)], axis=1)


def next_tokens(tokens: jax.Array) -> jax.Array:
    """Return the labels of causal logits: the next token, at the last position the token itself.

    Args:
      tokens: integers ``[batch, width]``.

    Returns:
      integers ``[batch, width]``.

    Example:
      >>> next_tokens(jnp.array([[3, 4, 5]])).tolist()
      [[4, 5, 5]]
    """
    return jnp.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1)


def on_policy(
    fraction: float | jax.Array = 1.0,
    *,
    temperature: float = 1.0,
    end: int | None = None,
    tokens: str = "tokens",
    length: str = "length",
    labels: str = "label",
    mask: str = "mask",
) -> Callable[[jax.Array, Batch, Logits], Batch]:
    """Return a function that replaces some answers of a batch by samples from the student.

    With probability ``fraction`` an example becomes its prompt continued by the current student,
    which the teacher then corrects; the loss is any divergence of tokens, as
    ``partial(jsd, beta=0.9)`` or `reverse_kl`, over the mask. Sampling has no gradient.

    Args:
      fraction: share of examples that are the student's own, 0 to 1; the others stay as they are.
      temperature: of the samples.
      end: the token that ends a sequence, see `generate`.
      tokens: the batch's entry with integers ``[batch, width]``.
      length: with the prompts' lengths ``[batch]``.
      labels: with the next tokens ``[batch, width]``, written anew.
      mask: with what counts ``[batch, width]``, written anew.

    Returns:
      ``(key, batch, logits) -> batch``, for ``distillation(..., resample=...)``.

    Example:
      >>> batch = {"tokens": jnp.array([[2, 0, 0]]), "length": jnp.array([1])}
      >>> batch["mask"] = jnp.ones((1, 3), bool)
      >>> follow = lambda tokens: 99.0 * jax.nn.one_hot((tokens + 1) % 5, 5)
      >>> on_policy()(jax.random.key(0), batch, follow)["tokens"].tolist()
      [[2, 3, 4]]

    References:
      Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
      Mistakes", ICLR 2024, algorithm 1 (there the choice is of whole batches).
    """

    def resample(key: jax.Array, batch: Batch, logits: Logits) -> Batch:
        first, second = jax.random.split(key)
        drawn, own = generate(
            logits, batch[tokens], batch[length], first, temperature=temperature, end=end
        )
        chosen = jax.random.bernoulli(second, fraction, (len(drawn), 1))
        new = jnp.where(chosen, drawn, batch[tokens])
        counts = jnp.where(chosen, own, batch[mask].astype(bool))
        return {**batch, tokens: new, labels: next_tokens(new), mask: counts}

    return resample
