"""From prepared files to arrays in memory, read once in large pieces."""

from collections.abc import Callable
from typing import Any

import numpy as np

from compress_jax.core.errors import DataError
from compress_jax.data._explain import damaged
from compress_jax.data._progress import progress
from compress_jax.data._quiet import quiet
from compress_jax.data.preprocess import Split

_CHUNK = 1000  # records in one call


def read(builder: Any, split: str) -> Split:
    """Read a split into memory.

    Args:
      builder: see `prepared`.
      split: the name of a split.

    Returns:
      ``image`` ``[n, height, width, channels]`` in its stored dtype and ``label`` int32 ``[n]``, in TFDS's stored order.

    Raises:
      DataError: if the data are not labelled images of one size, or the files on disk are damaged.

    Example:
      >>> import tempfile
      >>> from compress_jax.data.prepare import prepared
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     read(prepared("digits", folder), "test")["image"].shape
      (355, 8, 8, 1)
    """
    try:
        with quiet(), progress(f"reading {builder.name} {split}", builder.info.splits[split].num_examples) as advance:
            return _stacked(builder, split, advance)
    except DataError:
        raise
    except Exception as error:
        raise DataError(damaged(builder.data_path, error)) from error


def _stacked(builder: Any, split: str, advance: Callable[[int], None]) -> Split:
    """Read records in chunks into two arrays made for all of them."""
    image, label = builder.info.supervised_keys
    source = builder.as_data_source(split)
    n, first = len(source), np.asarray(source[0][image])
    images, labels = np.empty((n, *first.shape), first.dtype), np.empty(n, np.int32)
    for start in range(0, n, _CHUNK):
        for row, record in enumerate(source.__getitems__(range(start, min(start + _CHUNK, n))), start):
            if np.shape(record[image]) != first.shape:
                raise DataError(f"{builder.name} has images of several sizes; only sets of one size can be loaded.")
            images[row], labels[row] = record[image], record[label]
        advance(min(_CHUNK, n - start))
    return {"image": images, "label": labels}
