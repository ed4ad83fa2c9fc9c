"""Does distillation help a student that is pruned to 80 % and has 4 bits a weight? Crops and flips, one view for both.

python experiments/distillation/compressed.py --data DIR                # minutes on an accelerator, an hour on 2 cores
python experiments/distillation/compressed.py --data DIR --tune         # validation only: nothing is read of the test split

Fashion-MNIST. The teacher is a ResNet-8 of width 16, trained on all 54,000 training images; the student a ResNet-8 of a
smaller width. Both see the same augmented view in every step (Beyer et al., CVPR 2022: a consistent and patient teacher).
The student is pruned along a cubic ramp to 80 % by the first half of the run, and is on a 4-bit grid, one scale a channel,
from the first step on. Every run has the same steps, batches, Adam and schedule, and starts at the same weights; only the
loss differs. Validation (6,000 images held out of train) chooses among the losses, on seeds of its own; then labels alone
and the one that was chosen are trained on fresh seeds, and each reads the test split once.
"""

import argparse
import json
import statistics
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
from compress_jax.models import ResNet
from compress_jax.train import accuracy, create, distillation, fit, label_optimizer, make_step, supervised

RESULTS, BATCH, TUNING_SEEDS = Path(__file__).parent / "results", 128, (1000, 1001)
TEACHER: Any = ResNet(depth=8, width=16, stem_stride=2)
LOSSES = {
    "labels alone": [d.on_labels()],
    "KD": [d.on_labels(0.1), d.on_logits(d.kl, 0.9, temperature=4.0)],
    "KD, T = 1": [d.on_labels(0.1), d.on_logits(d.kl, 0.9, temperature=1.0)],
    "DIST": [d.on_labels(), d.on_logits(partial(d.dist, beta=2.0, gamma=2.0), temperature=4.0)],
}


def compressed(steps: int) -> cj.Compression:
    """80 % pruned by the first half of the run, and 4 bits a weight."""
    ramp = cj.prune.cubic(0.8, begin=0, end=steps // 2)
    prune, grid = cj.prune.magnitude(ramp, scope="global"), cj.quantize.uniform(4, granularity="channel")
    return cj.at("**/kernel", cj.chain(cj.every(20, prune), cj.every(20, grid)))


def crops(data: Data) -> Any:
    """Return the augmentation: a crop, padded by black, and a flip."""
    black = jnp.asarray(-data.mean / data.std)
    return lambda key, batch: {**batch, "image": random_crop_flip(key, batch["image"], fill=black)}


def learned(data: Data, epochs: int, file: Path) -> d.Teacher:
    """Return the teacher, trained unless its file is there."""
    if not file.exists():
        steps = epochs * (len(data.train["label"]) // BATCH)
        schedule = optax.cosine_onecycle_schedule(steps, 0.2, pct_start=0.2)
        optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9, nesterov=True))
        first = jax.jit(TEACHER.init)(jax.random.key(0), data.train["image"][:1])
        state = create(first, cj.identity(), optimizer, jax.random.key(1))
        step = jax.jit(make_step(supervised(TEACHER, augment=crops(data)), optimizer, cj.identity()), donate_argnums=0)
        file.parent.mkdir(parents=True, exist_ok=True)
        cj.save(file, fit(step, state, batches(data.train, BATCH, seed=0), steps=steps, title="teacher").variables())
    return d.Teacher(TEACHER.apply, cj.unpack(cj.load(file)[0]))


class Trainer:
    """Trains students of one budget; what is compiled serves all seeds."""

    def __init__(self, data: Data, teacher: d.Teacher, width: int, examples: int, epochs: int) -> None:
        """Take what all runs share."""
        self.student: Any = ResNet(depth=8, width=width, stem_stride=2)
        self.init = jax.jit(self.student.init)
        self.data, self.teacher, self.steps = data, teacher, epochs * (examples // BATCH)
        self.split = {name: array[:examples] for name, array in data.train.items()}
        self.compiled: dict[tuple[str, bool], Any] = {}

    def train(self, name: str, small: bool, seed: int) -> Any:
        """Return a student's variables."""
        c = compressed(self.steps) if small else cj.identity()
        loss = distillation(self.student, LOSSES[name], augment=crops(self.data))
        optimizer = label_optimizer(*[optax.adam(optax.cosine_decay_schedule(3e-3, self.steps))] * 3)
        if (name, small) not in self.compiled:
            self.compiled[name, small] = jax.jit(make_step(loss, optimizer, c), donate_argnums=0)
        feed, key = batches(self.split, BATCH, seed=seed), jax.random.key(seed)
        variables = self.init(key, self.split["image"][:1])
        state = create(variables, c, optimizer, key, loss.init(key, variables, feed[0], self.teacher))
        step = self.compiled[name, small]
        return fit(step, state, feed, steps=self.steps, title=name, teacher=self.teacher).variables(c)

    def measure(self, name: str, small: bool, seed: int, part: str) -> float:
        """Train, and return the accuracy on one split."""
        begun = time.monotonic()
        found = accuracy(self.student.apply, self.train(name, small, seed), getattr(self.data, part))
        about = "80 % pruned, 4 bits" if small else "as it is"
        print(f"{name}, {about}, seed {seed}: {part} {found:.4f}, {time.monotonic() - begun:.0f} s", flush=True)
        return found


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [f"teacher: {100 * record['teacher']:.2f} % on test; chosen on validation: {record['chosen']}", ""]
    lines += ["| student | loss | test accuracy, each seed | mean and deviation | over labels, paired, standard error |"]
    lines += ["|---|---|---|--:|--:|"]
    for student, rows in record["test"].items():
        for name, values in rows.items():
            apart = [100 * (a - b) for a, b in zip(values, rows["labels alone"], strict=True)]
            error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else np.nan
            gain = "" if name == "labels alone" else f"{statistics.mean(apart):+.2f} ± {error:.2f}"
            spread = statistics.stdev(values) if len(values) > 1 else np.nan
            each = ", ".join(f"{100 * value:.2f}" for value in values)
            mean = f"{100 * statistics.mean(values):.2f} ± {100 * spread:.2f}"
            lines.append(f"| {student} | {name} | {each} | {mean} | {gain} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=8, help="of the student")
    parser.add_argument("--examples", type=int, default=5_000, help="that the student sees")
    parser.add_argument("--epochs", type=int, default=60, help="of every student")
    parser.add_argument("--teacher-epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="train students without compression, too")
    parser.add_argument("--tune", action="store_true", help="stop after validation")
    parser.add_argument("--data", default=None, help="folder of the Fashion-MNIST files, if not to be downloaded")
    parser.add_argument("--work", default=Path(tempfile.gettempdir()) / "compress_jax_compressed", type=Path)
    args = parser.parse_args()
    data = load("fashion_mnist", manual_dir=args.data)
    teacher = learned(data, args.teacher_epochs, args.work / f"teacher-{args.teacher_epochs}.safetensors")
    trainer = Trainer(data, teacher, args.width, args.examples, args.epochs)
    tried = {name: [trainer.measure(name, True, seed, "validation") for seed in TUNING_SEEDS] for name in LOSSES}
    chosen = max([name for name in LOSSES if name != "labels alone"], key=lambda name: statistics.mean(tried[name]))
    record: dict[str, Any] = {"chosen": chosen, "validation": tried, "budget": {k: str(v) for k, v in vars(args).items()}}
    print(json.dumps(tried), f"chosen: {chosen}", flush=True)
    if args.tune:
        return
    record["test"] = {
        about: {
            name: [trainer.measure(name, small, seed, "test") for seed in range(args.seeds)]
            for name in ("labels alone", chosen)
        }
        for about, small in [("80 % pruned, 4 bits", True), ("as it is", False)][: 1 + args.whole]
    }
    record["teacher"] = accuracy(TEACHER.apply, teacher.variables, data.test)
    record["device"] = jax.devices()[0].device_kind
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compressed.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
