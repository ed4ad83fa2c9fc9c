"""configs/keywords.py, the DS-CNN of MLPerf Tiny, with a search in place of its candidates.

compress-jax run experiments/automatic/keywords.py                                # bytes alone
compress-jax run experiments/automatic/keywords.py --max-latency-ms .7 --reuse    # and time in XLA

Run it in the repository's folder.
"""

import dataclasses
import math
from pathlib import Path

import optax

import compress_jax as cj
from compress_jax.cli.config import build, load_config
from compress_jax.models import DSCNN
from compress_jax.search import Experiment, Network, Requirement, Search, Training

keywords = load_config(Path("configs/keywords.py"))

WIDTHS = (32, 48, 64)
FRONT_END = 3_032_120  # multiply-accumulates


def work(width: int) -> float:
    """Return the multiply-accumulates of a DS-CNN of 12 classes, and of its front end."""
    return 125 * (4 * width**2 + 40 * width) + 12 * width + FRONT_END


def config(
    max_drop: float = 0.02,
    max_latency_ms: float = math.inf,
    student_steps: int = 1000,
    steps: int = 250,
    seed: int = 0,
) -> Experiment:
    """Search the smallest DS-CNN that loses so much at most of the float32 student's accuracy.

    Args:
      max_drop: validation accuracy that may be lost; 0.01 is one point.
      max_latency_ms: milliseconds of one clip in XLA, front end and all.
      student_steps: training steps of the float32 student.
      steps: of a proposal's training in full.
      seed: seed for all randomness.
    """
    experiment = build(keywords, {"student_steps": student_steps, "seed": seed})
    assert experiment.student.training is not None
    augment = experiment.student.training.augment

    def training(steps: int, peak: float = 2e-3) -> Training:
        schedule = optax.cosine_onecycle_schedule(steps, peak)
        return Training(optax.adamw(schedule, weight_decay=1e-3), steps, 64, augment)

    def of_width(width: int) -> Network:
        network = DSCNN(12, width=width, depthwise="shifts")
        student = dataclasses.replace(experiment.student.model, model=network)
        return Network(student, training(student_steps, 3e-3))

    def as_large(result: dict[str, float]) -> Network:
        # Of 4 w^2 + 133 w + 12 floats, statistics too.
        return of_width(max(round((math.sqrt(133**2 + 4 * result["nbytes"]) - 133) / 8), 1))

    def as_fast(result: dict[str, float]) -> Network:
        return of_width(min(WIDTHS, key=lambda width: abs(work(width) - result["macs"])))

    options: dict[str, cj.Compression] = {}
    for bits in (2, 3, 4, 8):
        grid = cj.quantize.uniform(bits, granularity="channel", scale="mse")
        options[f"int{bits}"] = cj.every(10, grid)
        for share in (50, 75):
            pruned = cj.prune.magnitude(share / 100)
            options[f"prune{share}-int{bits}"] = cj.every(10, cj.chain(pruned, grid))
    bits_alone = tuple(name for name in options if name.startswith("int"))
    search = Search(
        options,
        training,
        steps,
        starts={f"width{width}": (of_width(width),) for width in WIDTHS[:-1]},
        baselines={
            "bits alone": bits_alone,
            "pruning alone": tuple(name for name in options if name.endswith("int8")),
            "distillation alone": as_large,
            "distillation alone, as fast": as_fast,
        },
    )
    return dataclasses.replace(
        experiment,
        name="keywords-automatic",
        teacher="student",
        candidates=(),
        search=search,
        coded=False,
        requirement=Requirement(
            max_drop=max_drop, reference="student", max_latency_ms=max_latency_ms
        ),
    )
