"""Where the bytes of an artifact are: by leaf, and by what they are for."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress_jax.export._artifact.artifact import LIMITS, of_file, opened
from compress_jax.export._artifact.limits import Limits
from compress_jax.export._artifact.structure import Structure, leaves, places, shapes
from compress_jax.export._coding import adaptive
from compress_jax.export._coding.bitstream import unpacked
from compress_jax.export._coding.entropy import NEVER, probabilities
from compress_jax.export._coding.streams import Coded, decoded, expanded


class Part(NamedTuple):
    """Bytes of one leaf that serve one purpose.

    Attributes:
      path: the leaf; empty for what belongs to none.
      cause: ``"codes"``, ``"mask"``, ``"values"``, ``"scale"``, ``"codebook"``, ...: the field of
        the packed node; ``"array"`` for a plain array; ``"header and metadata"`` for the rest of
        the file.
      nbytes: in the file; of a coded file, a share of what is coded together, so not a whole
        number.

    Example:
      >>> import compress_jax as cj
      >>> part = cj.export.Part("dense/kernel", "codes", nbytes=2048)
      >>> part.path, part.cause, part.nbytes
      ('dense/kernel', 'codes', 2048)
    """

    path: str
    cause: str
    nbytes: float


def breakdown(
    path: str | os.PathLike[str], *, max_bytes: int | None = None, limits: Limits = LIMITS
) -> list[Part]:
    """Return what every byte of an artifact is for; the sum is the size of the file.

    In a coded file a stream of symbols counts as the information it has under its model, and what
    zstandard compressed together is shared out in proportion.

    Args:
      path: a file that `save` wrote.
      max_bytes: as of `load`.
      limits: as of `load`.

    Returns:
      The parts, in the order of the tree, the header last.

    Raises:
      ArtifactError: as `load`.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> size = cj.save(file, {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}})
      >>> parts = cj.export.breakdown(file)
      >>> parts[0], sum(part.nbytes for part in parts) == size
      (Part(path='dense/kernel', cause='array', nbytes=16), True)
    """
    path = Path(path)
    found = opened(path, max_bytes, limits)
    size = path.stat().st_size
    sizes: dict[str, float] = {}
    if isinstance(found.parts, Coded):
        with of_file(path):
            sizes = _coded_sizes(found.tree, found.parts)
    else:
        sizes |= {name: x.nbytes for name, x in found.parts.items()}
    rows = []
    for place, structure in leaves(found.tree):
        for name, _ in places(structure, place):
            # A tensor's name is its leaf's, with the fields that lead to it behind: w.codes.mask.
            cause = name.removeprefix(place).rpartition(".")[2] or "array"
            rows.append(Part(place, cause, sizes[name]))
    return [*rows, Part("", "header and metadata", size - sum(row.nbytes for row in rows))]


def _coded_sizes(tree: Structure, parts: Coded) -> dict[str, float]:
    """Return the bytes of each tensor of a coded file."""
    raw = max(expanded(parts.rest, "its tensors"), 1)
    tables = [np.frombuffer(bytes.fromhex(table), np.uint8) for table in parts.index["tables"]]
    sizes: dict[str, float] = {}
    extents = shapes(tree)
    tensors = zip(decoded(tree, parts), places(tree), parts.index["tensors"], strict=True)
    for (name, tensor), (_, symbols), entry in tensors:
        if not tensor.size:  # its table, if it has one, has no symbol
            sizes[name] = 0
        elif isinstance(entry, int) and symbols:
            # The information of the symbols under their table: sum_s -n_s log2(p_s) bits.
            bits, _ = symbols
            counts = np.bincount(unpacked(tensor, *symbols), minlength=2**bits)
            used = tables[entry] != NEVER
            information = -np.log2(probabilities(tables[entry])[used])
            sizes[name] = float(information @ counts[used]) / 8
        elif symbols and (settings := adaptive.settings_of(entry)):
            own = unpacked(tensor, *symbols)
            sizes[name] = adaptive.cost(adaptive.Tensor(own, symbols[0], extents[name], settings))
        else:
            # zstandard sees all other tensors as one text: each has its share of the result.
            sizes[name] = tensor.nbytes * len(parts.rest) / raw
    return sizes
