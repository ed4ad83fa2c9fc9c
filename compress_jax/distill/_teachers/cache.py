"""A cache of teacher logits on disk: written once, by example and view, and verified when read.

`write_cache` stores a teacher's top-k logits, `open_cache` reads them, `CachedFeed` adds them to
the batches of a training run. `by_example` makes the augmentation that both runs must share.

A cache is a directory. ``cache.json`` describes it. Each of its P writing processes owns the
examples p, p + P, p + 2 P ... and four files of numbers (NumPy's format, memory-mapped, never
pickled): ``ids`` int32 ``[rows, views, k]``, ``log_probs`` ``[rows, views, k]`` (bfloat16 or
float32, stored as integers of that size), ``tail`` float32 ``[rows, views]`` and ``digests`` uint8
``[blocks, views, 32]``, the SHA-256 of each block of rows in a view, zeros before it is written.
No number is returned before the digest of its block was verified.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

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
from compress_jax.core.types import Array, Batch, JsonObject, Key, PyTree
from compress_jax.distill._teachers.shard import STORED, Shard, disk_errors
from compress_jax.distill._teachers.teacher import Teacher
from compress_jax.distill._teachers.top_k import TopK, top_k

Augment: TypeAlias = Callable[[Key, Batch], Batch]  # of a batch, as a training step applies it
AugmentOne: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]  # (key, image) -> image

VERSION = 2


def write_cache(
    directory: str | os.PathLike[str],
    teacher: Callable[[PyTree], jax.Array],
    split: Mapping[str, Array],
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
    """Write a teacher's top-k logits for every example in every view; resume where it was stopped.

    Blocks that are there already are read and verified; missing ones are computed, damaged ones are
    logged as a warning and computed again. One process at a time writes a part.

    Args:
      directory: directory of the cache, shared by all processes; made if missing.
      teacher: ``inputs -> logits``, a `Teacher`.
      split: arrays ``[examples, ...]``; an example's number is its row.
      teacher_sha256: the teacher's hash: ``hexadecimal(fingerprint(teacher))``.
      data_sha256: the data's hash: ``data.fingerprint``.
      k: classes stored per example; with all of them the cache is exact but for ``dtype``.
      views: augmented views of each example.
      augment: from `by_example`; training must use the same. None for the examples as they are.
      temperature: of the probabilities, see `TopK`.
      dtype: of the log-probabilities, ``"bfloat16"`` (relative error at most 2**-8 of each) or
        ``"float32"``.
      batch_size: examples per forward pass.
      inputs: the split's entry that is given to the teacher.
      process_index: index of this process; None asks JAX.
      process_count: number of processes that share the examples; None asks JAX.

    Raises:
      ConfigError: if ``dtype`` is neither of the two.
      ArgumentError: if a number is out of range.
      StateError: if the directory holds another cache (the message says what differs), or another
        process is writing this part.
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
    process = jax.process_index() if process_index is None else process_index
    processes = jax.process_count() if process_count is None else process_count
    examples = len(split[inputs])
    _require_positive(
        examples=examples, views=views, k=k, batch_size=batch_size, process_count=processes
    )
    if not 0 <= process < processes:
        raise ArgumentError(
            f"process_index must be 0 to {processes - 1}, as process_count is {processes}; got "
            f"{process}"
        )
    metadata = {
        "teacher_sha256": teacher_sha256,
        "data_sha256": data_sha256,
        "examples": examples,
        "views": views,
        "k": k,
        "temperature": float(temperature),
        "dtype": dtype,
        "processes": processes,
        "block": block_rows(k, dtype),
    }
    rows = np.arange(process, examples, processes)  # this process's examples

    ask = _asking(teacher, split, inputs, augment, k, temperature, batch_size)

    def top_of(at: np.ndarray, view: int) -> TopK:
        return ask(rows[at], view)

    directory = Path(directory)
    with _exclusive(directory, process, processes):
        shard = Shard.for_writing(directory, _claim(directory, metadata), process)
        for view in range(views):
            _write_view(shard, view, batch_size, dtype, top_of)


def _asking(
    teacher: Callable[[PyTree], jax.Array],
    split: Mapping[str, Array],
    inputs: str,
    augment: Augment | None,
    k: int,
    temperature: float,
    batch_size: int,
) -> Callable[[np.ndarray, int], TopK]:
    """Return ``(examples, view) -> the teacher's top k``, for at most a batch of examples."""

    @jax.jit
    def run(teacher: Callable[[PyTree], jax.Array], batch: Batch) -> tuple[TopK, jax.Array]:
        if augment is not None:
            batch = augment(None, batch)
        logits = teacher(batch[inputs])
        # Of the logits themselves: `top_k` takes infinities for large numbers, and any NaN for a
        # number where k is all classes.
        return top_k(logits, k, temperature), jnp.isfinite(logits).all(axis=-1)

    # A pytree, so that the teacher's arrays are arguments of the program and not its constants.
    if not isinstance(teacher, Teacher):
        teacher = jax.tree_util.Partial(teacher)

    def ask(examples: np.ndarray, view: int) -> TopK:
        padded = np.resize(examples, batch_size)  # one shape, one program
        batch = {inputs: split[inputs][padded], "index": padded, "view": np.full(batch_size, view)}
        # Without the rows that fill up the batch.
        found = jax.device_get(run(teacher, batch))
        top, good = jax.tree.map(lambda x: x[: len(examples)], found)
        if not good.all():
            raise NonFiniteError(
                f"the teacher's logits of example {examples[~good][0]}, view {view} are not finite"
            )
        return top

    return ask


def _write_view(
    shard: Shard,
    view: int,
    batch_size: int,
    dtype: str,
    top_of: Callable[[np.ndarray, int], TopK],
) -> None:
    """Write the blocks of a view that are not there yet."""
    missing = shard.missing(view)  # all rows of a new cache, the rest of a stopped one
    for start in range(0, len(missing), batch_size):
        at = missing[start : start + batch_size]
        later = missing[start + batch_size :]
        top = top_of(at, view)
        # NumPy's format has no bfloat16: the bits are stored as integers.
        log_probs = top.log_probs.astype(jnp.dtype(dtype)).view(STORED[dtype])
        following = int(later[0]) if len(later) else None
        shard.write(at, view, (top.ids, log_probs, top.tail), following)


@dataclass(frozen=True, eq=False)
class Cache:
    """Teacher logits on disk; see `write_cache` and `open_cache`.

    Attributes:
      metadata: the contents of ``cache.json``.
      shards: one per writing process.

    Example:
      >>> import tempfile
      >>> folder, split = tempfile.mkdtemp(), {"image": np.eye(3, dtype=np.float32)}
      >>> write_cache(folder, lambda x: x, split, teacher_sha256="me", data_sha256="eye", k=1)
      >>> cache = open_cache(folder, teacher_sha256="me", data_sha256="eye")
      >>> cache([0, 2], [0, 0]).ids.tolist(), cache.metadata["views"]
      ([[0], [2]], 1)
    """

    metadata: JsonObject
    shards: list[Shard]

    def __call__(self, index: Array | Sequence[int], view: Array | Sequence[int]) -> TopK:
        """Return the teacher's top k for some examples, each in one view.

        Args:
          index: integers ``[batch]``.
          view: integers ``[batch]``.

        Returns:
          A `TopK` of NumPy arrays ``[batch, k]``.

        Raises:
          DataError: if one of them is out of range, was never written, or is damaged; it names the
            first.
        """
        index = np.asarray(index)
        view = np.asarray(view)
        _require_in_range("index", index, self.metadata["examples"])
        _require_in_range("view", view, self.metadata["views"])
        shape = (len(index), self.metadata["k"])
        ids = np.empty(shape, np.int32)
        log_probs = np.empty(shape, STORED[self.metadata["dtype"]])
        tail = np.empty(len(index), np.float32)
        for process, shard in enumerate(self.shards):
            # Process p owns the examples p, p + P, p + 2 P ... as its rows 0, 1, 2 ...
            mine = index % len(self.shards) == process
            rows = index[mine] // len(self.shards)
            shard.require(rows, view[mine])
            for array, stored in zip((ids, log_probs, tail), shard.arrays, strict=True):
                array[mine] = stored[rows, view[mine]]
        log_probs = log_probs.view(jnp.dtype(self.metadata["dtype"]))
        # NumPy arrays: a feed runs on the host, and the step moves its batch to the device.
        return TopK(ids, log_probs, tail, self.metadata["temperature"])  # pyright: ignore[reportArgumentType]


def open_cache(
    directory: str | os.PathLike[str], *, teacher_sha256: str, data_sha256: str
) -> Cache:
    """Open a cache, if it belongs to this teacher and these data.

    Args:
      directory: directory of the cache.
      teacher_sha256: the teacher's hash now.
      data_sha256: the data's hash now.

    Returns:
      A `Cache`; its blocks are read when they are first asked for.

    Raises:
      DataError: if there is none, it is damaged, or a process's part is missing.
      StateError: if it is another teacher's, or of other data; it names both hashes.

    Example:
      >>> open_cache("/nowhere", teacher_sha256="me", data_sha256="eye")
      Traceback (most recent call last):
      compress_jax.core.errors.DataError: no cache of logits in /nowhere: write_cache makes one
    """
    directory = Path(directory)
    metadata = _read_metadata(directory)
    if metadata is None:
        raise DataError(f"no cache of logits in {directory}: write_cache makes one")
    for name, now in (("teacher_sha256", teacher_sha256), ("data_sha256", data_sha256)):
        if metadata[name] != now:
            raise StateError(
                f"the cache in {directory} is of another {name.split('_')[0]}: {name} "
                f"{metadata[name][:16]}, now {now[:16]}; write one in a new directory"
            )
    processes = range(metadata["processes"])
    return Cache(metadata, [Shard.for_reading(directory, metadata, p) for p in processes])


class Batches(Protocol):
    """Batches by step: `compress_jax.data`'s feeds, or a list."""

    def __getitem__(self, step: int, /) -> Batch:
        """Return the batch of a step, counted from 0."""


@dataclass(frozen=True, eq=False)
class CachedFeed:
    """A feed whose batches also have ``"view"`` and ``"teacher"``, a `TopK` from a cache.

    Attributes:
      feed: batches by step, with the examples' numbers as ``"index"``.
      cache: the cache of the training split.
      steps_per_epoch: each epoch uses the next view, and after the last the first again.

    Example:
      >>> import tempfile
      >>> folder, split = tempfile.mkdtemp(), {"image": np.eye(3, dtype=np.float32)}
      >>> write_cache(folder, lambda x: x, split, teacher_sha256="me", data_sha256="eye", k=1)
      >>> cache = open_cache(folder, teacher_sha256="me", data_sha256="eye")
      >>> batches = [{"image": split["image"][:2], "index": np.array([0, 1])}]
      >>> CachedFeed(batches, cache, steps_per_epoch=1)[0]["teacher"].ids.tolist()
      [[0], [1]]
    """

    feed: Batches
    cache: Cache
    steps_per_epoch: int

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step."""
        batch = self.feed[step]
        current = step // self.steps_per_epoch % self.cache.metadata["views"]
        view = np.full(len(batch["index"]), current, np.int32)
        return {**batch, "view": view, "teacher": self.cache(batch["index"], view)}


def by_example(
    augment: AugmentOne,
    seed: int,
    *,
    index: str = "index",
    view: str = "view",
    inputs: str = "image",
) -> Augment:
    """Return an augmentation that depends on the example's number and the view's number only.

    Logits that are cached by example alone belong to another crop than the one the student gets.
    With this augmentation the crop of (example, view) is the same in every batch and every run, so
    its cached logits are those of that crop.

    Args:
      augment: ``(key, image) -> image`` for one example; for a function of batches use
        ``lambda key, x: f(key, x[None])[0]``.
      seed: seed of all views.
      index: the batch entry with the examples' numbers.
      view: the batch entry with the views' numbers, 0 or more.
      inputs: the batch entry that is augmented.

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
        # No key of the step: it would differ between the run that writes and the one that trains.
        key = jax.random.fold_in(jax.random.key(seed), index)
        return augment(jax.random.fold_in(key, view), x)

    def augmented(key: Key, batch: Batch) -> Batch:
        return {**batch, inputs: jax.vmap(one)(batch[index], batch[view], batch[inputs])}

    return augmented


def _require_positive(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ArgumentError(f"{name} must be a whole number, 1 or more; got {value!r}")


def _require_in_range(name: str, at: np.ndarray, size: int) -> None:
    if at.min(initial=0) < 0 or at.max(initial=0) >= size:
        raise DataError(
            f"the cache holds {name} 0 to {size - 1}, and was asked for {at.min()} to {at.max()}"
        )


# The directory: cache.json, and the locks of its writers.

_FORM = {
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
    """Return how many rows share a digest: about a megabyte, as reading a row reads its block."""
    row_bytes = k * (4 + np.dtype(STORED[dtype]).itemsize) + 4
    return max(1, min(1024, 2**20 // row_bytes))


def _read_metadata(directory: Path) -> JsonObject | None:
    """Return the contents of ``cache.json``, or None without one; refuse damage, other versions."""
    file = directory / "cache.json"
    if not os.path.lexists(file):
        return None
    return read_record(file, _FORM, "remove the directory and write the cache again", DataError)


def _claim(directory: Path, metadata: JsonObject) -> JsonObject:
    """Write ``cache.json``, or check the one that is there; return it with its digest."""
    metadata = {"version": VERSION, **metadata}
    with disk_errors(directory), (directory / ".lock").open("w") as lock:
        # All processes of a job pass here, one after the other; none holds the lock for long.
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _read_metadata(directory)
        if found is None:
            new = directory / ".cache.json.new"
            new.write_bytes(sealed(metadata))
            # Renamed when complete, so that a reader never finds half a file.
            new.replace(directory / "cache.json")
            found = _read_metadata(directory) or {}
    differing = [name for name, now in metadata.items() if found.get(name) != now]
    if differing:
        differs = ", ".join(
            f"{name}: {found.get(name)} there, {metadata[name]} now" for name in differing
        )
        raise StateError(
            f"{directory} holds another cache ({differs}); use a new directory, or remove it"
        )
    return found


@contextlib.contextmanager
def _exclusive(directory: Path, process: int, processes: int) -> Iterator[None]:
    """Lock one part for writing; the system releases the lock of a process that is killed."""
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / f".lock-{process:05d}-of-{processes:05d}").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateError(
                f"another process is writing part {process} of {processes} of the cache in "
                f"{directory}; wait for it, or give each process its own process_index"
            ) from error
        yield
