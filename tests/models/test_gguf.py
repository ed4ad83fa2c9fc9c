"""GGUF files: the same numbers as Hugging Face's, every type, damaged ones refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import CompressError, WeightsError
from compress_jax.models._decoder.gguf import GGUF
from tests.models.decoder_reference import logits, weights
from tests.models.test_decoder import LLAMA3, SIZES, TOKENS, quiet

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'compress_jax[llm]'")
KIND = gguf.GGMLQuantizationType
CONFIGS = {
    "llama": {
        "model_type": "llama", **SIZES, "hidden_size": 32, "intermediate_size": 64,
        "num_key_value_heads": 2,
    },
    "llama 3.1": {
        "model_type": "llama", **SIZES, "hidden_size": 32, "intermediate_size": 64,
        "num_key_value_heads": 2, "rope_theta": 5e5, "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "model_type": "qwen2", **SIZES, "hidden_size": 32, "intermediate_size": 64,
        "num_key_value_heads": 2,
    },
    "qwen3": {
        "model_type": "qwen3", **SIZES, "hidden_size": 32, "intermediate_size": 64,
        "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text", **SIZES, "hidden_size": 32, "intermediate_size": 64,
        "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4,
        "sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0, "rope_theta": 1e6,
        "query_pre_attn_scalar": 16,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "n_positions": 32,
    },
}  # fmt: skip
# llama.cpp's names for Hugging Face's, the longer ones first.
RENAMED = (
    ("model.layers.", "blk."), ("transformer.h.", "blk."), ("transformer.", ""), ("model.", ""),
    ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"), ("embed_tokens", "token_embd"), ("lm_head", "output"),
    ("attn.c_attn", "attn_qkv"), ("attn.c_proj", "attn_output"), ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"), ("ln_1", "attn_norm"), ("ln_2", "ffn_norm"),
    ("ln_f", "output_norm"), ("wte", "token_embd"), ("wpe", "position_embd"),
)  # fmt: skip


def name_of(config, name):
    if config["model_type"] == "gemma3_text":
        name = name.replace("post_attention_layernorm", "post_attention_norm")
        name = name.replace("pre_feedforward_layernorm", "ffn_norm")
        name = name.replace("post_feedforward_layernorm", "post_ffw_norm")
    name = name.replace("post_attention_layernorm", "ffn_norm")
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return "output_norm.weight" if name == "norm.weight" else name


def paired(x, heads):
    """Lay the features that turn together side by side, as the converter does for Llama."""
    halves = x.reshape(heads, 2, -1, *x.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(x.shape))


def written(file, config, w, kind=KIND.F32, tokens=()):
    """Write a file as llama.cpp's converter does; return the weights that it then holds."""
    family = config["model_type"].removesuffix("_text")
    out = gguf.GGUFWriter(file, family)
    heads = config.get("num_attention_heads", config.get("n_head"))
    kv = config.get("num_key_value_heads", heads)
    out.add_block_count(config.get("num_hidden_layers", config.get("n_layer")))
    out.add_embedding_length(config.get("hidden_size", config.get("n_embd")))
    out.add_feed_forward_length(config.get("intermediate_size", 4 * config.get("n_embd", 0)))
    out.add_head_count(heads)
    out.add_head_count_kv(kv)
    out.add_context_length(config.get("n_positions", 64))
    if family == "gpt2":
        out.add_layer_norm_eps(1e-5)
    else:
        out.add_layer_norm_rms_eps(1e-6)
        out.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        out.add_key_length(config["head_dim"])
    if "sliding_window" in config:
        out.add_sliding_window(config["sliding_window"])
    if config.get("rope_scaling") == LLAMA3:
        d = config["hidden_size"] // heads
        from compress_jax.models._decoder.rope import llama3

        factors = llama3(config["rope_theta"], d, 8.0, 1.0, 4.0, 32)
        out.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    if tokens:
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre("smollm")
        out.add_token_list(tokens[0])
        out.add_token_merges(tokens[1])
        out.add_token_types(tokens[2])
    held = {}
    for name, x in w.items():
        if name.endswith(".attn.bias"):
            continue
        if family == "gpt2" and x.ndim == 2 and "wte" not in name and "wpe" not in name:
            x = x.T
        if family == "llama" and ".q_proj" in name:
            x = paired(x, heads)
        if family == "llama" and ".k_proj" in name:
            x = paired(x, kv)
        if family == "gemma3" and x.ndim == 1:
            x = x + 1
        x = np.ascontiguousarray(x)
        own = KIND.F32 if x.ndim == 1 else kind
        data = gguf.quants.quantize(x, own)
        out.add_tensor(name_of(config, name), data, raw_dtype=own)
        held[name] = gguf.quants.dequantize(data, own)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return held


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_are_those_of_the_papers(name, tmp_path):
    config = CONFIGS[name]
    w = weights(config, np.random.default_rng(0))
    file = tmp_path / "model.gguf"
    written(file, config, w)
    model, params, tokenizer = cj.models.load(file, log_fn=quiet)
    assert tokenizer is None
    ours = jax.jit(model.apply)({"params": params}, TOKENS[None])[0]
    theirs = logits(config, w, TOKENS)
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_every_type_is_what_the_gguf_package_dequantizes(kind, scan, tmp_path):
    config = CONFIGS["llama"]
    w = weights(config, np.random.default_rng(0))
    file = tmp_path / "model.gguf"
    held = written(file, config, w, KIND[kind])
    _, params, _ = cj.models.load(file, scan=scan, log_fn=quiet)
    if scan:
        params = {"layer_1": jax.tree.map(lambda x: x[1], params["layers"]), **params}
    own = params["layer_1"]
    for ours, theirs in (
        (own["mlp"]["down"]["kernel"], held["model.layers.1.mlp.down_proj.weight"].T),
        (params["tokens"]["embedding"], held["model.embed_tokens.weight"]),
    ):
        np.testing.assert_array_equal(np.asarray(ours), theirs)
    # Queries lie there feature beside feature: quantized so, then put back.
    q = held["model.layers.1.self_attn.q_proj.weight"]
    back = q.reshape(4, -1, 2, 32).swapaxes(1, 2).reshape(32, 32)
    np.testing.assert_array_equal(np.asarray(own["attention"]["query"]["kernel"]), back.T)


def test_k_quants_are_read(tmp_path):
    """Blocks of 256 weights of several types, from random bytes: the package has no quantizer."""
    rng = np.random.default_rng(0)
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        block, size = gguf.GGML_QUANT_SIZES[KIND[kind]]
        data = rng.integers(0, 100, (3, 2 * size)).astype(np.uint8)
        file = tmp_path / f"{kind}.gguf"
        out = gguf.GGUFWriter(file, "llama")
        out.add_tensor("x", data, raw_dtype=KIND[kind])
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        opened = GGUF(file)
        assert opened.shapes() == {"x": (3, 2 * block)}
        whole = gguf.quants.dequantize(data, KIND[kind])
        part = opened.read("x", (slice(1, 3), slice(5, 300)))
        np.testing.assert_array_equal(part, whole[1:3, 5:300])


def test_the_tokenizer_is_in_the_file(tmp_path):
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'compress_jax[llm]'")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "Ċ", "."]
    merges = ["t h", "th e", "Ġ the", "a b"]
    tokens = ["<|end|>", *letters, "th", "the", "Ġthe", "ab"]
    tokens += [f"<extra{i}>" for i in range(61 - len(tokens))]
    kinds = [3] + [1] * (len(tokens) - 1)
    config = CONFIGS["llama"]
    file = tmp_path / "model.gguf"
    written(file, config, weights(config, np.random.default_rng(0)), tokens=(tokens, merges, kinds))
    _, _, tokenizer = cj.models.load(file, log_fn=quiet)
    text = "ab the 12.\n<|end|>"
    numbers = tokenizer.encode([text])[0]
    pieces = [tokens[i] for i in numbers]
    assert pieces[:5] == ["ab", "Ġthe", "Ġ", "1", "2"]  # digits alone, as SmolLM2 has it
    assert 0 not in numbers  # the name of a control token inside a text is text
    assert tokenizer.decode(numbers).startswith("ab the 12.\n")
    assert tokenizer.decode([0]) == "<|end|>"


def test_damaged_files_are_refused_by_name(tmp_path):
    """Cut anywhere, or changed anywhere in the header: an error of ours, or the file is whole."""
    config = CONFIGS["qwen3"]
    good = tmp_path / "good.gguf"
    written(good, config, weights(config, np.random.default_rng(0)))
    data = good.read_bytes()
    rng = np.random.default_rng(0)
    header = data.index(b"output_norm.weight") + 60
    for _ in range(150):
        bad = bytearray(data)
        if rng.random() < 0.3:
            bad = bad[: rng.integers(0, len(bad))]
        else:
            for at in rng.integers(0, header, rng.integers(1, 4)):
                bad[at] = rng.integers(0, 256)
        file = tmp_path / "bad.gguf"
        file.write_bytes(bytes(bad))
        try:
            cj.models.load(file, log_fn=quiet)
        except CompressError as error:
            assert str(error)
    file.write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot read .*bad.gguf as GGUF"):
        cj.models.load(file, log_fn=quiet)


def test_other_families_are_refused_by_name(tmp_path):
    file = tmp_path / "model.gguf"
    out = gguf.GGUFWriter(file, "mamba")
    out.add_tensor("x", np.zeros(4, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(WeightsError, match="is of a 'mamba', and decoders of llama"):
        cj.models.load(file, log_fn=quiet)


def test_what_is_read_is_what_an_archive_of_the_same_holds(tmp_path):
    """The same model from both kinds of files, bit for bit, divided over devices."""
    import safetensors.numpy
    from jax.sharding import PartitionSpec as P

    config = CONFIGS["llama"]
    w = weights(config, np.random.default_rng(0))
    written(tmp_path / "model.gguf", config, w)
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(w, tmp_path / "model.safetensors")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    rules = [("layers/**/kernel", P(None, "fsdp"))]
    ours = cj.models.load(tmp_path / "model.gguf", scan=True, mesh=mesh, rules=rules, log_fn=quiet)
    theirs = cj.models.load(tmp_path, scan=True, dtype=jnp.float32, log_fn=quiet)
    assert ours.model == theirs.model
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    query = ours.params["layers"]["attention"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape == (3, 4, 32)
