"""Losses on logits, each example's own: the mean over a batch is left to the caller. Finite at any finite logits."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from compress_jax.distill.softened import Scalar, bounded, log_distributions, pair, squared

Objective: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(student_logits, teacher_logits, labels) -> loss of each example``."""


def kl(student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
    """Return the divergence of the student's softened distribution from the teacher's, in float32.

    ``T**2 * KL(p_t || p_s) = T**2 * sum_c p_t[c] * (log p_t[c] - log p_s[c])`` with ``p = softmax(logits / T)``. The factor
    keeps the gradient's size: ``dL/dstudent_logits = T * (p_s - p_t)``, and ``p_s - p_t`` shrinks as ``1/T``.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape. A target: no gradient goes here, so that in mutual learning each of two students takes
        the other's logits as they are.
      temperature: T > 0, a number or a scalar array, such as an optax schedule's value at this step.

    Returns:
      ``[...]``, in nats: summed over classes. Its mean over examples is "batchmean".

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[jnp.log(3.0), 0.0]])
      >>> kl(student, teacher).round(4).tolist()
      [0.13079999387264252]

    References:
      Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2 (equation 2: the gradient).
    """
    log_student, log_teacher = log_distributions(student_logits, teacher_logits, temperature)
    return squared(temperature, (jnp.exp(log_teacher) * (log_teacher - log_student)).sum(axis=-1))


def mse(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Return the mean squared difference of the logits, in float32.

    ``1/C * sum_c (s[c] - t[c])**2``. For logits of equal means it is twice the limit of `kl` at infinite temperature.

    Args:
      student_logits: ``[..., classes]``, any floating dtype.
      teacher_logits: same shape; no gradient goes here.

    Returns:
      ``[...]``: the mean over classes. Beyond differences of about 1e19 it overflows float32, as its value does.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> mse(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]])).tolist()
      [2.0]

    References:
      Kim et al., "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", IJCAI 2021,
      equations 2 and 5.
    """
    student, teacher = pair(student_logits, teacher_logits)
    return jnp.square(student - teacher).mean(axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Return the cross entropy of the labels, in float32.

    ``-sum_c q[c] * log softmax(logits)[c]`` with ``q = (1 - label_smoothing) * onehot(label) + label_smoothing / C``.

    Args:
      logits: ``[..., classes]``, any floating dtype, any finite values.
      labels: integers ``[...]``.
      label_smoothing: share of the probability spread evenly over all classes, 0 to 1.

    Returns:
      ``[...]``, in nats.

    Example:
      >>> cross_entropy(jnp.zeros((1, 2)), jnp.array([0])).round(4).tolist()
      [0.6930999755859375]

    References:
      Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7 (smoothing).
    """
    logits = bounded(logits)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing == 0.0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * jax.nn.log_softmax(logits).mean(axis=-1)


def hard_label(student_logits: jax.Array, teacher_logits: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Return the cross entropy of the teacher's prediction, in float32: the teacher as a labeller.

    ``-sum_c q[c] * log softmax(s)[c]`` with ``q = (1 - label_smoothing) * onehot(argmax t) + label_smoothing / C``.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape; no gradient goes here. Of equal logits the first counts.
      label_smoothing: see `cross_entropy`.

    Returns:
      ``[...]``, in nats.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> hard_label(jnp.zeros((1, 2)), jnp.array([[0.0, 5.0]])).round(4).tolist()
      [0.6930999755859375]

    References:
      Touvron et al., "Training data-efficient image transformers and distillation through attention", ICML 2021, equation 3.
      Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7 (smoothing).
    """
    student, teacher = pair(student_logits, teacher_logits)
    return cross_entropy(student, teacher.argmax(axis=-1), label_smoothing)


def hinton(alpha: Scalar = 0.1, temperature: Scalar = 4.0, *, label_smoothing: float = 0.0) -> Objective:
    """Return the classical objective of distillation: part labels, part teacher.

    ``alpha * CE(student, label) + (1 - alpha) * T**2 * KL(p_t || p_s)``.

    Args:
      alpha: weight of the labels, 0 to 1. 0.1 with T = 4 is usual on CIFAR, 0.5 with T = 1 on ImageNet. It may be an array,
        such as an optax schedule's value at this step; only numbers are checked.
      temperature: T > 0, see `kl`.
      label_smoothing: of the labels, see `cross_entropy`.

    Returns:
      ``(student_logits, teacher_logits, labels) -> [...]``, the loss of each example.

    Raises:
      ValueError: if ``alpha`` or ``temperature`` is out of range.

    Example:
      >>> objective = hinton(alpha=0.5, temperature=2.0)
      >>> objective(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([1])).round(4).tolist()
      [0.3465999960899353]

    References:
      Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    if isinstance(alpha, (int, float)) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the share of the labels and must be 0 to 1, got {alpha}")
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def objective(student_logits: jax.Array, teacher_logits: jax.Array, labels: Any) -> jax.Array:
        hard = cross_entropy(student_logits, labels, label_smoothing)
        share = jnp.asarray(alpha, hard.dtype)
        return share * hard + (1 - share) * kl(student_logits, teacher_logits, temperature)

    return objective
