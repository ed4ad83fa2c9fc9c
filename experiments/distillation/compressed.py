"""Distillation of a student at 80 % sparsity and 4 bits, under crops and flips.

python experiments/distillation/compressed.py --data DIR                # minutes on an accelerator,
an hour on 2 cores python experiments/distillation/compressed.py --data DIR --tune         #
validation only: nothing is read of the test split

Fashion-MNIST. The teacher is a ResNet-8 of width 16, trained on all 54,000 training images; the
student a ResNet-8 of a smaller width. Both see the same augmented view in every step (Beyer et al.,
CVPR 2022: a consistent and patient teacher). The student is pruned along a cubic ramp to 80 % by
the first half of the run, and is on a 4-bit grid, one scale a channel, from the first step on.
Every run has the same steps, batches, Adam and schedule, and starts at the same weights; only the
loss differs. Validation (6,000 images held out of train) chooses among the losses, on seeds of its
own; then labels alone and the one that was chosen are trained on fresh seeds, and each reads the
test split once.
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
import numpy as np
import optax
from fashion_mnist import BATCH, compressed, crops, said_by, train_teacher  # pyright: ignore[reportMissingImports]

import compress_jax as cj
from compress_jax import distill as d
from compress_jax.data import Data, batches, load
from compress_jax.models import ResNet
from compress_jax.train import accuracy, create, distillation, fit, label_optimizer, make_step

RESULTS, TUNING_SEEDS = Path(__file__).parent / "results", (1000, 1001)
LOSSES = {
    "labels alone": [d.on_labels()],
    "KD": [d.on_labels(0.1), d.on_logits(d.kl, 0.9, temperature=4.0)],
    "KD, T = 1": [d.on_labels(0.1), d.on_logits(d.kl, 0.9, temperature=1.0)],
    "DIST": [d.on_labels(), d.on_logits(partial(d.dist, beta=2.0, gamma=2.0), temperature=4.0)],
}


def learned(data: Data, epochs: int, file: Path) -> d.Teacher:
    """Return the teacher, trained unless its file is there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        cj.save(file, train_teacher(data, data.train, epochs * (len(data.train["label"]) // BATCH)))
    return d.Teacher(said_by, cj.unpack(cj.load(file)[0]))


class Trainer:
    """Trains students of one budget; what is compiled serves all seeds."""

    def __init__(
        self, data: Data, teacher: d.Teacher, width: int, examples: int, epochs: int
    ) -> None:
        """Take what all runs share."""
        self.student: Any = ResNet(depth=8, width=width, stem_stride=2)
        self.init = jax.jit(self.student.init)
        self.data, self.teacher, self.steps = data, teacher, epochs * (examples // BATCH)
        self.split = {name: array[:examples] for name, array in data.train.items()}
        self.compression = compressed(self.steps)
        self.optimizer = label_optimizer(
            *[optax.adam(optax.cosine_decay_schedule(3e-3, self.steps))] * 3
        )
        self.losses = {
            name: distillation(self.student, terms, augment=crops(data))
            for name, terms in LOSSES.items()
        }
        self.compiled = {
            name: jax.jit(make_step(loss, self.optimizer, self.compression), donate_argnums=0)
            for name, loss in self.losses.items()
        }

    def train(self, name: str, seed: int) -> Any:
        """Return a student's variables, as its compression shows them."""
        feed, key = batches(self.split, BATCH, seed=seed), jax.random.key(seed)
        variables = self.init(key, self.split["image"][:1])
        parts = self.losses[name].init(key, variables, feed[0], self.teacher)
        state = create(variables, self.compression, self.optimizer, key, parts)
        state = fit(
            self.compiled[name], state, feed, steps=self.steps, title=name, teacher=self.teacher
        )
        return state.variables(self.compression)

    def measure(self, name: str, seed: int, part: str) -> float:
        """Train, and return the accuracy on one split."""
        begun = time.monotonic()
        found = accuracy(self.student.apply, self.train(name, seed), getattr(self.data, part))
        print(
            f"{name}, seed {seed}: {part} {found:.4f}, {time.monotonic() - begun:.0f} s", flush=True
        )
        return found


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"teacher: {100 * record['teacher']:.2f} % on test; chosen on validation: "
        f"{record['chosen']}",
        "",
    ]
    lines += [
        "| loss | test accuracy, each seed | mean and deviation | over labels, paired, standard "
        "error |"
    ]
    lines += ["|---|---|--:|--:|"]
    for name, values in record["test"].items():
        apart = [100 * (a - b) for a, b in zip(values, record["test"]["labels alone"], strict=True)]
        error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else np.nan
        gain = "" if name == "labels alone" else f"{statistics.mean(apart):+.2f} ± {error:.2f}"
        spread = statistics.stdev(values) if len(values) > 1 else np.nan
        each = ", ".join(f"{100 * value:.2f}" for value in values)
        lines.append(
            f"| {name} | {each} | {100 * statistics.mean(values):.2f} ± {100 * spread:.2f} | "
            f"{gain} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=8, help="of the student")
    parser.add_argument("--examples", type=int, default=5_000, help="that the student sees")
    parser.add_argument("--epochs", type=int, default=60, help="of every student")
    parser.add_argument("--teacher-epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="stop after validation")
    parser.add_argument(
        "--data", default=None, help="folder of the Fashion-MNIST files, if not to be downloaded"
    )
    parser.add_argument(
        "--work", default=Path(tempfile.gettempdir()) / "compress_jax_compressed", type=Path
    )
    args = parser.parse_args()
    data = load("fashion_mnist", manual_dir=args.data)
    teacher = learned(
        data, args.teacher_epochs, args.work / f"teacher-{args.teacher_epochs}.safetensors"
    )
    trainer = Trainer(data, teacher, args.width, args.examples, args.epochs)
    tried = {
        name: [trainer.measure(name, seed, "validation") for seed in TUNING_SEEDS]
        for name in LOSSES
    }
    chosen = max(
        [name for name in LOSSES if name != "labels alone"],
        key=lambda name: statistics.mean(tried[name]),
    )
    record: dict[str, Any] = {
        "chosen": chosen,
        "validation": tried,
        "budget": {k: str(v) for k, v in vars(args).items() if k not in ("data", "work")},
    }
    print(json.dumps(tried), f"chosen: {chosen}", flush=True)
    if args.tune:
        return
    names = ("labels alone", chosen)
    record["test"] = {
        name: [trainer.measure(name, seed, "test") for seed in range(args.seeds)] for name in names
    }
    record["teacher"] = accuracy(said_by, teacher.variables, data.test)
    record["device"] = jax.devices()[0].device_kind
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compressed.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
