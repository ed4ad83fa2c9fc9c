"""Spoken keywords: a ResNet-8 teaches a DS-CNN, which is then quantized, or pruned and quantized.

compress-jax run configs/keywords.py

Both networks take waveforms: the front end (MFCC) is part of what is measured and exported. Without
TFDS's speech_commands, clips of espeak-ng are used (apt-get install espeak-ng), which are spoken at
the first run, in 1 to 2 minutes; accuracy on them is not accuracy on recorded speech. There is no
published number for them. On Speech Commands, the DS-CNN of MLPerf Tiny has 92.2 % in float32, and
91.6 % in int8.

20 minutes of processor time. Obtained on 2026-11-29, seed 0, JAX 0.10.2, espeak-ng's clips, on test
voices that train has none of: teacher 87.71 %, float32 student 87.39 %, chosen prune-60-int4
83.55 % in 19,044 bytes, 5.3 times smaller than the student; the student trained on as long without
compression: 87.29 %. Three seeds: experiments/fields/README.md.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import optax

import compress_jax as cj
from compress_jax.data import MFCC, Standardized, keywords, spec_augment, standardized
from compress_jax.models import DSCNN, ResNet, WithFrontEnd
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training
from compress_jax.tasks import classification


def config(
    teacher_steps: int = 900,
    student_steps: int = 1000,
    candidate_steps: int = 250,
    batch_size: int = 64,
    temperature: float = 2.0,
    max_drop: float = 0.03,
    min_ratio: float = 2.5,
    source: Literal["any", "speech_commands", "espeak"] = "any",
    takes: int = 6,
    seed: int = 0,
) -> Experiment:
    """Compress a DS-CNN that spots ten keywords in a second of sound.

    Args:
      teacher_steps: training steps of the teacher, a ResNet-8 of width 32.
      student_steps: training steps of the float32 student, a DS-CNN of width 64.
      candidate_steps: training steps under each compression.
      batch_size: clips a step.
      temperature: of the teacher's probabilities.
      max_drop: validation accuracy that may be lost below the teacher's; 0.01 is one point.
      min_ratio: how many times smaller than the float32 student the artifact must be.
      source: "speech_commands", "espeak", or "any" for the former where it is prepared.
      takes: how often each synthetic voice says each keyword.
      seed: seed for all randomness.
    """
    data = keywords(source, takes=takes)
    # Cepstra are no bands, so stretches of time are hidden alone; the small student learns more
    # without.
    masks = functools.partial(spec_augment, time_masks=1, time_width=6, band_masks=0)

    def training(steps: int, peak: float) -> Training:
        schedule = optax.cosine_onecycle_schedule(steps, peak)
        optimizer = optax.adamw(schedule, weight_decay=1e-3)
        return Training(optimizer, steps, batch_size, shifted)

    def candidate(name: str, compression: cj.Compression) -> Candidate:
        refreshed = cj.at("**/kernel", cj.every(10, compression))
        return Candidate(name, refreshed, training(candidate_steps, 1e-3))

    def pruned(sparsity: float) -> cj.Compression:
        ramp = cj.prune.cubic(sparsity, begin=0, end=candidate_steps // 2)
        return cj.prune.magnitude(ramp, scope="global")

    def rounded(bits: int) -> cj.Compression:
        return cj.quantize.uniform(bits, granularity="channel", scale="mse")

    def front_end(coefficients: int) -> Standardized:
        return standardized(MFCC(coefficients), data.train["sound"])

    teacher = WithFrontEnd(ResNet(8, width=32, classes=12, stem_stride=2), front_end(20), masks)
    # "shifts" trains several times faster on CPU, from the same parameters.
    student = WithFrontEnd(DSCNN(12, depthwise="shifts"), front_end(10))
    return Experiment(
        name="keywords",
        data=data,
        task=classification("sound"),
        teacher=Network(teacher, training(teacher_steps, 3e-3)),
        student=Network(student, training(student_steps, 3e-3)),
        loss=cj.distill.hinton(alpha=0.3, temperature=temperature),
        candidates=(
            candidate("int8", rounded(8)),
            candidate("prune-60-int8", cj.chain(pruned(0.6), rounded(8))),
            candidate("prune-60-int4", cj.chain(pruned(0.6), rounded(4))),
        ),
        requirement=Requirement(max_drop=max_drop, min_ratio=min_ratio),
        order="mild_first",
        coded=True,
        seed=seed,
    )


def shifted(key: jax.Array, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Move each clip by up to a tenth of a second, around its ends, and change its loudness."""
    shift_key, gain_key = jax.random.split(key)
    sound = batch["sound"]
    shifts = jax.random.randint(shift_key, (len(sound),), -1600, 1601)
    moved = jax.vmap(jnp.roll)(sound, shifts).astype(jnp.float32) / 2**15
    gains = jax.random.uniform(gain_key, (len(sound), 1), minval=0.3, maxval=1.0)
    return {**batch, "sound": moved * gains}
