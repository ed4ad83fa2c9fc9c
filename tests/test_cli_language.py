"""compress-jax eval and export of a language model, and wrong input in one sentence."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import compress_jax as cj
from compress_jax.cli import main
from tests.models.decoder_reference import weights
from tests.models.test_decoder import CONFIGS, quiet

TEXT = "to be or not to be that is the question " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny published model with a tokenizer, a text, and an artifact of it in four bits."""
    folder = tmp_path_factory.mktemp("model")
    config = CONFIGS["qwen3"]
    (folder / "config.json").write_text(json.dumps(config))
    w = weights(config, np.random.default_rng(0))
    safetensors.numpy.save_file(w, folder / "model.safetensors")
    cj.data.train_tokenizer([TEXT], 40).save(folder / "tokenizer.json")
    (folder / "book.txt").write_text(TEXT)
    _, params, _ = cj.models.load(folder, log_fn=quiet)
    int4 = cj.at("**/kernel", cj.quantize.uniform(4, granularity="channel"))
    packed = int4.pack(params, int4.init(params))
    cj.save(folder / "small.artifact", {"params": packed})
    return folder


def test_the_numbers_are_those_of_the_library(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    words = ["eval", str(folder), "--text", str(folder / "book.txt"), "--context", "16"]
    words += ["--compressed", str(folder / "small.artifact"), "--prompt", "to be", "--tokens", "5"]
    assert main(words) == 0
    out = capsys.readouterr().out
    model, params, tokenizer = cj.models.load(folder, log_fn=quiet)
    packed = cj.load(folder / "small.artifact")[0]["params"]
    text = [*tokenizer.start, *tokenizer.encode([TEXT])[0]]

    def fn(params, tokens):
        return model.apply({"params": params}, tokens)

    found = cj.train.evaluate.agreement(fn, params, fn, cj.unpack(packed), [text], context=16)
    for value in (f"{found.reference.perplexity:.3f}", f"{found.model.perplexity:.3f}"):
        assert value in out
    assert f"{found.kl:.4f}" in out and f"{100 * found.top_1:.1f} %" in out
    assert f"{(folder / 'small.artifact').stat().st_size:,}" in out
    prompt = [*tokenizer.start, *tokenizer.encode(["to be"])[0]]
    written = cj.models.generate(model, params, [prompt], 5).tokens[0]
    assert f"original: {tokenizer.decode(written)}" in out and "compressed:" in out


def test_the_model_alone_has_its_perplexity(folder, capsys):
    assert main(["eval", str(folder), "--text", str(folder / "book.txt"), "--stride", "64"]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "KL" not in out


def test_a_question_is_asked_as_the_template_says(folder, capsys):
    template = "{% for m in messages %}be {{ m.content }}{% endfor %}{{ ' the' }}"
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": template}))
    try:
        assert main(["eval", str(folder), "--chat", "to", "--tokens", "5"]) == 0
    finally:
        config.unlink()
    out = capsys.readouterr().out
    model, params, tokenizer = cj.models.load(folder, log_fn=quiet)
    asked = tokenizer.encode(["be to the"])
    written = cj.models.generate(model, params, asked, 5).tokens[0]
    assert f"original: {tokenizer.decode(written)}" in out


def test_an_export_keeps_the_chat_template_and_never_replaces_its_source(folder, tmp_path, capsys):
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ messages[0].content }}", "bos_token": "to"}))
    words = ["export", str(folder), "--to", "hugging-face", "--out"]
    try:
        assert main([*words, str(tmp_path / "out")]) == 0
        assert main([*words, str(folder)]) == 1
    finally:
        config.unlink()
    assert "is the model itself" in capsys.readouterr().err
    found = cj.models.chat_template(tmp_path / "out")
    assert found == cj.data.ChatTemplate("{{ messages[0].content }}", {"bos_token": "to"})


def test_the_original_has_its_own_bytes_alone(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    beside = folder / "small.safetensors"
    beside.write_bytes((folder / "small.artifact").read_bytes())
    words = ["eval", str(folder), "--text", str(folder / "book.txt"), "--compressed", str(beside)]
    try:
        assert main(words) == 0
    finally:
        beside.unlink()
    assert f"{(folder / 'model.safetensors').stat().st_size:,}" in capsys.readouterr().out


def test_wrong_requests_are_one_sentence(folder, tmp_path, capsys):
    missing = str(tmp_path / "no.txt")
    other = tmp_path / "run"
    other.mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    wide = {"params": {"tokens": {"embedding": np.ones((61, 99), np.float32)}}}
    cj.save(tmp_path / "other.artifact", wide)
    other_artifact = str(tmp_path / "other.artifact")
    for words, said in (
        (
            [str(folder), "--prompt", "to", "--compressed", other_artifact],
            "other.artifact is not of this model: head/kernel is not there, and (16, 61) in the",
        ),
        ([str(folder)], "say what to measure"),
        ([str(folder), "--text", missing], "no.txt cannot be read as text"),
        ([str(bare), "--text", str(folder / "book.txt")], "has no tokenizer that can be read"),
        ([str(other), "--prompt", "a"], "is no language model: give a GGUF file"),
        ([str(folder), "--prompt", "a", "--tokens", "0"], "steps must be"),
        ([str(folder), "--chat", "to"], "has no chat template"),
        ([str(folder), "--chat", "to", "--prompt", "be"], "give --prompt, which is continued, or"),
    ):
        assert main(["eval", *words]) == 1
        captured = capsys.readouterr()
        assert said in captured.err.replace("\n", " "), captured.err
        assert "Traceback" not in captured.err


def test_export_writes_what_the_library_writes(folder, tmp_path, capsys):
    pytest.importorskip("gguf", reason="needs gguf: pip install 'compress_jax[llm]'")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    artifact = str(folder / "small.artifact")
    words = ["export", str(bare), "--compressed", artifact, "--to", "gguf"]
    words += ["--out", str(tmp_path / "small.gguf")]
    assert main(words) == 1
    assert "are on no grid of GGUF" in capsys.readouterr().err
    assert main([*words, "--otherwise", "F32"]) == 0
    out = capsys.readouterr().out
    assert "gives no tokenizer" in out and "arrays as F32" in out
    packed = cj.load(artifact)[0]["params"]
    found = cj.models.load(tmp_path / "small.gguf", log_fn=quiet).params
    jax.tree.map(np.testing.assert_array_equal, found, cj.unpack(packed))
    words = ["export", str(folder), "--compressed", artifact, "--to", "hugging-face"]
    assert main([*words, "--out", str(tmp_path / "small")]) == 0
    assert "22 arrays as int4, by channel" in capsys.readouterr().out
    assert (tmp_path / "small" / "tokenizer.json").is_file()


def test_exports_that_make_no_sense_are_one_sentence(folder, tmp_path, capsys):
    for words, said in (
        ([str(folder)], "is a language model: say --to gguf --out FILE"),
        ([str(folder), "--to", "gguf"], "is a language model: say --to gguf --out FILE"),
        ([str(tmp_path), "--to", "gguf"], "is no language model, and --to gguf"),
    ):
        assert main(["export", *words]) == 1
        assert said in capsys.readouterr().err.replace("\n", " ")
