"""An artifact leaf by leaf, for models whose unpacked weights do not all fit into memory."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from compress_jax.core.types import PyTree
from compress_jax.export._artifact.artifact import LIMITS, of_file, opened
from compress_jax.export._artifact.limits import Limits
from compress_jax.export._artifact.structure import leaves, places
from compress_jax.export._artifact.validation import checked
from compress_jax.export._coding.streams import Coded, check, crc32, decoded


def stream(
    path: str | os.PathLike[str], *, max_bytes: int | None = None, limits: Limits = LIMITS
) -> Iterator[tuple[str, PyTree]]:
    """Yield the leaves of an artifact, one at a time, in the order of the tree.

    The file's own bytes are read at once and its checksum is verified before the first leaf; then
    one leaf after the other is decoded. What all leaves decode to is verified after the last.

    Args:
      path: a file that `save` wrote.
      max_bytes: as of `load`.
      limits: as of `load`.

    Yields:
      ``(path, leaf)``: keys joined by ``/``, and the array or packed node that `load` has there.

    Raises:
      ArtifactError: as `load`.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}}
      >>> _ = cj.save(file, params, coded=True)
      >>> [(path, leaf.shape) for path, leaf in cj.export.stream(file)]
      [('dense/kernel', (2, 2)), ('dense/bias', (2,))]
    """
    found = opened(Path(path), max_bytes, limits)
    tree = found.tree
    parts = found.parts
    total = 0
    with of_file(path):
        if isinstance(parts, Coded):
            tensors = decoded(tree, parts)
        else:
            tensors = ((name, parts[name]) for name, _ in places(tree))
        # The tensors come in the order of the leaves, so each leaf takes the next few of them.
        for place, structure in leaves(tree):
            own: dict[str, np.ndarray] = dict(next(tensors) for _ in places(structure, place))
            for tensor in own.values():
                total = crc32(tensor, total)
            yield place, checked(structure, own, place)
        if isinstance(parts, Coded):  # a plain file's digest covers its tensors as they are
            check(total, parts)
