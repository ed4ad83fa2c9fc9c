"""Time that masks, fake quantization and distillation add to a training step.

python experiments/benchmarks/step_overhead.py            # ResNet-20, batch 64 of 32x32x3; about 3
minutes on 2 cores

Every variant is `train.make_step` on the same model, batch and optimizer, jitted once; they take
turns.
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from interleave import interleaved, milliseconds, ratio, report

import compress_jax as cj
from compress_jax.core import Compression, identity
from compress_jax.distill import Teacher, kl, on_logits
from compress_jax.models import ResNet
from compress_jax.prune import magnitude
from compress_jax.quantize import uniform
from compress_jax.train import StatefulLoss, create, distillation, make_step, supervised

HEAD = ["step", "ms", "processor ms", "ratio to plain", "ratio of processor time"]
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def held(compression: Compression) -> Compression:
    """Return a compression whose state stays as `init` made it, so that only its view is timed."""
    return compression._replace(update=lambda params, state, **_: state)


def kernels(*compressions: Compression) -> Compression:
    return cj.at("**/kernel", cj.chain(*compressions))


def stepper(
    loss: StatefulLoss, compression: Compression, variables: Any, batch: Any, teacher: Any
) -> partial[Any]:
    """Return one compiled training step, applied to its arguments."""
    state = create(variables, compression, OPTIMIZER, jax.random.key(1))
    step = (
        jax.jit(make_step(loss, OPTIMIZER, compression))
        .lower(state, batch, teacher=teacher)
        .compile()
    )
    return partial(step, state, batch, teacher=teacher)


def variants(depth: int, batch_size: int) -> dict[str, partial[Any]]:
    """Return the steps to compare, by name, the plain one first."""
    student, image_key = ResNet(depth=depth), jax.random.key(0)
    batch = {
        "image": jax.random.normal(image_key, (batch_size, 32, 32, 3)),
        "label": jnp.arange(batch_size) % 10,
    }
    mask, int8 = magnitude(0.9), uniform(bits=8, granularity="channel")
    init = jax.jit(lambda key, model: model.init(key, batch["image"][:1]), static_argnums=1)
    own = supervised(student)
    cases: dict[str, tuple[StatefulLoss, Compression, Any]] = {
        "plain": (own, identity(), None),
        "mask 90 %": (own, held(kernels(mask)), None),
        "mask 90 %, recomputed every step": (own, kernels(mask), None),
        "fake quantization int8": (own, held(kernels(int8)), None),
        "fake quantization int8, scales recomputed every step": (own, kernels(int8), None),
        "mask and fake quantization": (own, held(kernels(mask, int8)), None),
    }
    taught = distillation(student, [on_logits(kl, temperature=4.0)])
    for deep in (depth, 3 * depth - 4):  # as deep as the student, and three times as many blocks
        model = ResNet(depth=deep)
        teacher = Teacher(model.apply, init(image_key, model))
        cases[f"distillation, ResNet-{deep} teacher"] = (taught, identity(), teacher)
    variables = init(image_key, student)
    return {
        name: stepper(loss, c, variables, batch, teacher)
        for name, (loss, c, teacher) in cases.items()
    }


def main() -> None:
    """Time all variants and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet, 6 n + 2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    times = interleaved(variants(args.depth, args.batch), args.rounds)
    plain, rows = times["plain"], []
    for name, runs in times.items():
        wall, cpu = (
            ratio((r.wall for r in runs), (r.wall for r in plain)),
            ratio((r.cpu for r in runs), (r.cpu for r in plain)),
        )
        rows.append(
            [name, milliseconds(r.wall for r in runs), milliseconds(r.cpu for r in runs), wall, cpu]
        )
    model = f"ResNet-{args.depth}, batch {args.batch}"
    report("step_overhead", HEAD, rows, model=model, rounds=args.rounds)


if __name__ == "__main__":
    main()
