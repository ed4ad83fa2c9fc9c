"""configs/keywords.py with a student in Flax NNX. Run it in the repository's folder.

compress-jax run experiments/fields/keywords_nnx.py
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from compress_jax.cli.config import build, load_config
from compress_jax.search import Experiment, Network

keywords = load_config(Path("configs/keywords.py"))


class Depthwise(nnx.Module):
    """A depthwise 3x3 convolution as nine shifted products, which CPUs train faster."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 1, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return an array in the shape of ``x``, ``[batch, height, width, channels]``."""
        _, height, width, _ = x.shape
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        parts = [
            padded[:, i : i + height, j : j + width] * self.kernel[i, j, 0][None, None, None]
            for i in range(3)
            for j in range(3)
        ]
        return sum(parts[1:], parts[0]) + self.bias[None, None, None]


class DSCNN(nnx.Module):
    """The small DS-CNN of MLPerf Tiny behind its front end: it takes waveforms."""

    def __init__(self, front_end: Callable[[jax.Array], jax.Array], rngs: nnx.Rngs):
        self.front_end = front_end
        he = nnx.initializers.he_normal()
        self.stem = nnx.Conv(1, 64, (10, 4), strides=2, kernel_init=he, rngs=rngs)
        layers = []
        for _ in range(4):
            layers.append(Depthwise(64, rngs))
            layers.append(nnx.Conv(64, 64, (1, 1), kernel_init=he, rngs=rngs))
        self.layers = nnx.List(layers)
        self.norms = nnx.List([nnx.BatchNorm(64, momentum=0.9, rngs=rngs) for _ in range(9)])
        self.head = nnx.Linear(64, 12, rngs=rngs)

    def __call__(self, waveforms: jax.Array) -> jax.Array:
        """Return logits ``[batch, 12]`` of waveforms ``[batch, 16000]``."""
        x = self.front_end(waveforms)[..., None]
        for layer, norm in zip([self.stem, *self.layers], self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return self.head(x.mean((1, 2)))


def config(seed: int = 0) -> Experiment:
    """Compress the NNX student as configs/keywords.py compresses its Linen one.

    Args:
      seed: seed for all randomness.
    """
    experiment = build(keywords, {"seed": seed})
    front_end = experiment.student.model.front_end
    student = Network(lambda rngs: DSCNN(front_end, rngs), experiment.student.training)
    return dataclasses.replace(experiment, name="keywords-nnx", student=student)
