"""Validate a tree after its checksum and before its use: the structure and its arrays."""

from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArtifactError
from compress_jax.core.types import PyTree
from compress_jax.export._artifact.checks import Spec, check, intact, memory
from compress_jax.export._artifact.fields import KEY, KEY_WORDS, NATIVE, dtype_named, refuse
from compress_jax.export._artifact.limits import Budget, Limits
from compress_jax.export._artifact.structure import (
    Stored,
    Structure,
    Tensors,
    build,
    is_key,
    on_device,
    typed,
)


def grammar(structure: Structure, limits: Limits) -> int:
    """Check that a structure has containers, nodes of known kinds, and fields in range.

    Args:
      structure: from JSON.
      limits: of depth and number.

    Returns:
      How many arrays it has.

    Raises:
      ArtifactError: if it is none; says which entry and what is wrong.

    Example:
      >>> bits = {"Bits": {"data": True, "bits": 4, "shape": [2]}}
      >>> grammar({"dict": [["a", True], ["b", bits]]}, Limits())
      2
    """
    names: set[str] = set()
    characters = 0

    # Nodes are made with None for each array: what counts here are names and static fields.
    def array(name: str, dtype: Stored) -> None:
        if name in names or name == "__metadata__":
            raise refuse(name, "two entries have this name")
        nonlocal characters
        names.add(name)
        characters += len(name)
        few(len(names), limits)  # before the next one, so that a huge structure ends early
        if characters > limits.header:  # as many as a file could name in its header
            raise ArtifactError(f"the names of its arrays have over {limits.header:,} characters")
        if dtype is not True:
            _foreign(name, dtype)

    build(structure, array, depth=limits.depth)
    return len(names)


def survey(structure: Structure, specs: dict[str, Spec], budget: Budget, limits: Limits) -> None:
    """Check a structure against the shapes and dtypes of its tensors; count its memory.

    Args:
      structure: from JSON.
      specs: of every tensor of the file.
      budget: of memory.
      limits: of depth and number.

    Raises:
      ArtifactError: if they do not agree; says which entry and what is wrong.
    """
    # All names of a structure differ, so equal numbers and no missing name are the same names.
    if (count := grammar(structure, limits)) != len(specs):
        raise ArtifactError(f"it has {len(specs)} tensors, and its structure {count}")

    # Each tensor becomes its shape and dtype; nothing is allocated.
    def array(name: str, dtype: Stored) -> Spec:
        spec = specs.get(name)
        if spec is None:
            raise refuse(name, "the file's structure names this tensor, and it is not in the file")
        if dtype is True:
            return spec
        found = f"{spec.dtype} {list(spec.shape)}"
        if dtype.startswith(KEY):
            words = KEY_WORDS[dtype.removeprefix(KEY)]  # [..., words]
            if spec.dtype != np.uint32 or spec.shape[-1:] != (words,):
                raise refuse(name, f"{dtype} is stored as rows of {words} uint32, not {found}")
            return spec
        wanted = dtype_named(dtype)
        if spec.dtype != np.uint8 or spec.shape[-1:] != (wanted.itemsize,):
            size = wanted.itemsize
            raise refuse(name, f"{dtype} is stored as rows of {size} bytes, not {found}")
        return Spec(spec.shape[:-1], wanted)

    # Whole nodes: their fields must agree, and all that unpacking them takes is counted.
    def leaf(found: PyTree, path: str) -> None:
        if not isinstance(found, Spec):
            check(found, path)
        budget.take(memory(found), f"entry {path!r}")

    build(structure, array, leaf, depth=limits.depth)


def checked(
    structure: Structure,
    tensors: Tensors,
    path: str = "",
    *,
    keep: bool = True,
    depth: int = Limits().depth,
) -> PyTree:
    """Return the tree of a structure and its tensors once all that they hold agrees.

    Args:
      structure: from JSON, surveyed.
      tensors: decoded.
      path: where in the tree the structure stands.
      keep: whether to return the tree, or only to look at it.
      depth: how many containers and nodes may stand inside each other.

    Returns:
      The tree, arrays on the device; see `structure.decode`.

    Raises:
      ArtifactError: if masks, codes and values do not agree; says which entry and what is wrong.
    """

    # Values are compared in NumPy; only what has passed goes to the device.
    def leaf(found: PyTree, path: str) -> PyTree:
        if isinstance(found, np.ndarray):
            intact(found, path)
            return on_device(found) if keep else None
        if is_key(found):
            return found if keep else None
        check(found, path)
        return jax.tree.map(jnp.asarray, found) if keep else None

    return build(structure, lambda name, dtype: typed(name, dtype, tensors), leaf, path, depth)


def few(count: int, limits: Limits) -> None:
    """Raise ArtifactError if there are more arrays than the limit allows."""
    if count > limits.arrays:
        raise ArtifactError(
            f"it has more than {limits.arrays:,} arrays; if you trust the file, pass "
            "limits=export.Limits(arrays=...)"
        )


def shallow(metadata: object, limits: Limits) -> None:
    """Raise ArtifactError unless metadata is a dict no deeper than the limit allows."""
    if not isinstance(metadata, dict):
        raise ArtifactError(f"the metadata must be a dict, not a {type(metadata).__name__}")
    # Level by level: recursion would meet Python's own limit first.
    level: list[PyTree] = [metadata]
    for _ in range(limits.depth):
        values = chain.from_iterable(x.values() if isinstance(x, dict) else x for x in level)
        level = [value for value in values if isinstance(value, (dict, list, tuple))]
        if not level:
            return
    raise ArtifactError(f"the metadata is nested more deeply than {limits.depth} levels")


def _foreign(name: str, dtype: str) -> None:
    """Check that a named dtype exists and is none of safetensors' own, or is a key type."""
    if dtype.startswith(KEY):
        if dtype.removeprefix(KEY) not in KEY_WORDS:
            raise refuse(
                name, f"{dtype[:40]!r} is none of the random keys there are: {', '.join(KEY_WORDS)}"
            )
        return
    try:
        found = dtype_named(dtype)
    except ValueError as error:
        raise refuse(name, f"the dtype {dtype[:40]!r}: {error}") from error
    if found.name in NATIVE:
        raise refuse(name, f"the dtype {dtype!r} is named, though it is one of safetensors")
