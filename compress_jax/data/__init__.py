"""Data: a name to arrays (`load`), arrays to batches (`batches`, `eval_batches`), and what happens in between.

TensorFlow Datasets is the input layer, without TensorFlow: embedded builders prepare the UCI digits
(no network needed), MNIST and Fashion-MNIST; any other TFDS name that prepares without TensorFlow
works too. Splits are dicts of NumPy arrays in memory, cleaning and normalising are pure functions
of them, a batch is a function of seed and step, and augmentation is a pure function of an explicit
key that runs on the device.
"""

from compress_jax.core.errors import DataError
from compress_jax.data._augment import mixup, random_crop_flip
from compress_jax.data._dataset import Data, fingerprint, load
from compress_jax.data._feed import Feed, batches, eval_batches
from compress_jax.data._preprocess import Split, clean, normalise, scale_to_unit, statistics

__all__ = [
    "Data",
    "DataError",
    "Feed",
    "Split",
    "batches",
    "clean",
    "eval_batches",
    "fingerprint",
    "load",
    "mixup",
    "normalise",
    "random_crop_flip",
    "scale_to_unit",
    "statistics",
]


def __dir__() -> list[str]:
    """Show what may be called, and no module that holds it."""
    return sorted(__all__)
