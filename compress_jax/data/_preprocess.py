"""Cleaning and normalization of a split: pure functions from arrays to arrays."""

import numpy as np

from compress_jax.core.errors import ArgumentError

Split = dict[str, np.ndarray]
"""Arrays ``[n, ...]`` by name, all with the same n."""

_CHUNK = 4096  # examples at a time, which avoids a float64 copy of a whole split


def clean(split: Split, *, drop_duplicates: bool = False) -> tuple[Split, dict[str, int]]:
    """Drop examples that are not finite and, if asked, exact repeats.

    Args:
      split: arrays ``[n, ...]``, all with the same n.
      drop_duplicates: whether to drop examples equal in every array to an earlier one.

    Returns:
      The split in its old order, and the number of dropped examples by reason.

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> images = np.array([[1.0], [np.nan], [1.0]], np.float32)
      >>> split = {"image": images, "label": np.array([3, 3, 3])}
      >>> kept, dropped = cj.data.clean(split, drop_duplicates=True)
      >>> kept["image"].tolist(), dropped
      ([[1.0]], {'non_finite': 1, 'duplicate': 1})
    """
    finite = np.ones(len(next(iter(split.values()))), bool)
    for array in split.values():
        if np.issubdtype(array.dtype, np.floating):
            finite &= np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    keep = finite & _first(split) if drop_duplicates else finite
    kept = split if keep.all() else {key: array[keep] for key, array in split.items()}
    return kept, {"non_finite": int(np.sum(~finite)), "duplicate": int(np.sum(finite & ~keep))}


def _first(split: Split) -> np.ndarray:
    """Return for each example whether no earlier one has the same bytes."""
    earlier: set[bytes] = set()
    first = np.zeros(len(next(iter(split.values()))), bool)
    for row in range(len(first)):
        content = b"".join(array[row].tobytes() for array in split.values())
        first[row] = content not in earlier
        earlier.add(content)
    return first


def scale_to_unit(split: Split, *, maximum: float = 255.0, entry: str = "image") -> Split:
    r"""Scale images to :math:`x / \text{maximum}`, as float32.

    Args:
      split: ``image`` of any dtype with values 0 to ``maximum``; other keys are not changed.
      maximum: the largest value that a pixel can have, not the largest that occurs, which would
        differ between splits.
      entry: the name of the images.

    Returns:
      The split with float32 ``image`` in [0, 1].

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> cj.data.scale_to_unit({"image": np.array([[0, 255]], np.uint8)})["image"].tolist()
      [[0.0, 1.0]]
    """
    images = split[entry].astype(np.float32)
    images /= np.float32(maximum)  # in place on the new copy, for half the memory
    return {**split, entry: images}


def statistics(split: Split, *, entry: str = "image") -> tuple[np.ndarray, np.ndarray]:
    r"""Return the mean and the standard deviation of each channel.

    .. math:: \mu_c = \frac1N\sum x_c, \quad \sigma_c^2 = \frac1N\sum (x_c - \mu_c)^2

    Call it on the training split only. Sums are float64, in two passes.

    Args:
      split: ``image`` is ``[n, ..., channels]``.
      entry: the name of the images, or of any array.

    Returns:
      Mean and standard deviation, float32 ``[channels]``. The deviation of a constant channel is
      set to 1, so that it can be divided by.

    Raises:
      ArgumentError: if the split is empty.

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> mean, std = cj.data.statistics({"image": np.array([[[1.0], [3.0]]], np.float32)})
      >>> mean.tolist(), std.tolist()
      ([2.0], [1.0])
    """
    images = split[entry]
    if images.size == 0:
        raise ArgumentError("an empty split has no statistics; give one with examples")
    rows = images.size // images.shape[-1]
    axes = tuple(range(images.ndim - 1))
    chunks = [images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]  # views
    mean = sum(chunk.sum(axes, dtype=np.float64) for chunk in chunks) / rows
    variance = sum(((chunk - mean) ** 2).sum(axes) for chunk in chunks) / rows
    std = np.sqrt(np.where(variance > 0, variance, 1.0))
    return mean.astype(np.float32), std.astype(np.float32)


def normalize(split: Split, mean: np.ndarray, std: np.ndarray, *, entry: str = "image") -> Split:
    r"""Shift and scale images to :math:`(x - \mu_c) / \sigma_c`.

    Args:
      split: float32 ``image`` ``[n, ..., channels]``; other keys are not changed.
      mean: float32 ``[channels]``, from `statistics` of the training split.
      std: float32 ``[channels]``, positive.
      entry: the name of the images, or of any array.

    Returns:
      The split with its new ``image``.

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> split = {"image": np.array([[[1.0], [3.0]]], np.float32)}
      >>> mean, std = cj.data.statistics(split)
      >>> cj.data.normalize(split, mean, std)["image"].ravel().tolist()
      [-1.0, 1.0]
    """
    images = split[entry] - mean
    images /= std
    return {**split, entry: images}
