"""Deterministic batches: the batch of a training step is a function of the seed and of the step's number."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np

from compress_jax.core.errors import ConfigError
from compress_jax.core.types import Batch
from compress_jax.data._preprocess import Split


@dataclass(frozen=True, eq=False)
class Feed:
    """Random access to the batches of an endless, reshuffled training set; see `batches`.

    There is nothing to save in a checkpoint: a run that continues at step s asks for ``feed[s]``.

    Attributes:
      dataset: a `grain.MapDataset` of batches, one epoch repeated without end.
      steps_per_epoch: batches before the examples are shuffled anew.
    """

    dataset: grain.MapDataset[Any]
    steps_per_epoch: int

    def __getitem__(self, step: int) -> Split:
        """Return the batch of a step, 0 or more: the same arrays whenever and in whatever order it is asked for."""
        if step < 0:
            raise IndexError(f"steps count from 0, got {step}")
        batch: Batch = self.dataset[step]  # grain's type allows None, for datasets that filter
        return batch


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Feed:
    """Shuffle a split anew for every epoch, cut it into full batches, and hand each process its rows of every batch.

    The global batch of a step is the same for any number of processes; process p of P gets its rows
    p, p + P, p + 2P ... The examples left over at the end of an epoch wait for the next shuffle.

    Args:
      split: arrays ``[n, ...]``, all with the same n, in memory.
      batch_size: examples in one global batch.
      seed: 0 to 2**32 - 1; decides every order.
      process_index: which process this is; None asks JAX.
      process_count: how many there are; None asks JAX.

    Returns:
      A `Feed` of dicts of arrays ``[batch_size / process_count, ...]``.

    Raises:
      ConfigError: if a batch is larger than the split or cannot be shared evenly.

    Example:
      >>> feed = batches({"label": np.arange(10)}, 4, seed=0)
      >>> feed.steps_per_epoch, feed[7]["label"].shape
      (2, (4,))
    """
    n = _size(split)
    index, count = _process(batch_size, process_index, process_count)
    if not 1 <= batch_size <= n:
        raise ConfigError(
            f"batch_size is {batch_size}, but the split has {n} examples; choose 1 to {n}."
        )
    # Only indices travel through grain; one gather a batch is ten times faster than one call an
    # example.
    rows = (
        grain.MapDataset.range(n)
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
    )
    gathered = rows.map(lambda r: {key: array[r[index::count]] for key, array in split.items()})
    return Feed(gathered.repeat(), n // batch_size)


def eval_batches(
    split: Split,
    batch_size: int,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[Split]:
    """Cut a split into batches of one fixed size, in order, padding the last, so that nothing is compiled twice.

    Args:
      split: arrays ``[n, ...]``, all with the same n, and none called ``mask``.
      batch_size: rows in one global batch; may be larger than n.
      process_index: which process this is; None asks JAX.
      process_count: how many there are; None asks JAX.

    Yields:
      Dicts of arrays ``[batch_size / process_count, ...]`` with a boolean ``mask``: false for
      padding, which is zeros.

    Raises:
      ConfigError: if a batch cannot be shared evenly.

    Example:
      >>> [(b["label"].tolist(), b["mask"].tolist()) for b in eval_batches({"label": np.arange(1, 4)}, 2)]
      [([1, 2], [True, True]), ([3, 0], [True, False])]
    """
    index, count = _process(batch_size, process_index, process_count)
    masked = {**split, "mask": np.ones(_size(split), bool)}
    for start in range(0, _size(split), batch_size):
        batch = {
            key: _padded(array[start : start + batch_size], batch_size)
            for key, array in masked.items()
        }
        yield {key: array[index::count] for key, array in batch.items()}


def _size(split: Split) -> int:
    """Return how many examples a split has."""
    return len(next(iter(split.values())))


def _process(batch_size: int, index: int | None, count: int | None) -> tuple[int, int]:
    """Return which process this is and how many share a batch, asking JAX for what is None."""
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if batch_size % count:
        raise ConfigError(
            f"batch_size is {batch_size}, which {count} processes cannot share; choose a multiple "
            f"of {count}."
        )
    return index, count


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Return ``rows`` followed by zeros up to ``size`` rows."""
    return (
        np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
        if len(rows) < size
        else rows
    )
