"""Losses on statistics of features: channels or positions are summed out, and student and teacher may differ there.

Each takes ``[batch, *positions, channels]`` and returns the loss of each example, ``[batch]`` in float32, finite with finite
gradients at any finite features; no gradient reaches the teacher. With a ``mask`` (see `masks`) sums over positions are over
those that count, means are divided by their number, and what does not count is not read.
"""

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ShapeError
from compress_jax.distill.masks import Mask, mean_of_each, of_features
from compress_jax.distill.shapes import flat, pair, rows, same_batch, same_channels, same_positions, same_shape
from compress_jax.distill.stable import bounded, rescaled, unit


def attention(student: jax.Array, teacher: jax.Array, p: float = 2, *, mask: Mask | None = None) -> jax.Array:
    """Return the mean squared difference of attention maps: attention transfer.

    ``mean((Q(s) - Q(t))**2)`` over positions, Q being ``mean(abs(f)**p)`` over channels, divided by its Euclidean norm over
    positions. It does not change with the scale of either; numbers of channels may differ. The usual weight is 1000.

    Args:
      student: ``[batch, *positions, channels]``, any floating dtype.
      teacher: ``[batch, *positions, other channels]``.
      p: power, at least 1: the higher, the more the strongest channel counts.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``.

    Raises:
      ShapeError: if batch or positions differ.

    Example:
      >>> student, teacher = jnp.array([[[1.0], [0.0]]]), jnp.array([[[0.0, 0.0], [3.0, 3.0]]])
      >>> attention(student, teacher).tolist(), attention(5 * student, student).tolist()
      ([1.0], [0.0])

    References:
      Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2.
    """
    same_positions(student, teacher)
    positions = student.shape[:-1]
    student, teacher = pair(student, teacher, mask)
    square = jnp.square(_attention(student, p) - _attention(teacher, p))
    return mean_of_each(square.reshape(*positions, 1), mask)


def _attention(features: jax.Array, p: float) -> jax.Array:
    """Return ``[batch, positions]`` of norm 1."""
    return unit((jnp.abs(rescaled(rows(features), (1, 2))) ** p).mean(axis=2))


def ft(student: jax.Array, teacher: jax.Array, p: float = 1, *, mask: Mask | None = None) -> jax.Array:
    """Return the mean distance of normalised factors: factor transfer.

    ``mean(abs(s / norm(s) - t / norm(t))**p)`` with norms over all of an example's factor. The teacher's factor comes from
    the part `paraphraser`, trained before on its features alone, the student's from the part `translator`.

    Args:
      student: ``[batch, ...]``, a translator's output, any floating dtype.
      teacher: same shape, a paraphraser's factor.
      p: 1 or 2.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``.

    Raises:
      ShapeError: if the shapes differ.

    Example:
      >>> ft(jnp.array([[3.0, 4.0]]), jnp.array([[6.0, 8.0]])).tolist(), ft(jnp.eye(2), jnp.eye(2)[::-1]).tolist()
      ([0.0], [1.0, 1.0])

    References:
      Kim, Park and Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018, equation 2.
    """
    same_shape(student, teacher)
    student, teacher = pair(student, teacher, mask)
    difference = jnp.abs(unit(flat(student)) - unit(flat(teacher))) ** p
    return mean_of_each(difference.reshape(student.shape), mask)


def fsp(
    student: tuple[jax.Array, jax.Array], teacher: tuple[jax.Array, jax.Array], *, mask: Mask | None = None
) -> jax.Array:
    """Return the mean squared difference of the flow of solution procedure, what lies between two layers.

    ``mean((G(s) - G(t))**2)`` with ``G[i, j] = mean(f[i] * g[j])`` over positions, f being the features where a stage begins
    and g those where it ends. Positions of student and teacher may differ; the two of a pair must agree (`resize`).

    Args:
      student: two arrays ``[batch, *positions, channels]``, any floating dtype, channels as the teacher's.
      teacher: two arrays.
      mask: which examples or positions count, see `masks`; one of positions must fit all four arrays.

    Returns:
      ``[batch]``.

    Raises:
      ShapeError: if the positions of a pair, or the channels of student and teacher, differ.

    Example:
      >>> f, g = jnp.ones((1, 4, 2)), jnp.ones((1, 4, 3))
      >>> fsp((f, g), (f, 3 * g)).tolist()
      [4.0]

    References:
      Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
      CVPR 2017, equations 1 and 2.
    """
    for own, other in zip(student, teacher, strict=True):
        same_batch(own, other)
        same_channels(own, other)
    begin, end = (pair(own, other, mask) for own, other in zip(student, teacher, strict=True))
    difference = _flow(begin[0], end[0], mask) - _flow(begin[1], end[1], mask)
    return jnp.square(flat(difference)).mean(axis=1)


def _flow(first: jax.Array, second: jax.Array, mask: Mask | None) -> jax.Array:
    """Return ``[batch, channels of first, channels of second]``."""
    if first.shape[:-1] != second.shape[:-1]:
        raise ShapeError(f"fsp pairs features of equal positions, got {first.shape} and {second.shape}: distill.resize one")
    counts = jnp.ones(first.shape[:-1]) if mask is None else of_features(mask, first) > 0
    number = jnp.maximum(counts.reshape(first.shape[0], -1).sum(axis=1), 1).astype(first.dtype)
    first, second = rows(bounded(first, 4)), rows(bounded(second, 4))
    return jnp.einsum("bpi,bpj->bij", first, second, precision="highest") / number[:, None, None]


def nst(student: jax.Array, teacher: jax.Array, *, mask: Mask | None = None) -> jax.Array:
    """Return the maximum mean discrepancy of where channels are active: neuron selectivity transfer.

    ``mean k(s_i, s_j) + mean k(t_i, t_j) - 2 mean k(s_i, t_j)`` with ``k(x, y) = (x . y)**2``, a channel being the vector of
    its values over positions, of norm 1. Numbers of channels may differ. The usual weight is 50.

    Args:
      student: ``[batch, *positions, channels]``, any floating dtype.
      teacher: ``[batch, *positions, other channels]``.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``, not below zero but for rounding.

    Raises:
      ShapeError: if batch or positions differ.

    Example:
      >>> nst(jnp.array([[[1.0], [0.0]]]), jnp.array([[[0.0], [7.0]]])).tolist()
      [2.0]

    References:
      Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, section 4 (polynomial
      kernel, d = 2, c = 0).
    """
    same_positions(student, teacher)
    s, t = (unit(rows(each), axis=1) for each in pair(student, teacher, mask))
    return _kernel(s, s) + _kernel(t, t) - 2 * _kernel(s, t)


def _kernel(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean over pairs of channels of the squared inner product, ``[batch]``."""
    return jnp.square(jnp.einsum("bpi,bpj->bij", x, y, precision="highest")).mean(axis=(1, 2))
