"""A packed tree as JSON structure plus named raw tensors, and back; what `artifact` puts into the file.

The structure is written node by node. A tensor is its dtype's name, and its name in the file is its place:
``"dense/kernel"`` for containers, ``".codes"`` after it for the fields of a node. ``{"dict": [[key, node], ...]}``,
``{"list": [...]}``, ``{"tuple": [...]}`` and ``null`` (None) are containers. ``{"Quantized": {field: ...}}`` (or Sparse,
Clustered, LowRank, Bits, Gaps) is a packed node; its static fields are plain JSON. NNX states become plain nested dicts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.bits import Bits
from compress_jax.core.errors import ArtifactError
from compress_jax.core.layout import Layout
from compress_jax.core.packed import Clustered, Gaps, LowRank, Quantized, Sparse

NODES = {node.__name__: node for node in (Bits, Gaps, Sparse, Quantized, Clustered, LowRank)}
# Dtypes safetensors has for NumPy; any other (bfloat16, int4, fp8) is stored as its bytes, its name kept in the structure.
NATIVE = frozenset("bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64".split())

Tensors = dict[str, np.ndarray]


def encode(tree: Any) -> tuple[Any, Tensors]:
    """Return the JSON structure of a tree and its tensors by name.

    Args:
      tree: nested dicts, lists, tuples, NNX states; leaves are arrays, numbers or packed nodes.

    Returns:
      ``(structure, {name: NumPy array})``.

    Raises:
      ArtifactError: if a leaf is not an array, naming it.
    """
    tensors: Tensors = {}

    def visit(x: Any, path: str) -> Any:
        x = getattr(x, "value", x) if type(x).__module__.startswith("flax.nnx") and not isinstance(x, Mapping) else x
        if type(x).__name__ in NODES and dataclasses.is_dataclass(x):
            fields, statics = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}, _statics(type(x))
            inner = {k: _plain(v) if k in statics else visit(v, f"{path}.{k}") for k, v in fields.items()}
            return {type(x).__name__: inner}
        if isinstance(x, Mapping):
            return {"dict": [[key, visit(value, _below(path, key))] for key, value in x.items()]}
        if isinstance(x, (list, tuple)):
            kind = "list" if isinstance(x, list) else "tuple"
            return {kind: [visit(value, _below(path, i)) for i, value in enumerate(x)]}
        return None if x is None else _leaf(x, path, tensors)

    return visit(tree, ""), tensors


def _below(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _leaf(x: Any, path: str, tensors: Tensors) -> str:
    array = np.asarray(x) if isinstance(x, (jax.Array, np.ndarray, np.generic, int, float)) else np.asarray(None)
    if array.dtype.hasobject or array.dtype.kind in "US":
        raise ArtifactError(f"leaf {path!r} is a {type(x).__name__}, and only arrays and packed nodes can be saved")
    native = array.dtype.name in NATIVE
    tensors[path] = np.asarray(array if native else array.reshape(*array.shape, 1).view(np.uint8), order="C")
    return array.dtype.name


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, np.dtype) else value


def decode(structure: Any, tensors: Tensors, path: str = "") -> Any:
    """Undo `encode`.

    Args:
      structure: the JSON structure.
      tensors: ``{name: NumPy array}``.
      path: where in the tree the structure stands.

    Returns:
      The tree; arrays are JAX arrays.

    Raises:
      ArtifactError: if the structure names a tensor or a kind of node there is not.
    """
    if structure is None:
        return None
    if isinstance(structure, str):
        return _array(path, structure, tensors)
    ((kind, content),) = structure.items()
    if kind == "dict":
        return {key: decode(value, tensors, _below(path, key)) for key, value in content}
    if kind in ("list", "tuple"):
        values = [decode(value, tensors, _below(path, i)) for i, value in enumerate(content)]
        return values if kind == "list" else tuple(values)
    if kind not in NODES:
        raise ArtifactError(f"the file holds a node of kind {kind!r}, which this version does not know")
    cls, statics = NODES[kind], _statics(NODES[kind])
    return cls(**{k: _static(k, v) if k in statics else decode(v, tensors, f"{path}.{k}") for k, v in content.items()})


def _statics(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls) if field.metadata.get("static")}


def _static(field: str, value: Any) -> Any:
    if field == "dtype":
        return jnp.dtype(value)
    if field == "layout":
        shape, channels, group_size = value
        return Layout(tuple(shape), tuple(channels), group_size)
    return tuple(value) if isinstance(value, list) else value


def _array(path: str, dtype: str, tensors: Tensors) -> jax.Array:
    if path not in tensors:
        raise ArtifactError(f"the file's structure names a tensor {path!r} that is not in the file")
    array = tensors[path]
    return jnp.asarray(array if dtype in NATIVE else array.view(jnp.dtype(dtype))[..., 0])
