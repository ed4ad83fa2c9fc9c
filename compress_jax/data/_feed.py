"""Deterministic batches: the batch of a training step is a function of the seed and the step."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import grain
import numpy as np
from absl import flags

from compress_jax.core.errors import ConfigError
from compress_jax.core.types import Batch, DType, Shape
from compress_jax.data._disk.stored import columns_of, take
from compress_jax.data._preprocess import Split

AHEAD = 2  # batches that are read from disk before a step asks for them


@dataclass(frozen=True, eq=False)
class Feed:
    """Random access to the batches of an endless, reshuffled training set; see `batches`.

    A checkpoint needs no state of it: a run that continues at step s takes ``feed[s]``.

    Attributes:
      dataset: a `grain.MapDataset` of batches, one epoch repeated without end.
      steps_per_epoch: the number of batches before the examples are shuffled again.
      ahead: how many batches are made before they are asked for, while steps follow each other.
      workers: processes that make them; 0 for a thread of this one.
      finish: what is done to a batch in this process, before it is handed out.

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> feed = cj.data.batches({"label": np.arange(10)}, 4, seed=0)
      >>> epoch = np.concatenate([feed[0]["label"], feed[1]["label"]])
      >>> len(epoch), len(set(epoch.tolist()))
      (8, 8)
    """

    dataset: grain.MapDataset[Any]
    steps_per_epoch: int
    ahead: int = 0
    workers: int = 0
    finish: Callable[[Batch], Batch] = lambda batch: batch
    _reading: dict[int, Iterator[Any]] = field(default_factory=dict, repr=False)

    def __getitem__(self, step: int) -> Split:
        """Return the batch of a step, 0 or more; calls in any order give the same arrays."""
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        if not self.ahead:
            # grain's type allows None, for datasets that filter.
            return self.finish(self.dataset[step])
        # An iterator reads ahead. It goes on where the last step ended, or begins anew.
        iterator = self._reading.pop(step, None) or self._from(step)
        self._reading.clear()
        batch = next(iterator)
        self._reading[step + 1] = iterator
        return self.finish(batch)

    def _from(self, step: int) -> Iterator[Any]:
        """Return an iterator over the batches from a step on."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self.ahead)
        ahead = self.dataset[step:].to_iter_dataset(options)
        if self.workers:
            if not flags.FLAGS.is_parsed():  # grain asks for its flags, which only absl's apps read
                flags.FLAGS.mark_as_parsed()
            many = grain.MultiprocessingOptions(self.workers, self.ahead)
            ahead = ahead.mp_prefetch(many)
        return iter(ahead)


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of an array that this process has, of those of all processes.

    Attributes:
      values: ``[rows, ...]``.
      rows: their numbers in the whole array, int64, ascending.
      total: the number of rows of the whole.

    Example:
      >>> import numpy as np
      >>> half = Part(np.array([5.0, 6.0]), np.array([2, 3]), 4)
      >>> half.shape, half[2:4].tolist()
      ((4,), [5.0, 6.0])
    """

    values: np.ndarray
    rows: np.ndarray
    total: int

    @property
    def shape(self) -> Shape:
        """That of the whole array."""
        return (self.total, *self.values.shape[1:])

    @property
    def dtype(self) -> DType:
        """Of each value."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.values.ndim

    def __len__(self) -> int:
        """Return the number of rows of the whole array."""
        return self.total

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return what an index of the whole array selects; its rows must be here."""
        first, *others = index if isinstance(index, tuple) else (index,)
        wanted = np.arange(self.total)[first]
        return self.values[(np.searchsorted(self.rows, wanted), *others)]


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    rows: np.ndarray | None = None,
    check: Callable[[Batch], None] | None = None,
) -> Feed:
    """Shuffle a split for each epoch and cut it into full batches.

    The batch of a step is the same for any number of processes. By default each process gets all of
    it, and `train.jit_step` gives every device its rows; process p of P may ask for one part alone:
    B / P rows from row p * B / P on. Examples that do not fill a batch are left out of that epoch.

    Args:
      split: arrays ``[n, ...]`` by name, all with the same n, or columns of `Records`: those are
        read ahead, and with their augmentation if they have one.
      batch_size: the number of examples in one global batch.
      seed: 0 to 2**32 - 1; the seed of all shuffles, and of the augmentation of records.
      process_index: which part, counted from 0.
      process_count: the number of parts.
      rows: the numbers of the rows that this process's devices hold, ascending: others are not
        read, and what `train.jit_step` is given still has the shape of the whole batch.
      check: called with each batch; raises where it is wrong.

    Returns:
      A `Feed` of dicts of arrays ``[batch_size / process_count, ...]``.

    Raises:
      ConfigError: if a batch is larger than the split or cannot be shared evenly.

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> feed = cj.data.batches({"label": np.arange(10)}, 4, seed=0)
      >>> feed.steps_per_epoch, feed[7]["label"].shape
      (2, (4,))
    """
    n = _size(split)
    part = _part(batch_size, process_index, process_count)
    if not 1 <= batch_size <= n:
        raise ConfigError(
            f"batch_size is {batch_size}, but the split has {n} examples; choose 1 to {n}."
        )
    own = np.arange(batch_size)[part] if rows is None else rows
    whole = rows is None or len(rows) == batch_size

    def gather(step: int, numbers: np.ndarray) -> Batch:
        return take(split, numbers[own], (seed, step))

    def finish(batch: Batch) -> Batch:
        if check is not None:
            check(batch)
        return batch if whole else {key: Part(x, own, batch_size) for key, x in batch.items()}

    # Only indices pass through grain: one gather for each batch is ten times faster than one call
    # for each example.
    numbers = (
        grain.MapDataset.range(n)
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
        .repeat()
    )
    stored = columns_of(split)
    workers = max((each.records.workers for each in stored), default=0)
    made = numbers.map_with_index(gather)
    return Feed(made, n // batch_size, AHEAD if stored else 0, workers, finish)


def eval_batches(
    split: Split,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Split]:
    """Cut a split in order into batches of one fixed size, the last one padded.

    With one size the evaluation step is compiled once.

    Args:
      split: arrays ``[n, ...]``, all with the same n, and none called ``mask``.
      batch_size: the number of rows in one global batch; may be larger than n.
      process_index: which part of each batch, see `batches`.
      process_count: the number of parts.

    Yields:
      Dicts of arrays ``[batch_size / process_count, ...]`` with a boolean ``mask``: false for
      padding, which is zeros.

    Raises:
      ConfigError: if a batch cannot be divided evenly.

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> for batch in cj.data.eval_batches({"label": np.arange(1, 4)}, 2):
      ...     print(batch["label"], batch["mask"])
      [1 2] [ True  True]
      [3 0] [ True False]
    """
    part = _part(batch_size, process_index, process_count)
    total = _size(split)
    masked = {**split, "mask": np.ones(total, bool)}

    def batch(number: int) -> Split:
        found = take(masked, slice(number * batch_size, (number + 1) * batch_size))
        return {key: _padded(array, batch_size)[part] for key, array in found.items()}

    made = grain.MapDataset.range(-(-total // batch_size)).map(batch)
    if columns_of(split):
        yield from made.to_iter_dataset(grain.ReadOptions(1, AHEAD))
    else:
        yield from made


def _size(split: Mapping[str, Any]) -> int:
    """Return the number of examples of a split."""
    return len(next(iter(split.values())))


def _part(batch_size: int, index: int, count: int) -> slice:
    """Return the rows of a batch that one of so many processes gets."""
    if batch_size % count:
        raise ConfigError(
            f"batch_size is {batch_size}, which {count} processes cannot divide evenly; choose a "
            f"multiple of {count}."
        )
    size = batch_size // count
    return slice(index * size, (index + 1) * size)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Return ``rows`` followed by zeros up to ``size`` rows."""
    if len(rows) == size:
        return rows
    zeros = np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)
    return np.concatenate([rows, zeros])
