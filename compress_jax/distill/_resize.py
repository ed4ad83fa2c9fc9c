"""Bring features to other positions by averaging."""

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ShapeError
from compress_jax.distill.masks import Mask, kept, of_features


def resize(features: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Return features at other positions: each new one is the mean of the old ones it covers ("adaptive average pooling").

    Along an axis from n to m positions, the i-th is the mean of those from ``floor(i n / m)`` up to, not including,
    ``ceil((i + 1) n / m)``. Where m divides n this is average pooling, where n divides m it repeats (nearest neighbour).

    Args:
      features: ``[batch, *positions, channels]``, any floating dtype.
      size: the new positions, one number for each axis: ``(4, 4)`` for images, ``(16,)`` for sequences.

    Returns:
      ``[batch, *size, channels]``, the dtype of ``features``.

    Raises:
      ShapeError: if ``size`` has another number of axes than the positions.

    Example:
      >>> resize(jnp.arange(4.0).reshape(1, 4, 1), (2,)).ravel().tolist()
      [0.5, 2.5]
      >>> resize(jnp.arange(2.0).reshape(1, 2, 1), (4,)).ravel().tolist()
      [0.0, 0.0, 1.0, 1.0]
    """
    if len(size) != features.ndim - 2 or min(size, default=1) < 1:
        raise ShapeError(f"features {features.shape} have {features.ndim - 2} axes of positions, resize was given {size}")
    for axis, new in enumerate(size, start=1):
        if features.shape[axis] != new:
            means = jnp.asarray(_means(features.shape[axis], new), features.dtype)
            mixed = jnp.tensordot(features, means, axes=[[axis], [0]], precision="highest")
            features = jnp.moveaxis(mixed, -1, axis)
    return features


def pool(features: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return the mean of features over their positions, those that count: what a relation of sequences is made of.

    Args:
      features: ``[batch, *positions, channels]``, any floating dtype.
      mask: which examples or positions count, see `masks`; of an example without any the mean is 0.

    Returns:
      ``[batch, channels]``, the dtype of ``features``.

    Raises:
      ShapeError: if the mask does not fit.

    Example:
      >>> pool(jnp.array([[[1.0], [3.0], [9.0]]]), mask=jnp.array([[1, 1, 0]])).tolist()
      [[2.0]]
    """
    positions = tuple(range(1, features.ndim - 1))
    if mask is None:
        return features.mean(positions)
    counts = of_features(mask, features)
    number = jnp.maximum((counts > 0).sum(positions), 1).astype(features.dtype)
    return kept(features, counts).sum(positions) / number[:, None]


def _means(old: int, new: int) -> np.ndarray:
    """Return ``[old, new]`` whose columns take the means."""
    i = np.arange(new)
    start, stop = i * old // new, -((i + 1) * old // -new)
    at = np.arange(old)[:, None]
    return ((at >= start) & (at < stop)) / (stop - start)
