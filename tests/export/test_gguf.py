"""GGUF files: the gguf package, our reader and llama.cpp find in them what was trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import ArtifactError, DataError, ExportError
from compress_jax.core.paths import flatten
from tests.models.decoder_reference import weights
from tests.models.test_decoder import TOKENS, quiet
from tests.models.test_gguf import CONFIGS, written

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'compress_jax[llm]'")
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789", "Ġ", "Ċ", "."]
MERGES = ["t h", "th e", "Ġ the", "a b"]
PIECES = ["<|endoftext|>", *LETTERS, "th", "the", "Ġthe", "ab"]
SHAPE = {"heads": 2, "kv_heads": 1, "head_width": 32, "hidden": 96}
MODEL = cj.models.Decoder(cj.models.DecoderConfig(61, 64, 2, **SHAPE))
UNTIED = cj.models.Decoder(cj.models.DecoderConfig(61, 64, 2, **SHAPE, tied=False))


def params_of(model, seed=0):
    """Return random params, norms and biases included."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.1 * rng.normal(size=x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def packed_of(params, kind, scale=None):
    """Return packed params and what the model is evaluated with."""
    c = cj.rules(
        [
            ("**/kernel", cj.quantize.gguf(kind, scale)),
            ("tokens/embedding", cj.quantize.gguf(kind, scale, axis=0)),
        ]
    )
    state = c.init(params)
    return c.pack(params, state), c.view(params, state)


def read(file):
    """Return the arrays of a file and their types, as the gguf package reads them."""
    arrays = gguf.GGUFReader(file).tensors
    values = {x.name: gguf.dequantize(x.data, x.tensor_type) for x in arrays}
    return values, {x.name: x.tensor_type.name for x in arrays}


def unpaired(x, heads):
    """Put the features that turn together apart again, as llama.cpp's own converter would."""
    return x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def leaves(params):
    return flatten(params)[0]


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_the_file_is_the_trained_model_bit_for_bit(kind, scan, tmp_path):
    model = MODEL.clone(scan=scan)
    packed, view = packed_of(params_of(model), kind)
    same(cj.unpack(packed), view)
    file = tmp_path / "model.gguf"
    exported = cj.export.to_gguf(model, packed, file)
    assert exported.difference == 0 and exported.nbytes == file.stat().st_size
    values, kinds = read(file)
    assert {kinds[name] for name in kinds if values[name].ndim == 2} == {kind}
    assert {kinds[name] for name in kinds if values[name].ndim == 1} == {"F32"}
    assert {row.name: row.form for row in exported.rows} == kinds
    own = jax.tree.map(lambda x: x[1], view["layers"]) if scan else view["layer_1"]
    query = unpaired(values["blk.1.attn_q.weight"], 2)
    np.testing.assert_array_equal(query.T, own["attention"]["query"]["kernel"])
    np.testing.assert_array_equal(values["blk.1.ffn_down.weight"].T, own["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(values["token_embd.weight"], view["tokens"]["embedding"])
    loaded = cj.models.load(file, scan=scan, log_fn=quiet)
    assert loaded.model == model
    same(loaded.params, view)
    logits = jax.jit(model.apply)
    ours = logits({"params": view}, TOKENS[None])
    np.testing.assert_array_equal(ours, logits({"params": loaded.params}, TOKENS[None]))


def test_the_bytes_are_those_of_the_package(tmp_path):
    """Weights already on the grid: llama.cpp's quantizer gives the bytes that we write."""
    packed, view = packed_of(params_of(UNTIED), "Q8_0")
    file = tmp_path / "model.gguf"
    cj.export.to_gguf(UNTIED, packed, file)
    found = {x.name: x.data for x in gguf.GGUFReader(file).tensors}["output.weight"]
    kernel = np.asarray(view["head"]["kernel"])
    theirs = gguf.quantize(kernel.T, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(found, theirs)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_scales_are_the_nearest_of_float16_at_any_size(kind):
    """NumPy's own rounding, from the smallest step of float16 to its largest number."""
    sizes = 2.0 ** np.arange(-40, 24)
    shape = np.random.default_rng(0).uniform(-1, 1, (64, 32)) * sizes[:, None]
    params = {"kernel": jnp.asarray(shape.T, jnp.float32)}
    bits, symmetric = {"Q8_0": (8, True), "Q4_0": (4, True), "Q4_1": (4, False)}[kind]
    c = cj.quantize.gguf(kind)
    fixed = c.init(params).fixed["kernel"]
    plain = cj.quantize.uniform(bits, symmetric, 32).init(params).fixed["kernel"]["scale"]
    scale = np.asarray(fixed["scale"], np.float64).ravel()
    free = np.asarray(plain, np.float64).ravel()
    np.testing.assert_array_equal(scale, scale.astype(np.float16))
    assert (scale > 0).all()
    if symmetric:
        with np.errstate(over="ignore"):
            nearest = np.clip(free.astype(np.float16).astype(np.float64), 2.0**-24, 65504)
        np.testing.assert_array_equal(scale, nearest)
        return
    inside = (free > 2.0**-14) & (free < 4352)
    assert (np.abs(scale / free - 1)[inside] <= 2.0**-7).all()
    least = scale * np.asarray(fixed["zero_point"], np.float64).ravel()
    np.testing.assert_array_equal(least, least.astype(np.float16))


def test_masked_weights_are_zeros_of_the_file(tmp_path):
    pruned = cj.chain(cj.prune.magnitude(0.7), cj.quantize.gguf("Q4_1", "mse"))
    c = cj.at("**/mlp/**/kernel", pruned)
    params = params_of(MODEL)
    packed = c.pack(params, c.init(params))
    file = tmp_path / "model.gguf"
    cj.export.to_gguf(MODEL, packed, file)
    same(cj.models.load(file, log_fn=quiet).params, cj.unpack(packed))
    assert (read(file)[0]["blk.0.ffn_up.weight"] == 0).mean() > 0.69


def test_plain_weights_are_floats_as_asked(tmp_path):
    params = params_of(UNTIED)
    file = tmp_path / "model.gguf"
    assert cj.export.to_gguf(UNTIED, {"params": params}, file).difference == 0
    same(cj.models.load(file, log_fn=quiet).params, params)
    exported = cj.export.to_gguf(UNTIED, params, file, floats="F16")
    assert 0 < exported.difference < 2**-11
    half = jax.tree.map(
        lambda x: x.astype(jnp.float16).astype(x.dtype) if x.ndim > 1 else x, params
    )
    same(cj.models.load(file, log_fn=quiet).params, half)
    params["head"]["kernel"] = params["head"]["kernel"].at[0, 0].set(1e5)
    with pytest.raises(ExportError, match=r"output.weight has numbers .* F16; .*100000"):
        cj.export.to_gguf(UNTIED, params, file, floats="F16")


@pytest.mark.parametrize(
    ("compression", "reason"),
    [
        (cj.quantize.uniform(4, granularity=32), "not exact in float16"),
        (cj.quantize.uniform(4, granularity=16), "do not share a scale"),
        (cj.quantize.gguf("Q4_0", axis=0), "do not share a scale"),
        (cj.quantize.ternary(), "no array of integer codes"),
        (cj.lowrank.svd(4), "no array of integer codes"),
    ],
)
def test_leaves_on_no_grid_are_refused_or_listed(compression, reason, tmp_path):
    c = cj.at("layer_1/mlp/up/kernel", compression)
    params = params_of(MODEL)
    packed = c.pack(params, c.init(params))
    file = tmp_path / "model.gguf"
    with pytest.raises(ExportError, match=rf"(?s)1 packed .* blk.1.ffn_up.weight: .*{reason}"):
        cj.export.to_gguf(MODEL, packed, file)
    assert not file.exists()
    exported = cj.export.to_gguf(MODEL, packed, file, otherwise="F32")
    assert [row for row in exported.rows if row.reason][0].name == "blk.1.ffn_up.weight"
    same(cj.models.load(file, log_fn=quiet).params, cj.unpack(packed))


def test_any_grid_that_the_blocks_hold_is_written(tmp_path):
    """Scales of a channel, and codes of 3 and 8 bits: what counts is the numbers."""
    eighth = lambda w, layout, grid: (jnp.full(layout.scale_shape, 0.125), grid.middle)  # noqa: E731
    c = cj.rules(
        [
            ("**/up/kernel", cj.quantize.uniform(3, granularity="channel", scale=eighth)),
            ("**/kernel", cj.quantize.uniform(8, scale=eighth)),
        ]
    )
    params = params_of(MODEL)
    packed = c.pack(params, c.init(params))
    file = tmp_path / "model.gguf"
    cj.export.to_gguf(MODEL, packed, file)
    kinds = read(file)[1]
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0" and kinds["blk.0.attn_q.weight"] == "Q4_0"
    same(cj.models.load(file, log_fn=quiet).params, cj.unpack(packed))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_what_is_loaded_is_written_and_loaded_again(name, tmp_path):
    config = CONFIGS[name]
    w = weights(config, np.random.default_rng(0))
    written(tmp_path / "theirs.gguf", config, w)
    first = cj.models.load(tmp_path / "theirs.gguf", log_fn=quiet)
    cj.export.to_gguf(first.model, first.params, tmp_path / "ours.gguf")
    second = cj.models.load(tmp_path / "ours.gguf", log_fn=quiet)
    assert second.model == first.model
    same(second.params, first.params)
    # The arrays are those of the reference's writer, one by one.
    theirs, ours = read(tmp_path / "theirs.gguf")[0], read(tmp_path / "ours.gguf")[0]
    assert ours.keys() == theirs.keys()
    same(ours, theirs)
    c = cj.at("**/kernel", cj.quantize.gguf("Q8_0"))
    packed = c.pack(first.params, c.init(first.params))
    cj.export.to_gguf(first.model, packed, tmp_path / "small.gguf")
    same(cj.models.load(tmp_path / "small.gguf", log_fn=quiet).params, cj.unpack(packed))


@pytest.mark.parametrize("name", ["llama 3.1", "qwen3", "gemma3"])
def test_folders_of_hugging_face_become_files(name, tmp_path):
    import safetensors.numpy

    config = CONFIGS[name]
    w = weights(config, np.random.default_rng(0))
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(w, tmp_path / "model.safetensors")
    first = cj.models.load(tmp_path, log_fn=quiet)
    cj.export.to_gguf(first.model, first.params, tmp_path / "ours.gguf")
    second = cj.models.load(tmp_path / "ours.gguf", log_fn=quiet)
    same(second.params, first.params)
    ours = jax.jit(first.model.apply)({"params": first.params}, TOKENS[None])
    theirs = jax.jit(second.model.apply)({"params": second.params}, TOKENS[None])
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()


def test_models_that_llama_cpp_has_no_family_for_are_refused(tmp_path):
    shape = {**SHAPE, "qk_norm": True, "activation": "gelu"}
    model = cj.models.Decoder(cj.models.DecoderConfig(61, 64, 1, **shape))
    with pytest.raises(ExportError, match="qwen3 of llama.cpp, but has activation=gelu and not"):
        cj.export.to_gguf(model, params_of(model), tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="layer_0.* is not there"):
        cj.export.to_gguf(MODEL, {"tokens": params_of(MODEL)["tokens"]}, tmp_path / "model.gguf")
    with pytest.raises(ExportError, match=r"Sequential is no models.Decoder"):
        cj.export.to_gguf(__import__("flax").linen.Sequential([]), {}, tmp_path / "model.gguf")


def tokenizer_of(folder):
    """Return the tokenizer of a file that the reference's writer made."""
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install 'compress_jax[llm]'")
    config = CONFIGS["llama"]
    file = folder / "words.gguf"
    tokens = PIECES + [f"<extra{i}>" for i in range(61 - len(PIECES))]
    kinds = [3] + [1] * 60
    w = weights(config, np.random.default_rng(0))
    written(file, config, w, tokens=(tokens, MERGES, kinds))
    return cj.models.load(file, log_fn=quiet).tokenizer


def test_the_tokenizer_comes_back(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    file = tmp_path / "model.gguf"
    exported = cj.export.to_gguf(MODEL, params_of(MODEL), file, tokenizer=tokenizer)
    assert exported.notes == (
        "a text ends with <|endoftext|> (0), going by its name; eos= says otherwise",
    )
    again = cj.models.load(file, log_fn=quiet).tokenizer
    text = "ab the 12.\n<|endoftext|>"
    assert again.encode([text]) == tokenizer.encode([text])
    assert again.start == tokenizer.start == () and again.size == 61
    theirs = gguf.GGUFReader(tmp_path / "words.gguf")
    ours = gguf.GGUFReader(file)
    for name in ("model", "pre", "tokens", "merges", "token_type"):
        field = f"tokenizer.ggml.{name}"
        assert ours.get_field(field).contents() == theirs.get_field(field).contents()


def test_tokens_around_a_text_come_back(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    content = json.loads(tokenizer.tokenizer.to_str())
    name = "<|endoftext|>"
    texts = [{"Sequence": {"id": each, "type_id": 0}} for each in "AB"]
    around = {"SpecialToken": {"id": name, "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [around, texts[0]],
        "pair": texts,
        "special_tokens": {name: {"id": name, "ids": [0], "tokens": [name]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = cj.data.load_tokenizer(tmp_path)
    assert tokenizer.start == (0,)
    file = tmp_path / "model.gguf"
    cj.export.to_gguf(MODEL, params_of(MODEL), file, tokenizer=tokenizer, eos=3)
    assert cj.models.load(file, log_fn=quiet).tokenizer.start == (0,)
    assert gguf.GGUFReader(file).get_field("tokenizer.ggml.eos_token_id").contents() == 3


def test_tokenizers_without_a_name_are_refused(tmp_path):
    words = cj.data.train_tokenizer(["to be or not to be"], 20)
    with pytest.raises(DataError, match="is a WordPiece, and BPE is written"):
        cj.export.to_gguf(MODEL, params_of(MODEL), tmp_path / "model.gguf", tokenizer=words)
    tokenizer = tokenizer_of(tmp_path)
    small = cj.models.Decoder(cj.models.DecoderConfig(40, 64, 1, **SHAPE))
    with pytest.raises(DataError, match="has the token 60, and the model 40 tokens"):
        cj.export.to_gguf(small, params_of(small), tmp_path / "model.gguf", tokenizer=tokenizer)


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path, monkeypatch):
    import errno

    file = tmp_path / "model.gguf"
    file.write_bytes(b"before")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(ArtifactError, match="the disk is full; the file that was there"):
        cj.export.to_gguf(MODEL, params_of(MODEL), file)
    assert file.read_bytes() == b"before" and [*tmp_path.iterdir()] == [file]


def test_every_leaf_of_a_file_has_a_row(tmp_path):
    params = params_of(MODEL)
    exported = cj.export.to_gguf(MODEL, params, tmp_path / "model.gguf")
    assert len(exported.rows) == len(leaves(params))
