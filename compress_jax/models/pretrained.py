"""Import published weights, most of PyTorch models: map their names and transpose their kernels.

Weights are a dict of arrays by their own names, from a safetensors file by `read`, or from
``{name: x.numpy() for name, x in model.state_dict().items()}``. No code from a file is executed.
"""

import fnmatch
import os
import re
import zipfile
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from compress_jax.core.errors import WeightsError
from compress_jax.core.paths import Patterns, flatten, matches
from compress_jax.core.types import Array, Variables
from compress_jax.models._published import renamed, require_fit

Weights = Mapping[str, Array]
"""Arrays by their PyTorch names."""

# The last part of a name: Flax's and PyTorch's.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
QKV = ("query", "key", "value")
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
VIT = (
    (r"token", "embeddings.cls_token"),
    (r"positions", "embeddings.position_embeddings"),
    (r"patches", "embeddings.patch_embeddings.projection"),
    (r"layer_(\d+)/attention_norm", r"encoder.layer.\1.layernorm_before"),
    (r"layer_(\d+)/attention/(query|key|value)", r"encoder.layer.\1.attention.attention.\2"),
    (r"layer_(\d+)/attention/out", r"encoder.layer.\1.attention.output.dense"),
    (r"layer_(\d+)/mlp_norm", r"encoder.layer.\1.layernorm_after"),
    (r"layer_(\d+)/mlp/up", r"encoder.layer.\1.intermediate.dense"),
    (r"layer_(\d+)/mlp/down", r"encoder.layer.\1.output.dense"),
    (r"norm", "layernorm"),
    (r"head", "classifier"),
)
# What timm calls them, and Hugging Face: the beginnings of names.
TIMM = (
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"blocks\.(\d+)\.norm1", r"encoder.layer.\1.layernorm_before"),
    (r"blocks\.(\d+)\.norm2", r"encoder.layer.\1.layernorm_after"),
    (r"blocks\.(\d+)\.attn\.(query|key|value)", r"encoder.layer.\1.attention.attention.\2"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layer.\1.attention.output.dense"),
    (r"blocks\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
    (r"blocks\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
    (r"norm", "layernorm"),
    (r"head", "classifier"),
)
# What is replaced in the names of BiT's files, one after the other, to be big_vision's with dots.
BIT = (
    (r"^(params|opt/target|resnet)/", ""),
    (r"^group_norm/", "norm-pre-head/"),
    (r"^root_block/standardized_conv2d(_\d+)?/", "root_block/conv_root/"),
    (r"^head/conv2d/", "head/"),
    (r"/a/proj/standardized_conv2d(_\d+)?/", "/conv_proj/"),
    (r"/a/standardized_conv2d(_\d+)?/", "/conv1/"),
    (r"/b/standardized_conv2d(_\d+)?/", "/conv2/"),
    (r"/c/standardized_conv2d(_\d+)?/", "/conv3/"),
    (r"/a/group_norm/", "/gn1/"),
    (r"/b/group_norm/", "/gn2/"),
    (r"/c/group_norm/", "/gn3/"),
    (r"/(kernel|scale|gamma)$", "/weight"),
    (r"/beta$", "/bias"),
    (r"/", "."),
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
    """Read a safetensors file, or one of NumPy's ``.npz`` archives.

    Args:
      path: the file. Files of ``torch.save`` are refused: they are pickles, which may execute any
        code.

    Returns:
      Arrays by name.

    Raises:
      WeightsError: if it is neither.

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
    if os.fspath(path).endswith(".npz"):
        return _read_archive(path)
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"cannot read {path} as safetensors: {error}. If you trust a file of torch.save, "
            "convert it with "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
        ) from error


def _read_archive(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        # Opened here, as NumPy leaves a file open that is no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(f"cannot read {path} as an archive of arrays: {error}") from error


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


def vit(
    variables: Variables, weights: Weights, *, ignore: Sequence[str] = (), fresh: Patterns = ()
) -> Variables:
    """Load weights with Hugging Face's or timm's names into a `ViT` with ``pool="token"``.

    Those of ``google/vit-base-patch16-224`` and of timm's ``vit_base_patch16_224`` are for
    ``ViT(1000, 16, 768, 12, 12, pool="token", gelu="exact")`` and images of 224 x 224 pixels from
    -1 to 1.

    Args:
      variables: from the model's ``init``, or its shapes from ``jax.eval_shape``.
      weights: by name, with or without the prefix ``vit.``.
      ignore: globs of names, of Hugging Face's kind, that need not be used: ``"pooler.*"``,
        ``"classifier.*"``.
      fresh: globs of our paths that stay as they are in ``variables``: ``"params/head/*"`` for
        other classes.

    Returns:
      Variables.

    Raises:
      WeightsError: if weights are missing, unexpected or of another shape; it lists them all.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> variables = {"params": {"norm": {"scale": jnp.zeros(2), "bias": jnp.zeros(2)}}}
      >>> weights = {"norm.weight": np.ones(2), "norm.bias": np.ones(2)}
      >>> cj.models.pretrained.vit(variables, weights)["params"]["norm"]["scale"].tolist()
      [1.0, 1.0]
    """
    named = {name.removeprefix("vit."): np.asarray(x) for name, x in weights.items()}
    if not any(name.startswith(("embeddings.", "encoder.", "layernorm.")) for name in named):
        named = _from_timm(named)
    return _fill(variables, named, VIT, ignore, fresh)


def bit(
    variables: Variables, weights: Weights, *, ignore: Sequence[str] = (), fresh: Patterns = ()
) -> Variables:
    """Load weights with the names of BiT's and big_vision's ``.npz`` files into `BiT`.

    ``BiT-M-R152x2-ILSVRC2012.npz`` and ``R152x2_T_224.npz``, the teacher of "A good teacher is
    patient and consistent", are for ``BiT((3, 8, 36, 3), width=128)``; `read` opens them.

    Args:
      variables: from the model's ``init``, or its shapes from ``jax.eval_shape``.
      weights: by name, such as ``"resnet/block1/unit01/a/standardized_conv2d/kernel"`` or
        ``"block1/unit01/conv1/kernel"``; kernels are ``[rows, columns, in, out]``.
      ignore: globs of names that need not be used, of the form ``"head.*"``.
      fresh: globs of our paths that stay as they are in ``variables``: ``"params/head/*"`` for
        other classes.

    Returns:
      Variables.

    Raises:
      WeightsError: if weights are missing, unexpected or of another shape; it lists them all, by
        names such as ``block1.unit01.conv1.weight``.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> variables = {"params": {"norm": {"scale": jnp.zeros(2), "bias": jnp.zeros(2)}}}
      >>> weights = {f"resnet/group_norm/{name}": np.ones(2) for name in ("gamma", "beta")}
      >>> cj.models.pretrained.bit(variables, weights)["params"]["norm"]["scale"].tolist()
      [1.0, 1.0]
    """
    named = dict(_of_bit(name, np.asarray(x)) for name, x in weights.items())
    layers = {path.rpartition("/")[0] for path in flatten(variables["params"])[0]}
    names = tuple((re.escape(layer), _bit_layer(layer)) for layer in sorted(layers))
    return _fill(variables, named, names, ignore, fresh)


def _bit_layer(layer: str) -> str:
    """Return what BiT calls a layer of ours; it counts stages, blocks and convolutions from 1."""
    match = re.fullmatch(r"block_(\d+)_(\d+)/(conv|norm|projection)_?(\d*)", layer)
    if match is None:
        return {"stem": "root_block.conv_root", "norm": "norm-pre-head"}.get(layer, layer)
    stage, block, kind, number = match.groups()
    last = {"conv": "conv", "norm": "gn"}[kind] + str(int(number) + 1) if number else "conv_proj"
    return f"block{int(stage) + 1}.unit{int(block) + 1:02d}.{last}"


def _of_bit(name: str, x: np.ndarray) -> tuple[str, np.ndarray]:
    """Return one of BiT's weights by big_vision's name, in PyTorch's form."""
    for pattern, to in BIT:
        name = re.sub(pattern, to, name)
    if re.search(r"(^norm-pre-head|\.gn\d)\.", name):
        x = x.reshape(-1)  # big_vision's are [1, 1, 1, channels]
    if name == "head.weight":
        x = x.reshape(x.shape[-2:])  # [in, out]
    return name, np.moveaxis(x, (-1, -2), (0, 1)) if x.ndim > 1 else x


def _from_timm(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return timm's weights, whose query, key and value are one array, by Hugging Face's names."""
    split = {}
    for name, x in weights.items():
        parts = np.split(x, 3) if ".qkv." in name else ()
        split |= {name.replace("qkv", to): part for to, part in zip(QKV, parts, strict=False)}
        if not parts:
            split[name] = x
    return {_renamed(name): x for name, x in split.items()}


def _renamed(name: str) -> str:
    """Return Hugging Face's name for timm's; a name that timm's ViT has not stays as it is."""
    stem, dot, end = name.rpartition(".")
    if (whole := renamed(name, TIMM)) is not None:
        return whole
    theirs = renamed(stem, TIMM)
    return name if theirs is None else f"{theirs}{dot}{end}"


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
    require_fit("the model", problems)
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
    # An array that belongs to no layer, such as a class token, is its own name's last part.
    place, end = (layer, f".{ends[leaf]}") if leaf in ends else (inside, "")
    if (theirs := renamed(place, names)) is not None:
        return f"{theirs}{end}"
    raise WeightsError(f"{path!r} is no parameter of a model that such weights are for")


def _transposed(path: str, x: np.ndarray) -> np.ndarray:
    """Return a kernel ``[out, in, ...]`` as ``[..., in, out]``, other arrays as they are."""
    if not path.endswith("/kernel") or x.ndim < 2:
        return x
    return np.transpose(x, (*range(2, x.ndim), 1, 0))
