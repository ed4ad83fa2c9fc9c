"""A teacher's logits on disk, by example and by view: computed once, read without loading, refused when they do not belong.

A directory: ``cache.json`` says what it is, and each process of P that wrote it has four files of numbers (NumPy's format,
memory-mapped, never pickle) with its examples p, p + P, p + 2 P ...: ``ids`` int32 ``[rows, views, k]``, ``log_probs``
bfloat16 (or float32), stored as integers of that size, ``tail`` float32 ``[rows, views]``, and ``digests`` uint8
``[blocks, views, 32]``: the sha256 of each block of rows in a view, zeros where it was not written yet. Nothing is given
out before its block's digest was seen to be right.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError, ConfigError, DataError, NonFiniteError, StateError
from compress_jax.distill._cache_files import STORED, Shard, block_rows, claim, read_about, writing
from compress_jax.distill._top_k import TopK, top_k
from compress_jax.distill.teacher import Teacher

Augment = Callable[[Any, Any], Any]


def by_example(augment: Augment, seed: int, *, index: str = "index", view: str = "view", inputs: str = "image") -> Augment:
    """Return an augmentation that is a function of the example's number and of a view's number, and of nothing else.

    A cache by example alone gives the logits of another crop than the student sees; with this one the crop of (example,
    view) is the same whenever and in whatever batch it comes, so that its logits are its own.

    Args:
      augment: ``(key, image) -> image`` of one example; of a whole batch of one, ``lambda key, x: f(key, x[None])[0]``.
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

    return lambda key, batch: {**batch, inputs: jax.vmap(one)(batch[index], batch[view], batch[inputs])}


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
          DataError: if one of them is out of range, was never written, or is damaged; it names the first.
        """
        index, view = np.asarray(index), np.asarray(view)
        for name, at in (("index", index), ("view", view)):
            most = self.about["examples" if name == "index" else "views"]
            if at.min(initial=0) < 0 or at.max(initial=0) >= most:
                raise DataError(f"the cache holds {name} 0 to {most - 1}, and was asked for {at.min()} to {at.max()}")
        shape = (len(index), self.about["k"])
        found = np.empty(shape, np.int32), np.empty(shape, STORED[self.about["dtype"]]), np.empty(len(index), np.float32)
        for process, shard in enumerate(self.shards):
            mine = index % len(self.shards) == process
            rows = index[mine] // len(self.shards)
            shard.require(rows, view[mine])
            for array, stored in zip(found, shard.arrays, strict=True):
                array[mine] = stored[rows, view[mine]]
        ids, log_probs, tail = found
        arrays: Any = {"ids": ids, "log_probs": log_probs.view(jnp.dtype(self.about["dtype"])), "tail": tail}
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

    What is there already is read and held against its digests first; what is missing is computed, and what is damaged is
    logged as a warning and computed again. One process at a time writes a part.

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
      dtype: of the log-probabilities, ``"bfloat16"`` (relative error at most 2**-8 of each) or ``"float32"``.
      batch_size: examples at once.
      inputs: the split's entry that is given to the teacher.
      process_index: which process this is; None asks JAX.
      process_count: how many share the examples; None asks JAX.

    Raises:
      ConfigError: if ``dtype`` is none of these.
      ArgumentError: if a number is out of range.
      StateError: if the directory holds another cache (it says what differs), or another process is writing this part.
      DataError: if ``cache.json`` is damaged, or the disk is full or not writable; what was written stays.
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
        raise ArgumentError(f"process_index must be 0 to {count - 1}, as process_count is {count}; got {mine}")
    about = {"teacher_sha256": teacher_sha256, "data_sha256": data_sha256, "examples": size, "views": views, "k": k}
    about |= {"temperature": float(temperature), "dtype": dtype, "processes": count, "block": block_rows(k, dtype)}
    rows = np.arange(mine, size, count)

    @jax.jit
    def see(teacher: Any, batch: Any) -> TopK:
        return top_k(teacher((augment(None, batch) if augment else batch)[inputs]), k, temperature)

    asked = teacher if isinstance(teacher, Teacher) else jax.tree_util.Partial(teacher)  # arguments, not constants

    def ask(at: np.ndarray, view: int) -> TopK:
        padded = rows[np.resize(at, batch_size)]  # one shape, one program
        batch = {inputs: split[inputs][padded], "index": padded, "view": np.full(batch_size, view)}
        top = jax.tree.map(lambda x: x[: len(at)], jax.device_get(see(asked, batch)))
        if (bad := ~np.isfinite(top.tail)).any():
            raise NonFiniteError(f"the teacher's logits of example {rows[at[bad][0]]}, view {view} are not finite")
        return top

    with writing(Path(directory), mine, count):
        shard = Shard.for_writing(Path(directory), claim(Path(directory), about), mine)
        for view in range(views):
            missing = shard.missing(view)
            for start in range(0, len(missing), batch_size):
                at, later = missing[start : start + batch_size], missing[start + batch_size :]
                top = ask(at, view)
                log_probs = top.log_probs.astype(jnp.dtype(dtype)).view(STORED[dtype])
                shard.write(at, view, (top.ids, log_probs, top.tail), int(later[0]) if len(later) else None)


def open_cache(directory: str | os.PathLike[str], *, teacher_sha256: str, data_sha256: str) -> Cache:
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
                f"the cache in {directory} is of another {name.split('_')[0]}: {name} {about[name][:16]}, now {now[:16]}; "
                "write one in a new directory"
            )
    return Cache(about, [Shard.for_reading(Path(directory), about, p) for p in range(about["processes"])])


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
        view = np.full(len(batch["index"]), step // self.steps_per_epoch % self.cache.about["views"], np.int32)
        return {**batch, "view": view, "teacher": self.cache(batch["index"], view)}


def _require_counts(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ArgumentError(f"{name} must be a whole number, 1 or more; got {value!r}")
