"""Decoders as llama.cpp stores them: one GGUF file with shape, weights and vocabulary."""

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress_jax.core.errors import WeightsError
from compress_jax.models._decoder.tensors import Index

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
TEXT, LIST = 8, 9
MOST = 2**24  # entries of a list, dimensions of an array: more is a damaged file


@dataclass(frozen=True)
class Entry:
    """An array of a file.

    Attributes:
      shape: rows first, as NumPy has it.
      kind: llama.cpp's number of its type.
      offset: bytes from the beginning of the data.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUF:
    """A GGUF file: what it says of itself, and its arrays, of which parts are read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read all but the arrays.

        Args:
          path: the file.

        Raises:
          WeightsError: if it is another kind of file, or damaged.
        """
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._at = 0
            self.metadata, self.entries = self._header()
        except (OSError, struct.error, ValueError, RecursionError, WeightsError) as error:
            raise WeightsError(f"cannot read {path} as GGUF: {error}") from error
        self._check()

    def _header(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        if self._bytes(4) != MAGIC:
            raise WeightsError("it does not begin with GGUF")
        version = self._scalar("<I")
        if version not in VERSIONS:
            raise WeightsError(f"its version is {version}, and {VERSIONS} are known")
        arrays, pairs = self._count(), self._count()
        metadata = {}
        for _ in range(pairs):
            name = self._text()
            metadata[name] = self._value(self._scalar("<I"))
        entries = {}
        for _ in range(arrays):
            name = self._text()
            shape = [self._scalar("<Q") for _ in range(self._scalar("<I"))]
            entries[name] = Entry(tuple(reversed(shape)), self._scalar("<I"), self._scalar("<Q"))
        step = metadata.get("general.alignment", 32)
        self._start = -(-self._at // step) * step
        return metadata, entries

    def _bytes(self, count: int) -> bytes:
        if not 0 <= count <= len(self._data) - self._at:
            raise WeightsError("it ends within its header")
        self._at += count
        return self._data[self._at - count : self._at]

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _count(self) -> int:
        count = self._scalar("<Q")
        if count > MOST:
            raise WeightsError(f"it claims {count:,} entries")
        return count

    def _text(self) -> str:
        return self._bytes(self._scalar("<Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind == TEXT:
            return self._text()
        if kind != LIST:
            raise WeightsError(f"a value has the unknown kind {kind}")
        inner = self._scalar("<I")
        count = self._count()
        if inner in SCALARS:  # at once: there are many
            form = np.dtype(SCALARS[inner])
            return np.frombuffer(self._bytes(count * form.itemsize), form).tolist()
        return [self._value(inner) for _ in range(count)]

    def _check(self) -> None:
        sizes = library().GGML_QUANT_SIZES
        for name, entry in self.entries.items():
            if entry.kind not in sizes:
                raise WeightsError(f"{self.path}: {name} has the unknown type {entry.kind}")
            block, _ = sizes[entry.kind]
            if not entry.shape or entry.shape[-1] % block:
                raise WeightsError(f"{self.path}: {name} {entry.shape} has no whole blocks")
            if entry.offset + self._nbytes(entry) > len(self._data) - self._start:
                raise WeightsError(f"{self.path}: {name} lies beyond the end of the file")

    def _nbytes(self, entry: Entry) -> int:
        block, size = library().GGML_QUANT_SIZES[entry.kind]
        return math.prod(entry.shape) // block * size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each array."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """Return a part of an array, dequantized to float32."""
        package = library()
        entry = self.entries[name]
        flat = np.frombuffer(self._data, np.uint8, self._nbytes(entry), self._start + entry.offset)
        rows = flat.reshape(*entry.shape[:-1], -1)
        inner = index[-1:] if len(entry.shape) > 1 else index
        outer = index[:-1] if len(entry.shape) > 1 else ()
        kind = package.GGMLQuantizationType(entry.kind)
        try:
            values = package.quants.dequantize(rows[outer], kind)
        except NotImplementedError as error:
            raise WeightsError(f"{self.path}: {name} has the type {kind.name}: {error}") from error
        return values[(..., *inner)]


def library() -> Any:
    """Return the gguf package.

    Raises:
      WeightsError: if it is not installed.
    """
    try:
        import gguf  # pyright: ignore[reportMissingImports]
        import gguf.quants  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise WeightsError(
            "GGUF files are read and written with the gguf package: pip install 'compress_jax[llm]'"
        ) from error
    return gguf
