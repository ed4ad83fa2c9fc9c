"""A packed tree as JSON structure plus named raw tensors, and back; what `artifact` puts into the file.

The structure is written node by node: ``{"t": name}`` is a tensor, ``{"dict": [[key, node], ...]}``, ``{"list": [...]}``,
``{"tuple": [...]}`` and ``{"none": 0}`` are containers, and ``{"Quantized": {field: ...}}`` (or Sparse, Clustered, LowRank,
Bits, Gaps) is a packed node whose static fields are plain JSON. NNX states are written as plain nested dicts.
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


def encode(tree: Any, name: str = "") -> tuple[Any, Tensors]:
    """Return the JSON structure of a tree and its tensors by name.

    Args:
      tree: nested dicts, lists, tuples, NNX states; leaves are arrays, numbers or packed nodes.
      name: prefix of the tensors' names.

    Returns:
      ``(structure, {name: NumPy array})``.

    Raises:
      ArtifactError: if a leaf is not an array, naming it.
    """
    tensors: Tensors = {}

    def visit(x: Any, path: str) -> Any:
        x = getattr(x, "value", x) if type(x).__module__.startswith("flax.nnx") and not isinstance(x, Mapping) else x
        if type(x).__name__ in NODES and dataclasses.is_dataclass(x):
            fields = {f.name: (f, getattr(x, f.name)) for f in dataclasses.fields(x)}
            inner = {k: _plain(v) if f.metadata.get("static") else visit(v, f"{path}.{k}") for k, (f, v) in fields.items()}
            return {type(x).__name__: inner}
        if isinstance(x, Mapping):
            return {"dict": [[key, visit(value, f"{path}/{key}" if path else str(key))] for key, value in x.items()]}
        if isinstance(x, (list, tuple)):
            kind = "list" if isinstance(x, list) else "tuple"
            return {kind: [visit(value, f"{path}/{i}" if path else str(i)) for i, value in enumerate(x)]}
        if x is None:
            return {"none": 0}
        return _leaf(x, path or "value", tensors)

    return visit(tree, name), tensors


def _leaf(x: Any, path: str, tensors: Tensors) -> dict[str, Any]:
    array = np.asarray(x) if isinstance(x, (jax.Array, np.ndarray, np.generic, int, float)) else np.asarray(None)
    if array.dtype.hasobject or array.dtype.kind in "US":
        raise ArtifactError(f"leaf {path!r} is a {type(x).__name__}, and only arrays and packed nodes can be saved")
    native = array.dtype.name in NATIVE
    tensors[path] = np.ascontiguousarray(array if native else array.reshape(*array.shape, 1).view(np.uint8))
    return {"t": path} if native else {"t": path, "dtype": array.dtype.name}


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, np.dtype) else value


def decode(structure: Any, tensors: Tensors) -> Any:
    """Undo `encode`.

    Args:
      structure: the JSON structure.
      tensors: ``{name: NumPy array}``.

    Returns:
      The tree; arrays are JAX arrays.

    Raises:
      ArtifactError: if the structure names a tensor or a kind of node there is not.
    """
    (kind, content), *more = structure.items()
    if kind == "t":
        return _array(content, dict(more), tensors)
    if kind == "dict":
        return {key: decode(value, tensors) for key, value in content}
    if kind in ("list", "tuple"):
        values = [decode(value, tensors) for value in content]
        return values if kind == "list" else tuple(values)
    if kind == "none":
        return None
    if kind not in NODES:
        raise ArtifactError(f"the file holds a node of kind {kind!r}, which this version does not know")
    return _node(NODES[kind], content, tensors)


def _node(cls: Any, content: dict[str, Any], tensors: Tensors) -> Any:
    statics = {f.name for f in dataclasses.fields(cls) if f.metadata.get("static")}
    return cls(**{k: _static(k, v) if k in statics else decode(v, tensors) for k, v in content.items()})


def _static(field: str, value: Any) -> Any:
    if field == "dtype":
        return jnp.dtype(value)
    if field == "layout":
        shape, channels, group_size = value
        return Layout(tuple(shape), tuple(channels), group_size)
    return tuple(value) if isinstance(value, list) else value


def _array(name: str, extra: dict[str, Any], tensors: Tensors) -> jax.Array:
    if name not in tensors:
        raise ArtifactError(f"the file's structure names a tensor {name!r} that is not in the file")
    array = tensors[name]
    return jnp.asarray(array.view(jnp.dtype(extra["dtype"]))[..., 0] if "dtype" in extra else array)
