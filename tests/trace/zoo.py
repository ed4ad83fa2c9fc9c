"""The zoo: models and functions on which every analysis is tested, with the right answers.

`ZOO` is quick: each entry traces, compiles and runs in about a second. `BIG` is abstract. Importing
this builds nothing.
"""

from importlib.util import find_spec

from flax.nnx import BatchStat

from tests.trace import zoo_answers as answers
from tests.trace import zoo_linen as linen_models
from tests.trace import zoo_nnx as nnx_models
from tests.trace.zoo_big import BIG
from tests.trace.zoo_entry import IMAGES, TOKENS, VECTORS, Answer, Entry
from tests.trace.zoo_linen import linen
from tests.trace.zoo_nested import NESTED
from tests.trace.zoo_nnx import flax_nnx
from tests.trace.zoo_plain import PLAIN

__all__ = ["BIG", "ZOO", "Answer", "Entry"]

MODELS = {  # name: the class in both frameworks, its input, what is known
    "mlp": ("MLP", VECTORS, answers.mlp),
    "lenet": ("LeNet", IMAGES, answers.lenet),
    "resnet": ("ResNet", IMAGES, answers.resnet),
    "vit": ("ViT", IMAGES, answers.vit),
    "llama": ("Llama", TOKENS, answers.llama),
    "moe": ("MoE", VECTORS, answers.moe),
    "mobilenet": ("MobileNet", IMAGES, answers.mobilenet),
    "unet": ("UNet", IMAGES, answers.unet),
    "tied_lm": ("TiedLM", TOKENS, answers.tied_lm),
}


def _linen(name: str) -> Entry:
    kind, draw, known = MODELS[name]
    return Entry(
        f"{name}/linen",
        linen(lambda: getattr(linen_models, kind)(), draw),
        lambda: known().under("params/"),
    )


def _nnx(name: str) -> Entry:
    kind, draw, known = MODELS[name]
    return Entry(f"{name}/nnx", flax_nnx(getattr(nnx_models, kind), draw), known)


def _equinox() -> tuple[Entry, ...]:
    """Return no entry where Equinox is not installed."""
    if find_spec("equinox") is None:
        return ()
    from tests.trace.zoo_equinox import EQUINOX

    return EQUINOX


ZOO: tuple[Entry, ...] = (
    *(make(name) for name in MODELS for make in (_linen, _nnx)),
    Entry(
        "resnet_train/linen",
        linen(lambda: linen_models.ResNet(train=True), IMAGES, mutable=["batch_stats"]),
        lambda: answers.resnet().under("params/"),
    ),
    Entry(
        "resnet_train/nnx",
        flax_nnx(lambda rngs: nnx_models.ResNet(rngs, train=True), IMAGES, mutable=BatchStat),
        answers.resnet,
    ),
    Entry(
        "recurrent/linen",
        linen(linen_models.Recurrent, TOKENS),
        lambda: answers.recurrent_linen().under("params/"),
    ),
    Entry("recurrent/nnx", flax_nnx(nnx_models.Recurrent, TOKENS), answers.recurrent_nnx),
    *PLAIN,
    *NESTED,
    *_equinox(),
)
