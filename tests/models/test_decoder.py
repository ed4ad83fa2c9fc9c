"""Decoders against NumPy in float64, against transformers, and against themselves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, ShapeError, WeightsError
from tests.models.decoder_reference import logits, weights

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 24, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "llama": {"model_type": "llama", **SIZES, "num_key_value_heads": 2},
    "llama 3.1, tied": {
        "model_type": "llama", **SIZES, "num_key_value_heads": 2, "rope_theta": 5e5,
        "rope_scaling": LLAMA3, "tie_word_embeddings": True,
    },
    "biases, linear": {
        "model_type": "llama", **SIZES, "num_key_value_heads": 1, "attention_bias": True,
        "mlp_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "mistral": {
        "model_type": "mistral", **SIZES, "num_key_value_heads": 2, "head_dim": 6,
        "sliding_window": 5,
    },
    "qwen2": {
        "model_type": "qwen2", **SIZES, "num_key_value_heads": 2, "use_sliding_window": True,
        "sliding_window": 4, "max_window_layers": 2,
    },
    "qwen3": {"model_type": "qwen3", **SIZES, "num_key_value_heads": 2, "head_dim": 10},
    "gemma": {"model_type": "gemma", **SIZES, "num_key_value_heads": 1, "head_dim": 8},
    "gemma3": {
        "model_type": "gemma3_text", **SIZES, "num_key_value_heads": 1, "head_dim": 8,
        "sliding_window": 4, "sliding_window_pattern": 3, "rope_local_base_freq": 100.0,
        "query_pre_attn_scalar": 12, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4,
        "n_positions": 32,
    },
}  # fmt: skip
TOKENS = np.random.default_rng(5).integers(0, 61, 19)


def quiet(line):
    pass


def written(folder, config, w, shards=1):
    """Write a folder as Hugging Face does."""
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(w)
    if shards == 1:
        safetensors.numpy.save_file(w, folder / "model.safetensors")
        return folder
    places = {}
    for i in range(shards):
        part = {name: w[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, folder / f"model-{i}.safetensors")
        places |= dict.fromkeys(part, f"model-{i}.safetensors")
    index = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(params=list(CONFIGS))
def published(request, tmp_path):
    config = CONFIGS[request.param]
    w = weights(config, np.random.default_rng(0))
    return config, w, written(tmp_path, config, w, shards=3)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_logits_are_those_of_the_papers(published, scan):
    config, w, folder = published
    model, params, tokenizer = cj.models.load(folder, scan=scan, log_fn=quiet)
    assert tokenizer is None
    ours = jax.jit(model.apply)({"params": params}, TOKENS[None])[0]
    theirs = logits(config, w, TOKENS)
    # Rounding of float32 through three layers, against values of this size.
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()
    assert sum(x.size for x in jax.tree.leaves(params)) == sum(
        x.size for name, x in w.items() if not name.endswith(".attn.bias")
    )


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_a_cache_gives_what_the_whole_text_gives(published, scan):
    """In pieces of any lengths, for rows of different lengths."""
    config, w, folder = published
    model, params, _ = cj.models.load(folder, scan=scan, log_fn=quiet)
    apply = jax.jit(model.apply)
    rows = np.stack([TOKENS, TOKENS[::-1]])
    whole = apply({"params": params}, rows)
    cache = model.cache(2, capacity=24)
    found = []
    for begin, end in ((0, 7), (7, 8), (8, 14), (14, 19)):
        part, cache = apply({"params": params}, rows[:, begin:end], cache=cache)
        found.append(part)
    found = jnp.concatenate(found, axis=1)
    assert np.abs(found - whole).max() < 1e-5 * np.abs(whole).max()
    assert cache.length.tolist() == [19, 19]
    # The second row goes on from its seventh token while the first goes on from its last.
    behind = cache._replace(length=jnp.array([19, 7]))
    token = np.stack([TOKENS[:1], rows[1, 7:8]])
    after, _ = apply({"params": params}, token, cache=behind)
    assert np.abs(after[1, 0] - whole[1, 7]).max() < 1e-5 * np.abs(whole).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_are_those_of_transformers(name, tmp_path):
    reason = "needs transformers and torch: pip install transformers torch"
    transformers = pytest.importorskip("transformers", reason=reason)
    torch = pytest.importorskip("torch", reason=reason)
    config = CONFIGS[name]
    w = {
        n: x
        for n, x in weights(config, np.random.default_rng(0)).items()
        if not n.endswith(".attn.bias")
    }
    folder = written(tmp_path, config, w)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        exact = theirs.double()(torch.tensor(TOKENS[None])).logits[0].numpy()
    model, params, _ = cj.models.load(folder, log_fn=quiet)
    ours = model.apply({"params": params}, TOKENS[None])[0]
    assert np.abs(ours - exact).max() < 2e-5 * np.abs(exact).max()


def test_params_are_read_straight_into_their_shards(tmp_path):
    config = CONFIGS["llama"]
    w = weights(config, np.random.default_rng(0))
    folder = written(tmp_path, config, w)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = (("layers/**/kernel", P(None, None, "fsdp")), ("head/kernel", P("fsdp")))
    model, params, _ = cj.models.load(folder, scan=True, mesh=mesh, rules=rules, log_fn=quiet)
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert [x.data.shape for x in up.addressable_shards] == [(3, 16, 3)] * 8
    for i in range(3):
        theirs = w[f"model.layers.{i}.mlp.up_proj.weight"].T
        np.testing.assert_array_equal(np.asarray(up)[i], theirs)
    ours = jax.jit(model.apply)({"params": params}, TOKENS[None])[0]
    theirs = logits(config, w, TOKENS)
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()
    with pytest.raises(ShapeError, match=r"tokens/embedding .61, 16. cannot be divided as"):
        cj.models.load(folder, mesh=mesh, rules=[("tokens/embedding", P("fsdp"))], log_fn=quiet)


def test_bfloat16_is_read_as_it_is(tmp_path):
    config = CONFIGS["gemma"]
    w = weights(config, np.random.default_rng(0))
    half = {name: x.astype(jnp.bfloat16) for name, x in w.items()}
    folder = written(tmp_path, config, half)
    _, params, _ = cj.models.load(folder, dtype=jnp.bfloat16, log_fn=quiet)
    own = params["layer_0"]["mlp"]["up"]["kernel"]
    theirs = half["model.layers.0.mlp.up_proj.weight"].T
    assert own.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(own), theirs)
    # A norm is one plus what the file has, rounded once.
    scale = params["norm"]["scale"]
    one = 1 + half["model.norm.weight"].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(scale), one.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_type": "bert"}, "config.json is of a 'bert', and decoders of llama"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "by 'yarn'"),
        ({"hidden_act": "relu6"}, "wants the activation 'relu6'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping, which no decoder here"),
        ({"partial_rotary_factor": 0.5}, "turns 0.5 of a head's features"),
        ({"intermediate_size": None}, "must be a whole number"),
        ({"hidden_size": "many"}, "config.json cannot be used"),
        ({"num_attention_heads": 0}, "config.json cannot be used"),
        ({"rope_scaling": 3}, "config.json cannot be used"),
        ({"num_hidden_layers": 4}, r"the config wants, the file has not:\n  layer_3"),
        ({"num_hidden_layers": 2}, r"the file has, the config has no use for:\n  model.layers.2"),
        ({"intermediate_size": 32}, r"gate_proj.weight: \(16, 24\) here is \(16, 32\)"),
    ],
)
def test_what_does_not_fit_is_said(change, said, tmp_path):
    config = CONFIGS["llama"]
    folder = written(tmp_path, config, weights(config, np.random.default_rng(0)))
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((WeightsError, ArgumentError), match=said):
        cj.models.load(folder, log_fn=quiet)


def test_the_end_of_a_text_is_what_the_files_say(tmp_path):
    config = {**CONFIGS["llama"], "eos_token_id": 2}
    folder = written(tmp_path, config, weights(config, np.random.default_rng(0)))
    assert cj.models.load(folder, log_fn=quiet).model.config.stop == (2,)
    # A token that the vocabulary lacks is left out.
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2, 1000000]}')
    assert cj.models.load(folder, log_fn=quiet).model.config.stop == (5, 2)


def test_damaged_folders_are_refused(tmp_path):
    config = CONFIGS["llama"]
    folder = written(tmp_path, config, weights(config, np.random.default_rng(0)), shards=2)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("model-0.safetensors", "../model-0.safetensors"))
    with pytest.raises(WeightsError, match="which is not in its folder"):
        cj.models.load(folder, log_fn=quiet)
    index.write_text("[]")
    with pytest.raises(WeightsError, match="no index of safetensors files"):
        cj.models.load(folder, log_fn=quiet)
    index.write_text(good)
    (folder / "model-1.safetensors").write_bytes(b"\0" * 50)
    with pytest.raises(WeightsError, match=r"model-1.safetensors as safetensors"):
        cj.models.load(folder, log_fn=quiet)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"cannot read .*model-1.safetensors"):
        cj.models.load(folder, log_fn=quiet)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="config.json, which says what the weights are"):
        cj.models.load(folder, log_fn=quiet)


def test_sizes_that_do_not_fit_together_are_refused():
    good = {"vocabulary": 9, "width": 8, "depth": 2, "heads": 4, "kv_heads": 2, "head_width": 2}
    for change, said in (
        ({"kv_heads": 3}, "kv_heads=3 do not divide heads=4"),
        ({"head_width": 3}, "an even head_width"),
        ({"sliding": (True,)}, "one for each of 2 layers"),
        ({"sliding": (True, True)}, "need a window"),
        ({"norm": "batch"}, "norm"),
    ):
        with pytest.raises(ArgumentError, match=said):
            cj.models.DecoderConfig(**{**good, "hidden": 8, **change})
    config = cj.models.DecoderConfig(**good, hidden=8, positions=4)
    model = cj.models.Decoder(config)
    with pytest.raises(ArgumentError, match="longer than positions=4"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 5), jnp.int32))


def test_a_decoder_is_compressed_like_any_function(tmp_path):
    """Groups of channels, bound scales of stacked layers, a narrower one that still runs."""
    config = CONFIGS["qwen3"]
    folder = written(tmp_path, config, weights(config, np.random.default_rng(0)))
    model, params, _ = cj.models.load(folder, log_fn=quiet)

    def fn(params, tokens):
        return model.apply({"params": params}, tokens)

    found = {group.size for group in cj.trace.groups(fn, params, TOKENS[None])}
    assert {16, 24, 2} <= found  # the residual stream, the perceptrons, heads of keys
    small = cj.prune.shrink(fn, params, TOKENS[None], ratio=0.5)
    assert small.params["layer_0"]["mlp"]["up"]["kernel"].shape == (8, 12)
    assert jax.jit(small.fn)(small.params, TOKENS[None]).shape == (1, 19, 61)
    stacked, own, _ = cj.models.load(folder, scan=True, log_fn=quiet)
    int4 = cj.bind(
        cj.at("**/kernel", cj.quantize.uniform(4, granularity="channel")),
        lambda p, x: stacked.apply({"params": p}, x),
        own,
        TOKENS[None],
    )
    alone = cj.bind(
        cj.at("**/kernel", cj.quantize.uniform(4, granularity="channel")), fn, params, TOKENS[None]
    )
    views = int4.view(own, int4.init(own)), alone.view(params, alone.init(params))
    for i in range(3):
        one = views[0]["layers"]["mlp"]["up"]["kernel"][i]
        np.testing.assert_array_equal(one, views[1][f"layer_{i}"]["mlp"]["up"]["kernel"])
