"""What shapes of features a loss takes: checks whose errors say what to do, and the layouts losses compute in."""

from typing import Any

import jax

from compress_jax.core.errors import ShapeError
from compress_jax.distill.masks import Mask, kept, of_features
from compress_jax.distill.teacher import at_least_float32

CHANNELS = "bring the student's channels to the teacher's by a regressor part (distill.linear, conv, deconv)"
POSITIONS = "bring one of them to the other's positions by distill.resize or by a part with a stride (distill.conv, deconv)"


def same_shape(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless features have one shape, batch included.

    Example:
      >>> import jax.numpy as jnp
      >>> same_shape(jnp.ones((2, 4)), jnp.ones((2, 4)))
    """
    same_positions(student, teacher)
    same_channels(student, teacher)


def same_channels(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless features agree in the last axis, the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> same_channels(jnp.ones((2, 8, 8, 4)), jnp.ones((2, 4)))
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ShapeError(f"{_both(student, teacher)} differ in channels: {CHANNELS}")


def same_positions(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless features agree in all but the last axis, the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> same_positions(jnp.ones((2, 8, 8, 4)), jnp.ones((2, 8, 8, 16)))
    """
    same_batch(student, teacher)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ShapeError(f"{_both(student, teacher)} differ in positions, the axes between: {POSITIONS}")


def same_batch(student: Any, teacher: Any) -> None:
    """Raise a ShapeError unless features are ``[batch, ..., channels]`` of one batch.

    Example:
      >>> import jax.numpy as jnp
      >>> same_batch(jnp.ones((2, 4)), jnp.ones((2, 8, 8, 16)))
    """
    if min(student.ndim, teacher.ndim) < 2:
        raise ShapeError(f"{_both(student, teacher)} must be [batch, ..., channels]: give the batch an axis of its own")
    if student.shape[0] != teacher.shape[0]:
        raise ShapeError(f"{_both(student, teacher)} are of different numbers of examples: give both models the same batch")


def _both(student: Any, teacher: Any) -> str:
    return f"the student's features {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}"


def frozen(teacher: Any) -> jax.Array:
    """Return the teacher's features in float32, cut off from gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> jax.grad(lambda x: frozen(x).sum())(jnp.ones(2)).tolist()
      [0.0, 0.0]
    """
    return at_least_float32(jax.lax.stop_gradient(teacher))


def pair(student: jax.Array, teacher: jax.Array, mask: Mask | None) -> tuple[jax.Array, jax.Array]:
    """Return both features in float32, zero where the mask says so, the teacher's cut off from gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> pair(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.array([False]))[0].tolist()
      [[0.0, 0.0]]
    """
    student, teacher = at_least_float32(student), frozen(teacher)
    if mask is None:
        return student, teacher
    counts = of_features(mask, student, "the student's features"), of_features(mask, teacher, "the teacher's features")
    return kept(student, counts[0]), kept(teacher, counts[1])


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
