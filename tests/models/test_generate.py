"""What a decoder writes: as without a cache, row by row, drawn as asked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, NonFiniteError
from compress_jax.models._decoder.generate import Sampling, drawn

CONFIG = cj.models.DecoderConfig(
    53, 16, 2, heads=4, kv_heads=2, head_width=4, hidden=24, sliding=(True, False), window=4
)
PROMPTS = [[3, 9, 27, 1, 50, 7], [4], [8, 8, 12]]


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scan"])
def decoder(request):
    model = cj.models.Decoder(CONFIG, scan=request.param)
    params = jax.jit(model.init)(jax.random.key(1), jnp.ones((1, 1), jnp.int32))["params"]
    # Larger than at the start, so that the likeliest token depends on what was said.
    return model, jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)


def recomputed(model, params, prompt, steps):
    """Write greedily without a cache: the whole text again for each token."""
    apply = jax.jit(model.apply)
    text = list(prompt)
    for _ in range(steps):
        padded = np.zeros((1, 24), np.int32)  # causal: what follows is not seen
        padded[0, : len(text)] = text
        text.append(int(apply({"params": params}, padded)[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


def test_rows_are_continued_as_each_alone_without_a_cache(decoder):
    model, params = decoder
    written = cj.models.generate(model, params, PROMPTS, 12)
    expected = [recomputed(model, params, prompt, 12) for prompt in PROMPTS]
    assert written.tokens == expected
    assert len({tuple(row) for row in expected}) == 3 and len(set(expected[0])) > 3
    assert written.tokens_per_second > 0


def test_programs_are_compiled_once(decoder):
    model, params = decoder
    from compress_jax.models._decoder import generate

    cj.models.generate(model, params, PROMPTS, 6)
    before = generate._programs.cache_info().misses
    cj.models.generate(model, params, [row[::-1] for row in PROMPTS], 6)
    assert generate._programs.cache_info().misses == before


def test_rows_end_at_their_stop_tokens(decoder):
    model, params = decoder
    whole = cj.models.generate(model, params, PROMPTS, 12).tokens
    stop = [whole[0][3], whole[2][5]]
    written = cj.models.generate(model, params, PROMPTS, 12, stop=stop).tokens
    for row, full in zip(written, whole, strict=True):
        end = next((i for i, t in enumerate(full) if t in stop), 12)
        assert row == full[:end]


def test_a_model_stops_at_its_own_end_unless_told_otherwise(decoder):
    model, params = decoder
    whole = cj.models.generate(model, params, PROMPTS[:1], 12).tokens[0]
    config = dataclasses.replace(model.config, stop=(whole[3],))
    ending = model.clone(config=config)
    written = cj.models.generate(ending, params, PROMPTS[:1], 12)
    assert written.tokens[0] == whole[: whole.index(whole[3])]
    assert cj.models.generate(ending, params, PROMPTS[:1], 12, stop=()).tokens[0] == whole


def test_packed_weights_write_what_their_view_writes(decoder):
    model, params = decoder
    int4 = cj.at("**/kernel", cj.quantize.uniform(4, granularity="channel"))
    state = int4.init(params)
    view = int4.view(params, state)
    packed = int4.pack(params, state)
    ours = cj.models.generate(model, packed, PROMPTS, 8).tokens
    assert ours == cj.models.generate(model, view, PROMPTS, 8).tokens


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(1.0), [0, 1, 2, 3, 4]),
        (Sampling(0.5), [0, 1, 2, 3, 4]),
        (Sampling(2.0, top_k=3), [0, 1, 2]),
        (Sampling(1.0, top_p=0.75), [0, 1, 2]),  # .4 and .3 do not reach it yet
        (Sampling(1.0, top_k=4, top_p=0.3), [0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_is_asked_for(sampling, kept):
    shares = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    powers = shares ** (1 / sampling.temperature)
    expected = np.where(np.isin(np.arange(5), kept), powers, 0)
    expected /= expected.sum()
    logits = jnp.tile(jnp.log(jnp.asarray(shares, jnp.float32))[None], (4000, 1))
    tokens = np.asarray(drawn(logits, sampling, jax.random.key(0)))
    counts = np.bincount(tokens, minlength=5)
    assert not counts[expected == 0].any()
    if len(kept) > 1:
        found = stats.chisquare(counts[kept], 4000 * expected[kept])
        assert found.pvalue > 1e-3


def test_a_seed_decides_what_is_drawn_and_rows_differ(decoder):
    model, params = decoder
    options = {"temperature": 1.5, "top_p": 0.95}
    twice = [[5, 6], [5, 6]]
    one = cj.models.generate(model, params, twice, 10, key=jax.random.key(3), **options).tokens
    assert (
        one == cj.models.generate(model, params, twice, 10, key=jax.random.key(3), **options).tokens
    )
    assert one[0] != one[1]
    assert (
        one != cj.models.generate(model, params, twice, 10, key=jax.random.key(4), **options).tokens
    )


def test_wrong_requests_are_refused(decoder):
    model, params = decoder
    for prompts, options, said in (
        ([[]], {}, "each prompt needs a token"),
        ([[99]], {}, "token 99 is none of the vocabulary of 53"),
        ([[1]], {"temperature": 1.0}, "give a key"),
        ([[1]], {"temperature": -1.0}, "at least 0"),
        ([[1]], {"top_p": 1.5}, "top_p must be above 0"),
        ([[1]], {"top_k": 0}, "top_k"),
    ):
        with pytest.raises(ArgumentError, match=said):
            cj.models.generate(model, params, prompts, 3, **options)
    placed = cj.models.Decoder(
        cj.models.DecoderConfig(9, 8, 1, 2, 2, 4, hidden=8, positions=4), scan=False
    )
    with pytest.raises(ArgumentError, match="more than the 4 learned positions"):
        cj.models.generate(placed, {}, [[1, 2]], 3)
    small = model.cache(1, 3)
    with pytest.raises(ArgumentError, match="do not fit into a cache of 3"):
        model.apply({"params": params}, jnp.ones((1, 4), jnp.int32), cache=small)


def test_what_is_not_finite_or_does_not_fit_is_said(decoder):
    model, params = decoder
    wrong = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(NonFiniteError, match="after a prompt are NaN or infinite"):
        cj.models.generate(model, wrong, [[3]], 2)
    with pytest.raises(ArgumentError, match="temperature"):
        cj.models.generate(model, params, [[3]], 2, temperature=float("nan"))
    with pytest.raises(ArgumentError, match="grid must be a quantize.KVGrid"):
        cj.models.generate(model, params, [[3]], 2, grid=4)
    with pytest.raises(ArgumentError, match="prompts are tokens of each"):
        cj.models.generate(model, params, "once", 2)
    both = [np.array([3, 9]), [4]]
    assert cj.models.generate(model, params, both, 3) is not None
    _, full = model.apply({"params": params}, jnp.array([[3, 9]]), cache=model.cache(1, 2))
    with pytest.raises(ArgumentError, match="1 more tokens do not fit into a cache of 2"):
        model.apply({"params": params}, jnp.array([[4]]), cache=full)
