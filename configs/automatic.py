"""Say what you need: the smallest file that loses so many points at most, searched for by itself.

    compress-jax run configs/automatic.py              # digits, 3 minutes on 2 cores
    compress-jax run configs/automatic.py --data fashion_mnist --max-bytes 40000
    compress-jax run configs/automatic.py --data fashion_mnist --max-bytes 30000 --reuse

The third command uses what the second one measured and trained. LeNet-300-100 in float32 teaches
the candidates; every kernel takes 2, 3, 4 or 8 bits, whole, or 50, 75 or 90 % pruned, and each
hidden layer may lose a quarter or half of its units.
Beside the result stand, trained as long: each option for all kernels alike, bits alone, pruning at
8 bits alone and a smaller network in float32, at its number of bytes; and one that is as fast.
`experiments/automatic/README.md` has the numbers.
"""

import math

import optax

import compress_jax as cj
from compress_jax.search import Experiment, Network, Requirement, Search, Training


def config(
    data: str = "digits",
    max_drop: float = 0.01,
    max_bytes: float = 1e9,
    max_latency_ms: float = math.inf,
    steps: int = 400,
    student_steps: int = 800,
    batch_size: int = 128,
    seed: int = 0,
) -> Experiment:
    """Search the smallest LeNet-300-100 that meets a requirement.

    Args:
      data: name of a data set of images: digits, fashion_mnist, mnist.
      max_drop: accuracy on validation data that may be lost below the float32 student's.
      max_bytes: largest file.
      max_latency_ms: milliseconds of one image in XLA; any number has them measured.
      steps: of a proposal's training in full.
      student_steps: of the float32 student.
      batch_size: examples a step.
      seed: seed for all randomness.
    """

    def training(steps: int) -> Training:
        return Training(optax.adam(optax.cosine_decay_schedule(2e-3, steps)), steps, batch_size)

    images = cj.data.load(data)
    inputs = math.prod(images.train["image"].shape[1:])

    def narrower(work: float) -> Network:
        # Multiply-accumulates are parameters without biases; of 1 to 100 % of the units.
        share = min(range(1, 101), key=lambda n: abs(n * (3 * inputs + 3 * n + 10) - work))
        return Network(cj.models.LeNet300100(hidden=(3 * share, share)), training(student_steps))

    options: dict[str, cj.Compression] = {}
    for bits in (2, 3, 4, 8):
        grid = cj.quantize.uniform(bits, granularity="channel")
        options[f"int{bits}"] = grid
        for share in (50, 75, 90):
            pruned = cj.chain(cj.prune.magnitude(share / 100), grid)
            options[f"prune{share}-int{bits}"] = pruned
    bits_alone = tuple(name for name in options if name.startswith("int"))
    search = Search(
        options,
        training,
        steps,
        width_ratios=(0.25, 0.5),
        baselines={
            "bits alone": bits_alone,
            "pruning alone": ("int8", "prune50-int8", "prune75-int8", "prune90-int8"),
            "distillation alone": lambda result: narrower(result["nbytes"] / 4),
            "distillation alone, as fast": lambda result: narrower(result["macs"]),
        },
    )
    return Experiment(
        name="automatic",
        data=images,
        student=Network(cj.models.LeNet300100(), training(student_steps)),
        requirement=Requirement(
            max_drop=max_drop,
            max_bytes=max_bytes,
            max_latency_ms=max_latency_ms,
            reference="student",
        ),
        teacher="student",
        loss=cj.tasks.classification().distillation(alpha=0.5, temperature=2.0),
        search=search,
        seed=seed,
    )
