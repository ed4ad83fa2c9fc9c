"""Data: from a name to arrays (`load`), and from arrays to batches (`batches`, `eval_batches`).

TensorFlow Datasets is the input layer, without TensorFlow: embedded builders prepare the UCI digits
(no network needed), MNIST and Fashion-MNIST; other TFDS names work if they prepare without
TensorFlow. Splits are dicts of NumPy arrays in memory. Cleaning and normalization are pure
functions of splits, a batch is a function of seed and step, and augmentation is a pure function of
a key that runs on the device.
"""

from collections.abc import Callable
from typing import Any

from compress_jax.core.deprecated import renamed
from compress_jax.core.errors import DataError
from compress_jax.data._augment import mixup, random_crop_flip
from compress_jax.data._dataset import Data, fingerprint, load
from compress_jax.data._feed import Feed, batches, eval_batches
from compress_jax.data._preprocess import Split, clean, normalize, scale_to_unit, statistics

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
    "normalize",
    "random_crop_flip",
    "scale_to_unit",
    "statistics",
]

__getattr__: Callable[[str], Any] = renamed({"normalise": "normalize"}, __name__)


def __dir__() -> list[str]:
    """List the public names, without the modules that define them."""
    return sorted(__all__)
