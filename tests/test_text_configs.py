"""The configs of text, on small corpora of random words: they fit together, and they run."""

import dataclasses
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.sharding import AxisType

import compress_jax as cj
from compress_jax.cli.config import build, load_config
from compress_jax.search import compress
from compress_jax.search._check import check

CONFIGS = Path(__file__).parents[1] / "configs"


def experiment(name, **arguments):
    function = load_config(CONFIGS / f"{name}.py")
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = dict(zip(names, function.__defaults__, strict=True))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    return dataclasses.replace(build(function, {**defaults, **arguments}), mesh=mesh)


@pytest.fixture
def brown(tmp_path):
    """Sixty documents whose words end as their tags want."""
    rng = np.random.default_rng(0)
    kinds = (("ed", "vbd"), ("ly", "rb"), ("s", "nns"), ("", "nn"), (".", "."))
    folder = tmp_path / "brown"
    folder.mkdir()
    for i in range(60):
        lines = []
        for _ in range(8):
            chosen = [kinds[k] for k in rng.integers(0, 5, 10)]
            lines.append(" ".join(f"w{rng.integers(40)}{end}/{tag}" for end, tag in chosen))
        (folder / f"c{'abcdefghjklmnpr'[i % 15]}{i // 15 + 1:02}").write_text("\n".join(lines))
    steps = {"teacher_steps": 4, "student_steps": 4, "candidate_steps": 4, "batch_size": 4}
    return {"corpus": str(folder), "length": 32, **steps}


@pytest.mark.slow
def test_brown_fits_together(brown):
    made = experiment("brown", **brown)
    notes = check(made, {})
    assert not [note for note in notes if "could not" in note]
    assert made.data.classes == 12 and made.task.mask == "word"


@pytest.mark.slow
def test_brown_runs(brown, tmp_path):
    made = experiment("brown", **brown, max_drop=0.99, min_ratio=1.0)
    result = compress(made, tmp_path / "work")
    assert result is not None
    assert (tmp_path / "work" / "artifact.safetensors").stat().st_size > 1000


def small_minilm(place, monkeypatch):
    """A folder for a network of MiniLM's layers, which takes the place of the published one."""
    folder = place / "minilm"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    cj.data.train_tokenizer(["w1 w2 w3 mail"], 60).save(folder / "tokenizer.json")

    def small(folder, classes, depth=6):
        encoder = cj.models.Bert(vocabulary=60, width=12, depth=depth, heads=2, positions=32)
        return cj.models.starting_at(cj.models.BertClassifier(encoder, classes), lambda x: x)

    monkeypatch.setattr(cj.models, "minilm_classifier", small)
    return str(folder)


@pytest.mark.slow
def test_spam_fits_together(tmp_path, monkeypatch):
    """With weights of MiniLM's names on a small scale."""
    mails = tmp_path / "mails"
    rng = np.random.default_rng(0)
    for i in range(80):
        folder = mails / ("easy-ham-1", "spam-1")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        words = " ".join(f"w{k}" for k in rng.integers(0, 200, 30))
        (folder / f"{i}.txt").write_text(f"Subject: mail {i}\n\n{words}")
    function = load_config(CONFIGS / "spam.py")
    assert function.__globals__["minilm_folder"] is cj.models.minilm_folder
    minilm = small_minilm(tmp_path, monkeypatch)
    made = experiment("spam", minilm=minilm, mails=str(mails), length=16, batch_size=8,
                      teacher_steps=4, student_steps=4, candidate_steps=4, max_drop=0.99,
                      min_ratio=1.0)  # fmt: skip
    assert not [note for note in check(made, {}) if "could not" in note]
    assert [metric.name for metric in made.task.metrics] == ["accuracy", "F1"]


@pytest.fixture
def sst2(tmp_path, monkeypatch):
    """An archive of the published form, which TFDS's own builder of SST-2 is given to prepare."""
    rng = np.random.default_rng(0)
    archive = tmp_path / "SST-2.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for part, n in (("train", 60), ("dev", 12), ("test", 8)):
            texts = [" ".join(f"w{k}" for k in rng.integers(0, 200, 6)) for _ in range(n)]
            rows = [[text, str(i % 2)] for i, text in enumerate(texts)]
            if part == "test":  # its labels are not published
                rows = [[str(i), text] for i, text in enumerate(texts)]
            head = ["index", "sentence"] if part == "test" else ["sentence", "label"]
            lines = "\n".join("\t".join(row) for row in (head, *rows))
            file.writestr(f"SST-2/{part}.tsv", lines + "\n")

    def fetched(manager, url):
        assert url.endswith("SST-2.zip")
        # TFDS unpacks archives by TensorFlow, where it is installed.
        zipfile.ZipFile(archive).extractall(tmp_path / "unpacked")
        return tmp_path / "unpacked"

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fetched)
    monkeypatch.setattr("compress_jax.data._tfds.unreachable", lambda url: None)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.slow
def test_sst2_runs(sst2, tmp_path, monkeypatch):
    steps = {"teacher_steps": 2, "student_steps": 2, "candidate_steps": 2}
    minilm = small_minilm(tmp_path, monkeypatch)
    made = experiment("sst2", minilm=minilm, length=12, batch_size=8, **steps)
    made = dataclasses.replace(made, requirement=cj.search.Requirement(0.99, 0.1))
    data = made.data
    sizes = [len(getattr(data, part)["label"]) for part in ("train", "validation", "test")]
    # Test is what is published as validation; validation is cut from train.
    assert sum(sizes[:2]) == 60 and 2 < sizes[1] < 15 and sizes[2] == 12
    assert data.names == ("negative", "positive")
    result = compress(made, tmp_path / "work")
    assert result is not None
    assert (tmp_path / "work" / "artifact.safetensors").stat().st_size > 1000
