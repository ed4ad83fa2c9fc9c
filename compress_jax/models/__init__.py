"""Reference networks in Flax Linen, with importers of published weights.

``model.apply(variables, x, train=False)`` returns float32 logits.
"""

from compress_jax.models import pretrained
from compress_jax.models._bert import Bert, BertClassifier
from compress_jax.models._bit import BiT, standardized_kernels
from compress_jax.models._crepe import Crepe, load_crepe, pitch, pitch_targets
from compress_jax.models._decoder.cache import Cache
from compress_jax.models._decoder.chat import chat_template
from compress_jax.models._decoder.config import DecoderConfig
from compress_jax.models._decoder.decoder import Decoder
from compress_jax.models._decoder.fitted import fitted
from compress_jax.models._decoder.generate import Generated, generate
from compress_jax.models._decoder.load import Loaded, load
from compress_jax.models._decoder.rope import Rope
from compress_jax.models._decoder.untied import untied
from compress_jax.models._decoder.with_cache import cached_step, with_cache
from compress_jax.models._ds_cnn import DSCNN
from compress_jax.models._efficientnet import EfficientNetLite, load_efficientnet_lite
from compress_jax.models._front_end import WithFrontEnd
from compress_jax.models._gpt import GPT
from compress_jax.models._imagenet_resnet import ImageNetResNet
from compress_jax.models._lenet import LeNet5, LeNet300100
from compress_jax.models._minilm import minilm_classifier, minilm_folder, starting_at
from compress_jax.models._resnet import ResNet
from compress_jax.models._smollm2 import smollm2_file
from compress_jax.models._tagger import Tagger
from compress_jax.models._vit import ViT

__all__ = [
    "DSCNN",
    "GPT",
    "BiT",
    "Bert",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Generated",
    "Loaded",
    "cached_step",
    "chat_template",
    "fitted",
    "generate",
    "Rope",
    "load",
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
    "smollm2_file",
    "standardized_kernels",
    "starting_at",
    "untied",
    "with_cache",
]


def __dir__() -> list[str]:
    """List the public names, without the modules that define them."""
    return sorted(__all__)
