"""Reference networks in Flax Linen, with importers of published weights.

``model.apply(variables, x, train=False)`` returns float32 logits.
"""

from compress_jax.models import pretrained
from compress_jax.models._bert import Bert, BertClassifier
from compress_jax.models._crepe import Crepe, load_crepe, pitch, pitch_targets
from compress_jax.models._ds_cnn import DSCNN
from compress_jax.models._efficientnet import EfficientNetLite, load_efficientnet_lite
from compress_jax.models._front_end import WithFrontEnd
from compress_jax.models._gpt import GPT
from compress_jax.models._imagenet_resnet import ImageNetResNet
from compress_jax.models._lenet import LeNet5, LeNet300100
from compress_jax.models._minilm import minilm_classifier, minilm_folder, starting_at
from compress_jax.models._resnet import ResNet
from compress_jax.models._tagger import Tagger
from compress_jax.models._vit import ViT

__all__ = [
    "DSCNN",
    "GPT",
    "Bert",
    "BertClassifier",
    "Crepe",
    "EfficientNetLite",
    "ImageNetResNet",
    "LeNet5",
    "LeNet300100",
    "ResNet",
    "Tagger",
    "ViT",
    "WithFrontEnd",
    "load_crepe",
    "load_efficientnet_lite",
    "minilm_classifier",
    "minilm_folder",
    "pitch",
    "pitch_targets",
    "pretrained",
    "starting_at",
]


def __dir__() -> list[str]:
    """List the public names, without the modules that define them."""
    return sorted(__all__)
