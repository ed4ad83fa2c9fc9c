"""DIST: correlation of probabilities within each example and within each class."""

import jax
import jax.numpy as jnp

from compress_jax.distill._losses.temperature import Scalar, log_distributions, squared
from compress_jax.distill._losses.transforms import unit
from compress_jax.distill._masks import Mask, fitted, kept


def dist(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 1.0,
    *,
    mask: Mask | None = None,
) -> jax.Array:
    """Return how badly the probabilities correlate over classes and over examples, in float32.

    ``T**2 * (beta * (1 - r(p_s[b, :], p_t[b, :])) + gamma * (1 - mean_c r(p_s[:, c], p_t[:, c])))``
    for example b, with ``p = softmax(logits / T)`` and r Pearson's correlation. The first part, of
    a row, is the example's own. The second, of the columns, belongs to the batch: every example
    gets the same, so that the mean over the batch is the paper's loss.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values. All leading axes
        together are the batch that columns run over: other examples in it change the second part,
        and so does a smaller microbatch.
      teacher_logits: same shape; no gradient goes here.
      beta: weight of the rows.
      gamma: weight of the columns.
      temperature: T > 0. The paper has ``beta = gamma = 1``, T = 1 on ImageNet and
        ``beta = gamma = 2``, T = 4 on CIFAR.
      mask: which examples or tokens count, see `masks`; columns run over those only, and the loss
        of the others is 0.

    Returns:
      ``[...]``. A row or column that is constant, to a relative 1e-4 of its length, has no
      meaningful correlation: it counts as 0 and its gradient is bounded.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> teacher = jnp.array([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
      >>> [f"{loss:.2f}" for loss in abs(dist(teacher, teacher))]
      ['0.00', '0.00']
      >>> [f"{loss:.2f}" for loss in dist(-teacher, teacher)]
      ['3.87', '3.81']

    References:
      Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, section 3
      (inter-class relation: rows; intra-class relation: columns).
    """
    leading = student_logits.shape[:-1]
    counts = jnp.ones(leading, bool)
    if mask is not None:
        counts = fitted(mask, leading, "the logits", examples=True).astype(bool)
        student_logits = kept(student_logits, counts)
        teacher_logits = kept(teacher_logits, counts)
    logs = log_distributions(student_logits, teacher_logits, temperature)
    counts = counts.ravel()
    # Columns run over all leading axes together: [examples, classes].
    student, teacher = (kept(jnp.exp(log).reshape(-1, log.shape[-1]), counts) for log in logs)
    there = jnp.broadcast_to(counts[:, None], student.shape)  # [examples, classes]
    # Over the classes of each example (inter-class), and over the examples of each class.
    rows = 1 - _correlation(student, teacher, axis=1, counts=there)
    columns = 1 - _correlation(student, teacher, axis=0, counts=there).mean()  # one number
    beta, gamma = (jnp.asarray(weight, rows.dtype) for weight in (beta, gamma))
    return kept(squared(temperature, beta * rows + gamma * columns), counts).reshape(leading)


def _correlation(x: jax.Array, y: jax.Array, axis: int, counts: jax.Array) -> jax.Array:
    """Return Pearson's correlation of probabilities along an axis, over the entries that count."""
    x = unit(x, axis, _floor(x, axis), counts)
    y = unit(y, axis, _floor(y, axis), counts)
    return (x * y).sum(axis)


def _floor(x: jax.Array, axis: int) -> jax.Array:
    """Return the length below which differences are noise.

    It is relative to the length of ``x``, as the columns of rare classes are small.
    """
    largest = x.max(axis, keepdims=True)
    # Squares of the probabilities themselves would underflow in the columns of rare classes.
    scaled = x / jnp.maximum(largest, 1e-30)
    length = largest * jnp.sqrt(jnp.square(scaled).sum(axis, keepdims=True))
    return jax.lax.stop_gradient(jnp.maximum(1e-4 * length, 1e-30))
