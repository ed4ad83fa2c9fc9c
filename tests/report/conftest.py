import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.bits import Bits
from compress_jax.core.packed import Clustered
from compress_jax.export import save

EVIL = "</script><script>window.owned=1</script><img src=x onerror=window.owned=1>'\"{{7*7}}"


def row(name: str, nbytes: int, validation: float, **other) -> dict:
    numbers = {"parameters": 45, "bits": 8 * nbytes / 45, "test": None, "accepted": None}
    return (
        {"name": name, "nbytes": nbytes, "validation": validation, "reason": ""} | numbers | other
    )


def rows() -> list[dict]:
    """Teacher, student and candidates, many of them nearly at one place."""
    found = [
        row("teacher", 4000, 0.98, test=0.97, macs=900),
        row("student", 2000, 0.97, test=0.96, macs=450),
    ]
    for i in range(9):
        name = f"candidate-number-{i}"
        found.append(row(name, 240 + i, 0.95 + i / 2000, accepted=i > 2, macs=100 + 7 * i))
    found[4]["test"] = 0.94
    return found


@pytest.fixture
def whole(tmp_path: Path):
    """Write a finished run's folder that has all a report shows; return the function that does."""

    def write(word: str = "plain", name: str = "stage") -> Path:
        weights = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
        node = Clustered(Bits.pack(jnp.asarray(weights > 0, jnp.uint8), 1), jnp.array([-0.8, 0.8]))
        dense = {"kernel": jnp.asarray(weights), "bias": jnp.zeros(5)}
        packed = {"kernel": node, "bias": jnp.zeros(5)}
        about = {"left_alone": {word: ["d/bias"]}, "model": word}
        save(tmp_path / "student.safetensors", {"params": {"d": dense}})
        save(tmp_path / "artifact.safetensors", {"params": {"d": packed}}, about)
        found = rows()
        found[3]["name"] = name
        found[3]["reason"] = word
        metric = {"name": word, "percent": True, "higher_is_better": True}
        results = {"experiment": word, "chosen": "candidate-number-2", "met": True, "rows": found}
        put(tmp_path / "results.json", results | {"metric": metric})
        put(tmp_path / "run.json", run_record(word))
        (tmp_path / "log.txt").write_text(f"{word}\n")
        for i, stage in enumerate(("teacher", "student", f"candidates/{name}")):
            (tmp_path / stage).mkdir(parents=True)
            lines = [{"step": s, "train/loss": 1 / (s + i), word: s / 9} for s in range(1, 9)]
            (tmp_path / stage / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        put(tmp_path / "export" / "export.json", exports(word))
        put(tmp_path / "search" / "sensitivities.json", sensitivities(word))
        digest = hashlib.sha256((tmp_path / "artifact.safetensors").read_bytes()).hexdigest()
        put(tmp_path / "report" / "measured.json", measured(word, digest))
        session = {"started": word, "seconds": 2.5, "ended": "finished", "devices": "8 x cpu"}
        (tmp_path / "sessions.jsonl").write_text(json.dumps(session) + "\n")
        return tmp_path

    return write


def put(file: Path, content: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def run_record(word: str) -> dict:
    return {
        "config": word,
        "arguments": {word: word, "seed": 3},
        "flags": ["--seed", "3"],
        "versions": {"jax": word},
        "git": {"config": "0123abcd"},
        "hardware": {"processor": word},
        "requirement": {"max_drop": 0.04, "min_ratio": 3, "max_bytes": 240, "reference": "teacher"},
    }


def exports(word: str) -> dict:
    nan = float("nan")
    timing = {"batch": 1, "threads": 2, "seconds": 1e-3, "baseline": 2e-3, "speedup": 2.0}
    site = {"name": word, "form": "int8", "reason": word}
    record = {"path": "model.onnx", "nbytes": 1234, "baseline_bytes": 5678, "agreement": 0.99}
    record |= {"accuracy": nan, "reference": nan, "failures": [word], "sites": [site]}
    return {word: record | {"timings": [timing | {"low": 1.9, "high": 2.1}]}}


def sensitivities(word: str) -> dict:
    scores = {"d/kernel": {"int8": 0.001, word: 0.5}}
    sizes = {"d/kernel": {"int8": 40, word: 20}}
    return {"measure": word, "scores": scores, "nbytes": sizes, "left": {"d/bias": word}}


def measured(word: str, digest: str) -> dict:
    own = {"low": -1.0, "high": 1.0, "shares": [0.25, 0.5, 0.25]}
    return {
        "artifact_sha256": digest,
        "reference": "teacher",
        "examples": 20,
        "confusion": [[9, 1], [2, 8]],
        "right": {"both": 15, "neither": 5},
        "activation_examples": 64,
        "activations": {word: {"student in float32": own, "artifact": own}},
        "notes": [word],
    }


@pytest.fixture
def evil() -> str:
    return EVIL
