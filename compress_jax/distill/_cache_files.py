"""The files of a cache of logits: claimed once, written by one process at a time, never believed without their digests."""

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress_jax.core.errors import DataError, StateError
from compress_jax.core.record import POSITIVE, TEXT, Kind, read_record, sealed

STORED = {"bfloat16": np.uint16, "float32": np.uint32}
VERSION = 2
WIDTH = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)
_ABOUT = {
    "version": Kind(f"{VERSION}, the version that is read here", lambda value: value == VERSION),
    "teacher_sha256": TEXT,
    "data_sha256": TEXT,
    "examples": POSITIVE,
    "views": POSITIVE,
    "k": POSITIVE,
    "temperature": Kind("a number above 0", lambda value: isinstance(value, float) and 0 < value < np.inf),
    "dtype": Kind(f"one of {', '.join(STORED)}", lambda value: isinstance(value, str) and value in STORED),
    "processes": POSITIVE,
    "block": POSITIVE,
    "sha256": TEXT,
}


def block_rows(k: int, dtype: str) -> int:
    """Return how many rows share a digest: about a megabyte, as the first row read of a block reads all of it."""
    return max(1, min(1024, 2**20 // (k * (4 + np.dtype(STORED[dtype]).itemsize) + 4)))


def read_about(directory: Path) -> dict[str, Any] | None:
    """Return what ``cache.json`` says, or None if there is none; refuse a damaged one, or one of another version."""
    if not os.path.lexists(directory / "cache.json"):
        return None
    return read_record(directory / "cache.json", _ABOUT, "remove the directory and write the cache again", DataError)


def claim(directory: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Say what a directory is, or see that it is that; return what it says, its digest too."""
    about = {"version": VERSION, **about}
    with _writable(directory), (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one job come here together; each holds it for a moment
        if (found := read_about(directory)) is None:
            own = directory / ".cache.json.new"
            own.write_bytes(sealed(about))
            own.replace(directory / "cache.json")
            found = read_about(directory) or {}
    pairs = [(name, found.get(name), now) for name, now in about.items() if found.get(name) != now]
    if pairs:
        differs = ", ".join(f"{name}: {there} there, {now} now" for name, there, now in pairs)
        raise StateError(f"{directory} holds another cache ({differs}); use a new directory, or remove it")
    return found


@contextlib.contextmanager
def writing(directory: Path, process: int, processes: int) -> Iterator[None]:
    """Keep other writers of the same part out; the lock of a killed process is gone with it."""
    with _writable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / f".lock-{process:05d}-of-{processes:05d}").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateError(
                f"another process is writing part {process} of {processes} of the cache in {directory}; wait for it, or "
                "give each process its own process_index"
            ) from error
        yield


@dataclass(frozen=True, eq=False)
class Shard:
    """What one process wrote.

    Attributes:
      directory: of the cache.
      about: what ``cache.json`` says.
      process: whose part this is.
      arrays: ``ids``, ``log_probs`` and ``tail``, memory-mapped.
      digests: uint8 ``[blocks, views, 32]``, memory-mapped.
      known: which blocks were seen to be right, ``[blocks, views]``.
    """

    directory: Path
    about: dict[str, Any]
    process: int
    arrays: tuple[np.memmap, np.memmap, np.memmap]
    digests: np.memmap
    known: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Know nothing."""
        object.__setattr__(self, "known", np.zeros(self.digests.shape[:2], bool))

    @classmethod
    def for_reading(cls, directory: Path, about: dict[str, Any], process: int) -> "Shard":
        """Open the files of a process; a missing or damaged one is refused."""
        *arrays, digests = (_opened(*file) for file in _files(directory, about, process))
        return cls(directory, about, process, tuple(arrays), digests)  # pyright: ignore[reportArgumentType]

    @classmethod
    def for_writing(cls, directory: Path, about: dict[str, Any], process: int) -> "Shard":
        """Open the files of a process, made where there are none; a damaged one is brought into shape, with a warning."""
        with _writable(directory):
            *arrays, digests = (_made(*file) for file in _files(directory, about, process))
        return cls(directory, about, process, tuple(arrays), digests)  # pyright: ignore[reportArgumentType]

    def require(self, rows: np.ndarray, views: np.ndarray) -> None:
        """See that rows were written and are undamaged; each block is read and verified the first time it is asked for."""
        blocks = rows // self.about["block"]
        for block, view in sorted(set(zip(blocks.tolist(), views.tolist(), strict=True))):
            state = self._state(block, view)
            if state == "right":
                continue
            row = rows[(blocks == block) & (views == view)][0]
            example = int(row) * self.about["processes"] + self.process
            if state == "missing":
                raise DataError(f"the cache lacks example {example}, view {view}: go on with write_cache")
            raise DataError(
                f"the cache in {self.directory} is damaged at example {example}, view {view}: what is stored differs from "
                "what was written; write_cache writes it again"
            )

    def missing(self, view: int) -> np.ndarray:
        """Return the rows of a view that are not there or are damaged; the latter are logged as a warning."""
        states = [self._state(block, view) for block in range(len(self.digests))]
        if damaged := states.count("damaged"):
            _log.warning(
                "%d of %d blocks of view %d of process %d in %s differ from what was written; they are written again",
                damaged, len(states), view, self.process, self.directory,
            )  # fmt: skip
        wrong = np.repeat([state != "right" for state in states], self.about["block"])
        return np.flatnonzero(wrong[: len(self.arrays[0])])

    def write(self, rows: np.ndarray, view: int, values: tuple[Any, Any, Any], following: int | None) -> None:
        """Store values of rows, and the digests of blocks that are whole by now: all but the ``following`` row's."""
        for array, own in zip(self.arrays, values, strict=True):
            array[rows, view] = own
        blocks = np.unique(rows // self.about["block"])
        if following is not None:
            blocks = blocks[blocks != following // self.about["block"]]
        if len(blocks):
            self._flush(self.arrays)  # before the digests that vouch for them
            for block in blocks:
                self.digests[block, view] = np.frombuffer(self._digest(block, view), np.uint8)
            self._flush((self.digests,))

    def _flush(self, arrays: tuple[np.memmap, ...]) -> None:
        with _writable(self.directory):
            for array in arrays:
                array.flush()

    def _state(self, block: int, view: int) -> str:
        """Return ``"right"``, ``"missing"`` or ``"damaged"``; a digest that a writer is storing at this moment counts."""
        if self.known[block, view]:
            return "right"
        while True:
            stored = self.digests[block, view].tobytes()
            if stored == bytes(WIDTH):
                return "missing"
            if stored == self._digest(block, view):
                self.known[block, view] = True
                return "right"
            if stored == self.digests[block, view].tobytes():
                return "damaged"

    def _digest(self, block: int, view: int) -> bytes:
        """Return the digest of a block: of what the cache is, where the block is in it, and its numbers."""
        rows = slice(block * self.about["block"], (block + 1) * self.about["block"])
        digest = hashlib.sha256(f"{self.about['sha256']} {self.process} {block} {view}".encode())
        for array in self.arrays:
            digest.update(np.ascontiguousarray(array[rows, view]).data)
        return digest.digest()


def _files(directory: Path, about: dict[str, Any], process: int) -> list[tuple[Path, np.dtype, tuple[int, ...]]]:
    """Return path, dtype and shape of each file of a process."""
    rows = len(range(process, about["examples"], about["processes"]))
    narrow = (rows, about["views"])
    kinds = {"ids": ("<i4", (*narrow, about["k"])), "log_probs": (STORED[about["dtype"]], (*narrow, about["k"]))}
    kinds |= {"tail": ("<f4", narrow), "digests": ("u1", (-(-rows // about["block"]), about["views"], WIDTH))}
    end = f"{process:05d}-of-{about['processes']:05d}.npy"
    return [(directory / f"{name}-{end}", np.dtype(dtype), shape) for name, (dtype, shape) in kinds.items()]


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Return the first bytes of a file in NumPy's format."""
    file = io.BytesIO()
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def _wrong(path: Path, header: bytes, size: int) -> str | None:
    """Return what is wrong with a file that is there, as its size and its first bytes tell."""
    if not path.is_file():
        return "it is not a file"
    if path.stat().st_size != size:
        return f"it has {path.stat().st_size:,} bytes, not {size:,}"
    with path.open("rb") as file:
        return None if file.read(len(header)) == header else "it begins otherwise than it was written"


def _opened(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Map a file for reading."""
    header = _header(dtype, shape)
    if not os.path.lexists(path):
        process, processes = path.stem.rsplit("-", 3)[-3::2]
        raise DataError(f"{path} is missing: process {int(process)} of {int(processes)} has not written its part")
    try:
        wrong = _wrong(path, header, len(header) + int(np.prod(shape)) * dtype.itemsize)
        if wrong is None:
            return _mapped(path, dtype, shape, "r", len(header))
    except OSError as error:
        wrong = f"it cannot be read ({error.strerror})"
    raise DataError(f"{path} is damaged: {wrong}; write_cache writes again what is lost")


def _made(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Map a file for writing, made if there is none; its size and first bytes are put right, digests tell what was lost."""
    header = _header(dtype, shape)
    size = len(header) + int(np.prod(shape)) * dtype.itemsize
    if os.path.lexists(path) and (wrong := _wrong(path, header, size)) is not None:
        if not path.is_file():
            raise DataError(f"{path} is damaged: {wrong}; remove it, and write_cache writes it again")
        _log.warning("%s is damaged: %s; what is lost is written again", path, wrong)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(size)
        if hasattr(os, "posix_fallocate"):  # a full disk is found now, not when a page of the map cannot be stored
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        file.write(header)
    return _mapped(path, dtype, shape, "r+", len(header))


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], mode: Any, offset: int) -> Any:
    if 0 in shape:  # of a process without examples; an empty map is an error
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, mode, offset, shape)


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one sentence."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise DataError(f"cannot write the cache in {directory}: {why}; what was written stays, go on later") from error
