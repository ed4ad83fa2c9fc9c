"""Data: from a name to arrays (`load`), and from arrays to batches (`batches`, `eval_batches`).

TensorFlow Datasets is the input layer, without TensorFlow: embedded builders prepare the UCI digits
(no network needed), MNIST and Fashion-MNIST; other TFDS names work if they prepare without
TensorFlow. Splits are dicts of NumPy arrays in memory, or of columns that stay on disk
(`from_records`, `images_on_disk`, `tokens_on_disk`, `sounds_on_disk`). Cleaning and normalization
are pure functions of splits, a batch is a function of seed and step, and augmentation is a pure
function of a key that runs on the device.
"""

from collections.abc import Callable
from typing import Any

from compress_jax.core.deprecated import renamed
from compress_jax.core.errors import DataError
from compress_jax.data._audio import (
    MFCC,
    LogMel,
    Standardized,
    mel_filters,
    power_spectrum,
    spec_augment,
    standardized,
)
from compress_jax.data._augment import mixup, random_crop_flip, random_resized_crop, resized_crop
from compress_jax.data._brown import brown, brown_texts
from compress_jax.data._chat import ChatTemplate, chat
from compress_jax.data._data import Data, fingerprint
from compress_jax.data._dataset import load
from compress_jax.data._disk.images import images_on_disk
from compress_jax.data._disk.records import from_records
from compress_jax.data._disk.sounds import read_sound, sounds_on_disk
from compress_jax.data._disk.stored import Column, Records
from compress_jax.data._disk.tokens import tokens_on_disk
from compress_jax.data._feed import Feed, batches, eval_batches
from compress_jax.data._folder import from_folder
from compress_jax.data._hugging_face import from_hugging_face
from compress_jax.data._keywords import keywords
from compress_jax.data._packages import npm_archive, wheel_files
from compress_jax.data._preprocess import Split, clean, normalize, scale_to_unit, statistics
from compress_jax.data._published import blank_images
from compress_jax.data._records import from_grain
from compress_jax.data._spam import spam_assassin
from compress_jax.data._text import TextData, Tokens, from_texts, tokens
from compress_jax.data._tfds import from_tfds
from compress_jax.data._tokenizer import Tokenizer, WordPieces, load_tokenizer
from compress_jax.data._tones import tones
from compress_jax.data._train_tokenizer import train_tokenizer

__all__ = [
    "ChatTemplate",
    "chat",
    "MFCC",
    "Column",
    "Data",
    "DataError",
    "Feed",
    "LogMel",
    "Records",
    "Split",
    "Standardized",
    "TextData",
    "Tokenizer",
    "Tokens",
    "WordPieces",
    "batches",
    "blank_images",
    "brown",
    "brown_texts",
    "clean",
    "eval_batches",
    "fingerprint",
    "from_folder",
    "from_grain",
    "from_hugging_face",
    "from_records",
    "from_texts",
    "from_tfds",
    "images_on_disk",
    "keywords",
    "load",
    "load_tokenizer",
    "mel_filters",
    "mixup",
    "normalize",
    "npm_archive",
    "power_spectrum",
    "random_crop_flip",
    "random_resized_crop",
    "read_sound",
    "resized_crop",
    "scale_to_unit",
    "sounds_on_disk",
    "spam_assassin",
    "spec_augment",
    "standardized",
    "statistics",
    "tones",
    "tokens",
    "tokens_on_disk",
    "train_tokenizer",
    "wheel_files",
]

__getattr__: Callable[[str], Any] = renamed({"normalise": "normalize"}, __name__)


def __dir__() -> list[str]:
    """List the public names, without the modules that define them."""
    return sorted(__all__)
