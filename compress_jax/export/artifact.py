"""The artifact: one safetensors file that holds a packed model at its true size, and says what it is.

A safetensors container with its header's keys sorted, whose ``__metadata__`` has the strings ``format`` =
``"compress_jax"``, ``version``, and ``sha256`` = hex digest of the whole file as it is with 64 zeros in place of the
digest. Its content is JSON with ``tree`` (see `structure`) and ``metadata`` (free-form: model, data, config, accuracy).
Nothing in the file is ever executed.

Version 1, plain: the content is one more string, ``content``, and the tensors of the tree are those of the container. Codes
of 1 to 16 bits are packed without gaps, least significant bit first, into uint8 tensors.

Version 2, coded: the container has three uint8 tensors. ``content`` is the JSON, compressed by zstandard, with the entry
``index`` besides; ``ans`` and ``rest`` hold the tensors of the tree as `streams` says: their symbols at their entropy.
"""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import zstandard

from compress_jax.core.errors import ArtifactError
from compress_jax.export.streams import Coded, code, squeezed, uncode
from compress_jax.export.structure import Tensors, decode, encode

FORMAT, PLAIN, VERSION, BLANK = "compress_jax", 1, 2, "0" * 64


def save(path: str | os.PathLike[str], packed: Any, metadata: dict[str, Any] | None = None, *, coded: bool = False) -> int:
    """Write packed params to one file, atomically: a full disk or a kill leaves an old file as it was.

    Args:
      path: the file to write.
      packed: params as `Compression.pack` returns them (plain arrays are fine too).
      metadata: anything JSON can hold: names of model and data, config, accuracy.
      coded: whether to store codes, masks and indices at their entropy, and everything else compressed, rather than as
        tensors that any safetensors reader finds.

    Returns:
      Bytes written.

    Raises:
      ArtifactError: if a leaf or the metadata cannot be written, or the disk is full or not writable.

    Example:
      >>> import jax.numpy as jnp
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> written = save(file, {"kernel": jnp.arange(3.0)}, {"model": "tiny"})
      >>> written == file.stat().st_size, load(file)
      (True, ({'kernel': Array([0., 1., 2.], dtype=float32)}, {'model': 'tiny'}))
    """
    tree, tensors = encode(packed)
    data = (_coded if coded else _plain)(tree, tensors, metadata or {})
    write_atomically(Path(path), data)
    return len(data)


def load(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Read a file that `save` wrote.

    Args:
      path: the file.

    Returns:
      ``(packed, metadata)``; ``compress_jax.unpack(packed)`` gives bit for bit the params that were evaluated.

    Raises:
      ArtifactError: if there is no such file, or it is damaged, foreign, or of a newer version.

    Example:
      >>> import jax.numpy as jnp
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> _ = save(file, [jnp.ones(2)])
      >>> packed, metadata = load(file)
      >>> packed[0].tolist(), metadata
      ([1.0, 1.0], {})
    """
    content, parts = opened(Path(path))
    tensors = uncode(content["tree"], parts) if isinstance(parts, Coded) else parts
    return decode(content["tree"], tensors), content["metadata"]


def opened(path: Path) -> tuple[dict[str, Any], Tensors | Coded]:
    """Read a file and verify it; return its content as JSON, and its tensors as they are stored."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    header = _header(path, data)
    if header.get("format") != FORMAT:
        raise ArtifactError(f"{path} is a safetensors file, but not one that compress_jax wrote; load it with safetensors")
    if not header.get("version", "").isdecimal() or int(header["version"]) > VERSION:
        raise ArtifactError(
            f"{path} has format version {header.get('version')}, and this version of compress_jax reads up to {VERSION}; "
            "upgrade compress_jax to read it"
        )
    digest = header.get("sha256", "")
    if hashlib.sha256(_reseal(data, digest, BLANK)).hexdigest() != digest:
        raise ArtifactError(f"{path} is truncated or damaged: its checksum does not match. Copy or write it again")
    tensors = safetensors.numpy.load(data)
    if int(header["version"]) == PLAIN:
        return json.loads(header["content"]), tensors
    content = json.loads(zstandard.decompress(tensors["content"].tobytes()))
    return content, Coded(content["index"], tensors["ans"].tobytes(), tensors["rest"].tobytes())


def _plain(tree: Any, tensors: Tensors, metadata: dict[str, Any]) -> bytes:
    return _container(tensors, {"version": str(PLAIN), "content": _json({"tree": tree, "metadata": metadata})})


def _coded(tree: Any, tensors: Tensors, metadata: dict[str, Any]) -> bytes:
    parts = code(tree, tensors)
    content = _json({"tree": tree, "metadata": metadata, "index": parts.index})
    pieces = {"ans": parts.ans, "content": squeezed(content.encode()), "rest": parts.rest}
    return _container({name: np.frombuffer(piece, np.uint8) for name, piece in pieces.items()}, {"version": str(VERSION)})


def _json(content: dict[str, Any]) -> str:
    try:
        return json.dumps(content, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"the metadata, or a key of the tree, cannot be written as JSON: {error}") from error


def _container(tensors: Tensors, strings: dict[str, str]) -> bytes:
    """Return the whole file."""
    try:
        data = _ordered(safetensors.numpy.save(tensors, {"format": FORMAT, **strings, "sha256": BLANK}))
    except ValueError as error:  # a name that is no text
        raise ArtifactError(f"a key of the tree cannot be the name of a tensor: {error}") from error
    return _reseal(data, BLANK, hashlib.sha256(data).hexdigest())


def _header(path: Path, data: bytes) -> dict[str, str]:
    """Return the string metadata of a safetensors file; the digest vouches for the rest of it."""
    try:
        strings = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        return {name: str(value) for name, value in strings.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is truncated, damaged or not an artifact at all: its {len(data)} bytes are no safetensors file: {error}"
        ) from error


def _ordered(data: bytes) -> bytes:
    """Sort the header: safetensors writes its metadata in an order that differs from process to process."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _reseal(data: bytes, old: str, new: str) -> bytes:
    """Exchange the digest. It comes first: a quote in any other string of the header has a backslash before it."""
    return data.replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{new}"'.encode(), 1)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file beside its place, force it to disk, then rename it: it is there whole or not at all.

    Args:
      path: the file; its directory is made.
      data: its content.

    Raises:
      ArtifactError: if the disk is full or not writable; what was there before is unchanged.

    Example:
      >>> file = Path(tempfile.mkdtemp()) / "results.json"
      >>> write_atomically(file, b"{}")
      >>> file.read_bytes()
      b'{}'
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise ArtifactError(f"cannot write {path} ({len(data):,} bytes): {why}{kept}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
