"""A teacher's logits on disk, by example and by view: computed once, read without loading, refused when they do not belong.

A directory: ``cache.json`` says what it is, and each process of P that wrote it has four files of
numbers (NumPy's format, memory-mapped, never pickle) with its examples p, p + P, p + 2 P ...:
``ids`` int32 ``[rows, views, k]``, ``log_probs`` bfloat16 (or float32), stored as integers of that
size, ``tail`` float32 ``[rows, views]``, and ``digests`` uint8 ``[blocks, views, 32]``: the sha256
of each block of rows in a view, zeros where it was not written yet. Nothing is given out before its
block's digest was seen to be right.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    NonFiniteError,
    StateError,
)
from compress_jax.core.record import POSITIVE, TEXT, Kind, read_record, sealed
from compress_jax.core.types import Batch
from compress_jax.distill._teachers.teacher import Teacher
from compress_jax.distill._teachers.top_k import TopK, top_k

# The files of a cache of logits: claimed once, written by one process at a time, never believed
# without their digests.


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
    "temperature": Kind(
        "a number above 0", lambda value: isinstance(value, float) and 0 < value < np.inf
    ),
    "dtype": Kind(
        f"one of {', '.join(STORED)}", lambda value: isinstance(value, str) and value in STORED
    ),
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
    return read_record(
        directory / "cache.json",
        _ABOUT,
        "remove the directory and write the cache again",
        DataError,
    )


def claim(directory: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Say what a directory is, or see that it is that; return what it says, its digest too."""
    about = {"version": VERSION, **about}
    with _writable(directory), (directory / ".lock").open("w") as lock:
        fcntl.flock(
            lock, fcntl.LOCK_EX
        )  # processes of one job come here together; each holds it for a moment
        if (found := read_about(directory)) is None:
            own = directory / ".cache.json.new"
            own.write_bytes(sealed(about))
            own.replace(directory / "cache.json")
            found = read_about(directory) or {}
    pairs = [(name, found.get(name), now) for name, now in about.items() if found.get(name) != now]
    if pairs:
        differs = ", ".join(f"{name}: {there} there, {now} now" for name, there, now in pairs)
        raise StateError(
            f"{directory} holds another cache ({differs}); use a new directory, or remove it"
        )
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
                f"another process is writing part {process} of {processes} of the cache in "
                f"{directory}; wait for it, or "
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
                raise DataError(
                    f"the cache lacks example {example}, view {view}: go on with write_cache"
                )
            raise DataError(
                f"the cache in {self.directory} is damaged at example {example}, view {view}: "
                "what is stored differs from "
                "what was written; write_cache writes it again"
            )

    def missing(self, view: int) -> np.ndarray:
        """Return the rows of a view that are not there or are damaged; the latter are logged as a warning."""
        states = [self._state(block, view) for block in range(len(self.digests))]
        if damaged := states.count("damaged"):
            _log.warning(
                "%d of %d blocks of view %d of process %d in %s differ from what was written; "
                "they are written again",
                damaged, len(states), view, self.process, self.directory,
            )  # fmt: skip
        wrong = np.repeat([state != "right" for state in states], self.about["block"])
        return np.flatnonzero(wrong[: len(self.arrays[0])])

    def write(
        self, rows: np.ndarray, view: int, values: tuple[Any, Any, Any], following: int | None
    ) -> None:
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


def _files(
    directory: Path, about: dict[str, Any], process: int
) -> list[tuple[Path, np.dtype, tuple[int, ...]]]:
    """Return path, dtype and shape of each file of a process."""
    rows = len(range(process, about["examples"], about["processes"]))
    narrow = (rows, about["views"])
    kinds = {
        "ids": ("<i4", (*narrow, about["k"])),
        "log_probs": (STORED[about["dtype"]], (*narrow, about["k"])),
    }
    kinds |= {
        "tail": ("<f4", narrow),
        "digests": ("u1", (-(-rows // about["block"]), about["views"], WIDTH)),
    }
    end = f"{process:05d}-of-{about['processes']:05d}.npy"
    return [
        (directory / f"{name}-{end}", np.dtype(dtype), shape)
        for name, (dtype, shape) in kinds.items()
    ]


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
        return (
            None if file.read(len(header)) == header else "it begins otherwise than it was written"
        )


def _opened(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """Map a file for reading."""
    header = _header(dtype, shape)
    if not os.path.lexists(path):
        process, processes = path.stem.rsplit("-", 3)[-3::2]
        raise DataError(
            f"{path} is missing: process {int(process)} of {int(processes)} has not written its "
            "part"
        )
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
            raise DataError(
                f"{path} is damaged: {wrong}; remove it, and write_cache writes it again"
            )
        _log.warning("%s is damaged: %s; what is lost is written again", path, wrong)
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(size)
        if hasattr(
            os, "posix_fallocate"
        ):  # a full disk is found now, not when a page of the map cannot be stored
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
        why = (
            "the disk is full"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else error.strerror or str(error)
        )
        raise DataError(
            f"cannot write the cache in {directory}: {why}; what was written stays, go on later"
        ) from error


Augment = Callable[[Any, Any], Any]


def by_example(
    augment: Augment, seed: int, *, index: str = "index", view: str = "view", inputs: str = "image"
) -> Augment:
    """Return an augmentation that is a function of the example's number and of a view's number, and of nothing else.

    A cache by example alone gives the logits of another crop than the student sees; with this one
    the crop of (example, view) is the same whenever and in whatever batch it comes, so that its
    logits are its own.

    Args:
      augment: ``(key, image) -> image`` of one example; of a whole batch of one,
        ``lambda key, x: f(key, x[None])[0]``.
      seed: of all views.
      index: the batch's entry with the examples' numbers.
      view: the batch's entry with the views' numbers, 0 or more.
      inputs: the batch's entry that is augmented.

    Returns:
      ``(key, batch) -> batch``; the key is not used.

    Example:
      >>> crop = by_example(lambda key, x: x * jax.random.uniform(key), seed=0)
      >>> batch = {"image": jnp.ones((2, 1)), "index": jnp.array([3, 7]), "view": jnp.array([0, 1])}
      >>> last = {name: x[1:] for name, x in batch.items()}
      >>> bool(crop(None, batch)["image"][1] == crop(None, last)["image"][0])
      True
    """

    def one(index: jax.Array, view: jax.Array, x: jax.Array) -> jax.Array:
        return augment(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), view), x)

    return lambda key, batch: {
        **batch,
        inputs: jax.vmap(one)(batch[index], batch[view], batch[inputs]),
    }


@dataclass(frozen=True, eq=False)
class Cache:
    """Logits on disk; see `write_cache` and `open_cache`.

    Attributes:
      about: what ``cache.json`` says.
      shards: what each process wrote.
    """

    about: dict[str, Any]
    shards: list[Shard]

    def __call__(self, index: Any, view: Any) -> TopK:
        """Return what the teacher said of some examples, each in a view of it.

        Args:
          index: integers ``[batch]``.
          view: integers ``[batch]``.

        Returns:
          A `TopK` of NumPy arrays ``[batch, k]``.

        Raises:
          DataError: if one of them is out of range, was never written, or is damaged; it names the
            first.
        """
        index, view = np.asarray(index), np.asarray(view)
        for name, at in (("index", index), ("view", view)):
            most = self.about["examples" if name == "index" else "views"]
            if at.min(initial=0) < 0 or at.max(initial=0) >= most:
                raise DataError(
                    f"the cache holds {name} 0 to {most - 1}, and was asked for {at.min()} to "
                    f"{at.max()}"
                )
        shape = (len(index), self.about["k"])
        found = (
            np.empty(shape, np.int32),
            np.empty(shape, STORED[self.about["dtype"]]),
            np.empty(len(index), np.float32),
        )
        for process, shard in enumerate(self.shards):
            mine = index % len(self.shards) == process
            rows = index[mine] // len(self.shards)
            shard.require(rows, view[mine])
            for array, stored in zip(found, shard.arrays, strict=True):
                array[mine] = stored[rows, view[mine]]
        ids, log_probs, tail = found
        arrays: Any = {
            "ids": ids,
            "log_probs": log_probs.view(jnp.dtype(self.about["dtype"])),
            "tail": tail,
        }
        return TopK(**arrays, temperature=self.about["temperature"])


def write_cache(
    directory: str | os.PathLike[str],
    teacher: Callable[[Any], jax.Array],
    split: Mapping[str, Any],
    *,
    teacher_sha256: str,
    data_sha256: str,
    k: int,
    views: int = 1,
    augment: Augment | None = None,
    temperature: float = 1.0,
    dtype: str = "bfloat16",
    batch_size: int = 256,
    inputs: str = "image",
    process_index: int | None = None,
    process_count: int | None = None,
) -> None:
    """Write a teacher's top-k logits of every example in every view. Started again, it goes on where it was.

    What is there already is read and held against its digests first; what is missing is computed,
    and what is damaged is logged as a warning and computed again. One process at a time writes a
    part.

    Args:
      directory: of the cache, shared by all processes; made if missing.
      teacher: ``inputs -> logits``, a `Teacher`.
      split: arrays ``[examples, ...]``; an example's number is its row.
      teacher_sha256: who it is: ``hexadecimal(fingerprint(teacher))``.
      data_sha256: what the data are: ``data.fingerprint``.
      k: classes kept of each; all of them make the cache exact but for ``dtype``.
      views: augmented views of each example.
      augment: from `by_example`; the training must use the same. None for the examples as they are.
      temperature: of the probabilities, see `TopK`.
      dtype: of the log-probabilities, ``"bfloat16"`` (relative error at most 2**-8 of each) or
        ``"float32"``.
      batch_size: examples at once.
      inputs: the split's entry that is given to the teacher.
      process_index: which process this is; None asks JAX.
      process_count: how many share the examples; None asks JAX.

    Raises:
      ConfigError: if ``dtype`` is none of these.
      ArgumentError: if a number is out of range.
      StateError: if the directory holds another cache (it says what differs), or another process is
        writing this part.
      DataError: if ``cache.json`` is damaged, or the disk is full or not writable; what was written
        stays.
      NonFiniteError: if a logit is NaN or infinite; it names the example.

    Example:
      >>> import tempfile
      >>> folder, split = tempfile.mkdtemp(), {"image": np.eye(3, dtype=np.float32)}
      >>> write_cache(folder, lambda x: 2.0 * x, split, teacher_sha256="me", data_sha256="eye", k=2)
      >>> open_cache(folder, teacher_sha256="me", data_sha256="eye")([2], [0]).ids.tolist()
      [[2, 0]]
    """
    if dtype not in STORED:
        raise ConfigError(f"log-probabilities are stored as {sorted(STORED)}, not as {dtype!r}")
    mine = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    size = len(split[inputs])
    _require_counts(examples=size, views=views, k=k, batch_size=batch_size, process_count=count)
    if not 0 <= mine < count:
        raise ArgumentError(
            f"process_index must be 0 to {count - 1}, as process_count is {count}; got {mine}"
        )
    about = {
        "teacher_sha256": teacher_sha256,
        "data_sha256": data_sha256,
        "examples": size,
        "views": views,
        "k": k,
    }
    about |= {
        "temperature": float(temperature),
        "dtype": dtype,
        "processes": count,
        "block": block_rows(k, dtype),
    }
    rows = np.arange(mine, size, count)

    @jax.jit
    def see(teacher: Any, batch: Batch) -> TopK:
        return top_k(teacher((augment(None, batch) if augment else batch)[inputs]), k, temperature)

    asked = (
        teacher if isinstance(teacher, Teacher) else jax.tree_util.Partial(teacher)
    )  # arguments, not constants

    def ask(at: np.ndarray, view: int) -> TopK:
        padded = rows[np.resize(at, batch_size)]  # one shape, one program
        batch = {inputs: split[inputs][padded], "index": padded, "view": np.full(batch_size, view)}
        top = jax.tree.map(lambda x: x[: len(at)], jax.device_get(see(asked, batch)))
        if (bad := ~np.isfinite(top.tail)).any():
            raise NonFiniteError(
                f"the teacher's logits of example {rows[at[bad][0]]}, view {view} are not finite"
            )
        return top

    with writing(Path(directory), mine, count):
        shard = Shard.for_writing(Path(directory), claim(Path(directory), about), mine)
        for view in range(views):
            missing = shard.missing(view)
            for start in range(0, len(missing), batch_size):
                at, later = missing[start : start + batch_size], missing[start + batch_size :]
                top = ask(at, view)
                log_probs = top.log_probs.astype(jnp.dtype(dtype)).view(STORED[dtype])
                shard.write(
                    at, view, (top.ids, log_probs, top.tail), int(later[0]) if len(later) else None
                )


def open_cache(
    directory: str | os.PathLike[str], *, teacher_sha256: str, data_sha256: str
) -> Cache:
    """Open a cache that belongs to a teacher and to data.

    Args:
      directory: of the cache.
      teacher_sha256: the teacher's, as it is now.
      data_sha256: the data's.

    Returns:
      A `Cache`, on which nothing is read before it is asked for.

    Raises:
      DataError: if there is none, it is damaged, or a process's part is missing.
      StateError: if it is another teacher's, or of other data; it names both hashes.

    Example:
      >>> open_cache("/nowhere", teacher_sha256="me", data_sha256="eye")
      Traceback (most recent call last):
      compress_jax.core.errors.DataError: no cache of logits in /nowhere: write_cache makes one
    """
    about = read_about(Path(directory))
    if about is None:
        raise DataError(f"no cache of logits in {directory}: write_cache makes one")
    for name, now in (("teacher_sha256", teacher_sha256), ("data_sha256", data_sha256)):
        if about[name] != now:
            raise StateError(
                f"the cache in {directory} is of another {name.split('_')[0]}: {name} "
                f"{about[name][:16]}, now {now[:16]}; "
                "write one in a new directory"
            )
    return Cache(
        about, [Shard.for_reading(Path(directory), about, p) for p in range(about["processes"])]
    )


@dataclass(frozen=True, eq=False)
class CachedFeed:
    """Batches with the teacher's logits beside them: ``feed[step]`` gets ``"view"`` and ``"teacher"``, a `TopK`.

    Attributes:
      feed: batches by step, with the examples' numbers as ``"index"``.
      cache: of the training split.
      steps_per_epoch: each epoch sees the next view, and after the last the first again.
    """

    feed: Any
    cache: Cache
    steps_per_epoch: int

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return the batch of a step."""
        batch = self.feed[step]
        view = np.full(
            len(batch["index"]), step // self.steps_per_epoch % self.cache.about["views"], np.int32
        )
        return {**batch, "view": view, "teacher": self.cache(batch["index"], view)}


def _require_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ArgumentError(f"{name} must be a whole number, 1 or more; got {value!r}")
