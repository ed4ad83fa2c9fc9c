"""Two networks of published size and cost, as shapes only: to count and to time a trace."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.trace.zoo_answers import vit
from tests.trace.zoo_entry import Answer, Entry, Made, answer
from tests.trace.zoo_linen import ConvNorm, ViT

STAGES = (
    (3, 64, 56),
    (4, 128, 28),
    (6, 256, 14),
    (3, 512, 7),
)  # blocks, width, size of their outputs


class Bottleneck(nn.Module):
    """Version 1.5: the stride is in the 3x3 convolution."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(ConvNorm(self.width, 1, name="reduce")(x))
        y = nn.relu(ConvNorm(self.width, 3, self.stride, name="middle")(y))
        y = ConvNorm(4 * self.width, 1, name="expand")(y)
        if x.shape != y.shape:
            x = ConvNorm(4 * self.width, 1, self.stride, name="shortcut")(x)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(ConvNorm(64, 7, 2, name="stem")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, (blocks, width, _) in enumerate(STAGES):
            for i in range(blocks):
                x = Bottleneck(width, 2 if stage and not i else 1, name=f"stage_{stage}_{i}")(x)
        return nn.Dense(1000, name="head")(x.mean((1, 2)))


def resnet50() -> Answer:
    layers, into, size = {"stem": 112**2 * 7**2 * 3 * 64}, 64, 56
    for stage, (blocks, width, smaller) in enumerate(STAGES):
        for i in range(blocks):
            block = f"stage_{stage}_{i}"
            layers[f"{block}/reduce"] = size**2 * into * width
            layers[f"{block}/middle"] = smaller**2 * 3**2 * width**2
            layers[f"{block}/expand"] = smaller**2 * width * 4 * width
            if not i:
                layers[f"{block}/shortcut"] = smaller**2 * into * 4 * width
            into, size = 4 * width, smaller
    return answer(
        {f"{name}/conv/kernel": macs for name, macs in layers.items()}
        | {"head/kernel": 2048 * 1000}
    )


def abstract(module: nn.Module) -> Made:
    """Return a module's apply, with shapes for variables and for one image of 224x224."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), image), (image,)


BASE: dict[str, Any] = {"patch": 16, "width": 768, "hidden": 3072, "layers": 12, "classes": 1000}
BIG = (
    Entry(
        "resnet50/linen",
        lambda: abstract(ResNet50()),
        lambda: resnet50().under("params/"),
        parameters=25_557_032,
    ),
    Entry(
        "vit_b16/linen",
        lambda: abstract(ViT(heads=12, **BASE)),
        lambda: vit(batch=1, image=224, **BASE).under("params/"),
        parameters=86_567_656,
    ),
)
