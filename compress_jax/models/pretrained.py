"""Import the published weights of PyTorch models: map their names and transpose their kernels.

Weights are a dict of arrays by their PyTorch names, from a safetensors file by `read`, or from
``{name: x.numpy() for name, x in model.state_dict().items()}``. No code from a file is executed.
"""

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from compress_jax.core.errors import WeightsError
from compress_jax.core.paths import Patterns, flatten, matches
from compress_jax.core.types import Array, Variables

Weights = Mapping[str, Array]
"""Arrays by their PyTorch names."""

# The last part of a name: Flax's and PyTorch's.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
STATISTICS = {"mean": "running_mean", "var": "running_var"}
# Patterns of layers in our tree, and the layer's PyTorch name.
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


def _resnet_names() -> tuple[tuple[str, str], ...]:
    """Return the names of ResNet's layers; PyTorch counts stages and convolutions from 1."""
    names = [(r"stem", "conv1"), (r"stem_norm", "bn1"), (r"head", "fc")]
    for stage in range(4):
        ours = rf"block_{stage}_(\d+)"
        theirs = rf"layer{stage + 1}.\1"
        # A bottleneck has three convolutions, a basic block two: the third is then not asked for.
        for i in range(3):
            names.append((rf"{ours}/conv_{i}", rf"{theirs}.conv{i + 1}"))
            names.append((rf"{ours}/norm_{i}", rf"{theirs}.bn{i + 1}"))
        names.append((rf"{ours}/projection", rf"{theirs}.downsample.0"))
        names.append((rf"{ours}/projection_norm", rf"{theirs}.downsample.1"))
    return tuple(names)


RESNET = _resnet_names()


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a safetensors file.

    Args:
      path: the file. Files of ``torch.save`` are refused: they are pickles, which may execute any
        code.

    Returns:
      Arrays by name.

    Raises:
      WeightsError: if it is no safetensors file.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import safetensors.numpy
      >>> import compress_jax as cj
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> safetensors.numpy.save_file({"fc.bias": np.ones(2)}, file)
      >>> cj.models.pretrained.read(file)["fc.bias"].tolist()
      [1.0, 1.0]
    """
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"cannot read {path} as safetensors: {error}. If you trust a file of torch.save, "
            "convert it with "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
        ) from error


def bert(
    variables: Variables, weights: Weights, *, ignore: Sequence[str] = (), fresh: Patterns = ()
) -> Variables:
    """Load weights with the names of Hugging Face's ``BertModel`` into `Bert` or `BertClassifier`.

    Args:
      variables: from the model's ``init``, or its shapes from ``jax.eval_shape``.
      weights: by name, with or without the prefix ``bert.``, with ``weight`` and ``bias`` or the
        older ``gamma`` and ``beta`` in layer norms.
      ignore: globs of PyTorch names that need not be used: ``"pooler.*"`` for a `Bert`, ``"cls.*"``
        for a head that the model lacks.
      fresh: globs of our paths that stay as they are in ``variables``: ``"params/head/*"`` for a
        new task.

    Returns:
      Variables.

    Raises:
      WeightsError: if weights are missing, unexpected or of another shape; it lists them all.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> variables = {"params": {"norm": {"scale": jnp.zeros(2), "bias": jnp.zeros(2)}}}
      >>> norm = {"gamma": np.ones(2), "beta": np.ones(2)}
      >>> weights = {f"bert.embeddings.LayerNorm.{name}": x for name, x in norm.items()}
      >>> cj.models.pretrained.bert(variables, weights)["params"]["norm"]["scale"].tolist()
      [1.0, 1.0]
    """
    named = {}
    for name, x in weights.items():
        name = name.removeprefix("bert.")
        # Names of files that were converted from TensorFlow's.
        name = re.sub(r"(?<=LayerNorm\.)gamma$", "weight", name)
        name = re.sub(r"(?<=LayerNorm\.)beta$", "bias", name)
        named[name] = x
    return _fill(variables, named, BERT, (*ignore, "*position_ids"), fresh)


def resnet(
    variables: Variables, weights: Weights, *, ignore: Sequence[str] = (), fresh: Patterns = ()
) -> Variables:
    """Load weights with torchvision's names into `ImageNetResNet`.

    Args:
      variables: from the model's ``init``, or its shapes from ``jax.eval_shape``.
      weights: by name.
      ignore: globs of PyTorch names that need not be used.
      fresh: globs of our paths that stay as they are in ``variables``: ``"params/head/*"`` for
        other classes.

    Returns:
      Variables, batch statistics included.

    Raises:
      WeightsError: if weights are missing, unexpected or of another shape; it lists them all.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> variables = {"params": {"stem": {"kernel": jnp.zeros((7, 7, 3, 64))}}}
      >>> filled = cj.models.pretrained.resnet(variables, {"conv1.weight": np.ones((64, 3, 7, 7))})
      >>> filled["params"]["stem"]["kernel"].shape
      (7, 7, 3, 64)
    """
    return _fill(variables, weights, RESNET, (*ignore, "*num_batches_tracked"), fresh)


def _fill(
    variables: Variables,
    weights: Weights,
    names: Sequence[tuple[str, str]],
    ignore: Sequence[str],
    fresh: Patterns,
) -> Variables:
    """Return the variables with every leaf from the weights.

    Raises:
      WeightsError: with all problems at once.
    """
    # All problems are collected first: a user who maps names wants the whole list.
    leaves, rebuild = flatten(variables)
    theirs = {path: _torch_name(path, names) for path in leaves}
    wanted = {path: name for path, name in theirs.items() if not matches(fresh, path)}
    found = {}
    missing = []
    wrong = []
    for path, name in wanted.items():
        if name not in weights:
            missing.append(f"{path} (their {name})")
            continue
        x = found[path] = _transposed(path, np.asarray(weights[name]))
        if x.shape != leaves[path].shape:
            wrong.append(f"{path}: {x.shape} here is {leaves[path].shape}")
    used = set(theirs.values())
    unused = [name for name in weights if name not in used and not _matches_any(name, ignore)]
    fresh_paths = [path for path in leaves if path not in wanted]
    # Fresh leaves are taken from `variables`, where a ShapeDtypeStruct has no values to take.
    shapes_only = [path for path in fresh_paths if not hasattr(leaves[path], "__array__")]
    problems = {
        "the model has, the weights have not": missing,
        "the weights have, the model has not (a glob in ignore= drops them)": unused,
        "of another shape, as (theirs, transposed) here is (ours)": wrong,
        "to stay fresh, but given as shapes only: pass variables of init": shapes_only,
    }
    if any(problems.values()):
        lists = [f"{what}:\n  " + "\n  ".join(each) for what, each in problems.items() if each]
        raise WeightsError("these weights do not fit the model. " + "\n".join(lists))
    for path, x in found.items():
        leaves[path] = jnp.asarray(x, leaves[path].dtype)
    return rebuild(leaves)


def _matches_any(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _torch_name(path: str, names: Sequence[tuple[str, str]]) -> str:
    """Return the PyTorch name of a leaf."""
    collection, _, inside = path.partition("/")
    # The layers of a `BertClassifier` are those of its `Bert`, one level down.
    layer, _, leaf = inside.removeprefix("encoder/").rpartition("/")
    ends = STATISTICS if collection == "batch_stats" else LEAVES
    for pattern, theirs in names:
        match = re.fullmatch(pattern, layer)
        if match and leaf in ends:
            return f"{match.expand(theirs)}.{ends[leaf]}"
    raise WeightsError(f"{path!r} is no parameter of a model that such weights are for")


def _transposed(path: str, x: np.ndarray) -> np.ndarray:
    """Return a kernel ``[out, in, ...]`` as ``[..., in, out]``, other arrays as they are."""
    if not path.endswith("/kernel") or x.ndim < 2:
        return x
    return np.transpose(x, (*range(2, x.ndim), 1, 0))
