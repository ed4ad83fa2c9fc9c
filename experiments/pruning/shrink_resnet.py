"""Channels removed from a residual network.

2 and 4 times fewer multiply-accumulates, fine-tuned, and timed.

COMPRESS_JAX_DATA=DIR python experiments/pruning/shrink_resnet.py --seed 0      # minutes on a GPU,
an hour on 2 cores python experiments/pruning/shrink_resnet.py --speed                             #
wall-clock time beside the MACs python experiments/pruning/shrink_resnet.py --table
# the means of all seeds that were run

ResNet-8 of width 16 (stem of stride 2) on Fashion-MNIST: the first examples train it, then it is
fine-tuned with the float network as teacher, hinton's loss, batch norm in training mode
(``--examples``, ``--epochs``). `shrink` is left at its defaults (L2, every group alike); with
``--choose`` the validation split chooses among three ways after half an epoch of fine-tuning at 2x.
The test split is looked at once for each row, at the end.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import compress_jax as cj
from compress_jax.data import Data, batches, load
from compress_jax.models import ResNet
from compress_jax.prune import importance
from compress_jax.train import accuracy

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from interleave import interleaved, milliseconds, ratio  # noqa: E402 # pyright: ignore[reportMissingImports]

RESULTS, BATCH = Path(__file__).parent / "results", 128
TRIAL = 0.5  # epochs
MODEL = ResNet(depth=8, width=16, stem_stride=2)
TARGETS = {"2x": 0.5, "4x": 0.25}


def infer(model: ResNet, variables: Any, x: jax.Array) -> Any:
    """Return logits in eval mode."""
    return model.apply(variables, x)


def learn(variables: Any, x: jax.Array) -> Any:
    """Return logits in training mode and the new batch statistics."""
    return MODEL.apply(variables, x, train=True, mutable=["batch_stats"])


FULL = partial(infer, MODEL)


def train(
    fn: Any, variables: Any, data: Data, epochs: float, rate: float, seed: int, teacher: Any = None
) -> Any:
    """Train all variables of a function that returns logits and batch statistics.

    A teacher's variables are optional.
    """
    steps = round(epochs * len(data.train["label"]) / BATCH)
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps), weight_decay=1e-4
    )

    def loss(params: Any, rest: Any, x: jax.Array, y: jax.Array, teacher: Any) -> Any:
        logits, new = fn({"params": params, **rest}, x)
        if teacher is None:
            return cj.distill.cross_entropy(logits, y).mean(), new
        return cj.distill.hinton()(logits, FULL(teacher, x), y).mean(), new

    @jax.jit
    def step(params: Any, rest: Any, state: Any, x: jax.Array, y: jax.Array, teacher: Any) -> Any:
        gradient, new = jax.grad(loss, has_aux=True)(params, rest, x, y, teacher)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), {**rest, **new}, state

    params, rest = (
        variables["params"],
        {key: value for key, value in variables.items() if key != "params"},
    )
    state, feed = optimizer.init(params), batches(data.train, BATCH, seed=seed)
    for index in range(steps):
        batch = feed[index]
        params, rest, state = step(params, rest, state, batch["image"], batch["label"], teacher)
    return {"params": params, **rest}


def criteria(data: Data, variables: Any, choose: bool) -> dict[str, dict[str, Any]]:
    """Return the ways to prune among which validation chooses; or just the default."""
    if not choose:
        return {"L2, every group alike": {}}
    parts = [slice(start, start + 256) for start in range(0, 2048, 256)]
    calibration = [(data.train["image"][part], data.train["label"][part]) for part in parts]

    def loss(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cj.distill.cross_entropy(FULL(variables, x), y).mean()

    taylor = importance.taylor(importance.gradients(loss, variables, calibration))
    together = {"scope": "global", "max_ratio": 0.75}
    return {
        "L2, every group alike": {},
        "L2, all groups together": together,
        "Taylor, all groups together": {"importance": taylor, **together},
    }


def tuned(data: Data, full: Any, small: Any, epochs: float, seed: int, variables: Any) -> Any:
    """Fine-tune the kept channels, batch statistics too, in the training-mode function."""
    x = jnp.asarray(data.train["image"][:BATCH])
    return train(
        cj.prune.narrow(learn, full, x, kept=small.kept).fn,
        variables,
        data,
        epochs,
        1e-3,
        seed,
        full,
    )


def run(data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that is reported of one seed; finished parts are taken from the cache."""
    seed, choose, (epochs, tuning) = args.seed, args.choose, args.epochs
    name = f"seed{seed}_{epochs}_{tuning}_{args.examples}"
    record, weights = Record(args.cache / f"{name}.json"), args.cache / f"{name}.cjx"
    x = jnp.asarray(data.train["image"][:BATCH])
    if not weights.exists():
        fresh = jax.jit(MODEL.init)(jax.random.key(seed), x)
        cj.save(weights, train(learn, fresh, data, epochs, 3e-3, seed))
    full = cj.load(weights)[0]
    ways = criteria(data, full, choose)

    def trial(name: str) -> list[float]:
        small = cj.prune.shrink(FULL, full, x, macs=TARGETS["2x"], **ways[name])
        after = tuned(data, full, small, TRIAL, seed + 100, small.params)
        return [accuracy(small.fn, params, data.validation) for params in (small.params, after)]

    scores = {name: record.once(name, partial(trial, name)) for name in ways if choose}
    chosen = max(ways, key=lambda name: scores[name][1] if choose else 0)

    def rows(target: str) -> dict[str, Any]:
        small = cj.prune.shrink(FULL, full, x, macs=TARGETS[target], **ways[chosen])
        print(small.table, flush=True)
        after = tuned(data, full, small, tuning, seed + 1000, small.params)
        every = {target: small.params, f"{target}, tuned": after}
        return {
            name: row(data, small.fn, params, small.table.after) for name, params in every.items()
        }

    found = record.once(
        "full", lambda: {"full": row(data, FULL, full, cj.trace.cost(FULL, full, x))}
    )
    for target in args.targets:
        found |= record.once(target, partial(rows, target))
    examples = len(data.train["label"])
    details = {
        "seed": seed,
        "examples": examples,
        "epochs": args.epochs,
        "chosen": chosen,
        "seconds": record.seconds,
    }
    return {**details, "validation": scores, "rows": found}


class Record:
    """Finished parts of a run, kept in a file, with the seconds they took."""

    def __init__(self, path: Path) -> None:
        """Start where the file stops."""
        self.path, self.start = path, time.perf_counter()
        self.parts = json.loads(path.read_text()) if path.exists() else {"seconds": 0.0}

    @property
    def seconds(self) -> int:
        """Seconds of all parts so far."""
        return round(self.parts["seconds"])

    def once(self, name: str, make: Any) -> Any:
        """Return a part, made unless it is there."""
        if name not in self.parts:
            self.parts[name] = make()
            self.parts["seconds"] += time.perf_counter() - self.start
            self.path.write_text(json.dumps(self.parts))
            print(name, self.parts[name], f"{self.seconds} s", flush=True)
        self.start = time.perf_counter()
        return self.parts[name]


def row(data: Data, fn: Any, variables: Any, cost: Any) -> dict[str, Any]:
    """Return accuracy on test and on validation, and the size."""
    found = {
        name: accuracy(fn, variables, split)
        for name, split in (("test", data.test), ("validation", data.validation))
    }
    return {**found, "macs": cost.macs // BATCH, "params": cost.params}


def speed(widths: list[int], rounds: int = 11) -> list[dict[str, Any]]:
    """Time inference of two widths, full and shrunk, taking turns.

    Weights are random, which does not matter here.
    """
    rows = []
    for width in widths:
        model = ResNet(depth=8, width=width, stem_stride=2)
        images = {
            size: jax.random.normal(jax.random.key(1), (size, 28, 28, 1)) for size in (1, 128)
        }
        variables, fn = jax.jit(model.init)(jax.random.key(0), images[1]), partial(infer, model)
        models: dict[str, Any] = {"full": (jax.jit(fn), variables)}
        macs = {"full": cj.trace.cost(fn, variables, images[1]).macs}
        for target, share in TARGETS.items():
            small = cj.prune.shrink(fn, variables, images[1], macs=share)
            models[target], macs[target] = (small.fn, small.params), small.table.after.macs
        for size, x in images.items():
            repeats = 64 if size == 1 else 1
            runs = {
                name: partial(repeat, partial(run, params, x), repeats)
                for name, (run, params) in models.items()
            }
            timed = interleaved(runs, rounds)
            for name, of in timed.items():
                fewer = {
                    "width": width,
                    "batch": size,
                    "model": name,
                    "MACs, fewer": f"{macs['full'] / macs[name]:.2f}x",
                }
                cpu = ratio((each.cpu for each in timed["full"]), (each.cpu for each in of))
                wall = ratio((each.wall for each in timed["full"]), (each.wall for each in of))
                time_of = milliseconds(each.wall / repeats for each in of)
                rows.append({**fewer, "ms": time_of, "faster, wall": wall, "faster, cpu": cpu})
                print(rows[-1], flush=True)
    return rows


def repeat(call: Any, times: int) -> Any:
    """Call a function several times, one after the other."""
    for _ in range(times):
        out = jax.block_until_ready(call())
    return out


def table() -> str:
    """Return the means over all seeds, as Markdown."""
    records = [
        json.loads(path.read_text()) for path in sorted(RESULTS.glob("shrink_resnet_seed*.json"))
    ]
    lines = [
        "| model | MACs | parameters | test accuracy (sd) | difference to full |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in records[0]["rows"]:
        found = [record["rows"][name] for record in records]
        tests = [100 * each["test"] for each in found]
        apart = [
            100 * (each["test"] - record["rows"]["full"]["test"])
            for each, record in zip(found, records, strict=True)
        ]
        spread = f" ({statistics.stdev(tests):.2f})" if len(tests) > 1 else ""
        sizes = (
            f"{statistics.mean(each[key] for each in found):,.0f}" for key in ("macs", "params")
        )
        lines.append(
            f"| {name} | {' | '.join(sizes)} | {statistics.mean(tests):.2f}{spread} | "
            f"{statistics.mean(apart):+.2f} |"
        )
    lines += [
        "",
        f"seeds: {len(records)}; minutes a seed: "
        f"{[round(each['seconds'] / 60, 1) for each in records]}",
    ]
    lines += [
        f"seed {each['seed']}: {each['chosen']}; tried on validation: {each['validation']}"
        for each in records
    ]
    return "\n".join(lines)


def main() -> None:
    """Run one seed, or time, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int)
    parser.add_argument("--examples", type=int, default=54_000, help="that train")
    parser.add_argument(
        "--epochs", type=int, nargs=2, default=[20, 20], help="of training, and of fine-tuning"
    )
    parser.add_argument(
        "--choose", action="store_true", help="among ways to prune, on validation; else the default"
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("shrink_resnet_cache"),
        help="of an interrupted run's parts",
    )
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64], help="to time")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    args.cache.mkdir(exist_ok=True)
    if args.seed is not None:
        data = load("fashion_mnist")
        data.train.update({name: values[: args.examples] for name, values in data.train.items()})
        record = run(data, args)
        (RESULTS / f"shrink_resnet_seed{args.seed}.json").write_text(
            json.dumps(record, indent=1) + "\n"
        )
    if args.speed:
        (RESULTS / "shrink_resnet_speed.json").write_text(
            json.dumps(speed(args.widths), indent=1) + "\n"
        )
    if args.table or args.seed is not None:
        text = table()
        (RESULTS / "shrink_resnet.md").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
