"""configs/digits.py with a student in Flax NNX. Run it in the repository's folder.

compress-jax run experiments/fields/digits_nnx.py
"""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from compress_jax.cli.config import build, load_config
from compress_jax.search import Experiment, Network

digits = load_config(Path("configs/digits.py"))


class LeNet(nnx.Module):
    """LeNet-300-100, for images ``[batch, 8, 8, 1]``."""

    def __init__(self, rngs: nnx.Rngs):
        sizes = (64, 300, 100, 10)
        layers = [nnx.Linear(n, m, rngs=rngs) for n, m in zip(sizes, sizes[1:], strict=False)]
        self.layers = nnx.List(layers)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return logits ``[batch, 10]``."""
        x = images.reshape(len(images), -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def config(seed: int = 0) -> Experiment:
    """Compress the NNX student as configs/digits.py compresses its Linen one.

    Args:
      seed: seed for all randomness.
    """
    experiment = build(digits, {"seed": seed})
    student = Network(lambda rngs: LeNet(rngs), experiment.student.training)
    return dataclasses.replace(experiment, name="digits-nnx", student=student)
