"""A packed tree as a JSON structure and named tensors, and back.

The structure is written node by node. ``{"dict": [[key, node], ...]}``, ``{"list": [...]}``,
``{"tuple": [...]}`` and ``null`` (None) are containers. ``{"Quantized": {field: ...}}`` (or Sparse,
Tabled, Clustered, LowRank, Sum, Bits, Gaps) is a packed node; its static fields are plain JSON, and
those that have their default value are left out. ``true`` is a tensor; where safetensors has no
such dtype, the dtype's name is there instead, and the tensor holds each entry's bytes as a last
axis. ``"key:threefry2x32"`` is a typed random key of that implementation, and its tensor the key's
data (uint32).

The name of a tensor is its place: ``"dense/kernel"`` for containers, ``".scale"`` after it for the
field of a node that has more than one tensor. NNX states become plain nested dicts, and named
tuples plain ones.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.bits import Bits
from compress_jax.core.errors import ArtifactError
from compress_jax.core.packed import (
    Clustered,
    Gaps,
    LowRank,
    Packed,
    Quantized,
    Sparse,
    Sum,
    Tabled,
)
from compress_jax.core.types import Array, JsonObject, PyTree
from compress_jax.export._artifact.fields import KEY, NATIVE, refuse, static

Node: TypeAlias = Bits | Gaps | Packed
"""A packed node, or the packed integers inside one."""

NODES: dict[str, type[Node]] = {
    node.__name__: node for node in (Bits, Gaps, Sparse, Quantized, Tabled, Clustered, LowRank, Sum)
}

Tensors = dict[str, np.ndarray]

LONGEST = 4096  # characters of a name

Stored: TypeAlias = str | Literal[True]
"""How a tensor is stored: True as its own dtype, else the name of the dtype or kind of key."""

Structure: TypeAlias = JsonObject | Stored | None
"""A tree in JSON: an object of one key for a container or node, a tensor's dtype, or null."""


def encode(tree: PyTree) -> tuple[Structure, Tensors]:
    """Return the JSON structure of a tree and its tensors by name.

    Args:
      tree: nested dicts, lists, tuples, NNX states; leaves are arrays, numbers or packed nodes.

    Returns:
      ``(structure, {name: NumPy array})``.

    Raises:
      ArtifactError: if a leaf is not an array, a key is neither text nor integer, or two leaves
        have the same name.
    """
    tensors: Tensors = {}

    def visit(x: PyTree, path: str) -> Structure:
        x = x.get_value() if hasattr(x, "get_value") else x  # an NNX variable
        # Of this very class: another class of the same name may have other fields.
        if type(x) is NODES.get(type(x).__name__):
            statics = _statics(x)
            arrays = {
                k: visit(getattr(x, k), where) for k, where in tensor_fields(type(x), path).items()
            }
            return {type(x).__name__: {**arrays, **statics}}
        if isinstance(x, Mapping):
            pairs = [[_key(k, path), visit(value, below(path, k))] for k, value in x.items()]
            return {"dict": pairs}
        if isinstance(x, (list, tuple)):
            kind = "list" if isinstance(x, list) else "tuple"
            return {kind: [visit(value, below(path, i)) for i, value in enumerate(x)]}
        return None if x is None else _leaf(x, path, tensors)

    return visit(tree, ""), tensors


def is_key(x: object) -> bool:
    """Return whether a leaf is a typed random key, such as NNX's Dropout has.

    Example:
      >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0))
      (True, False)
    """
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def below(path: str, key: str | int) -> str:
    """Return the name of an entry of a container.

    Args:
      path: the container's.
      key: of the entry.

    Returns:
      The name.

    Raises:
      ArtifactError: if it is too long: a name is made for each entry, so that one long key above
        many entries would take memory without end.

    Example:
      >>> below("dense", "kernel"), below("", 7)
      ('dense/kernel', '7')
    """
    name = f"{path}/{key}" if path else str(key)
    if len(name) > LONGEST:
        raise refuse(f"{name[:60]}...", f"a name has at most {LONGEST:,} characters")
    return name


def _key(key: object, path: str) -> str | int:
    if not isinstance(key, (str, int)):
        raise ArtifactError(
            f"the key {key!r} in {path!r} is a {type(key).__name__}; only text and integers can "
            "be saved"
        )
    return key


def tensor_fields(cls: type[Node], path: str = "") -> dict[str, str]:
    """Return the name of each tensor field of a node.

    A node with a single tensor uses the node's own name for it.

    Example:
      >>> tensor_fields(Sparse, "w"), tensor_fields(Bits, "w")
      ({'values': 'w.values', 'mask': 'w.mask'}, {'data': 'w'})
    """
    names = [field.name for field in dataclasses.fields(cls) if not field.metadata.get("static")]
    if len(names) == 1:
        return {names[0]: path}
    return {name: f"{path}.{name}" for name in names}


def _statics(node: Node) -> JsonObject:
    """Return the static fields of a node that differ from their defaults, as JSON takes them."""
    statics: JsonObject = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        # Compared as text, for -0.0 == 0 and would be read as the default.
        if field.metadata.get("static") and repr(value) != repr(field.default):
            statics[field.name] = value.name if isinstance(value, np.dtype) else value
    return statics


def _leaf(x: PyTree, path: str, tensors: Tensors) -> Stored:
    if path in tensors or path == "__metadata__":  # which safetensors reserves
        raise ArtifactError(
            f"two entries would be named {path!r} in the file; rename a key that contains '/', "
            "'.' or '__'"
        )
    if is_key(x):
        tensors[path] = np.asarray(jax.random.key_data(x))
        return f"{KEY}{jax.random.key_impl(x)}"
    array = _numpy(x, path)
    if array.dtype.name in NATIVE:
        tensors[path] = array
        return True
    tensors[path] = array.reshape(*array.shape, 1).view(np.uint8)  # [..., itemsize]
    return array.dtype.name


def _numpy(x: PyTree, path: str) -> np.ndarray:
    """Return a leaf as an array in C order and native byte order."""
    x = np.asarray(x) if isinstance(x, (int, float)) else x
    # Text, dates and records are no dtypes of jnp; bfloat16, fp8 and int4 are.
    dtype = getattr(getattr(x, "dtype", None), "name", "")
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)) or not hasattr(jnp, dtype):
        what = " ".join(filter(None, (type(x).__name__, dtype)))
        raise ArtifactError(
            f"leaf {path!r} is a {what}, and only arrays of numbers and packed nodes can be saved"
        )
    return np.asarray(x, jnp.dtype(dtype), order="C")


def decode(structure: Structure, tensors: Mapping[str, Array], path: str = "") -> PyTree:
    """Undo `encode`.

    Args:
      structure: the JSON structure.
      tensors: ``{name: NumPy array}``.
      path: where in the tree the structure stands.

    Returns:
      The tree; arrays are JAX arrays, or NumPy's where JAX would cut their 64 bits to 32.

    Raises:
      ArtifactError: if the structure is none, or names a tensor that there is not.
    """
    return build(structure, lambda name, dtype: on_device(typed(name, dtype, tensors)), path=path)


def build(
    structure: Structure,
    array: Callable[[str, Stored], object],
    leaf: Callable[[PyTree, str], PyTree] = lambda found, path: found,
    path: str = "",
    depth: int = 300,
) -> PyTree:
    """Return the tree that a structure describes, with arrays or placeholders for its tensors.

    Args:
      structure: the JSON structure.
      array: ``(name, dtype) -> array or placeholder`` of a tensor; the dtype is True where
        safetensors has it.
      leaf: ``(array or packed node, path) -> leaf of the tree``; not called for the fields of a
        packed node.
      path: of the structure in the tree.
      depth: how deeply containers and nodes may be nested.

    Returns:
      The tree.

    Raises:
      ArtifactError: if the structure is none.
    """
    if structure is None:
        return None
    if structure is True or isinstance(structure, str):
        return leaf(array(path, structure), path)
    if depth < 1:
        raise too_deep(path)
    kind, content = _only(structure, path)
    inside: dict[str, Any] = {"array": array, "leaf": leaf, "depth": depth - 1}
    # Containers: their entries are built below them.
    if kind == "dict":
        pairs = _pairs(content, path)
        return {key: build(value, path=below(path, key), **inside) for key, value in pairs}
    if kind in ("list", "tuple"):
        entries = enumerate(_listed(content, path))
        values = [build(value, path=below(path, i), **inside) for i, value in entries]
        return values if kind == "list" else tuple(values)
    if kind not in NODES:
        raise refuse(path, f"a node of kind {kind!r}, which this version does not know")
    # A packed node is one leaf: what it is made of stays as `array` returns it.
    inside["leaf"] = lambda found, path: found
    return leaf(_made(NODES[kind], content, path, inside), path)


def too_deep(path: str) -> ArtifactError:
    """Return the error of a structure that is nested more deeply than the limit allows.

    Example:
      >>> str(too_deep("a/0")).partition(";")[0]
      "entry 'a/0': it is nested more deeply than the limit allows"
    """
    return refuse(
        path,
        "it is nested more deeply than the limit allows; pass limits=export.Limits(depth=...)",
    )


def _only(structure: object, path: str) -> tuple[str, object]:
    if not isinstance(structure, dict) or len(structure) != 1:
        raise refuse(path, "in the file's structure, an object of one key must stand here")
    return next(iter(structure.items()))


def _listed(content: object, path: str) -> list[Any]:
    if not isinstance(content, list):
        raise refuse(path, "in the file's structure, a list must stand here")
    return content


def _pairs(content: object, path: str) -> list[tuple[str | int, Structure]]:
    """Return the entries of a dict, whose keys must be all text or all integers.

    JAX sorts the keys of a dict, and cannot sort a mixture.
    """
    pairs: list[tuple[str | int, Structure]] = []
    types: dict[str | int, type] = {}
    for pair in _listed(content, path):
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], (str, int)):
            problem = "in the file's structure, a pair of a key and a node must stand here"
            raise refuse(path, problem)
        key = pair[0]
        if isinstance(key, str) and not _is_unicode(key):
            problem = f"the key {key!r} is no Unicode text, so it can be the name of no tensor"
            raise refuse(path, problem)
        if key in types:
            raise refuse(path, f"the key {key!r} is there twice")
        # A bool counts as the integer that Python takes it for.
        types[key] = str if isinstance(key, str) else int
        pairs.append((key, pair[1]))
    if len(set(types.values())) > 1:
        raise refuse(
            path,
            f"the keys {list(types)[:9]} are text and integers, and JAX takes dicts of one of them "
            "only",
        )
    return pairs


def _is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which UTF-8 cannot encode."""
    return text.isascii() or text == text.encode(errors="replace").decode()


def _made(cls: type[Node], content: object, path: str, inside: dict[str, Any]) -> Node:
    """Return a packed node of the fields that the structure has for it."""
    # Only fields with a default may be missing, and there may be no others.
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(content, dict) or not content.keys() <= fields.keys():
        raise refuse(
            path, f"a {cls.__name__} has the fields {', '.join(fields)}, and the file has others"
        )
    for name, field in fields.items():
        if name not in content and field.default is dataclasses.MISSING:
            raise refuse(path, f"a {cls.__name__} without its field {name!r}")
    # Tensors, and nodes inside, are built under their own names; the rest is plain JSON.
    tensors = tensor_fields(cls, path)
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name in tensors:
            values[name] = build(value, path=tensors[name], **inside)
        else:
            values[name] = static(name, value, path)
    return cls(**values)


def places(structure: Structure, path: str = "") -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield the name of every tensor of a structure, in order.

    With it comes the node of packed symbols that the tensor holds, or None.

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
    for name, node in _tensors(structure, path):
        yield name, (node["bits"], math.prod(node["shape"])) if node else None


def shapes(structure: Structure) -> dict[str, tuple[int, ...]]:
    """Return the shape of the symbols of every tensor that holds packed ones.

    Example:
      >>> tree, _ = encode({"k": Bits.pack(jnp.zeros((2, 4), int), 3), "b": jnp.zeros(2)})
      >>> shapes(tree)
      {'k': (2, 4)}
    """
    return {name: tuple(node["shape"]) for name, node in _tensors(structure, "") if node}


def _tensors(structure: Structure, path: str) -> Iterator[tuple[str, JsonObject | None]]:
    """Yield the name of every tensor of a structure, and the fields of the Bits it is the data of.

    The order is that of the structure, which coded files store their symbols in.
    """
    if structure is True or isinstance(structure, str):
        yield path, None
    elif structure is not None:
        ((kind, content),) = structure.items()
        if kind == "dict":
            for key, value in content:
                yield from _tensors(value, below(path, key))
        elif kind in ("list", "tuple"):
            for i, value in enumerate(content):
                yield from _tensors(value, below(path, i))
        elif kind == "Bits":
            yield path, content
        elif kind in NODES:  # its static fields have no places
            where = tensor_fields(NODES[kind], path)
            for field, value in content.items():
                if field in where:
                    yield from _tensors(value, where[field])


def leaves(structure: Structure, path: str = "") -> Iterator[tuple[str, Structure]]:
    """Yield the place and the structure of every array and packed node, in order.

    Example:
      >>> tree, _ = encode({"k": Bits.pack(jnp.arange(8), 3), "b": [jnp.zeros(2)]})
      >>> list(leaves(tree))
      [('k', {'Bits': {'data': True, 'bits': 3, 'shape': (8,)}}), ('b/0', True)]
    """
    # A tensor and null have no kind; a packed node's kind is none of the containers.
    kind: str = ""
    content: list[Any] = []
    if isinstance(structure, dict):
        ((kind, content),) = structure.items()
    if kind == "dict":
        for key, value in content:
            yield from leaves(value, below(path, key))
    elif kind in ("list", "tuple"):
        for i, value in enumerate(content):
            yield from leaves(value, below(path, i))
    elif structure is not None:
        yield path, structure


def typed(name: str, dtype: Stored, tensors: Mapping[str, Array]) -> Array:
    """Return the array that a tensor of a file holds.

    Args:
      name: of the tensor.
      dtype: True where safetensors has it, else its name, and the tensor holds each entry's bytes
        as a last axis; or the implementation of a typed random key, and the tensor holds its words.
      tensors: of the file.

    Returns:
      The NumPy array, or JAX's typed random keys.

    Raises:
      ArtifactError: if there is no such tensor.

    Example:
      >>> typed("x", "bfloat16", {"x": np.array([[0x80, 0x3F]], np.uint8)}).tolist()
      [1.0]
    """
    if name not in tensors:
        raise refuse(name, "the file's structure names this tensor, and it is not in the file")
    if isinstance(dtype, str) and dtype.startswith(KEY):
        return jax.random.wrap_key_data(jnp.asarray(tensors[name]), impl=dtype.removeprefix(KEY))
    if dtype is True:
        return tensors[name]
    return tensors[name].view(jnp.dtype(dtype))[..., 0]  # [..., itemsize] bytes to [...] entries


def on_device(array: Array) -> Array:
    """Return an array as JAX's, or as it is where JAX would cut its 64 bits to 32."""
    if isinstance(array, jax.Array) or jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    return jnp.asarray(array)
