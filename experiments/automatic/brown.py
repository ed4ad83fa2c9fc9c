"""configs/brown.py with a search in place of its candidates. Run it in the repository's folder.

compress-jax run experiments/automatic/brown.py
"""

import dataclasses
import math
from pathlib import Path

import jax
import optax

import compress_jax as cj
from compress_jax.cli.config import build, load_config
from compress_jax.models import Tagger
from compress_jax.search import Experiment, Network, Requirement, Search, Training

brown = load_config(Path("configs/brown.py"))

WIDTH = 32


def config(
    max_drop: float = 0.01,
    max_latency_ms: float = math.inf,
    student_steps: int = 1500,
    steps: int = 500,
    seed: int = 0,
) -> Experiment:
    """Search the smallest tagger that loses so much at most of the float32 student's accuracy.

    Args:
      max_drop: validation accuracy that may be lost; 0.01 is one point.
      max_latency_ms: milliseconds of one text in XLA; any number has them measured.
      student_steps: training steps of the float32 student.
      steps: of a proposal's training in full.
      seed: seed for all randomness.
    """
    experiment = build(brown, {"student_steps": student_steps, "seed": seed})

    def training(steps: int, peak: float = 2e-3) -> Training:
        schedule = optax.cosine_onecycle_schedule(steps, peak, pct_start=0.2)
        return Training(optax.adamw(schedule, weight_decay=1e-3), steps, 16)

    def as_large(result: dict[str, float]) -> Network:
        # The table of 8,192 rows is nearly all there is.
        return of_width(int(result["nbytes"] / 4 / 8400))

    def as_fast(result: dict[str, float]) -> Network:
        # Products of width by width are nearly all the work.
        return of_width(round(WIDTH * math.sqrt(result["macs"] / whole)))

    def of_width(width: int) -> Network:
        width = max(width, 1)
        tagger = Tagger(8192, len(experiment.data.names), width, 1, 1)
        return Network(tagger, training(student_steps, 6e-3))

    model, example = experiment.student.pure, experiment.example
    drawn = jax.eval_shape(model.init, jax.random.key(0), *example)
    whole = cj.trace.cost(model.apply, drawn, *example).macs
    options: dict[str, cj.Compression] = {}
    for bits in (2, 3, 4, 8):
        grid = cj.quantize.uniform(bits, granularity="channel", scale="mse")
        options[f"int{bits}"] = cj.every(10, grid)
        for share in (50, 75, 90):
            pruned = cj.prune.magnitude(share / 100)
            options[f"prune{share}-int{bits}"] = cj.every(10, cj.chain(pruned, grid))
    bits_alone = tuple(name for name in options if name.startswith("int"))
    search = Search(
        options,
        training,
        steps,
        baselines={
            "bits alone": bits_alone,
            "pruning alone": tuple(name for name in options if name.endswith("int8")),
            "distillation alone": as_large,
            "distillation alone, as fast": as_fast,
        },
    )
    return dataclasses.replace(
        experiment,
        name="brown-automatic",
        teacher="student",
        candidates=(),
        search=search,
        requirement=Requirement(
            max_drop=max_drop, reference="student", max_latency_ms=max_latency_ms
        ),
    )
