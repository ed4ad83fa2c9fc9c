"""Which distillation helps a small student? One teacher, one student, one budget, every method beside the labels alone.

python experiments/distillation/fashion_mnist.py

Fashion-MNIST. The teacher is a ResNet-8 trained on the first 20,000 training images with crops and flips; the student,
LeNet-5 with LeNet's own 6 and 16 channels, sees 10,000 of them, as they are, so that the teacher's logits and features are
computed once and come with the batch. Every run is 400 steps of 128 images with the same Adam and the same schedule; only
the loss differs. Losses of features get, on one more seed, the published weight and a tenth of it, and validation (6,000
images held out of train) chooses. The test split is read once by each of the final runs.

Runs that the results file has are not run again (``--fresh`` forgets them); ``--minutes`` begins no run after so long, and
the same command goes on where it was. The trained teacher is kept in the folder ``--work``.
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
from compress_jax.models import LeNet5, ResNet
from compress_jax.train import accuracy, create, distillation, fit, label_optimizer, make_step, supervised

RESULTS = Path(__file__).parent / "results" / "fashion_mnist.json"
TAUGHT, EXAMPLES, BATCH, STEPS, TEACHER_STEPS, TUNING_SEED = 20_000, 10_000, 128, 400, 936, 1_000
MAP, LAST = "block_1_0", "pooled"
TEACHER, STUDENT = ResNet(depth=8, width=16, stem_stride=2), LeNet5()
init = jax.jit(STUDENT.init)


def pooled(x: jax.Array) -> jax.Array:
    return x.mean(axis=(1, 2))


def see(variables: Any, x: jax.Array) -> Any:
    """Return the teacher's logits and the two features that terms look at."""
    logits, features = d.capture(TEACHER, ("block_1_0", "block_2_0"))(variables, x)
    return logits, {MAP: features["block_1_0"], LAST: pooled(features["block_2_0"])}


def standardized(student: jax.Array, teacher: jax.Array, temperature: Any) -> jax.Array:
    return d.kl(d.standardize(student), d.standardize(teacher), temperature)


def teacher_free(student: jax.Array, teacher: jax.Array, labels: jax.Array) -> jax.Array:
    return d.kl(student, d.virtual_teacher(labels, 10), 20.0)


def methods(labels: np.ndarray) -> dict[str, tuple[Any, bool]]:
    """Return each method: its terms, given the share of the published weight, and whether that share is to be chosen."""
    to_map = partial(d.resize, size=(7, 7))
    relu_map = lambda x: jax.nn.relu(to_map(x))  # noqa: E731
    warm = optax.linear_schedule(0.0, 1.0, STEPS // 12)
    kd = [d.on_labels(0.1), d.on_logits(d.kl, 0.9, temperature=4.0)]

    def beside_labels(term: Any) -> Any:
        return lambda share: [d.on_labels(), term(share)]

    def on_map(loss: Any, weight: float, part: Any = None, of: Any = to_map) -> Any:
        return lambda share: d.on_features(loss, "conv_1", MAP, share * weight, part=part, of_student=of)

    def on_last(loss: Any, weight: float, part: Any = None) -> Any:
        return lambda share: d.on_features(loss, "dense_1", LAST, share * weight, part=part)

    fixed = {
        "labels alone": [d.on_labels()],
        "KD": kd,
        "logit MSE": [d.on_labels(0.1), d.on_logits(d.mse, 0.9)],
        "DKD": [d.on_labels(), d.on_logits(d.dkd, warm, temperature=4.0, labels=True)],
        "DIST": [d.on_labels(), d.on_logits(partial(d.dist, beta=2.0, gamma=2.0), temperature=4.0)],
        "logit standardisation": [d.on_labels(0.1), d.on_logits(standardized, 9.0, temperature=2.0)],
        "JSD": [d.on_labels(0.1), d.on_logits(d.jsd, 0.9, temperature=4.0)],
        "teacher-free": [d.on_labels(0.1), d.on_logits(teacher_free, 0.9, labels=True)],
    }
    chosen = {
        "FitNet hint": beside_labels(on_map(d.hint, 100.0, d.linear())),
        "attention transfer": beside_labels(on_map(d.attention, 1000.0, of=relu_map)),
        "VID": beside_labels(on_map(d.vid, 1.0, d.gaussian())),
        "RKD": beside_labels(on_last(d.rkd, 1.0)),
        "SP": beside_labels(on_map(d.similarity, 3000.0)),
        "CRD": beside_labels(lambda share: d.contrast("dense_1", LAST, labels, share * 0.8, dim=64, negatives=256)),
        "KD + hint": lambda share: [*kd, on_map(d.hint, 100.0, d.linear())(share)],
    }
    return {
        **{name: (lambda share, terms=terms: terms, False) for name, terms in fixed.items()},
        **{name: (terms, True) for name, terms in chosen.items()},
    }


def compressed() -> cj.Compression:
    """80 % pruned by the first half of the run, and 4 bits a weight."""
    ramp = cj.prune.cubic(0.8, begin=0, end=STEPS // 2)
    prune, grid = cj.prune.magnitude(ramp, scope="global"), cj.quantize.uniform(4, granularity="channel", scale="mse")
    return cj.at("**/kernel", cj.chain(cj.every(20, prune), cj.every(20, grid)))


def train_teacher(data: Data, split: dict[str, np.ndarray]) -> Any:
    black = jnp.asarray(-data.mean / data.std)

    def augment(key: jax.Array, batch: Any) -> Any:
        return {**batch, "image": random_crop_flip(key, batch["image"], fill=black)}

    schedule = optax.cosine_onecycle_schedule(TEACHER_STEPS, 0.2, pct_start=0.2)
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9, nesterov=True))
    state = create(TEACHER.init(jax.random.key(0), split["image"][:1]), cj.identity(), optimizer, jax.random.key(1))
    step = jax.jit(make_step(supervised(TEACHER, augment=augment), optimizer, cj.identity()), donate_argnums=0)
    return fit(step, state, batches(split, BATCH, seed=0), steps=TEACHER_STEPS, title="teacher").variables()


def taught(variables: Any, split: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the split with the teacher's logits and features of each image beside it."""
    run = jax.jit(d.Teacher(see, variables).see)
    out = [jax.device_get(run(split["image"][i : i + 500])) for i in range(0, len(split["label"]), 500)]
    features = {f"teacher/{path}": np.concatenate([each[path] for _, each in out]) for path in (MAP, LAST)}
    index = np.arange(len(split["label"]), dtype=np.int32)
    return {**split, "index": index, "teacher": np.concatenate([logits for logits, _ in out]), **features}


def student_trainer(split: dict[str, np.ndarray], terms: list[Any], c: cj.Compression) -> Any:
    """Return ``seed -> variables``; what is compiled serves all seeds."""
    loss = distillation(STUDENT, terms)
    asked = {f"teacher/{path}" for term in terms for path in term.teacher} | {"image", "label", "index", "teacher"}
    optimizer = label_optimizer(*[optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))] * 3)
    step = jax.jit(make_step(loss, optimizer, c), donate_argnums=0)

    def train(seed: int) -> Any:
        feed = batches({name: array for name, array in split.items() if name in asked}, BATCH, seed=seed)
        key = jax.random.key(seed)
        variables = init(key, split["image"][:1])
        state = create(variables, c, optimizer, key, loss.init(key, variables, feed[0], None))
        return fit(step, state, feed, steps=STEPS, title="student").variables(c)

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no run after so many minutes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="forget the results there are")
    parser.add_argument("--data", default=None, help="folder of the Fashion-MNIST files, if not to be downloaded")
    parser.add_argument("--work", default=Path(tempfile.gettempdir()) / "compress_jax_distillation", type=Path)
    args = parser.parse_args()
    begun = time.monotonic()
    data = load("fashion_mnist", manual_dir=args.data)
    results: dict[str, Any] = {"teacher": {}, "tuning": {}, "runs": {}}
    if RESULTS.exists() and not args.fresh:
        results = json.loads(RESULTS.read_text())
    file = args.work / "teacher.safetensors"
    if not file.exists():
        cj.save(file, train_teacher(data, {name: array[:TAUGHT] for name, array in data.train.items()}))
    variables = cj.unpack(cj.load(file)[0])
    mark = d.hexadecimal(d.fingerprint(variables))
    if results["teacher"].get("sha256", mark) != mark:
        raise SystemExit("the results there are belong to another teacher; --fresh forgets them")
    measured = {part: accuracy(TEACHER.apply, variables, getattr(data, part)) for part in ("validation", "test")}
    results["teacher"] = {"sha256": mark, **measured}
    print("teacher", results["teacher"], flush=True)
    split = taught(variables, {name: array[:EXAMPLES] for name, array in data.train.items()})

    def run(group: str, name: str, terms: list[Any], seeds: list[int], c: cj.Compression) -> bool:
        """Train and measure what is missing; tell whether all is there."""
        train = student_trainer(split, terms, c)
        for seed in seeds:
            if f"{name}/{seed}" in results[group]:
                continue
            if time.monotonic() - begun > 60 * args.minutes:
                return False
            start = time.monotonic()
            variables = train(seed)
            row = {"validation": accuracy(STUDENT.apply, variables, data.validation)}
            row |= {"test": accuracy(STUDENT.apply, variables, data.test)} if group == "runs" else {}
            results[group][f"{name}/{seed}"] = {**row, "seconds": round(time.monotonic() - start, 1)}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(group, name, seed, results[group][f"{name}/{seed}"], flush=True)
        return True

    seeds, shares = list(range(args.seeds)), (1.0, 0.1)
    for name, (terms, choose) in methods(split["label"]).items():
        share = 1.0
        if choose:
            tried = [run("tuning", f"{name}/{each:g}", terms(each), [TUNING_SEED], cj.identity()) for each in shares]
            if not all(tried):
                break
            share = max(shares, key=lambda each: results["tuning"][f"{name}/{each:g}/{TUNING_SEED}"]["validation"])
        run("runs", name, terms(share), seeds, cj.identity())
        if name in ("labels alone", "KD"):
            run("runs", f"80 % pruned, 4 bits: {name}", terms(1.0), seeds, compressed())


if __name__ == "__main__":
    main()
