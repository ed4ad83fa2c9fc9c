"""Every distillation method beside labels alone: one teacher, one student, one budget.

python experiments/distillation/fashion_mnist.py                                     # 30 epochs,
all methods python experiments/distillation/fashion_mnist.py --epochs 10 --shares 1 0.1 --methods
labels KD DKD   # names by beginning

Fashion-MNIST. The teacher is a ResNet-8 trained on the first 20,000 training images with crops and
flips. The student has two hidden layers, of 64 and 32 units (LeNet-300-100, narrower), and sees
5,000 of those images, as they are, so that the teacher's logits and features are computed once and
come with the batch. Every run has the same number of steps of 128 images, the same Adam and the
same schedule; only the loss differs. Losses of features get, on one more seed, some shares of the
published weight, and validation (6,000 images held out of train) chooses. The test split is read
once by each final run.

Runs that the results file has are not run again (``--fresh`` forgets them); ``--minutes`` begins no
run after so long, and the same command goes on where it was. Teacher and what it says are kept in
the folder ``--work``.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import compress_jax as cj
from compress_jax import distill as d
from compress_jax.data import Data, batches, load, random_crop_flip
from compress_jax.models import LeNet300100, ResNet
from compress_jax.train import (
    accuracy,
    create,
    distillation,
    fit,
    label_optimizer,
    make_step,
    supervised,
)

RESULTS = Path(__file__).parent / "results"
TAUGHT, EXAMPLES, BATCH, TEACHER_STEPS, TUNING_SEED = 20_000, 5_000, 128, 936, 1_000
LAST = "pooled"
TEACHER, STUDENT = ResNet(depth=8, width=16, stem_stride=2), LeNet300100(hidden=(64, 32))
init = jax.jit(STUDENT.init)
answer: Any = STUDENT.apply
said_by: Any = TEACHER.apply


def see(variables: Any, x: jax.Array) -> Any:
    """Return the teacher's logits, and its last features averaged over positions."""
    logits, features = d.capture(TEACHER, ("block_2_0",))(variables, x)
    return logits, {LAST: features["block_2_0"].mean(axis=(1, 2))}


def standardized(student: jax.Array, teacher: jax.Array, temperature: Any) -> jax.Array:
    return d.kl(d.standardize(student), d.standardize(teacher), temperature)


def scaled(term: d.Term) -> d.Term:
    """Return a term with its weight in memory, so that one compiled step serves every weight."""

    def init(key: jax.Array, seen: d.LossContext) -> tuple[Any, Any]:
        parts, memory = term.init(key, seen)
        return parts, {"own": memory, "share": jnp.ones((), jnp.float32)}

    def loss(seen: d.LossContext, parts: Any, memory: Any) -> tuple[jax.Array, Any]:
        value, own = term.loss(seen, parts, memory["own"])
        return memory["share"] * value, {**memory, "own": own}

    return term._replace(init=init, loss=loss)


def methods(labels: np.ndarray, steps: int) -> tuple[dict[str, list[d.Term]], dict[str, d.Term]]:
    """Return methods with given weights, and terms whose weight beside the labels is chosen."""
    warm = optax.linear_schedule(0.0, 1.0, steps // 12)
    on_last = partial(d.on_features, student="dense_1", teacher=LAST)
    given = {
        "labels alone": [d.on_labels()],
        "KD": [d.on_labels(0.1), d.on_logits(d.kl, 0.9, temperature=4.0)],
        "DKD": [d.on_labels(), d.on_logits(d.dkd, warm, temperature=4.0, labels=True)],
        "DIST": [d.on_labels(), d.on_logits(partial(d.dist, beta=2.0, gamma=2.0), temperature=4.0)],
        "logit MSE": [d.on_labels(0.1), d.on_logits(d.mse, 0.9)],
        "JSD": [d.on_labels(0.1), d.on_logits(d.jsd, 0.9, temperature=4.0)],
        "logit standardisation": [
            d.on_labels(0.1),
            d.on_logits(standardized, 9.0, temperature=2.0),
        ],
    }
    chosen = {
        "RKD": on_last(d.rkd, weight=1.0),
        "SP": on_last(d.similarity, weight=3000.0),
        "PKT": on_last(d.pkt, weight=30000.0),
        "VID": on_last(d.vid, weight=1.0, adapter=d.gaussian()),
        "CRD": d.contrast("dense_1", LAST, labels, 0.8, dim=32, negatives=64),
        "FitNet hint": on_last(d.hint, weight=100.0, adapter=d.linear()),
    }
    return given, chosen


def compressed(steps: int) -> cj.Compression:
    """80 % pruned by the first half of the run, and 4 bits a weight."""
    ramp = cj.prune.cubic(0.8, begin=0, end=steps // 2)
    prune, grid = (
        cj.prune.magnitude(ramp, scope="global"),
        cj.quantize.uniform(4, granularity="channel"),
    )
    return cj.at("**/kernel", cj.chain(cj.every(20, prune), cj.every(20, grid)))


def crops(data: Data) -> Any:
    """Return the augmentation: a crop, padded by black, and a flip."""
    black = jnp.asarray(-data.mean / data.std)
    return lambda key, batch: {**batch, "image": random_crop_flip(key, batch["image"], fill=black)}


def train_teacher(data: Data, split: dict[str, np.ndarray], steps: int = TEACHER_STEPS) -> Any:
    schedule = optax.cosine_onecycle_schedule(steps, 0.2, pct_start=0.2)
    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9, nesterov=True)
    )
    state = create(
        TEACHER.init(jax.random.key(0), split["image"][:1]),
        cj.identity(),
        optimizer,
        jax.random.key(1),
    )
    step = jax.jit(
        make_step(supervised(TEACHER, augment=crops(data)), optimizer, cj.identity()),
        donate_argnums=0,
    )
    return fit(step, state, batches(split, BATCH, seed=0), steps=steps, title="teacher").variables()


def taught(variables: Any, split: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the teacher's logits and features of each image."""
    run = jax.jit(d.Teacher(see, variables).forward)
    out = [
        jax.device_get(run(split["image"][i : i + 500])) for i in range(0, len(split["label"]), 500)
    ]
    features = {
        f"teacher/{path}": np.concatenate([each[path] for _, each in out]) for path in (LAST,)
    }
    return {"teacher": np.concatenate([logits for logits, _ in out]), **features}


def student_trainer(
    split: dict[str, np.ndarray], terms: list[Any], c: cj.Compression, steps: int
) -> Any:
    """Return ``(seed, share) -> variables``; what is compiled serves all seeds and weights."""
    loss = distillation(STUDENT, terms)
    asked = {f"teacher/{path}" for term in terms for path in term.teacher} | {
        "image",
        "label",
        "index",
        "teacher",
    }
    optimizer = label_optimizer(*[optax.adam(optax.cosine_decay_schedule(2e-3, steps))] * 3)
    step = jax.jit(make_step(loss, optimizer, c), donate_argnums=0)

    def train(seed: int, share: float) -> Any:
        feed = batches(
            {name: array for name, array in split.items() if name in asked}, BATCH, seed=seed
        )
        key = jax.random.key(seed)
        variables = init(key, split["image"][:1])
        parts, memory = loss.init(key, variables, feed[0], None)
        memory = {name: {**own, "share": jnp.float32(share)} for name, own in memory.items()}
        state = create(variables, c, optimizer, key, (parts, memory))
        return fit(step, state, feed, steps=steps, title="student").variables(c)

    return train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30, help="of every run")
    parser.add_argument(
        "--shares",
        nargs="*",
        type=float,
        default=[0.1, 0.01],
        help="of published weights, to choose from",
    )
    parser.add_argument(
        "--methods", nargs="*", default=[""], help="only those whose names begin so"
    )
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin no run after so many minutes"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="forget the results there are")
    parser.add_argument(
        "--data", default=None, help="folder of the Fashion-MNIST files, if not to be downloaded"
    )
    parser.add_argument(
        "--work", default=Path(tempfile.gettempdir()) / "compress_jax_distillation", type=Path
    )
    args = parser.parse_args()
    begun = time.monotonic()
    data = load("fashion_mnist", manual_dir=args.data)
    results: dict[str, Any] = {"teacher": {}, "tuning": {}, "runs": {}}
    steps, file = (
        args.epochs * (EXAMPLES // BATCH),
        RESULTS / f"fashion_mnist_{args.epochs}_epochs.json",
    )
    if file.exists() and not args.fresh:
        results = json.loads(file.read_text())
    split, results["teacher"] = prepared(data, args.work)

    def run(name: str, terms: list[d.Term], c: cj.Compression, choose: bool = False) -> None:
        """Train and measure what is missing."""
        if not name.split(": ")[-1].startswith(tuple(args.methods)):
            return
        train = student_trainer(split, terms, c, steps)

        def one(group: str, seed: int, share: float, part: str) -> float | None:
            label = f"{name}/{share:g}" if group == "tuning" else f"{name}/{seed}"
            if label not in results[group] and time.monotonic() - begun < 60 * args.minutes:
                start = time.monotonic()
                measured = accuracy(answer, train(seed, share), getattr(data, part))
                row = {
                    part: measured,
                    "share": share,
                    "seconds": round(time.monotonic() - start, 1),
                }
                results[group][label] = row
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(results, indent=1) + "\n")
                print(group, label, row, flush=True)
            return results[group].get(label, {}).get(part)

        share = 1.0
        if choose:
            tried = {each: one("tuning", TUNING_SEED, each, "validation") for each in args.shares}
            if None in tried.values():
                return
            share = max(tried, key=lambda each: tried[each] or 0.0)
        for seed in range(args.seeds):
            one("runs", seed, share, "test")

    given, chosen = methods(split["label"], steps)
    for name in ("labels alone", "KD", "DIST"):
        run(name, given[name], cj.identity())
        run(f"80 % pruned, 4 bits: {name}", given[name], compressed(steps))
    for name, terms in given.items():
        run(name, terms, cj.identity())
    for name, term in chosen.items():
        run(name, [d.on_labels(), scaled(term)], cj.identity(), choose=True)
    print(table(results))


def prepared(data: Data, work: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the students' split with what the teacher says beside it, and who the teacher is.

    Kept in the folder.
    """
    file, said = work / "teacher.safetensors", work / f"said-{EXAMPLES}.npz"
    if not file.exists():
        cj.save(
            file, train_teacher(data, {name: array[:TAUGHT] for name, array in data.train.items()})
        )
    variables = cj.unpack(cj.load(file)[0])
    split = {name: array[:EXAMPLES] for name, array in data.train.items()}
    if not said.exists():
        accuracies = {
            part: accuracy(said_by, variables, getattr(data, part))
            for part in ("validation", "test")
        }
        told: dict[str, Any] = {
            **taught(variables, split),
            **{f"accuracy {part}": n for part, n in accuracies.items()},
        }
        np.savez(said, **told)
    with np.load(said) as arrays:
        about = {part: float(arrays[f"accuracy {part}"]) for part in ("validation", "test")}
        split |= {name: arrays[name] for name in arrays.files if not name.startswith("accuracy")}
    split["index"] = np.arange(EXAMPLES, dtype=np.int32)
    return split, {"sha256": d.hexadecimal(d.fingerprint(variables)), **about}


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    rows: dict[str, list[float]] = {}
    for label, row in results["runs"].items():
        rows.setdefault(label.rpartition("/")[0], []).append(100 * row["test"])
    plain = np.mean(rows.get("labels alone", [np.nan]))
    lines = [f"teacher: {100 * results['teacher']['test']:.2f} %", ""]
    lines += [
        "| method | weight | test accuracy, mean and deviation | seeds | over labels alone |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, values in rows.items():
        share = next(
            row["share"] for label, row in results["runs"].items() if label.startswith(f"{name}/")
        )
        deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
        difference = f"{np.mean(values) - plain:+.2f}"
        weight = f"{share:g} of the published"
        lines.append(
            f"| {name} | {weight} | {np.mean(values):.2f} ± {deviation:.2f} | {len(values)} | "
            f"{difference} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
