"""A comparison is of the networks' own numbers and texts, whatever else they are compared with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import ArgumentError

TEXT = "to be or not to be that is the question " * 4


@pytest.fixture(scope="module")
def language():
    tokenizer = cj.data.train_tokenizer([TEXT], 40)
    config = cj.models.DecoderConfig(
        tokenizer.size, 8, 1, heads=2, kv_heads=1, head_width=4, hidden=8
    )
    model = cj.models.Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
    return model, params, tokenizer


def test_each_network_is_measured_against_the_first(language):
    model, params, tokenizer = language
    int2 = cj.at("**/kernel", cj.quantize.uniform(2))
    packed = int2.pack(params, int2.init(params))
    text = tokenizer.encode([TEXT])[0]
    networks = {"original": params, "same": params, "int2": packed}
    found = cj.search.compare_language(
        model, networks, tokenizer, texts=[text], context=8, nbytes=len(TEXT)
    )
    values = {
        name: dict(zip(found.measures, own, strict=True)) for name, own in found.values.items()
    }

    def fn(params, tokens):
        return model.apply({"params": params}, tokens)

    alone = cj.train.evaluate.perplexity(
        fn, cj.unpack(packed), [np.asarray(text)], context=8, nbytes=len(TEXT)
    )
    assert values["int2"]["perplexity"] == f"{alone.perplexity:.3f}"
    assert values["int2"]["bits a byte"] == f"{alone.bits_per_byte:.4f}"
    assert values["same"]["KL"] == "0.0000" and values["same"]["same 1st"] == "100.0 %"
    assert float(values["int2"]["KL"]) > 0
    assert values["original"]["KL"] == "-"
    assert found.prompts == () and found.answers == {}


def test_answers_are_what_each_network_writes(language):
    model, params, tokenizer = language
    other = jax.tree.map(lambda x: -x, params)
    both = {"original": params, "negative": other}
    found = cj.search.compare_language(
        model, both, tokenizer, context=8, prompts=("to be", "or"), length=4
    )
    for name, own in both.items():
        prompts = [[*tokenizer.start, *ids] for ids in tokenizer.encode(["to be", "or"])]
        written = cj.models.generate(model, own, prompts, 4).tokens
        assert found.answers[name] == tuple(tokenizer.decode(each) for each in written)
    assert found.measures == ("tokens/s",)


@pytest.mark.parametrize("networks", [{}, {"original": {}}])
def test_nothing_to_compare_is_refused(language, networks):
    model, _, tokenizer = language
    with pytest.raises(ArgumentError, match="give networks, and texts or prompts"):
        cj.search.compare_language(model, networks, tokenizer, context=8)
