"""What language models predict and write, side by side."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError, ConfigError
from compress_jax.core.packed import unpack
from compress_jax.core.types import Array, JsonObject, Params
from compress_jax.data import ChatTemplate, Tokenizer, chat
from compress_jax.models import Decoder, fitted, generate
from compress_jax.train.evaluate import Agreement, LogitsFn, Perplexity, agreement, perplexity


class Comparison(NamedTuple):
    """What networks answer, side by side, for people to read.

    Attributes:
      measures: what was measured, such as ``("perplexity", "KL")``.
      values: by name of a network the text of each measure; ``"-"`` for none.
      prompts: what was asked.
      answers: by name of a network its answer to each prompt.

    Example:
      >>> import compress_jax as cj
      >>> values = {"student": ("46.3",), "int4": ("52.2",)}
      >>> answers = {"student": ("yes",), "int4": ("no",)}
      >>> found = cj.search.Comparison(("perplexity",), values, ("Is it so?",), answers)
      >>> list(found.record())
      ['measures', 'values', 'prompts', 'answers']
    """

    measures: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    prompts: tuple[str, ...] = ()
    answers: Mapping[str, tuple[str, ...]] = {}

    def checked(self) -> "Comparison":
        """Return it; raise a ConfigError if its rows do not fit its measures and prompts."""
        for rows, columns, what in (
            (self.values, self.measures, "measures"),
            (self.answers, self.prompts, "prompts"),
        ):
            wrong = [name for name, own in rows.items() if len(own) != len(columns)]
            if wrong:
                raise ConfigError(
                    f"Comparison: {wrong[0]!r} has {len(rows[wrong[0]])} entries for "
                    f"{len(columns)} {what}"
                )
        return self

    def record(self) -> JsonObject:
        """Return it as JSON takes it."""
        return {
            "measures": list(self.measures),
            "values": {name: list(own) for name, own in self.values.items()},
            "prompts": list(self.prompts),
            "answers": {name: list(own) for name, own in self.answers.items()},
        }


def compare_language(
    model: Decoder,
    networks: Mapping[str, Params],
    tokenizer: Tokenizer,
    *,
    context: int,
    texts: Sequence[Array | Sequence[int]] = (),
    prompts: Sequence[str] = (),
    template: ChatTemplate | None = None,
    length: int = 64,
    stride: int | None = None,
    nbytes: int | None = None,
) -> Comparison:
    """Compare language models with the first of them: predictions, texts, tokens a second.

    Args:
      model: the decoder.
      networks: the params of each by name, arrays or packed, of the decoder or of one that was
        shrunk, see `models.fitted`; the first is the original.
      tokenizer: theirs.
      context: tokens that they see at once.
      texts: tokens of each text that they are measured on.
      prompts: beginnings that they continue, with the likeliest tokens.
      template: of chats, see `models.chat_template`: prompts are then what a user says.
      length: tokens to write after each.
      stride: by how many tokens windows move on; None for ``context``.
      nbytes: bytes of the texts, for bits a byte; None where they are unknown.

    Returns:
      A `Comparison`: perplexity and bits a byte; for all but the first also the mean KL divergence
      of a token's prediction, the share of tokens for which both find the same one most likely, and
      the mean share of the original's five that are among the network's; tokens a second.

    Raises:
      ArgumentError: without texts and prompts, or without networks.

    Example:
      >>> import compress_jax as cj
      >>> tokenizer = cj.data.train_tokenizer(["to be or not to be"], 30)
      >>> size = tokenizer.size
      >>> config = cj.models.DecoderConfig(size, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=8)
      >>> model = cj.models.Decoder(config)
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
      >>> both = {"original": params, "the same": params}
      >>> found = cj.search.compare_language(model, both, tokenizer, context=8, texts=[[3, 4, 5]])
      >>> dict(zip(found.measures, found.values["the same"]))["KL"]
      '0.0000'
    """
    if not networks or not (texts or prompts):
        raise ArgumentError("give networks, and texts or prompts to compare them on")
    dense = jax.jit(unpack)
    fits = {name: fitted(model, dense(params)) for name, params in networks.items()}
    options = {"context": context, "stride": stride, "nbytes": nbytes}
    original, *others = networks
    columns: dict[str, dict[str, str]] = {name: {} for name in networks}
    answers: dict[str, tuple[str, ...]] = {}
    if texts and not others:
        title = f"perplexity of {original}"
        found = perplexity(*_function(fits[original]), texts, title=title, **options)
        columns[original] |= _likelihood(found)
    for name in others if texts else ():
        both = (*_function(fits[original]), *_function(fits[name]))
        found = agreement(*both, texts, title=f"comparing {name}", **options)
        columns[original] |= _likelihood(found.reference)
        columns[name] |= _likelihood(found.model) | _likeness(found)
    if prompts:
        begun = _begun(tokenizer, prompts, template)
        for name, (own, params) in fits.items():
            written = generate(own, params, begun, length)
            answers[name] = tuple(tokenizer.decode(each) for each in written.tokens)
            columns[name]["tokens/s"] = f"{written.tokens_per_second:.1f}"
    # The last network has every measure, in order: likeness is not one of the first.
    measures = tuple(columns[[*networks][-1]])
    values = {name: tuple(own.get(key, "-") for key in measures) for name, own in columns.items()}
    return Comparison(measures, values, tuple(prompts), answers)


def _function(network: tuple[Decoder, Params]) -> tuple[LogitsFn, Params]:
    """Return a decoder's logits as a function of params and tokens, and the params."""
    model, params = network

    def fn(params: Params, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, tokens))

    return fn, params


def _begun(
    tokenizer: Tokenizer, prompts: Sequence[str], template: ChatTemplate | None
) -> list[list[int]]:
    """Return the tokens that stand before each answer."""
    if template is None:
        return [[*tokenizer.start, *ids] for ids in tokenizer.encode(prompts)]
    # A template writes the tokens that begin a text itself.
    said = [chat(template, [{"role": "user", "content": prompt}]) for prompt in prompts]
    return tokenizer.encode(said, special=True)


def _likelihood(found: Perplexity) -> dict[str, str]:
    cells = {"perplexity": f"{found.perplexity:.3f}"}
    if found.bits_per_byte is not None:
        cells["bits a byte"] = f"{found.bits_per_byte:.4f}"
    return cells


def _likeness(found: Agreement) -> dict[str, str]:
    return {
        "KL": f"{found.kl:.4f}",
        "same 1st": f"{100 * found.top_1:.1f} %",
        f"same {found.k}": f"{100 * found.top_k:.1f} %",
    }
