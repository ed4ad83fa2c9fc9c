"""The artifact: one safetensors file that holds a packed model and its metadata.

The strings of the container's ``__metadata__`` are ``format`` = ``"compress_jax"`` and ``version``.
Nothing in the file is ever executed. All versions are read; `save` writes 1, 3 and 4.

Version 1, named: the tensors of the tree are those of the container, so that any reader of
safetensors finds them. Codes of 1 to 16 bits are packed without gaps, least significant bit first,
into uint8 tensors. There are two more strings. ``content`` is JSON with ``tree`` (see `structure`)
and ``metadata`` (free-form: model, data, config, accuracy). ``sha256`` is the hex digest of the
whole file as it is with 64 zeros in place of the digest. Keys are sorted.

Version 2, coded, no longer written: the strings are those of version 1, but for ``content``, and
there are three uint8 tensors. ``content`` is the JSON, compressed by zstandard, with the entry
``index`` besides; ``ans`` and ``rest`` hold the tensors of the tree as `streams` says: their
symbols at their entropy.

Version 3, compact: one uint8 tensor, ``model``, has a compressed description and the bytes of all
tensors (see `compact`), plain or coded, and, as its last 16 bytes, the first half of the SHA-256 of
all bytes before them. A plain file is compact if its names, JSON and digest would take more than
2 % of it and 200 bytes: a name costs a small tensor more than its numbers do.

Version 4 is version 3 with tensors that are coded adaptively (see `adaptive`); a file without such
tensors is of version 3.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from compress_jax.core.errors import ArtifactError
from compress_jax.core.files import write_atomically
from compress_jax.core.types import JsonObject, PyTree
from compress_jax.export._artifact import compact
from compress_jax.export._artifact.checks import Spec
from compress_jax.export._artifact.compact import Opened
from compress_jax.export._artifact.container import (
    ADAPTIVE,
    COMPACT,
    DIGEST,
    ROW,
    as_json,
    content_of,
    header_of,
    named,
    rowed,
    tensors_of,
    version_of,
)
from compress_jax.export._artifact.limits import Budget, Limits
from compress_jax.export._artifact.structure import Structure, Tensors, encode
from compress_jax.export._artifact.validation import checked, few, grammar, shallow, survey
from compress_jax.export._coding.streams import Coded, expanded, specified, uncode, unsqueezed

LIMITS = Limits()
NAMED = 1  # version of a file whose tensors any safetensors reader finds
CODED = 2  # of an older coded one
SHARE = 0.02  # of a file that its header may take, and
FREE = 200  # bytes of it besides; else the file is compact


def save(
    path: str | os.PathLike[str],
    packed: PyTree,
    metadata: JsonObject | None = None,
    *,
    coded: bool = False,
) -> int:
    """Write packed params to one file, atomically.

    A full disk or a kill leaves an older file as it was.

    Args:
      path: the file to write.
      packed: params as `Compression.pack` returns them (plain arrays are fine too).
      metadata: anything JSON can hold: names of model and data, config, accuracy.
      coded: whether to store codes, masks and indices at their entropy, and everything else
        compressed, where that saves bytes. Otherwise the tensors of a large file have names, by
        which any safetensors reader finds them; `to_safetensors` writes such files at any size.

    Returns:
      Bytes written.

    Raises:
      ArtifactError: if a leaf or the metadata cannot be written, `load` would find a packed node
        inconsistent, or the disk is full or not writable.

    Example:
      >>> import jax.numpy as jnp
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> written = save(file, {"kernel": jnp.arange(3.0)}, {"model": "tiny"})
      >>> written == file.stat().st_size, load(file)
      (True, ({'kernel': Array([0., 1., 2.], dtype=float32)}, {'model': 'tiny'}))
    """
    tree, tensors = encode(packed)
    # What `load` would refuse is refused before anything is written.
    shallow(metadata or {}, Limits())
    checked(tree, tensors, keep=False)
    data = (smallest if coded else plain)(tree, tensors, metadata or {})
    write_atomically(Path(path), data)
    return len(data)


def load(
    path: str | os.PathLike[str], *, max_bytes: int | None = None, limits: Limits = LIMITS
) -> tuple[PyTree, JsonObject]:
    """Read a file that `save` wrote.

    A file is validated before it is used: its checksum, then every number of its header and its
    structure; then memory is allocated; then codes, masks and shapes are compared with each other.
    So a malicious file raises an error, and neither crashes the process nor fills its memory.

    Args:
      path: the file.
      max_bytes: memory that the file, its arrays and what `unpack` makes of them may take; None for
        512 MiB or 1,024 times the size of the file, whichever is more. Give more for a file that
        you trust.
      limits: how large its header may be, how many arrays it may have, and how deeply its tree may
        be nested.

    Returns:
      ``(packed, metadata)``; ``compress_jax.unpack(packed)`` gives bit for bit the params that were
      evaluated.

    Raises:
      ArtifactError: if there is no such file, or it is damaged, foreign, inconsistent, of a newer
        version, or beyond a limit; says which entry, and what is wrong with it.

    Example:
      >>> import jax.numpy as jnp
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> _ = save(file, [jnp.ones(2)])
      >>> packed, metadata = load(file)
      >>> packed[0].tolist(), metadata
      ([1.0, 1.0], {})
    """
    found = opened(Path(path), max_bytes, limits)
    with of_file(path):
        tensors = uncode(found.tree, found.parts) if isinstance(found.parts, Coded) else found.parts
        return checked(found.tree, tensors, depth=limits.depth), found.metadata


def opened(path: Path, max_bytes: int | None = None, limits: Limits = LIMITS) -> Opened:
    """Read a file and verify all of it that can be verified before its tensors are decoded.

    Args:
      path: as of `load`.
      max_bytes: as of `load`.
      limits: as of `load`.

    Returns:
      Its content, and its tensors as they are stored.

    Raises:
      ArtifactError: as `load`.
    """
    try:
        size = path.stat().st_size
        with of_file(path):
            budget = Budget(size, max_bytes)  # before the file is in memory
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    # JSON takes up to 40 times its length in Python objects, so its length is checked first. It is
    # what the file's first 8 bytes say, but no more than there is.
    with of_file(path):
        budget.parse(min(int.from_bytes(data[:8], "little"), len(data)), limits, "its header")
        header, start = header_of(data)
        version = version_of(data, header)
        tensors = tensors_of(data, header, start, functools.partial(few, limits=limits))
        if version == NAMED:
            return _opened_named(header["__metadata__"]["content"], tensors, budget, limits)
        if version == CODED:
            return _opened_coded(tensors, budget, limits)
        return compact.opened(_row(tensors, [ROW])[ROW][:-DIGEST], budget, limits)


def _opened_named(text: str, tensors: Tensors, budget: Budget, limits: Limits) -> Opened:
    budget.parse(len(text), limits, "its content")
    content = content_of(text, limits)
    specs = {name: Spec(x.shape, x.dtype) for name, x in tensors.items()}
    survey(content["tree"], specs, budget, limits)
    return Opened(content["tree"], content["metadata"], tensors)


def _opened_coded(tensors: Tensors, budget: Budget, limits: Limits) -> Opened:
    pieces = {name: bytes(x) for name, x in _row(tensors, ["ans", "content", "rest"]).items()}
    # The size that the JSON unpacks to is checked before it is unpacked.
    budget.parse(expanded(pieces["content"], "its content"), limits, "its content")
    text = unsqueezed(pieces["content"], "its content")
    content = content_of(text, limits, {"index"})
    # The index is read along the places of the tree, so the tree must be one before that.
    grammar(content["tree"], limits)
    coded = Coded(content["index"], pieces["ans"], pieces["rest"])
    survey(content["tree"], specified(content["tree"], coded), budget, limits)
    return Opened(content["tree"], content["metadata"], coded)


@contextlib.contextmanager
def of_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Begin every ArtifactError with the name of the file."""
    try:
        yield
    except ArtifactError as error:
        # What a malicious file has in the place of a name may be megabytes long.
        said = str(error)
        said = said if len(said) < 1000 else f"{said[:1000]}..."
        # The original cause, so that a traceback does not show the message twice.
        raise ArtifactError(f"{os.fspath(path)}: {said}") from error.__cause__


def _row(tensors: Tensors, names: list[str]) -> dict[str, memoryview]:
    """Return the rows of bytes that a file must consist of."""
    plain = all(x.dtype == np.uint8 and x.ndim == 1 for x in tensors.values())
    if tensors.keys() != set(names) or not plain:
        raise ArtifactError(f"a file of its version has rows of bytes called {', '.join(names)}")
    return {name: x.data for name, x in tensors.items()}


def plain(tree: Structure, tensors: Tensors, metadata: JsonObject) -> bytes:
    """Return a file whose tensors have names, or a compact one where the names cost too much.

    Args:
      tree: of `structure.encode`.
      tensors: of it.
      metadata: anything JSON can hold.

    Returns:
      The whole file.

    Raises:
      ArtifactError: if the metadata or a name cannot be written.
    """
    data = with_names(tree, tensors, metadata)
    header = 8 + int.from_bytes(data[:8], "little")
    if header <= SHARE * len(data) + FREE:
        return data
    return rowed(compact.written(tree, tensors, metadata))


def smallest(tree: Structure, tensors: Tensors, metadata: JsonObject) -> bytes:
    """Return a coded file, or a compact one if that is no larger; see `plain`."""
    row, adaptive = compact.written_coded(tree, tensors, metadata)
    data = rowed(row, ADAPTIVE if adaptive else COMPACT)
    # The tables of a few hundred symbols are larger than what they save.
    if len(row) > sum(x.nbytes for x in tensors.values()):
        data = min(rowed(compact.written(tree, tensors, metadata)), data, key=len)
    return data


def with_names(tree: Structure, tensors: Tensors, metadata: JsonObject) -> bytes:
    """Return a file of version 1; see `plain`."""
    content = as_json({"tree": tree, "metadata": metadata})
    return named(tensors, {"version": str(NAMED), "content": content})
