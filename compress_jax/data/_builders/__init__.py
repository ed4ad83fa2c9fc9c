"""TFDS builders that run without TensorFlow.

``Digits`` needs no network, ``MNIST`` and ``FashionMNIST`` need four files each, ``Keywords`` needs
the program espeak-ng. ``SpeechCommands`` reads what the stock builder has prepared.
"""

from compress_jax.data._builders.digits import Digits
from compress_jax.data._builders.keywords import Keywords, SpeechCommands
from compress_jax.data._builders.mnist import MNIST, FashionMNIST

__all__ = ["MNIST", "Digits", "FashionMNIST", "Keywords", "SpeechCommands"]
