"""What any file consists of: the safetensors container, and JSON, both read with suspicion.

The container's header and tensors are written in one order; JSON is written without NaN, and read
without what `save` never writes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection

import numpy as np
import safetensors.numpy

from compress_jax.core.errors import ArgumentError, ArtifactError
from compress_jax.core.types import JsonObject
from compress_jax.export._artifact.fields import extents, refuse
from compress_jax.export._artifact.limits import Limits
from compress_jax.export._artifact.structure import Tensors
from compress_jax.export._artifact.validation import shallow

FORMAT = "compress_jax"
COMPACT = 3  # version of a file of one row
ADAPTIVE = 4  # and of one with adaptively coded tensors
VERSION = ADAPTIVE  # the newest that this package reads
BLANK = "0" * 64  # in place of the digest while the digest is computed
DIGEST = 16  # bytes of the SHA-256 behind a row: damage by chance is not found at one of 2**128
ROW = "model"  # the only tensor of a file of version 3 or 4
# The strings that a header must have, by version.
STRINGS = {
    "1": {"format", "version", "sha256", "content"},
    "2": {"format", "version", "sha256"},
    "3": {"format", "version"},
    "4": {"format", "version"},
}
# Safetensors' names of NumPy's dtypes; all others are stored as uint8, see `structure`.
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


def header_of(data: bytes) -> tuple[JsonObject, int]:
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
    # A container: the header's length in 8 bytes, the header, the tensors.
    end = 8 + int.from_bytes(data[:8], "little")
    if not 8 < end <= len(data):
        raise ArtifactError(
            f"its {len(data)} bytes are no safetensors file: a header would end at {end}"
        )
    header = parsed(data[8:end], "the header")
    if not isinstance(header, dict):
        raise ArtifactError("its header is not an object of JSON")
    return header, end


def tensors_of(
    data: bytes, header: JsonObject, start: int, check_count: Callable[[int], None]
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
        # Python's integers do not overflow, however large the shape claims to be.
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


def _entry(name: str, entry: object) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(
            name, "a tensor has a dtype, a shape and data_offsets, nothing less and nothing more"
        )
    dtype = entry["dtype"]
    offsets = entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(name, f"the dtype {dtype!r} is none that compress_jax writes")
    # type, not isinstance: true and false are integers to Python.
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise refuse(name, "data_offsets are two whole numbers")
    try:
        shape = extents(entry["shape"])
    except ValueError as error:
        raise refuse(name, f"the shape is wrong: {error}") from error
    return np.dtype(DTYPES[dtype]), shape, (offsets[0], offsets[1])


def version_of(data: bytes, header: JsonObject) -> int:
    """Check the strings and the digest of a container, and return its version.

    Args:
      data: the file.
      header: of `header_of`.

    Returns:
      1 to `VERSION`.

    Raises:
      ArtifactError: if this package did not write the file, or a later one did, or it is damaged.

    Example:
      >>> file = rowed(b"bytes")
      >>> version_of(file, header_of(file)[0])
      3
    """
    strings = header.get("__metadata__", {})
    if not isinstance(strings, dict) or strings.get("format") != FORMAT:
        raise ArtifactError(
            "it is a safetensors file, but not one that compress_jax wrote; load it with "
            "safetensors"
        )
    # A newer version may have other strings, so this comes before they are checked.
    number = strings.get("version")
    if isinstance(number, str) and number.isdecimal() and int(number) > VERSION:
        raise ArtifactError(
            f"it has format version {number}, and this version of compress_jax reads up to "
            f"{VERSION}; upgrade compress_jax"
        )
    number = number if isinstance(number, str) else ""
    known = STRINGS.get(number)
    if strings.keys() != known or set(map(type, strings.values())) != {str}:
        needed = ", ".join(sorted(known or STRINGS["1"]))
        raise ArtifactError(
            f"it is damaged: its header must have the strings {needed}, and a known version"
        )
    if not _is_whole(data, strings):
        raise ArtifactError(
            "it is truncated or damaged: its checksum does not match. Copy or write it again"
        )
    return int(number)


def _is_whole(data: bytes, strings: dict[str, str]) -> bool:
    """Return whether the digest in a file is that of the file."""
    if "sha256" not in strings:
        return data[-DIGEST:] == _digest(memoryview(data)[:-DIGEST])
    digest = strings["sha256"]
    return hashlib.sha256(_reseal(data, digest, BLANK)).hexdigest() == digest


def named(tensors: Tensors, strings: dict[str, str]) -> bytes:
    """Return a file of tensors by name, with strings and a digest in its header.

    Args:
      tensors: by name.
      strings: beside the format and the digest.

    Returns:
      The whole file.

    Raises:
      ArtifactError: if a name is no text.

    Example:
      >>> file = named({"x": np.zeros(2)}, {"version": "2"})
      >>> version_of(file, header_of(file)[0])
      2
    """
    # The digest is that of the file with zeros in its place, which are replaced at the end.
    try:
        data = _ordered(
            safetensors.numpy.save(tensors, {"format": FORMAT, **strings, "sha256": BLANK})
        )
    except ValueError as error:
        raise ArtifactError(f"a key of the tree cannot be the name of a tensor: {error}") from error
    return _reseal(data, BLANK, hashlib.sha256(data).hexdigest())


def rowed(row: bytes, version: int = COMPACT) -> bytes:
    """Return a file of one tensor, `ROW`: some bytes, and the digest of all before it behind them.

    The header has no padding, as nothing in the row needs to be aligned.

    Args:
      row: the bytes.
      version: 3, or 4 if it has adaptively coded tensors.

    Returns:
      The whole file.

    Example:
      >>> len(rowed(bytes(1000))) - 1000
      142
    """
    size = len(row) + DIGEST
    header = {
        "__metadata__": {"format": FORMAT, "version": str(version)},
        ROW: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    data = len(text).to_bytes(8, "little") + text + row
    return data + _digest(data)


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST]


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


# The JSON inside a file.


def as_json(content: JsonObject) -> str:
    """Return JSON without spaces, in ASCII.

    Args:
      content: a structure and metadata.

    Returns:
      Its text.

    Raises:
      ArtifactError: if JSON cannot hold it.

    Example:
      >>> as_json({"metadata": {"a": [1, None]}})
      '{"metadata":{"a":[1,null]}}'
    """
    try:
        return json.dumps(content, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"the metadata, or a key of the tree, cannot be written as JSON: {error}"
        ) from error


def content_of(
    text: bytes | str, limits: Limits, needed: Collection[str] = (), optional: Collection[str] = ()
) -> JsonObject:
    """Return the content of a file: a tree, metadata that are not too deep, and nothing unknown.

    Args:
      text: JSON.
      limits: with the depth.
      needed: which entries it must have besides.
      optional: which ones it may have.

    Returns:
      The parsed content.

    Raises:
      ArtifactError: if it is no JSON, or has other entries.

    Example:
      >>> content_of('{"tree":null,"metadata":{}}', Limits())
      {'tree': None, 'metadata': {}}
    """
    content = parsed(text, "its content")
    wanted = {"tree", "metadata", *needed}
    if not isinstance(content, dict) or content.keys() - optional != wanted:
        raise ArtifactError(f"its content must have {', '.join(sorted(wanted))}, and nothing else")
    shallow(content["metadata"], limits)
    return content


def parsed(text: bytes | str, what: str) -> object:
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
    # ValueError is also that of bytes that are not UTF-8, and of what the hooks below refuse.
    try:
        text = text if isinstance(text, str) else text.decode()
        return json.loads(
            text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_constant
        )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is no JSON that can be read: {error}") from error


def _once(pairs: list[tuple[str, object]]) -> JsonObject:
    # Parsers disagree which of two entries of one name counts, so there must be one.
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
