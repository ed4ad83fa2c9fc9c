"""The artifact: one safetensors file that holds a packed model and its metadata.

A safetensors container with its header's keys sorted, whose ``__metadata__`` has the strings
``format`` = ``"compress_jax"``, ``version``, and ``sha256`` = hex digest of the whole file as it is
with 64 zeros in place of the digest. Its content is JSON with ``tree`` (see `structure`) and
``metadata`` (free-form: model, data, config, accuracy). Nothing in the file is ever executed.

Version 1, plain: the content is one more string, ``content``, and the tensors of the tree are those
of the container. Codes of 1 to 16 bits are packed without gaps, least significant bit first, into
uint8 tensors.

Version 2, coded: the container has three uint8 tensors. ``content`` is the JSON, compressed by
zstandard, with the entry ``index`` besides; ``ans`` and ``rest`` hold the tensors of the tree as
`streams` says: their symbols at their entropy.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from compress_jax.core.errors import ArgumentError, ArtifactError
from compress_jax.core.types import PyTree
from compress_jax.export._artifact.checks import Spec
from compress_jax.export._artifact.fields import extents, refuse
from compress_jax.export._artifact.limits import Budget, Limits
from compress_jax.export._artifact.structure import Tensors, encode
from compress_jax.export._artifact.validation import checked, few, grammar, shallow, survey
from compress_jax.export._coding.streams import (
    Coded,
    code,
    expanded,
    specified,
    squeezed,
    uncode,
    unsqueezed,
)

LIMITS = Limits()
FORMAT = "compress_jax"
PLAIN = 1
VERSION = 2
BLANK = "0" * 64  # in place of the digest while the digest is computed
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}


def header_of(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a container, and where its tensors begin.

    Args:
      data: the file.

    Returns:
      ``({name: ...}, offset)``.

    Raises:
      ArtifactError: if the file is no such container.

    Example:
      >>> import safetensors.numpy
      >>> header_of(safetensors.numpy.save({"x": np.zeros(2, np.uint8)}))[0]
      {'x': {'dtype': 'U8', 'shape': [2], 'data_offsets': [0, 2]}}
    """
    end = 8 + int.from_bytes(data[:8], "little")
    if not 8 < end <= len(data):
        raise ArtifactError(
            f"its {len(data)} bytes are no safetensors file: a header would end at {end}"
        )
    header = parsed(data[8:end], "the header")
    if not isinstance(header, dict):
        raise ArtifactError("its header is not an object of JSON")
    return header, end


def parsed(text: bytes | str, what: str) -> Any:
    """Return parsed JSON; refuse what `save` never writes.

    Refused are duplicate names, NaN, and infinite numbers.

    Args:
      text: JSON in UTF-8.
      what: which, for the error.

    Returns:
      Its value.

    Raises:
      ArtifactError: if it is no JSON, or such.

    Example:
      >>> parsed('{"a": [1, 2.5]}', "the content")
      {'a': [1, 2.5]}
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(
            text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is no JSON that can be read: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ArgumentError("a name is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ArgumentError(f"{text} is larger than any float")
    return value


def _constant(text: str) -> float:
    raise ArgumentError(f"{text} is no number of JSON")


def tensors_of(
    data: bytes, header: dict[str, Any], start: int, check_count: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Return the tensors of a container; they share its memory.

    Args:
      data: the file.
      header: of `header_of`.
      start: where its tensors begin.
      check_count: called with the number of tensors before any is made.

    Returns:
      ``{name: array}``.

    Raises:
      ArtifactError: if an entry says anything that is not so.
    """
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    check_count(len(entries))
    tensors: dict[str, np.ndarray] = {}
    spans = []
    for name, entry in entries.items():
        dtype, shape, (begin, end) = _entry(name, entry)
        size = math.prod(shape) * dtype.itemsize
        if end - begin != size or not 0 <= begin <= end <= len(data) - start:
            raise refuse(
                name,
                f"{dtype} of shape {list(shape)} has {size:,} bytes, and the file has {begin:,} "
                f"to {end:,} for it",
            )
        spans.append((begin, end))
        flat = np.zeros(0, dtype)  # np.frombuffer refuses to read nothing
        if size:
            flat = np.frombuffer(data, dtype, math.prod(shape), start + begin)
        tensors[name] = flat.reshape(shape)
    _require_tiling(spans, start, len(data))
    return tensors


def _require_tiling(spans: list[tuple[int, int]], start: int, size: int) -> None:
    """Check that tensors follow one another without a gap, up to the end of the file."""
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ArtifactError(f"its tensors overlap or leave a gap at byte {start + at:,}")
        at = end
    if start + at != size:
        raise ArtifactError(f"{size - start - at:,} bytes at its end belong to no tensor")


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(
            name, "a tensor has a dtype, a shape and data_offsets, nothing less and nothing more"
        )
    dtype = entry["dtype"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(name, f"the dtype {dtype!r} is none that compress_jax writes")
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise refuse(name, "data_offsets are two whole numbers")
    try:
        shape = extents(entry["shape"])
    except ValueError as error:
        raise refuse(name, f"the shape is wrong: {error}") from error
    return np.dtype(DTYPES[dtype]), shape, (offsets[0], offsets[1])


def save(
    path: str | os.PathLike[str],
    packed: PyTree,
    metadata: dict[str, Any] | None = None,
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
        compressed, rather than as tensors that any safetensors reader finds.

    Returns:
      Bytes written.

    Raises:
      ArtifactError: if a leaf or the metadata cannot be written, `load` would find a packed node
        inconsistent, or the disk is full or not writable.

    Example:
      >>> import jax.numpy as jnp
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> written = save(file, {"kernel": jnp.arange(3.0)}, {"model": "tiny"})
      >>> written == file.stat().st_size, load(file)
      (True, ({'kernel': Array([0., 1., 2.], dtype=float32)}, {'model': 'tiny'}))
    """
    tree, tensors = encode(packed)
    shallow(metadata or {}, Limits())
    checked(tree, tensors, keep=False)
    data = (_coded if coded else _plain)(tree, tensors, metadata or {})
    write_atomically(Path(path), data)
    return len(data)


def load(
    path: str | os.PathLike[str], *, max_bytes: int | None = None, limits: Limits = LIMITS
) -> tuple[Any, dict[str, Any]]:
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
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> _ = save(file, [jnp.ones(2)])
      >>> packed, metadata = load(file)
      >>> packed[0].tolist(), metadata
      ([1.0, 1.0], {})
    """
    content, parts = opened(Path(path), max_bytes, limits)
    with of_file(path):
        tensors = uncode(content["tree"], parts) if isinstance(parts, Coded) else parts
        return checked(content["tree"], tensors, depth=limits.depth), content["metadata"]


def opened(
    path: Path, max_bytes: int | None = None, limits: Limits = LIMITS
) -> tuple[dict[str, Any], Tensors | Coded]:
    """Read a file and verify all of it that can be verified before its tensors are decoded.

    Args:
      path: as of `load`.
      max_bytes: as of `load`.
      limits: as of `load`.

    Returns:
      Its content as JSON, and its tensors as they are stored.

    Raises:
      ArtifactError: as `load`.
    """
    try:
        size = path.stat().st_size
        with of_file(path):
            budget = Budget(size, max_bytes)
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    with of_file(path):
        budget.parse(min(int.from_bytes(data[:8], "little"), len(data)), limits, "its header")
        header, start = header_of(data)
        version = _version(data, header)
        tensors = tensors_of(data, header, start, functools.partial(few, limits=limits))
        if version == PLAIN:
            return _opened_plain(header["__metadata__"]["content"], tensors, budget, limits)
        return _opened_coded(tensors, budget, limits)


def _opened_plain(
    text: str, tensors: Tensors, budget: Budget, limits: Limits
) -> tuple[dict[str, Any], Tensors]:
    budget.parse(len(text), limits, "its content")
    content = _content(text, {"tree", "metadata"}, limits)
    specs = {name: Spec(x.shape, x.dtype) for name, x in tensors.items()}
    survey(content["tree"], specs, budget, limits)
    return content, tensors


def _opened_coded(tensors: Tensors, budget: Budget, limits: Limits) -> tuple[dict[str, Any], Coded]:
    pieces = _pieces(tensors)
    # The size that the JSON unpacks to is checked before it is unpacked.
    budget.parse(expanded(pieces["content"], "its content"), limits, "its content")
    text = unsqueezed(pieces["content"], "its content")
    content = _content(text, {"tree", "metadata", "index"}, limits)
    grammar(content["tree"], limits)
    coded = Coded(content["index"], pieces["ans"], pieces["rest"])
    survey(content["tree"], specified(content["tree"], coded), budget, limits)
    return content, coded


@contextlib.contextmanager
def of_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Begin every ArtifactError with the name of the file."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from error.__cause__


def _version(data: bytes, header: dict[str, Any]) -> int:
    """Check the strings and the digest of a container, and return its version."""
    strings = header.get("__metadata__", {})
    if not isinstance(strings, dict) or strings.get("format") != FORMAT:
        raise ArtifactError(
            "it is a safetensors file, but not one that compress_jax wrote; load it with "
            "safetensors"
        )
    number = strings.get("version")
    if isinstance(number, str) and number.isdecimal() and int(number) > VERSION:
        raise ArtifactError(
            f"it has format version {number}, and this version of compress_jax reads up to "
            f"{VERSION}; upgrade compress_jax"
        )
    known = {"format", "version", "sha256"} | ({"content"} if number == str(PLAIN) else set())
    if (
        number not in (str(PLAIN), str(VERSION))
        or strings.keys() != known
        or set(map(type, strings.values())) != {str}
    ):
        raise ArtifactError(
            f"it is damaged: its header must have the strings {', '.join(sorted(known))}, and a "
            "known version"
        )
    digest = strings["sha256"]
    if hashlib.sha256(_reseal(data, digest, BLANK)).hexdigest() != digest:
        raise ArtifactError(
            "it is truncated or damaged: its checksum does not match. Copy or write it again"
        )
    return int(number)


def _content(text: str | bytes, wanted: set[str], limits: Limits) -> dict[str, Any]:
    """Return the JSON content of a file, with the required entries and the metadata."""
    content = parsed(text, "its content")
    if not isinstance(content, dict) or content.keys() != wanted:
        raise ArtifactError(f"its content must have {', '.join(sorted(wanted))}, and nothing else")
    shallow(content["metadata"], limits)
    return content


def _pieces(tensors: Tensors) -> dict[str, bytes]:
    """Return the three byte strings of a coded file."""
    plain = all(x.dtype == np.uint8 and x.ndim == 1 for x in tensors.values())
    if tensors.keys() != {"ans", "content", "rest"} or not plain:
        raise ArtifactError("a coded file has three rows of bytes, ans, content and rest")
    return {name: x.tobytes() for name, x in tensors.items()}


def _plain(tree: PyTree, tensors: Tensors, metadata: dict[str, Any]) -> bytes:
    return _container(
        tensors, {"version": str(PLAIN), "content": _json({"tree": tree, "metadata": metadata})}
    )


def _coded(tree: PyTree, tensors: Tensors, metadata: dict[str, Any]) -> bytes:
    parts = code(tree, tensors)
    content = _json({"tree": tree, "metadata": metadata, "index": parts.index})
    pieces = {"ans": parts.ans, "content": squeezed(content.encode()), "rest": parts.rest}
    return _container(
        {name: np.frombuffer(piece, np.uint8) for name, piece in pieces.items()},
        {"version": str(VERSION)},
    )


def _json(content: dict[str, Any]) -> str:
    try:
        return json.dumps(content, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"the metadata, or a key of the tree, cannot be written as JSON: {error}"
        ) from error


def _container(tensors: Tensors, strings: dict[str, str]) -> bytes:
    """Return the whole file."""
    try:
        data = _ordered(
            safetensors.numpy.save(tensors, {"format": FORMAT, **strings, "sha256": BLANK})
        )
    except ValueError as error:  # a name that is no text
        raise ArtifactError(f"a key of the tree cannot be the name of a tensor: {error}") from error
    return _reseal(data, BLANK, hashlib.sha256(data).hexdigest())


def _ordered(data: bytes) -> bytes:
    """Sort the header; safetensors writes its metadata in another order in every process."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(
        json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _reseal(data: bytes, old: str, new: str) -> bytes:
    """Replace the digest in the header.

    It comes first, and a quote in any other string of the header has a backslash before it.
    """
    return data.replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{new}"'.encode(), 1)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: write a temporary file, sync it to disk, then rename it.

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
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
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
