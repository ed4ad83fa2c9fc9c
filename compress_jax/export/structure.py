"""A packed tree as JSON structure plus named raw tensors, and back; what `artifact` puts into the file.

The structure is written node by node. ``{"dict": [[key, node], ...]}``, ``{"list": [...]}``, ``{"tuple": [...]}`` and
``null`` (None) are containers. ``{"Quantized": {field: ...}}`` (or Sparse, Tabled, Clustered, LowRank, Bits, Gaps) is a
packed node; its static fields are plain JSON, and those that have their default value are left out. ``true`` is a tensor;
where safetensors has no such dtype, the dtype's name is there instead, and the tensor holds each entry's bytes as a last
axis. ``"key:threefry2x32"`` is a typed random key of that implementation, and its tensor the key's data (uint32).

The name of a tensor is its place: ``"dense/kernel"`` for containers, ``".scale"`` after it for the field of a node that has
more than one tensor. NNX states become plain nested dicts, and named tuples plain ones.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.bits import Bits
from compress_jax.core.errors import ArtifactError
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Float, Table
from compress_jax.core.packed import Clustered, Gaps, LowRank, Quantized, Sparse, Tabled

NODES = {node.__name__: node for node in (Bits, Gaps, Sparse, Quantized, Tabled, Clustered, LowRank)}
# Dtypes safetensors has for NumPy; any other (bfloat16, int4, fp8) is stored as its bytes.
NATIVE = frozenset("bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64".split())
KEY = "key:"  # before the implementation of a typed random key

Tensors = dict[str, np.ndarray]


def encode(tree: Any) -> tuple[Any, Tensors]:
    """Return the JSON structure of a tree and its tensors by name.

    Args:
      tree: nested dicts, lists, tuples, NNX states; leaves are arrays, numbers or packed nodes.

    Returns:
      ``(structure, {name: NumPy array})``.

    Raises:
      ArtifactError: if a leaf is not an array, a key is neither text nor integer, or two leaves have the same name.
    """
    tensors: Tensors = {}

    def visit(x: Any, path: str) -> Any:
        x = x.get_value() if hasattr(x, "get_value") else x  # an NNX variable
        if type(x) is NODES.get(type(x).__name__):
            statics = _statics(x)
            arrays = {k: visit(getattr(x, k), where) for k, where in _places(type(x), path).items()}
            return {type(x).__name__: {**arrays, **statics}}
        if isinstance(x, Mapping):
            return {"dict": [[_key(key, path), visit(value, _below(path, key))] for key, value in x.items()]}
        if isinstance(x, (list, tuple)):
            kind = "list" if isinstance(x, list) else "tuple"
            return {kind: [visit(value, _below(path, i)) for i, value in enumerate(x)]}
        return None if x is None else _leaf(x, path, tensors)

    return visit(tree, ""), tensors


def is_key(x: Any) -> bool:
    """Tell whether a leaf is a typed random key, such as NNX's Dropout keeps.

    Example:
      >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0))
      (True, False)
    """
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _below(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _key(key: Any, path: str) -> str | int:
    if not isinstance(key, (str, int)):
        raise ArtifactError(f"the key {key!r} in {path!r} is a {type(key).__name__}; only text and integers can be saved")
    return key


def _places(cls: Any, path: str) -> dict[str, str]:
    """Return where each field of a node that holds tensors has them; an only one has the node's own place."""
    names = [field.name for field in dataclasses.fields(cls) if not field.metadata.get("static")]
    return {name: f"{path}.{name}" for name in names} if len(names) > 1 else dict.fromkeys(names, path)


def _statics(node: Any) -> dict[str, Any]:
    """Return the static fields of a node that differ from their defaults, as JSON takes them."""
    fields = [field for field in dataclasses.fields(node) if field.metadata.get("static")]
    values = {field.name: getattr(node, field.name) for field in fields}
    told = {field.name for field in fields if repr(values[field.name]) != repr(field.default)}  # -0.0 == 0, but is not 0
    return {name: value.name if isinstance(value, np.dtype) else value for name, value in values.items() if name in told}


def _leaf(x: Any, path: str, tensors: Tensors) -> bool | str:
    if path in tensors or path == "__metadata__":  # the latter is what safetensors calls its own
        raise ArtifactError(f"two entries would be named {path!r} in the file; rename a key that contains '/', '.' or '__'")
    if is_key(x):
        tensors[path] = np.asarray(jax.random.key_data(x))
        return f"{KEY}{jax.random.key_impl(x)}"
    array = _numpy(x, path)
    native = array.dtype.name in NATIVE
    tensors[path] = array if native else array.reshape(*array.shape, 1).view(np.uint8)
    return native or array.dtype.name


def _numpy(x: Any, path: str) -> np.ndarray:
    """Return a leaf as an array in C order and native byte order."""
    x = np.asarray(x) if isinstance(x, (int, float)) else x
    dtype = getattr(getattr(x, "dtype", None), "name", "")
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)) or not hasattr(jnp, dtype):
        what = " ".join(filter(None, (type(x).__name__, dtype)))
        raise ArtifactError(f"leaf {path!r} is a {what}, and only arrays of numbers and packed nodes can be saved")
    return np.asarray(x, jnp.dtype(dtype), order="C")


def decode(structure: Any, tensors: Tensors, path: str = "") -> Any:
    """Undo `encode`.

    Args:
      structure: the JSON structure.
      tensors: ``{name: NumPy array}``.
      path: where in the tree the structure stands.

    Returns:
      The tree; arrays are JAX arrays, or NumPy's where JAX would cut their 64 bits to 32.

    Raises:
      ArtifactError: if the structure names a tensor or a kind of node there is not.
    """
    if structure is None:
        return None
    if structure is True or isinstance(structure, str):
        return _array(path, structure, tensors)
    ((kind, content),) = structure.items()
    if kind == "dict":
        return {key: decode(value, tensors, _below(path, key)) for key, value in content}
    if kind in ("list", "tuple"):
        values = [decode(value, tensors, _below(path, i)) for i, value in enumerate(content)]
        return values if kind == "list" else tuple(values)
    if kind not in NODES:
        raise ArtifactError(f"the file holds a node of kind {kind!r}, which this version does not know")
    places = _places(NODES[kind], path)
    fields = {k: decode(v, tensors, places[k]) if k in places else _static(k, v) for k, v in content.items()}
    return NODES[kind](**fields)


def places(structure: Any, path: str = "") -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield the name of every tensor a structure stands for, in its order, and what it holds if it is packed symbols.

    Args:
      structure: the JSON structure.
      path: where in the tree the structure stands.

    Yields:
      ``(name, (bits of a symbol, number of symbols))``, or ``(name, None)``.

    Example:
      >>> tree, _ = encode({"k": Bits.pack(jnp.arange(8), 3), "b": jnp.zeros(2)})
      >>> list(places(tree))
      [('k', (3, 8)), ('b', None)]
    """
    if structure is True or isinstance(structure, str):
        yield path, None
    elif structure is not None:
        ((kind, content),) = structure.items()
        if kind == "dict":
            for key, value in content:
                yield from places(value, _below(path, key))
        elif kind in ("list", "tuple"):
            for i, value in enumerate(content):
                yield from places(value, _below(path, i))
        elif kind == "Bits":
            yield path, (content["bits"], math.prod(content["shape"]))
        elif kind in NODES:
            where = _places(NODES[kind], path)
            for field, value in content.items():
                if field in where:
                    yield from places(value, where[field])


def leaves(structure: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the place and the structure of every array and packed node, in order.

    Example:
      >>> tree, _ = encode({"k": Bits.pack(jnp.arange(8), 3), "b": [jnp.zeros(2)]})
      >>> list(leaves(tree))
      [('k', {'Bits': {'data': True, 'bits': 3, 'shape': (8,)}}), ('b/0', True)]
    """
    kind, content = next(iter(structure.items())) if isinstance(structure, dict) else ("", structure)
    if kind == "dict":
        for key, value in content:
            yield from leaves(value, _below(path, key))
    elif kind in ("list", "tuple"):
        for i, value in enumerate(content):
            yield from leaves(value, _below(path, i))
    elif structure is not None:
        yield path, structure


def _static(field: str, value: Any) -> Any:
    if field == "dtype":
        return jnp.dtype(value)
    if field == "layout":
        shape, channels, group_size = value
        return Layout(tuple(shape), tuple(channels), group_size)
    if field == "levels":
        return Table(tuple(value[0])) if isinstance(value[0], list) else Float(*value)
    return tuple(value) if isinstance(value, list) else value


def _array(path: str, dtype: str | Literal[True], tensors: Tensors) -> jax.Array | np.ndarray:
    if path not in tensors:
        raise ArtifactError(f"the file's structure names a tensor {path!r} that is not in the file")
    if isinstance(dtype, str) and dtype.startswith(KEY):
        return _random_key(path, dtype.removeprefix(KEY), tensors[path])
    array = tensors[path] if dtype is True else tensors[path].view(jnp.dtype(dtype))[..., 0]
    return jnp.asarray(array) if jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype else array


def _random_key(path: str, implementation: str, data: Any) -> jax.Array:
    try:
        return jax.random.wrap_key_data(jnp.asarray(data), impl=implementation)
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path!r} is a random key of {implementation!r}, which this JAX cannot make: {error}"
        ) from error
