"""TFDS builders that run without TensorFlow: ``Digits`` needs no network, ``MNIST`` and ``FashionMNIST`` four files."""

from compress_jax.data.builders.digits import Digits
from compress_jax.data.builders.mnist import MNIST, FashionMNIST

__all__ = ["MNIST", "Digits", "FashionMNIST"]
