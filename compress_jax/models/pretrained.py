"""Published weights of PyTorch models for the networks here: names are mapped, kernels transposed, nothing is executed.

Weights are a dict of arrays by their PyTorch names: from a safetensors file by `read`, or ``{k: v.numpy() for k, v in
model.state_dict().items()}``.
"""

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from compress_jax.core.errors import WeightsError
from compress_jax.core.paths import Patterns, flatten, matches
from compress_jax.core.types import Variables

Weights = Mapping[str, Any]
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
STATISTICS = {"mean": "running_mean", "var": "running_var"}
BERT = (
    (r"tokens", "embeddings.word_embeddings"),
    (r"positions", "embeddings.position_embeddings"),
    (r"segments", "embeddings.token_type_embeddings"),
    (r"norm", "embeddings.LayerNorm"),
    (r"layer_(\d+)_attention/(query|key|value)", r"encoder.layer.\1.attention.self.\2"),
    (r"layer_(\d+)_attention/out", r"encoder.layer.\1.attention.output.dense"),
    (r"layer_(\d+)_attention_norm", r"encoder.layer.\1.attention.output.LayerNorm"),
    (r"layer_(\d+)_mlp/up", r"encoder.layer.\1.intermediate.dense"),
    (r"layer_(\d+)_mlp/down", r"encoder.layer.\1.output.dense"),
    (r"layer_(\d+)_mlp_norm", r"encoder.layer.\1.output.LayerNorm"),
    (r"pooler", "pooler.dense"),
    (r"head", "classifier"),
)
# Stages count from 0 here and from 1 there, as do convolutions.
RESNET = (
    (r"stem", "conv1"),
    (r"stem_norm", "bn1"),
    *(
        (rf"block_{stage}_(\d+)/conv_{i}", rf"layer{stage + 1}.\1.conv{i + 1}")
        for stage in range(4)
        for i in range(3)
    ),
    *(
        (rf"block_{stage}_(\d+)/norm_{i}", rf"layer{stage + 1}.\1.bn{i + 1}")
        for stage in range(4)
        for i in range(3)
    ),
    *(
        (rf"block_{stage}_(\d+)/projection", rf"layer{stage + 1}.\1.downsample.0")
        for stage in range(4)
    ),
    *(
        (rf"block_{stage}_(\d+)/projection_norm", rf"layer{stage + 1}.\1.downsample.1")
        for stage in range(4)
    ),
    (r"head", "fc"),
)


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a safetensors file.

    Args:
      path: the file. Files of ``torch.save`` are refused: they are pickles, which may execute
        anything.

    Returns:
      Arrays by name.

    Raises:
      WeightsError: if it is no safetensors file.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> safetensors.numpy.save_file({"fc.bias": np.ones(2)}, file)
      >>> read(file)["fc.bias"].tolist()
      [1.0, 1.0]
    """
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"cannot read {path} as safetensors: {error}. A file of torch.save is converted, by "
            "whoever trusts it, with "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
        ) from error


def bert(
    variables: Variables, weights: Weights, *, ignore: Sequence[str] = (), fresh: Patterns = ()
) -> Any:
    """Fill `Bert` or `BertClassifier` with weights named as Hugging Face's ``BertModel`` and its like name them.

    Args:
      variables: of the model's ``init``, or the shapes of it that ``jax.eval_shape`` gives.
      weights: by name, with or without the prefix ``bert.``; old layer norms' ``gamma`` and
        ``beta`` are understood.
      ignore: globs of their names that need not be used: ``"pooler.*"`` for a `Bert`, ``"cls.*"``
        for a head it has not.
      fresh: globs of our paths that stay as they are in ``variables``: ``"params/head/*"`` for a
        new task.

    Returns:
      Variables.

    Raises:
      WeightsError: if anything is missing, unexpected or of another shape; it lists all of it.

    Example:
      >>> variables = {"params": {"norm": {"scale": jnp.zeros(2), "bias": jnp.zeros(2)}}}
      >>> weights = {"bert.embeddings.LayerNorm.gamma": np.ones(2), "bert.embeddings.LayerNorm.beta": np.ones(2)}
      >>> bert(variables, weights)["params"]["norm"]["scale"].tolist()
      [1.0, 1.0]
    """
    old = {"gamma": "weight", "beta": "bias"}
    named = {
        re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: old[m[1]], _bare(k)): v
        for k, v in weights.items()
    }
    return _fill(variables, named, BERT, (*ignore, "*position_ids"), fresh)


def resnet(
    variables: Variables, weights: Weights, *, ignore: Sequence[str] = (), fresh: Patterns = ()
) -> Any:
    """Fill `ImageNetResNet` with weights named as torchvision names them.

    Args:
      variables: of the model's ``init``, or the shapes of it that ``jax.eval_shape`` gives.
      weights: by name.
      ignore: globs of their names that need not be used.
      fresh: globs of our paths that stay as they are in ``variables``: ``"params/head/*"`` for
        other classes.

    Returns:
      Variables, batch statistics included.

    Raises:
      WeightsError: if anything is missing, unexpected or of another shape; it lists all of it.

    Example:
      >>> variables = {"params": {"stem": {"kernel": jnp.zeros((7, 7, 3, 64))}}}
      >>> filled = resnet(variables, {"conv1.weight": np.ones((64, 3, 7, 7))})
      >>> filled["params"]["stem"]["kernel"].shape
      (7, 7, 3, 64)
    """
    return _fill(variables, weights, RESNET, (*ignore, "*num_batches_tracked"), fresh)


def _bare(name: str) -> str:
    return name.removeprefix("bert.")


def _fill(
    variables: Variables,
    weights: Weights,
    names: Sequence[tuple[str, str]],
    ignore: Sequence[str],
    fresh: Patterns,
) -> Any:
    """Return the variables with every leaf taken from the weights, or say everything that is wrong."""
    leaves, rebuild = flatten(variables)
    wanted = {path: _theirs(path, names) for path in leaves if not matches(fresh, path)}
    missing = [f"{path} (their {name})" for path, name in wanted.items() if name not in weights]
    used = {*wanted.values(), *(_theirs(path, names) for path in leaves)}
    left = [
        n
        for n in weights
        if n not in used and not any(fnmatch.fnmatchcase(n, glob) for glob in ignore)
    ]
    found = {
        path: _turned(path, np.asarray(weights[name]))
        for path, name in wanted.items()
        if name in weights
    }
    wrong = [
        f"{p}: {x.shape} here is {leaves[p].shape}"
        for p, x in found.items()
        if x.shape != leaves[p].shape
    ]
    empty = [
        path
        for path, leaf in leaves.items()
        if path not in wanted and not hasattr(leaf, "__array__")
    ]
    problems = {
        "the model has, the weights have not": missing,
        "the weights have, the model has not (a glob in ignore= drops them)": left,
        "of another shape, as (theirs, transposed) here is (ours)": wrong,
        "to stay fresh, but given as shapes only: pass variables of init": empty,
    }
    if any(problems.values()):
        lists = (f"{what}:\n  " + "\n  ".join(each) for what, each in problems.items() if each)
        raise WeightsError("these weights do not fit the model. " + "\n".join(lists))
    return rebuild(
        {p: jnp.asarray(found[p], leaf.dtype) if p in found else leaf for p, leaf in leaves.items()}
    )


def _theirs(path: str, names: Sequence[tuple[str, str]]) -> str:
    """Return their name of a leaf of ours."""
    collection, _, place = path.partition("/")
    layer, _, leaf = place.removeprefix("encoder/").rpartition("/")
    ends = STATISTICS if collection == "batch_stats" else LEAVES
    for pattern, theirs in names:
        if (match := re.fullmatch(pattern, layer)) and leaf in ends:
            return f"{match.expand(theirs)}.{ends[leaf]}"
    raise WeightsError(f"{path!r} is no parameter of a model that such weights are for")


def _turned(path: str, x: np.ndarray) -> np.ndarray:
    """Return an array of theirs with its axes in our order: ``[out, in, ...]`` becomes ``[..., in, out]``."""
    return (
        np.transpose(x, (*range(2, x.ndim), 1, 0))
        if path.endswith("/kernel") and x.ndim >= 2
        else x
    )
