"""Folders of Hugging Face: read back, and decompressed by a second implementation."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import compress_jax as cj
from compress_jax.core.errors import ExportError
from tests.export.test_gguf import MODEL, UNTIED, leaves, params_of, same, tokenizer_of
from tests.models.decoder_reference import weights
from tests.models.test_decoder import CONFIGS, TOKENS, quiet, written


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_is_loaded_is_written_and_loaded_again(name, tmp_path):
    config = CONFIGS[name]
    w = weights(config, np.random.default_rng(0))
    first = cj.models.load(written(tmp_path, config, w), log_fn=quiet)
    if name == "llama 3.1, tied":  # of a context that no published model was trained with
        with pytest.raises(ExportError, match="llama of Hugging Face, but has factors"):
            cj.export.to_hugging_face(first.model, first.params, tmp_path / "ours")
        return
    exported = cj.export.to_hugging_face(first.model, first.params, tmp_path / "ours")
    assert exported.difference == 0
    second = cj.models.load(tmp_path / "ours", log_fn=quiet)
    same(second.params, first.params)
    ours = jax.jit(second.model.apply)({"params": second.params}, TOKENS[None])
    theirs = jax.jit(first.model.apply)({"params": first.params}, TOKENS[None])
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()
    found = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    bare = {name.removeprefix("transformer."): x for name, x in found.items()}
    w = {n.removeprefix("transformer."): x for n, x in w.items() if ".attn.bias" not in n}
    assert bare.keys() == w.keys()
    # What lies below the last bit of 1 + w is lost when Gemma's norms are read.
    lost = 2.0**-24 if name.startswith("gemma") else 0.0
    for array, x in w.items():
        np.testing.assert_allclose(bare[array], x, rtol=0, atol=lost)


def unpacked(tensors, module, bits):
    """Return a weight as the definition of the layout says, one weight after the other."""
    out, inputs = tensors[f"{module}.weight_shape"]
    words = tensors[f"{module}.weight_packed"].view(np.uint32)
    scale = tensors[f"{module}.weight_scale"]
    found = np.zeros((out, inputs), np.float32)
    for row in range(out):
        number = sum(int(word) << 32 * i for i, word in enumerate(words[row]))
        for i in range(inputs):
            level = (number >> bits * i) % 2**bits - 2 ** (bits - 1)
            found[row, i] = np.float32(level) * scale[row, i * scale.shape[1] // inputs]
    return found


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_packed_kernels_are_the_trained_ones_bit_for_bit(scan, tmp_path):
    model = UNTIED.clone(scan=scan)
    c = cj.rules(
        [
            ("**/mlp/down/kernel", cj.quantize.uniform(3, granularity="channel")),
            ("**/mlp/up/kernel", cj.quantize.uniform(4, symmetric=False, granularity=32)),
            ("**/mlp/gate/kernel", cj.quantize.gguf("Q8_0")),
            ("head/kernel", cj.quantize.nf4()),
            ("**/kernel", cj.quantize.uniform(4, granularity=16)),
            ("tokens/embedding", cj.quantize.uniform(8, granularity="channel", axis=0)),
        ]
    )
    params = params_of(model)
    packed = c.pack(params, c.init(params))
    exported = cj.export.to_hugging_face(model, packed, tmp_path)
    reasons = {row.name: row.reason for row in exported.rows if row.reason}
    assert "not symmetric" in reasons.pop("model.layers.0.mlp.up_proj")
    assert "not symmetric" in reasons.pop("model.layers.1.mlp.up_proj")
    assert "no array of integer codes" in reasons.pop("lm_head")
    assert "only linear layers" in reasons.pop("model.embed_tokens") and not reasons
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    view = cj.unpack(packed)
    own = jax.tree.map(lambda x: x[1], view["layers"]) if scan else view["layer_1"]
    at = "model.layers.1."
    for module, bits, kernel in (
        ("mlp.down_proj", 3, own["mlp"]["down"]["kernel"]),
        ("mlp.gate_proj", 8, own["mlp"]["gate"]["kernel"]),
        ("self_attn.k_proj", 4, own["attention"]["key"]["kernel"]),
    ):
        np.testing.assert_array_equal(unpacked(tensors, at + module, bits).T, kernel)
    np.testing.assert_array_equal(tensors["lm_head.weight"].T, view["head"]["kernel"])
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    targets = [set(each["targets"]) for each in groups["config_groups"].values()]
    assert {at + "mlp.down_proj", "model.layers.0.mlp.down_proj"} in targets and len(targets) == 3


def test_floats_are_of_the_dtype_asked_for(tmp_path):
    params = params_of(MODEL)
    exported = cj.export.to_hugging_face(MODEL, params, tmp_path, dtype="float16")
    assert 0 < exported.difference < 2**-11
    half = {path: x.astype(np.float16) for path, x in leaves(params).items()}
    same(leaves(cj.models.load(tmp_path, log_fn=quiet).params), half)


def test_the_tokenizer_goes_along(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    cj.export.to_hugging_face(MODEL, params_of(MODEL), tmp_path / "ours", tokenizer=tokenizer)
    again = cj.models.load(tmp_path / "ours", log_fn=quiet).tokenizer
    assert again.encode(["ab the 12."]) == tokenizer.encode(["ab the 12."])


def test_folders_of_other_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ExportError, match="has an index of other weights"):
        cj.export.to_hugging_face(MODEL, params_of(MODEL), tmp_path)


@pytest.mark.slow
def test_compressed_tensors_decompresses_the_same(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch and compressed-tensors")
    compressors = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized", reason="needs compressed-tensors"
    )
    schemes = pytest.importorskip("compressed_tensors.quantization")
    c = cj.at("**/kernel", cj.quantize.uniform(4, granularity=32))
    params = params_of(MODEL)
    packed = c.pack(params, c.init(params))
    cj.export.to_hugging_face(MODEL, packed, tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    scheme = schemes.QuantizationConfig(**config).config_groups["group_0"]
    at = "model.layers.0.mlp.up_proj."
    own = {n.removeprefix(at): torch.tensor(x) for n, x in tensors.items() if n.startswith(at)}
    found = compressors.PackedQuantizationCompressor.decompress(own, scheme)["weight"]
    kernel = cj.unpack(packed)["layer_0"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(found.numpy().T, kernel)


def test_what_is_not_finite_is_refused_by_name(tmp_path):
    large = jax.tree.map(lambda x: 1e6 * x, params_of(MODEL))
    with pytest.raises(ExportError, match="not finite in float16"):
        cj.export.to_hugging_face(MODEL, large, tmp_path / "a", dtype="float16")
    wrong = jax.tree.map(lambda x: x * np.nan, params_of(MODEL))
    with pytest.raises(ExportError, match="not finite in float32"):
        cj.export.to_hugging_face(MODEL, wrong, tmp_path / "b")
    with pytest.raises(cj.core.ArgumentError, match="eos"):
        cj.export.to_hugging_face(MODEL, params_of(MODEL), tmp_path / "c", eos=10**6)
