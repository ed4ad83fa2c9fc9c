"""The post-training solvers beside rounding to nearest.

Error of layers and of the network, accuracy, at 2, 3 and 4 bits.

python experiments/quantization/solvers.py digits        # 64-96-48-10 on the digits, 3 seeds; a
processor minute each python experiments/quantization/solvers.py transformer   # a small ViT on the
digits, 3 seeds

Every kernel is quantized, weights only, one scale per output channel, by the same calibration data:
512 training examples without labels (AdaRound takes 1000 steps, a tenth of its default). Nothing is
chosen and every row that was run is printed. Errors are on the calibration data's layers
(``tr(D'GD)``, geometric mean over kernels) and on the test set's logits (mean squared), both
divided by those of rounding to nearest; accuracy is that of the test set.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import compress_jax as cj
from compress_jax.core.paths import flatten
from compress_jax.layerwise._clip import clip
from compress_jax.layerwise._gptq import gptq
from compress_jax.layerwise._problem import Problem, problems
from compress_jax.models import LeNet300100, ViT
from compress_jax.quantize import output_error, uniform
from compress_jax.quantize._rewrites.awq import awq
from compress_jax.quantize._rewrites.bias import correct_bias
from compress_jax.quantize._rewrites.equalize import equalize
from compress_jax.quantize._rewrites.smooth import smooth
from compress_jax.quantize._scales.hqq import hqq
from compress_jax.quantize._solvers.adaround import adaround
from compress_jax.quantize._solvers.signround import signround
from compress_jax.trace import calibrate, gram
from compress_jax.trace.reducers import absmax, moments

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "digits": LeNet300100(hidden=(96, 48)),
    "transformer": ViT(patch=2, width=32, depth=1, heads=4, hidden=64),
}


def data() -> dict[str, Any]:
    """Return the digits: the first 1297 to train with, the last 500 to test."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray((images / 16).reshape(-1, 8, 8, 1), jnp.float32), jnp.asarray(labels)
    return {"train": (x[:1297], y[:1297]), "test": (x[1297:], y[1297:])}


def train(model: Any, x: Any, y: Any, seed: int, steps: int = 1000) -> Any:
    """Train in float by Adam with a cosine."""
    params = model.init(jax.random.key(seed), x[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def loss(params: Any, index: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(
            model.apply(params, x[index]), y[index]
        ).mean()

    @jax.jit
    def run(params: Any) -> Any:
        def step(carry: Any, key: Any) -> Any:
            params, memory = carry
            grads = jax.grad(loss)(params, jax.random.randint(key, (64,), 0, len(x)))
            updates, memory = optimizer.update(grads, memory)
            return (optax.apply_updates(params, updates), memory), None

        return jax.lax.scan(
            step,
            (params, optimizer.init(params)),
            jax.random.split(jax.random.key(seed + 1), steps),
        )[0][0]

    return run(params)


def solvers(fn: Callable[..., Any], params: Any, x: Any, bits: int) -> dict[str, Any]:
    """Return by name what each solver makes of the params: plain arrays that lie on their grids."""
    batches = [x[i : i + 128] for i in range(0, len(x), 128)]
    seen = calibrate(fn, gram(), params, batches)
    means = calibrate(fn, moments(), params, batches)
    weights = "**/kernel"
    c = cj.at(weights, uniform(bits, granularity="channel"))
    made = {"nearest": c.view(params, c.init(params))}
    for name, rule in {"nearest, mse scale": "mse", "nearest, hqq scale": hqq}.items():
        other = cj.at(weights, uniform(bits, granularity="channel", scale=rule))
        made[name] = other.view(params, other.init(params))
    correct = partial(correct_bias, fn, params, x[:1], calibration=means)
    made["nearest, bias corrected"] = correct(compressed=made["nearest"]).params
    searched = clip(params, seen, c)
    made["clip"] = searched.params
    made["awq"] = awq(fn, params, x[:1], calibration=seen, compression=c).params
    for name, solve in {"gptq": gptq, "adaround": adaround, "signround": signround}.items():
        options = {"steps": 1000} if name == "adaround" else {}
        made[name] = solve(params, seen, c, **options).params
        made[f"clip, {name}"] = solve(params, seen, c, searched.state, **options).params
    made["clip, gptq, bias corrected"] = correct(compressed=made["clip, gptq"]).params
    tensor = cj.at(weights, uniform(bits))
    made["nearest, per tensor"] = tensor.view(params, tensor.init(params))
    even = equalize(fn, params, x[:1]).params
    made["equalized, per tensor"] = tensor.view(even, tensor.init(even))
    return made


def measured(
    fn: Callable[..., Any], params: Any, made: dict[str, Any], x: Any, test: Any
) -> dict[str, list[float]]:
    """Return (error of layers, of logits, accuracy) of everything made.

    Layers that were rescaled have no error.
    """
    leaves = flatten(params)[0]
    tasks, _ = problems(calibrate(fn, gram(), params, [x]), leaves)
    run = jax.jit(fn)
    exact = run(params, test[0])

    def error(path: str, task: Problem, new: Any) -> Any:
        kernel, rounded = (task.form.matrices(task.box.take(each[path])) for each in (leaves, new))
        return output_error(kernel, rounded, task.gram).sum()

    def layers(new: Any) -> float:
        errors = [sum(float(error(path, task, new)) for task in own) for path, own in tasks.items()]
        return float(np.exp(np.mean(np.log(errors))))

    rows = {}
    for name, each in made.items():
        logits = run(each, test[0])
        right = float((logits.argmax(-1) == test[1]).mean())
        moved = name.startswith(("awq", "equalized"))
        rows[name] = [
            float("nan") if moved else layers(flatten(each)[0]),
            float(((logits - exact) ** 2).mean()),
            right,
        ]
    return rows


def activations(fn: Callable[..., Any], bits: int) -> Callable[..., Any]:
    """Return the function with the inputs of products quantized, one dynamic scale a tensor."""

    def rule(site: Any, lhs: Any, rhs: Any) -> Any:
        if site.operand is None:
            return lhs, rhs
        x = (lhs, rhs)[site.inputs["input"]]
        top = jnp.abs(x).max() / (2 ** (bits - 1) - 1)
        x = jnp.clip(jnp.round(x / top), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * top
        return (lhs, x) if site.operand == "lhs" else (x, rhs)

    return cj.trace.rewrite(fn, rule)


def smoothed(
    fn: Callable[..., Any], params: Any, x: Any, test: Any, bits: int
) -> dict[str, list[float]]:
    """Return (nothing, error of logits, accuracy) at so many bits of weights and activations."""
    c = cj.at("**/kernel", uniform(bits, granularity="channel"))
    run = jax.jit(activations(fn, bits))
    exact, rows = jax.jit(fn)(params, test[0]), {}
    seen = calibrate(fn, absmax("channel"), params, [x])
    for name, each in {
        "nearest": params,
        "smooth, nearest": smooth(fn, params, x[:1], calibration=seen).params,
    }.items():
        logits = run(c.view(each, c.init(each)), test[0])
        right = float((logits.argmax(-1) == test[1]).mean())
        rows[f"{name}, activations too"] = [
            float("nan"),
            float(((logits - exact) ** 2).mean()),
            right,
        ]
    return rows


def main() -> None:
    """Measure every row over the seeds and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    args = parser.parse_args()
    model, split = MODELS[args.model], data()
    fn, table, floats = model.apply, {}, []
    for seed in range(args.seeds):
        params = train(model, split["train"][0], split["train"][1], seed)
        floats.append(float((fn(params, split["test"][0]).argmax(-1) == split["test"][1]).mean()))
        x = split["train"][0][:512]
        for bits in args.bits:
            rows = measured(fn, params, solvers(fn, params, x, bits), x, split["test"])
            if bits == 4:
                rows |= smoothed(fn, params, x, split["test"], bits)
            for name, row in rows.items():
                base = "nearest, per tensor" if "per tensor" in name else "nearest"
                base = "nearest, activations too" if "activations" in name else base
                ratios = [row[0] / rows[base][0], row[1] / rows[base][1], row[2]]
                table.setdefault((bits, name), []).append(ratios)
                print(seed, bits, name, *(f"{each:.4f}" for each in ratios), flush=True)
            write(args.model, floats, table)


def write(name: str, floats: list[float], table: dict[tuple[int, str], list[list[float]]]) -> None:
    """Write means over the seeds, with the standard deviation of the accuracy."""
    RESULTS.mkdir(exist_ok=True)
    lines = [
        f"float accuracy {100 * np.mean(floats):.2f}, {len(floats)} seed(s); errors relative to "
        "rounding to nearest",
        "",
    ]
    lines += [
        "| bits | solver | layers' error | logits' error | accuracy |",
        "| --- | --- | --- | --- | --- |",
    ]
    record = []
    for (bits, solver), runs in table.items():
        mean, spread = np.mean(runs, 0), np.std(runs, 0)
        layers = "" if np.isnan(mean[0]) else f"{mean[0]:.3f}"
        right = f"{100 * mean[2]:.2f}" + (f" ± {100 * spread[2]:.2f}" if len(runs) > 1 else "")
        lines.append(f"| {bits} | {solver} | {layers} | {mean[1]:.3f} | {right} |")
        record.append(
            {
                "bits": bits,
                "solver": solver,
                "runs": [[None if np.isnan(x) else x for x in run] for run in runs],
            }
        )
    (RESULTS / f"solvers_{name}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"solvers_{name}.json").write_text(
        json.dumps({"float": floats, "rows": record}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
