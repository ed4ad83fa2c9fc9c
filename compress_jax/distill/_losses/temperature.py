"""Logits divided by a temperature, as distributions in float32, finite at any finite logits."""

import jax
import jax.numpy as jnp

from compress_jax.core import ShapeError, straight_through
from compress_jax.distill._teachers.teacher import at_least_float32

Scalar = float | jax.Array

_clip = straight_through(jnp.clip)


def bounded(logits: jax.Array, temperature: Scalar = 1.0, classes: int | None = None) -> jax.Array:
    """Return ``logits / temperature`` in float32, clipped so that any loss of them is finite.

    The bound, about 1e37 divided by the number of classes and ``temperature**2``, leaves room for
    differences, sums over classes and the factor ``temperature**2``. It is straight-through:
    gradients are those of the unbounded loss.

    Args:
      logits: ``[..., classes]``, any floating dtype.
      temperature: T > 0.
      classes: number of classes that are summed over, where that is not the last axis.

    Returns:
      An array of the shape of the logits.
    """
    logits = at_least_float32(logits)
    temperature = jnp.asarray(temperature, logits.dtype)
    bound = largest(logits.dtype, temperature, classes or logits.shape[-1])
    return _clip(logits / temperature, -bound, bound)


def largest(dtype: jnp.dtype, temperature: Scalar, classes: int) -> jax.Array:
    """Return the bound of `bounded`: the largest absolute value of a softened logit."""
    # T**2 multiplies the loss; below T = 1 it makes the loss smaller, so that no room is needed.
    temperature = jnp.maximum(jnp.asarray(temperature, dtype), 1)
    # 32: a difference of two logits is up to 2 bounds, and losses are sums of a few of them.
    return jnp.finfo(dtype).max / 32 / classes / temperature**2


def pair(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Return both bounded softened logits; no gradient goes to the teacher's.

    Raises:
      ShapeError: if their shapes differ, which would otherwise broadcast or fail far from here.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ShapeError(
            f"student logits {student_logits.shape} and teacher logits {teacher_logits.shape} "
            "must have the same shape, [..., classes]; drop the classes that only one of them "
            "knows, or use a loss on features"
        )
    student = bounded(student_logits, temperature)
    teacher = jax.lax.stop_gradient(bounded(teacher_logits, temperature))
    return student, teacher


def log_distributions(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Return ``log softmax(logits / T)`` of student and teacher; the teacher gets no gradient."""
    student, teacher = pair(student_logits, teacher_logits, temperature)
    return jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)


def squared(temperature: Scalar, loss: jax.Array) -> jax.Array:
    """Return ``T**2 * loss``, which undoes the factor ``1 / T**2`` of softened gradients."""
    return jnp.asarray(temperature, loss.dtype) ** 2 * loss
