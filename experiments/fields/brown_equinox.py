"""configs/brown.py with a student in Equinox. Run it in the repository's folder.

compress-jax run experiments/fields/brown_equinox.py
"""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp

import compress_jax as cj
from compress_jax.cli.config import build, load_config
from compress_jax.search import Candidate, Experiment, Network

brown = load_config(Path("configs/brown.py"))

# Equinox keeps a dense layer's weight as [out, in]: a scale for each row is one for each channel.
WEIGHTS = tuple(
    f"{name}/weight" for name in ("tokens", "window", "attention/*", "up", "down", "head")
)


class Tagger(eqx.Module):
    """As `cj.models.Tagger` of one layer and one head: logits at each token of one row."""

    tokens: eqx.nn.Embedding
    window: eqx.nn.Linear
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norms: list[eqx.nn.LayerNorm]
    head: eqx.nn.Linear

    def __init__(self, vocabulary: int, classes: int, width: int, key: jax.Array):
        keys = jax.random.split(key, 6)
        table = 0.1 * jax.random.normal(keys[0], (vocabulary, width))
        self.tokens = eqx.nn.Embedding(weight=table)
        self.window = eqx.nn.Linear(5 * width, width, key=keys[1])
        self.attention = eqx.nn.MultiheadAttention(1, width, key=keys[2])
        self.up = eqx.nn.Linear(width, 2 * width, key=keys[3])
        self.down = eqx.nn.Linear(2 * width, width, key=keys[4])
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(3)]
        self.head = eqx.nn.Linear(width, classes, key=keys[5])

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Return logits ``[length, classes]`` of tokens and mask ``[length]``."""
        mask = mask.astype(bool)
        x = jnp.where(mask[:, None], jax.vmap(self.tokens)(tokens), 0)
        padded = jnp.pad(x, ((2, 2), (0, 0)))
        near = jnp.concatenate([padded[i : i + len(x)] for i in range(5)], axis=1)
        x = x + jax.nn.gelu(jax.vmap(self.window)(near))
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y, mask=jnp.broadcast_to(mask, (len(x), len(x))))
        hidden = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norms[1])(x)))
        x = x + jax.vmap(self.down)(hidden)
        return jax.vmap(self.head)(jax.vmap(self.norms[2])(x))


def config(sparsity: float = 0.75, bits: int = 4, seed: int = 0) -> Experiment:
    """Compress the Equinox student as configs/brown.py compresses its Linen one.

    Args:
      sparsity: share of zeros in the weights.
      bits: of the others.
      seed: seed for all randomness.
    """
    experiment = build(brown, {"sparsity": sparsity, "seed": seed})
    student = experiment.student.model
    sizes = (student.vocabulary, student.classes, student.width)
    training = experiment.candidates[-1].training
    ramp = cj.prune.cubic(sparsity, begin=0, end=250)
    rows = cj.quantize.uniform(bits, granularity="channel", axis=0, scale="mse")
    method = cj.every(10, cj.at(WEIGHTS, cj.chain(cj.prune.magnitude(ramp), rows)))
    return dataclasses.replace(
        experiment,
        name="brown-equinox",
        student=Network(lambda key: Tagger(*sizes, key), experiment.student.training),
        candidates=(Candidate(f"prune-{100 * sparsity:g}-int{bits}", method, training),),
    )
