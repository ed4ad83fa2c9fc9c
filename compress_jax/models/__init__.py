"""Reference networks in Flax Linen: ``model.apply(variables, x, train=False)`` gives float32 logits."""

from compress_jax.models.lenet import LeNet5, LeNet300100
from compress_jax.models.resnet import ResNet

__all__ = ["LeNet5", "LeNet300100", "ResNet"]
