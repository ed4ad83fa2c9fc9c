"""Losses on features before their ReLU, where only positive values matter.

``[batch, *positions, channels] -> [batch]``, float32, masks as in `features`.
"""

import jax
import jax.numpy as jnp

from compress_jax.distill._losses.shapes import (
    SMALLEST,
    bounded,
    frozen,
    pair,
    per_channel,
    same_shape,
)
from compress_jax.distill._masks import Mask, mean_of_positions
from compress_jax.distill._teachers.teacher import at_least_float32


def ab(
    student: jax.Array, teacher: jax.Array, margin: float = 1.0, *, mask: Mask | None = None
) -> jax.Array:
    """Return the hinge loss between the activation boundaries of student and teacher.

    ``mean(relu(margin - s)**2 where t > 0, relu(margin + s)**2 elsewhere)``, of features before the
    ReLU: the boundary between on and off is matched, with a margin, and the size of activations is
    not. The paper has the sum over neurons.

    Args:
      student: ``[batch, *positions, channels]`` before the ReLU, any floating dtype.
      teacher: same shape.
      margin: how far beyond zero is far enough.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``, or ``[batch, *positions]``; 0 where all neurons are on the teacher's side by the
      margin.

    Raises:
      ShapeError: if the shapes differ.

    Example:
      >>> ab(jnp.array([[2.0, -2.0, 0.5, 0.0]]), jnp.array([[0.1, -9.0, 1.0, -1.0]])).tolist()
      [0.3125]

    References:
      Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
      Neurons", AAAI 2019, the alternative loss with a margin.
    """
    same_shape(student, teacher)
    student, teacher = pair(student, teacher, mask)
    student = bounded(student, 2)
    missing = jax.nn.relu(margin + jnp.where(teacher > 0, -student, student))
    return mean_of_positions(jnp.square(missing), mask)


def ofd(
    student: jax.Array, teacher: jax.Array, margin: jax.Array, *, mask: Mask | None = None
) -> jax.Array:
    """Return overhauled feature distillation: a partial squared distance after a margin ReLU.

    With ``t' = max(t, margin)``: ``mean(0 where s <= t' <= 0, (s - t')**2 elsewhere)``. What the
    teacher's ReLU removes need only be removed too. The reference code has the sum over features,
    times 1e-3.

    Args:
      student: ``[batch, *positions, channels]`` before the ReLU, any floating dtype, after a
        regressor.
      teacher: same shape, before the ReLU.
      margin: ``[channels]``, below zero, from `ofd_margin`.
      mask: which examples or positions count, see `masks`.

    Returns:
      ``[batch]``; with a mask of positions ``[batch, *positions]``.

    Raises:
      ShapeError: if the shapes differ.

    Example:
      >>> ofd(jnp.array([[-5.0, 1.0]]), jnp.array([[-9.0, 3.0]]), jnp.array([-0.5, -0.5])).tolist()
      [2.0]

    References:
      Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, section 3 (margin
      ReLU, partial L2).
    """
    same_shape(student, teacher)
    student, teacher = pair(student, teacher, mask)
    target = jnp.maximum(teacher, per_channel(frozen(margin), teacher.ndim))
    student = bounded(student, 2)
    target = bounded(target, 2)
    # Elsewhere both are off, and the student by more than the target asks for.
    wanted = (student > target) | (target > 0)
    return mean_of_positions(jnp.square(jnp.where(wanted, student - target, 0.0)), mask)


def ofd_margin(scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the mean of a batch norm's negative outputs, the margin of `ofd`.

    A channel's outputs are normal with mean ``bias`` and deviation ``abs(scale)``, so that with
    ``z = bias / abs(scale)`` ``E[x | x < 0] = bias - abs(scale) * phi(z) / Phi(-z)``. (The
    reference code has ``-3 * abs(scale)`` instead where fewer than 0.1 % are negative, ten times
    what the formula says there.)

    Args:
      scale: ``[channels]`` of the teacher's batch norm before the ReLU, any floating dtype.
      bias: ``[channels]``.

    Returns:
      ``[channels]``, below zero or, where nothing is negative, zero; float32, accurate to 1e-3 of
      itself.

    Example:
      >>> [f"{margin:.4f}" for margin in ofd_margin(jnp.array([1.0, 1.0]), jnp.array([0.0, 10.0]))]
      ['-0.7979', '-0.0981']

    References:
      Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, section 3 (margin
      ReLU).
    """
    deviation = jnp.maximum(jnp.abs(at_least_float32(scale)), SMALLEST)
    bias = at_least_float32(bias)
    z = bias / deviation
    # From z = 8 on, z and the ratio cancel; the asymptotic series of their difference does not.
    tail = jnp.maximum(z, 8.0)
    series = -(1 - 2 / tail**2 + 10 / tail**4 - 74 / tail**6) / tail
    # From z = -30 down all outputs are negative and their mean is the bias.
    near = jnp.clip(z, -30.0, 8.0)
    # phi(z) / Phi(-z) by logarithms: Phi(-8) is 6e-16, and 1 - Phi(8) would be 0 in float32.
    ratio = jnp.exp(jax.scipy.stats.norm.logpdf(near) - jax.scipy.stats.norm.logcdf(-near))
    return jnp.where(z < -30.0, bias, deviation * jnp.where(z > 8.0, series, near - ratio))
