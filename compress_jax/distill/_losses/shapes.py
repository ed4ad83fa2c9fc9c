"""Checks of feature shapes, layouts, and norms that are finite at any finite features."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from compress_jax.core import straight_through
from compress_jax.core.errors import ShapeError
from compress_jax.distill._masks import Mask, kept, of_features
from compress_jax.distill._teachers.teacher import at_least_float32

CHANNELS = (
    "bring the student's channels to the teacher's by an adapter (distill.linear, conv, deconv)"
)
POSITIONS = (
    "bring one of them to the other's positions by distill.resize_features or by an adapter with a "
    "stride (distill.conv, deconv)"
)


def same_shape(student: jax.Array, teacher: jax.Array) -> None:
    """Raise a ShapeError unless features have one shape, batch included.

    Example:
      >>> import jax.numpy as jnp
      >>> same_shape(jnp.ones((2, 4)), jnp.ones((2, 4)))
    """
    same_positions(student, teacher)
    same_channels(student, teacher)


def same_channels(student: jax.Array, teacher: jax.Array) -> None:
    """Raise a ShapeError unless features agree in the last axis, the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> same_channels(jnp.ones((2, 8, 8, 4)), jnp.ones((2, 4)))
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ShapeError(f"{_both(student, teacher)} differ in channels: {CHANNELS}")


def same_positions(student: jax.Array, teacher: jax.Array) -> None:
    """Raise a ShapeError unless features agree in all but the last axis, the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> same_positions(jnp.ones((2, 8, 8, 4)), jnp.ones((2, 8, 8, 16)))
    """
    same_batch(student, teacher)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(
            f"{_both(student, teacher)} differ in positions, the axes between: {POSITIONS}"
        )


def same_batch(student: jax.Array, teacher: jax.Array) -> None:
    """Raise a ShapeError unless features are ``[batch, ..., channels]`` of one batch.

    Example:
      >>> import jax.numpy as jnp
      >>> same_batch(jnp.ones((2, 4)), jnp.ones((2, 8, 8, 16)))
    """
    if min(student.ndim, teacher.ndim) < 2:
        raise ShapeError(
            f"{_both(student, teacher)} must be [batch, ..., channels]: give the batch an axis of "
            "its own"
        )
    if student.shape[0] != teacher.shape[0]:
        raise ShapeError(
            f"{_both(student, teacher)} are of different numbers of examples: give both models "
            "the same batch"
        )


def _both(student: jax.Array, teacher: jax.Array) -> str:
    return f"the student's features {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}"


def frozen(teacher: jax.Array) -> jax.Array:
    """Return the teacher's features in float32, cut off from gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.grad(lambda x: frozen(x).sum())(jnp.ones(2)).tolist()
      [0.0, 0.0]
    """
    return at_least_float32(jax.lax.stop_gradient(teacher))


def pair(student: jax.Array, teacher: jax.Array, mask: Mask | None) -> tuple[jax.Array, jax.Array]:
    """Return both features in float32 with masked entries zero, the teacher's without gradient.

    Example:
      >>> import jax.numpy as jnp
      >>> pair(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.array([False]))[0].tolist()
      [[0.0, 0.0]]
    """
    student = at_least_float32(student)
    teacher = frozen(teacher)
    if mask is None:
        return student, teacher
    student_counts = of_features(mask, student, "the student's features")
    teacher_counts = of_features(mask, teacher, "the teacher's features")
    return kept(student, student_counts), kept(teacher, teacher_counts)


def flat(features: jax.Array) -> jax.Array:
    """Return features as ``[batch, all the rest]``.

    Example:
      >>> import jax.numpy as jnp
      >>> flat(jnp.ones((2, 8, 8, 4))).shape
      (2, 256)
    """
    return features.reshape(features.shape[0], -1)


def rows(features: jax.Array) -> jax.Array:
    """Return features as ``[batch, positions, channels]``.

    Example:
      >>> import jax.numpy as jnp
      >>> rows(jnp.ones((2, 8, 8, 4))).shape, rows(jnp.ones((2, 4))).shape
      ((2, 64, 4), (2, 1, 4))
    """
    return features.reshape(features.shape[0], -1, features.shape[-1])


def per_channel(values: jax.Array, ndim: int) -> jax.Array:
    """Return ``[channels]`` with axes of 1 before it, to go with features of some rank.

    Example:
      >>> import jax.numpy as jnp
      >>> per_channel(jnp.ones(4), 3).shape
      (1, 1, 4)
    """
    return values.reshape((1,) * (ndim - 1) + (-1,))


# Norms, directions and bounds, finite with finite gradients at any finite features.

SMALLEST = 1e-12
"""Vectors up to this size count as zero and get no gradient; gradients are at most its inverse."""

Axes = int | Sequence[int] | None

_clip = straight_through(jnp.clip)


def bounded(x: jax.Array, power: int) -> jax.Array:
    """Return ``x`` in float32, clipped so that a weighted sum of its entries to a power is finite.

    The bound is 1e7 times 100 for power 4 and millions of entries, more for less. It is
    straight-through: gradients are those of the bounded value, never zero.

    Args:
      x: any floating array.
      power: the power of the features in the loss: 2 for a squared difference.

    Returns:
      ``x``, clipped.

    Example:
      >>> bool(jnp.isfinite(jnp.square(bounded(jnp.array([3e38, -1.0]), 2)).sum()))
      True
    """
    x = at_least_float32(x)
    # Differences are up to twice the bound; 1e6 leaves room for weights and other factors.
    bound = (float(jnp.finfo(x.dtype).max) / 1e6 / max(x.size, 1)) ** (1 / power) / 2
    return _clip(x, -bound, bound)


def rescaled(x: jax.Array, axis: Axes = None) -> jax.Array:
    """Return ``x / max(abs(x))`` in float32, the maximum over some axes; zeros stay zeros.

    The divisor counts as a constant for gradients, which makes no difference to a loss that does
    not depend on scale.

    Args:
      x: any floating array.
      axis: axes that share one scale; None for all.

    Returns:
      Values from -1 to 1, the shape of ``x``.

    Example:
      >>> rescaled(jnp.array([[1e38, -2e38], [0.0, 0.0]]), axis=1).tolist()
      [[0.5, -1.0], [0.0, 0.0]]
    """
    # XLA may multiply by the divisor's inverse, and that of the largest floats is flushed to 0.
    x = at_least_float32(x) / 16
    size = jax.lax.stop_gradient(jnp.abs(x).max(axis=axis, keepdims=True))
    nonzero = size > SMALLEST / 16
    # The inner where keeps 0 / 0, and its NaN gradient, out of the branch that is not taken.
    return jnp.where(nonzero, x / jnp.where(nonzero, size, 1.0), 0.0)


def length(x: jax.Array, axis: Axes = -1, keepdims: bool = False) -> jax.Array:
    """Return the Euclidean norm over some axes, with gradient 0 at 0.

    Args:
      x: float32, of entries not near the largest float.
      axis: axes of one vector.
      keepdims: keep those axes, as 1.

    Returns:
      The norms.

    Example:
      >>> jax.grad(length)(jnp.zeros(2)).tolist(), float(length(jnp.array([3.0, 4.0])))
      ([0.0, 0.0], 5.0)
    """
    size = jax.lax.stop_gradient(jnp.abs(x).max(axis=axis, keepdims=True))
    square = jnp.square(rescaled(x, axis)).sum(axis=axis, keepdims=True)
    # The root's gradient at 0 is infinite, and times 0 it would be NaN: hence the inner where.
    norm = size * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return norm if keepdims else norm.squeeze(axis)


def unit(x: jax.Array, axis: Axes = -1) -> jax.Array:
    """Return ``x / norm(x)`` in float32; 0, with gradient 0, for a vector of zeros.

    Args:
      x: any floating array.
      axis: axes of one vector.

    Returns:
      Vectors of norm 1 or 0, the shape of ``x``.

    Example:
      >>> unit(jnp.array([[1e38, 0.0], [0.0, 0.0]])).tolist()
      [[1.0, 0.0], [0.0, 0.0]]
    """
    x = rescaled(x, axis)
    square = jnp.square(x).sum(axis=axis, keepdims=True)  # 0, or 1 to the number of entries
    return x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))
