"""The files of numbers that one process writes for a cache of teacher logits; see `cache`."""

import contextlib
import errno
import hashlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress_jax.core.errors import DataError
from compress_jax.core.types import Array, JsonObject, Shape

STORED = {"bfloat16": np.uint16, "float32": np.uint32}
DIGEST_BYTES = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Raise a DataError of one sentence where the disk is full or not writable."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "the disk is full"
        raise DataError(
            f"cannot write the cache in {directory}: {why}; what was written stays, go on later"
        ) from error


@dataclass(frozen=True, eq=False)
class Shard:
    """The rows that one process wrote.

    Attributes:
      directory: directory of the cache.
      metadata: the contents of ``cache.json``.
      process: index of the process that owns this part.
      arrays: ``ids``, ``log_probs`` and ``tail``, memory-mapped.
      digests: uint8 ``[blocks, views, 32]``, memory-mapped.
      verified: which blocks were read and found right, ``[blocks, views]``.
    """

    directory: Path
    metadata: JsonObject
    process: int
    arrays: tuple[np.memmap, np.memmap, np.memmap]
    digests: np.memmap
    verified: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Mark every block as not verified."""
        object.__setattr__(self, "verified", np.zeros(self.digests.shape[:2], bool))

    @classmethod
    def for_reading(cls, directory: Path, metadata: JsonObject, process: int) -> "Shard":
        """Open the files of a process; a missing or damaged one is refused."""
        ids, log_probs, tail, digests = (
            _open_map(*file) for file in _files(directory, metadata, process)
        )
        return cls(directory, metadata, process, (ids, log_probs, tail), digests)

    @classmethod
    def for_writing(cls, directory: Path, metadata: JsonObject, process: int) -> "Shard":
        """Open the files of a process; make missing ones, repair the size of damaged ones."""
        with disk_errors(directory):
            ids, log_probs, tail, digests = (
                _create_map(*file) for file in _files(directory, metadata, process)
            )
        return cls(directory, metadata, process, (ids, log_probs, tail), digests)

    def require(self, rows: np.ndarray, views: np.ndarray) -> None:
        """Raise unless rows were written and are undamaged; verify their blocks at first use."""
        blocks = rows // self.metadata["block"]
        for block, view in sorted(set(zip(blocks.tolist(), views.tolist(), strict=True))):
            state = self._state(block, view)
            if state == "right":
                continue
            row = rows[(blocks == block) & (views == view)][0]
            example = int(row) * self.metadata["processes"] + self.process
            if state == "missing":
                raise DataError(
                    f"the cache lacks example {example}, view {view}: go on with write_cache"
                )
            raise DataError(
                f"the cache in {self.directory} is damaged at example {example}, view {view}: "
                "what is stored differs from what was written; write_cache writes it again"
            )

    def missing(self, view: int) -> np.ndarray:
        """Return the rows of a view that are missing or damaged; warn of damaged blocks."""
        states = [self._state(block, view) for block in range(len(self.digests))]
        damaged = states.count("damaged")
        if damaged:
            _log.warning(
                "%d of %d blocks of view %d of process %d in %s differ from what was written; "
                "they are written again",
                damaged, len(states), view, self.process, self.directory,
            )  # fmt: skip
        wrong = np.repeat([state != "right" for state in states], self.metadata["block"])
        return np.flatnonzero(wrong[: len(self.arrays[0])])

    def write(
        self, rows: np.ndarray, view: int, values: tuple[Array, Array, Array], following: int | None
    ) -> None:
        """Store the values of rows, and the digests of blocks that are complete.

        Args:
          rows: row numbers, ascending.
          view: the view.
          values: ids, log-probabilities and tails of these rows.
          following: the row that will be written next, whose block is not complete; None after the
            last.
        """
        for array, own in zip(self.arrays, values, strict=True):
            array[rows, view] = own
        blocks = np.unique(rows // self.metadata["block"])
        # A digest is of a whole block, which the next batch may still be filling.
        if following is not None:
            blocks = blocks[blocks != following // self.metadata["block"]]
        if len(blocks):
            # Numbers reach the disk before the digests that vouch for them.
            self._flush(*self.arrays)
            for block in blocks:
                self.digests[block, view] = np.frombuffer(self._digest(block, view), np.uint8)
            self._flush(self.digests)

    def _flush(self, *arrays: np.memmap) -> None:
        with disk_errors(self.directory):
            for array in arrays:
                array.flush()

    def _state(self, block: int, view: int) -> Literal["right", "missing", "damaged"]:
        """Compare a block with its digest."""
        if self.verified[block, view]:
            return "right"
        while True:
            stored = self.digests[block, view].tobytes()
            if stored == bytes(DIGEST_BYTES):  # zeros, as the file was made
                return "missing"
            if stored == self._digest(block, view):
                self.verified[block, view] = True
                return "right"
            # A writer may have changed the block meanwhile: only an unchanged digest is a verdict.
            if stored == self.digests[block, view].tobytes():
                return "damaged"

    def _digest(self, block: int, view: int) -> bytes:
        """Return the digest of the cache's identity, the block's place and its numbers."""
        start = block * self.metadata["block"]
        rows = slice(start, start + self.metadata["block"])
        # The identity and the place too, so that a block cannot stand in for another one.
        place = f"{self.metadata['sha256']} {self.process} {block} {view}"
        digest = hashlib.sha256(place.encode())
        for array in self.arrays:
            digest.update(np.ascontiguousarray(array[rows, view]).data)
        return digest.digest()


# Files of numbers.


def _files(
    directory: Path, metadata: JsonObject, process: int
) -> list[tuple[Path, np.dtype, tuple[int, ...]]]:
    """Return path, dtype and shape of each file of a process."""
    rows = len(range(process, metadata["examples"], metadata["processes"]))
    blocks = -(-rows // metadata["block"])  # rounded up
    views = metadata["views"]
    k = metadata["k"]
    contents = {
        "ids": ("<i4", (rows, views, k)),
        "log_probs": (STORED[metadata["dtype"]], (rows, views, k)),
        "tail": ("<f4", (rows, views)),
        "digests": ("u1", (blocks, views, DIGEST_BYTES)),
    }
    end = f"{process:05d}-of-{metadata['processes']:05d}.npy"
    return [
        (directory / f"{name}-{end}", np.dtype(dtype), shape)
        for name, (dtype, shape) in contents.items()
    ]


def _header(dtype: np.dtype, shape: Shape) -> bytes:
    """Return the first bytes of a file in NumPy's format."""
    file = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


def _file_bytes(header: bytes, dtype: np.dtype, shape: Shape) -> int:
    return len(header) + int(np.prod(shape)) * dtype.itemsize


def _damage(path: Path, header: bytes, size: int) -> str | None:
    """Return what is wrong with the kind, the size or the first bytes of a file, or None."""
    if not path.is_file():
        return "it is not a file"
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size:,} bytes, not {size:,}"
    with path.open("rb") as file:
        start = file.read(len(header))
    return None if start == header else "its header is another"


def _open_map(path: Path, dtype: np.dtype, shape: Shape) -> np.memmap:
    """Map a file for reading."""
    header = _header(dtype, shape)
    if not os.path.lexists(path):
        # From the name ids-00001-of-00004: the first and the last number.
        process, processes = path.stem.rsplit("-", 3)[-3::2]
        raise DataError(
            f"{path} is missing: process {int(process)} of {int(processes)} has not written its "
            "part"
        )
    try:
        wrong = _damage(path, header, _file_bytes(header, dtype, shape))
        if wrong is None:
            return _map(path, dtype, shape, "r", len(header))
    except OSError as error:
        wrong = f"it cannot be read ({error.strerror})"
    raise DataError(f"{path} is damaged: {wrong}; write_cache writes again what is lost")


def _create_map(path: Path, dtype: np.dtype, shape: Shape) -> np.memmap:
    """Map a file for writing, with the right size and header; digests show what was lost."""
    header = _header(dtype, shape)
    size = _file_bytes(header, dtype, shape)
    wrong = _damage(path, header, size) if os.path.lexists(path) else None
    if wrong is not None:
        if not path.is_file():
            raise DataError(
                f"{path} is damaged: {wrong}; remove it, and write_cache writes it again"
            )
        _log.warning("%s is damaged: %s; what is lost is written again", path, wrong)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(size)
        # Find a full disk now: a page of the map that cannot be stored kills the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        file.write(header)
    return _map(path, dtype, shape, "r+", len(header))


def _map(path: Path, dtype: np.dtype, shape: Shape, mode: Literal["r", "r+"], offset: int) -> Any:
    if 0 in shape:  # a process without examples; NumPy refuses an empty map
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, mode, offset, shape)
