"""Deterministic batches: the batch of a training step is a function of the seed and the step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from compress_jax.core.errors import ConfigError
from compress_jax.core.types import Batch
from compress_jax.data._preprocess import Split


@dataclass(frozen=True, eq=False)
class Feed:
    """Random access to the batches of an endless, reshuffled training set; see `batches`.

    A checkpoint needs no state of it: a run that continues at step s takes ``feed[s]``.

    Attributes:
      dataset: a `grain.MapDataset` of batches, one epoch repeated without end.
      steps_per_epoch: the number of batches before the examples are shuffled again.

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

    def __getitem__(self, step: int) -> Split:
        """Return the batch of a step, 0 or more; calls in any order give the same arrays."""
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        batch: Batch = self.dataset[step]  # grain's type allows None, for datasets that filter
        return batch


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Feed:
    """Shuffle a split for each epoch and cut it into full batches.

    The batch of a step is the same for any number of processes. By default each process gets all of
    it, and `train.jit_step` gives every device its rows; process p of P may ask for one part alone:
    B / P rows from row p * B / P on. Examples that do not fill a batch are left out of that epoch.

    Args:
      split: arrays ``[n, ...]``, all with the same n, in memory.
      batch_size: the number of examples in one global batch.
      seed: 0 to 2**32 - 1; the seed of all shuffles.
      process_index: which part, counted from 0.
      process_count: the number of parts.

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
    # Only indices pass through grain: one gather for each batch is ten times faster than one call
    # for each example.
    rows = (
        grain.MapDataset.range(n)
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
    )
    gathered = rows.map(lambda r: {key: array[r[part]] for key, array in split.items()})
    return Feed(gathered.repeat(), n // batch_size)


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
    masked = {**split, "mask": np.ones(_size(split), bool)}
    for start in range(0, _size(split), batch_size):
        batch = {}
        for key, array in masked.items():
            batch[key] = _padded(array[start : start + batch_size], batch_size)[part]
        yield batch


def _size(split: Split) -> int:
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
