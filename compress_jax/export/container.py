"""The safetensors container, read with no trust: text and tensors of a file, every number of its header looked at."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from compress_jax.core.errors import ArtifactError
from compress_jax.export.fields import extents, refuse

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip


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
        raise ArtifactError(f"its {len(data)} bytes are no safetensors file: a header would end at {end}")
    header = parsed(data[8:end], "the header")
    if not isinstance(header, dict):
        raise ArtifactError("its header is not an object of JSON")
    return header, end


def parsed(text: bytes | str, what: str) -> Any:
    """Return JSON as Python, without what no writer of ours writes: names twice, NaN, numbers that are infinite.

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
        return json.loads(text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is no JSON that can be read: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is larger than any float")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def tensors_of(data: bytes, header: dict[str, Any], start: int, seen: Callable[[int], None]) -> dict[str, np.ndarray]:
    """Return the tensors of a container; they share its memory.

    Args:
      data: the file.
      header: of `header_of`.
      start: where its tensors begin.
      seen: called with how many tensors there are.

    Returns:
      ``{name: array}``.

    Raises:
      ArtifactError: if an entry says anything that is not so.
    """
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    seen(len(entries))
    tensors, spans = {}, []
    for name, entry in entries.items():
        dtype, shape, (begin, end) = _entry(name, entry)
        size = math.prod(shape) * dtype.itemsize
        if end - begin != size or not 0 <= begin <= end <= len(data) - start:
            raise refuse(
                name, f"{dtype} of shape {list(shape)} has {size:,} bytes, and the file has {begin:,} to {end:,} for it"
            )
        spans.append((begin, end))
        flat = np.frombuffer(data, dtype, math.prod(shape), start + begin) if size else np.zeros(0, dtype)
        tensors[name] = flat.reshape(shape)
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise ArtifactError(f"its tensors overlap or leave a gap at byte {start + at:,}")
        at = end
    if start + at != len(data):
        raise ArtifactError(f"{len(data) - start - at:,} bytes at its end belong to no tensor")
    return tensors


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(name, "a tensor has a dtype, a shape and data_offsets, nothing less and nothing more")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(name, f"the dtype {dtype!r} is none that compress_jax writes")
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise refuse(name, "data_offsets are two whole numbers")
    try:
        shape = extents(entry["shape"])
    except ValueError as error:
        raise refuse(name, f"the shape is wrong: {error}") from error
    return np.dtype(DTYPES[dtype]), shape, (offsets[0], offsets[1])
