"""Bytes of an artifact that are not its tensors': names, structure, digest, container.

python experiments/benchmarks/header_size.py                               # 5 CPU minutes

For small models the header is what keeps a file from being small: it may take 2 % of the file and
200 bytes. Networks have random weights, which the header does not depend on; kernels are packed by
channel, and tables of tokens with a scale for each row. A row of the table is written without
metadata, and once more with those that `compress-jax run` writes, which belong to the header; then
coded, as small files are best kept.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interleave import report

import compress_jax as cj
from compress_jax.core.packed import is_packed
from compress_jax.core.paths import flatten
from compress_jax.export import breakdown
from compress_jax.models import (
    DSCNN,
    Bert,
    BertClassifier,
    Crepe,
    LeNet5,
    LeNet300100,
    ResNet,
    Tagger,
)

HEAD = [
    "model",
    "bits",
    "file",
    "header",
    "budget",
    "with a run's metadata",
    "coded, with both",
    "kept",
]
SHARE = 0.02
FREE = 200
SPECTROGRAM = (49, 10, 1)
BERT_TINY = BertClassifier(Bert(width=128, depth=2, heads=2), classes=2)
MINILM = BertClassifier(Bert(width=384, depth=2, heads=12), classes=2)
MODELS: dict[str, tuple[Any, tuple[int, ...], type]] = {
    "DS-CNN of MLPerf Tiny": (DSCNN(), SPECTROGRAM, np.float32),
    "DS-CNN, width 16, 2 blocks": (DSCNN(width=16, blocks=2), SPECTROGRAM, np.float32),
    "ResNet-8": (ResNet(depth=8), (32, 32, 3), np.float32),
    "LeNet-300-100": (LeNet300100(), (28, 28, 1), np.float32),
    "LeNet-300-100, 8x8 images": (LeNet300100(), (8, 8, 1), np.float32),
    "LeNet-5": (LeNet5(), (28, 28, 1), np.float32),
    "CREPE tiny": (Crepe(width=4), (1024,), np.float32),
    "Tagger of configs/brown.py": (Tagger(8192, 12, 32, 1, 1), (128,), np.int32),
    "BERT-tiny": (BERT_TINY, (16,), np.int32),
    "MiniLM, 2 layers": (MINILM, (16,), np.int32),
}


def packed(name: str, bits: int) -> Any:
    """Return a network of normal weights, its kernels and tables packed."""
    model, shape, dtype = MODELS[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape), dtype))
    leaves, rebuild = flatten(shapes)
    random = np.random.default_rng(0)
    kernels = cj.quantize.uniform(bits, granularity="channel")
    tables = cj.quantize.uniform(bits, granularity="channel", axis=0)

    def leaf(path: str, shape: tuple[int, ...]) -> Any:
        x = jnp.asarray(random.normal(size=shape), jnp.float32)
        last = path.rsplit("/", 1)[-1]
        c = {"kernel": kernels, "embedding": tables}.get(last)
        return x if c is None else c.pack(x, c.init(x))

    return rebuild({path: leaf(path, x.shape) for path, x in leaves.items()})


def of_a_run(tree: Any) -> dict[str, Any]:
    """Return metadata as `compress-jax run` writes them."""
    arguments = {"teacher_steps": 900, "student_steps": 1000, "max_drop": 0.015, "seed": 3}
    left = [path for path, x in flatten(tree)[0].items() if not is_packed(x)]
    return {
        "experiment": "speech", "name": "int4", "model": "Network(classes=12)",
        "config": "/data/jobs/0417/configs/speech.py", "arguments": arguments,
        "left_alone": {"no pattern matches": [path for path in left if path.startswith("params")]},
        "data": "speech_commands", "data_sha256": hashlib.sha256(b"data").hexdigest(),
        "validation": 0.9123711340206185,
    }  # fmt: skip


def header(file: Path) -> int:
    """Return the bytes that are not those of tensors."""
    parts = [part for part in breakdown(file) if part.cause == "header and metadata"]
    return round(sum(part.nbytes for part in parts))


def row(name: str, bits: int, folder: Path) -> list[Any]:
    """Measure one network."""
    tree = packed(name, bits)
    file = folder / "f"
    coded = cj.save(file, tree, of_a_run(tree), coded=True)
    cj.save(file, tree, of_a_run(tree))
    full = header(file)
    size = cj.save(file, tree)
    own = header(file)
    budget = int(SHARE * size + FREE)
    kept = ("yes" if full <= budget else "but for the metadata") if own <= budget else "no"
    numbers = (size, own, budget, full, coded)
    return [name, bits, *(f"{x:,}" for x in numbers), kept]


def main() -> None:
    """Print and keep the table."""
    with tempfile.TemporaryDirectory() as place:
        rows = [row(name, bits, Path(place)) for name in MODELS for bits in (8, 4)]
    report("header_size", HEAD, rows, unit="bytes")


if __name__ == "__main__":
    main()
