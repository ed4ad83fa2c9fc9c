"""A model behind a front end: it takes waveforms, in training and as an exported file."""

import inspect
from collections.abc import Callable

import jax
from flax import linen as nn

from compress_jax.core.types import Batch

# What a call's argument for the mode is called, and its value in training.
MODES = {"train": True, "training": True, "is_training": True, "deterministic": False}


class WithFrontEnd(nn.Module):
    """A front end without parameters, such as `compress_jax.data.MFCC`, and a model of its output.

    The front end is part of what is traced, measured and exported: exported files take waveforms.

    Attributes:
      model: a Linen module of features.
      front_end: a pure function ``waveforms [batch, samples] -> features [batch, frames, bands]``.
      augment: ``(key, batch) -> batch`` of an entry ``features``, applied in training only, such as
        `compress_jax.data.spec_augment`; its key is the random stream ``dropout``. What changes the
        waveforms themselves belongs into `compress_jax.search.Training`.
      channel: whether features get a last axis of size 1, as convolutional networks take them.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.DSCNN(width=8, blocks=1)
      >>> spotter = cj.models.WithFrontEnd(model, cj.data.MFCC(10))
      >>> waveforms = jnp.zeros((2, 16000))
      >>> variables = jax.jit(spotter.init)(jax.random.key(0), waveforms)
      >>> spotter.apply(variables, waveforms).shape
      (2, 12)
    """

    model: nn.Module
    front_end: Callable[[jax.Array], jax.Array]
    augment: Callable[[jax.Array, Batch], Batch] | None = None
    channel: bool = True

    @nn.compact
    def __call__(self, waveforms: jax.Array, train: bool = False) -> jax.Array:
        """Return the model's outputs.

        Args:
          waveforms: ``[batch, samples]``.
          train: passed on to the model, by the name that its call has for it.
        """
        features = self.front_end(waveforms)
        if train and self.augment is not None:
            batch = self.augment(self.make_rng("dropout"), {"features": features})
            features = batch["features"]
        features = features[..., None] if self.channel else features
        known = inspect.signature(type(self.model).__call__).parameters
        mode = {name: train == value for name, value in MODES.items() if name in known}
        return self.model(features, **mode)
