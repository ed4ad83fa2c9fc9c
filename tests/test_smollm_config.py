"""The config of a language model, on a tiny one: it runs, and shows what both models write."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import compress_jax as cj
from compress_jax.cli import main
from compress_jax.cli.config import build, load_config
from compress_jax.report import read_results
from tests.models.decoder_reference import weights
from tests.models.test_decoder import CONFIGS

CONFIG = Path(__file__).parents[1] / "configs" / "smollm.py"
WORDS = ("sea", "road", "water", "old", "man", "boils", "was", "decided", "the", "committee")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A tiny published model with a tokenizer, and a corpus of sixty documents."""
    folder = tmp_path_factory.mktemp("smollm")
    rng = np.random.default_rng(0)
    corpus = folder / "brown"
    corpus.mkdir()
    texts = []
    for i in range(60):
        words = [WORDS[k] for k in rng.integers(0, len(WORDS), 60)]
        texts.append(" ".join(words))
        tagged = "\n".join(
            " ".join(f"{word}/nn" for word in words[at : at + 10]) for at in range(0, 60, 10)
        )
        (corpus / f"c{'abcdefghjklmnpr'[i % 15]}{i // 15 + 1:02}").write_text(tagged)
    model = folder / "model"
    model.mkdir()
    config = CONFIGS["qwen3"]
    (model / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights(config, rng), model / "model.safetensors")
    cj.data.train_tokenizer(texts, 40).save(model / "tokenizer.json")
    return {"model": str(model), "corpus": str(corpus), "length": 16, "group_size": 4}


def words_of(flags, **more):
    named = {**flags, **more}
    return [w for name, value in named.items() for w in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.slow
def test_it_runs_and_shows_what_both_models_write(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    few = {
        "tune_steps": 2,
        "steps": 2,
        "batch_size": 8,
        "calibration_rows": 8,
        "max_rise": 1000,
        "min_ratio": 1,
    }
    words = ["run", str(CONFIG), *words_of(flags, **few), "--workdir", str(tmp_path / "run")]
    assert main(words) == 0
    out = capsys.readouterr().out
    results = read_results(tmp_path / "run")
    assert {"int8", "int4-nearest", "narrow-int8", "int4-recovered"} <= {
        row["name"] for row in results["rows"]
    }
    found = results["comparison"]
    assert list(found["values"]) == ["student", results["chosen"]] == list(found["answers"])
    assert {"perplexity", "KL", "tokens/s"} <= set(found["measures"])
    page = (tmp_path / "run" / "report.html").read_text()
    for prompt in found["prompts"]:
        assert prompt in out and prompt in page
    # Measured by other code, on the same rows.
    student = next(row for row in results["rows"] if row["name"] == "student")
    place = found["measures"].index("perplexity")
    assert float(found["values"]["student"][place]) == pytest.approx(student["test"], rel=1e-3)


def test_the_quick_one_trains_nothing(flags):
    experiment = build(load_config(CONFIG), {**flags, "quick": True, "calibration_rows": 4})
    assert experiment.student.training is None
    assert not any(candidate.steps for candidate in experiment.candidates)
