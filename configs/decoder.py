"""A decoder of 1.1 billion parameters learns from one of 7 billion, half pruned, 4 bits a weight.

compress-jax plan configs/decoder.py --devices 64 --mesh data=8,fsdp=8 --chip v5p
compress-jax run configs/decoder.py --fsdp 8 --tokens tokens.npy --teacher teacher.safetensors

The second is for 64 chips (with --distributed on a cluster) and was never run whole: no such
machine was at hand. What was measured is the plan of the first, in experiments/scaling/README.md,
and a run of the same config two layers deep (tests/test_decoder_config.py). Without --tokens the
rows are random numbers, which teach nothing: for plans and trials only.
"""

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import compress_jax as cj
from compress_jax.models import GPT
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training

# Stacked kernels [layers, in, out], and tables [vocabulary, width].
RULES = (
    ("layers/**/kernel", PartitionSpec(None, "fsdp", "tensor")),
    ("*/embedding", PartitionSpec("fsdp", None)),
)


def config(
    tokens: str = "",
    teacher: str = "",
    vocabulary: int = 128_256,
    width: int = 2048,
    depth: int = 16,
    teacher_width: int = 4096,
    teacher_depth: int = 32,
    length: int = 2048,
    batch_size: int = 64,
    steps: int = 10_000,
    sparsity: float = 0.5,
    block: int = 16_384,
    fsdp: int = 1,
    seed: int = 0,
) -> Experiment:
    """Compress a decoder while it learns from a larger one.

    Args:
      tokens: a file of NumPy's, int32 [rows, length + 1]; empty for random ones.
      teacher: artifact with the larger one's weights; empty for random ones.
      vocabulary: different tokens.
      width: of the student; it has 128 units a head.
      depth: layers of the student.
      teacher_width: of the teacher.
      teacher_depth: layers of the teacher.
      length: tokens of a row.
      batch_size: rows a step, over all devices.
      steps: training steps under the compression.
      sparsity: share of zeros in the layers' kernels at the end.
      block: tokens whose logits exist at a time, over all devices.
      fsdp: parts that params and their moments are divided into; batches are divided over all.
      seed: seed for all randomness.
    """
    rows = np.load(tokens) if tokens else _random_rows(2 * batch_size, length, vocabulary, seed)

    def decoder(width: int, depth: int) -> GPT:
        heads = max(width // 128, 1)
        return GPT(vocabulary, width, depth, heads, positions=length, scan=True, remat=True,
                   dtype=jnp.bfloat16)  # fmt: skip

    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-4, max(steps // 20, 1), steps)
    training = Training(optax.adamw(schedule, weight_decay=0.1), steps, batch_size)
    untrained = Training(optax.sgd(0.0), 0, batch_size)
    ramp = cj.prune.cubic(sparsity, begin=steps // 10, end=steps // 2)
    small = cj.chain(cj.prune.magnitude(ramp), cj.quantize.uniform(bits=4, granularity="channel"))
    frozen = decoder(teacher_width, teacher_depth)
    task = cj.tasks.language_modelling()
    return Experiment(
        name="decoder",
        data=cj.data.Data.from_arrays({"tokens": rows}),
        task=task,
        teacher=Network(frozen, artifact=teacher, rules=RULES)
        if teacher
        else Network(frozen, untrained, rules=RULES),
        teacher_dtype=jnp.bfloat16,
        student=Network(decoder(width, depth), untrained, rules=RULES),
        candidates=(Candidate("half-int4", cj.at("layers/**/kernel", small), training),),
        requirement=Requirement(max_drop=0.5, min_ratio=4),
        # No array of [tokens, vocabulary] is made; blocks are of the tokens of all devices.
        loss=(cj.distill.on_vocabulary(alpha=0.9, chunk=vocabulary, block=block),),
        mesh=cj.train.make_mesh(fsdp=fsdp),
        longer_student=False,
        seed=seed,
    )


def _random_rows(rows: int, length: int, vocabulary: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocabulary, (2 * rows, length + 1), np.int32)
