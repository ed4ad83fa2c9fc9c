"""Reference networks in Flax Linen, with importers of published weights.

``model.apply(variables, x, train=False)`` returns float32 logits.
"""

from compress_jax.models import pretrained
from compress_jax.models._bert import Bert, BertClassifier
from compress_jax.models._ds_cnn import DSCNN
from compress_jax.models._gpt import GPT
from compress_jax.models._imagenet_resnet import ImageNetResNet
from compress_jax.models._lenet import LeNet5, LeNet300100
from compress_jax.models._resnet import ResNet
from compress_jax.models._vit import ViT

__all__ = [
    "DSCNN",
    "GPT",
    "Bert",
    "BertClassifier",
    "ImageNetResNet",
    "LeNet5",
    "LeNet300100",
    "ResNet",
    "ViT",
    "pretrained",
]


def __dir__() -> list[str]:
    """List the public names, without the modules that define them."""
    return sorted(__all__)
