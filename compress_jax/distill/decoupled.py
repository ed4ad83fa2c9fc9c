"""Decoupled distillation: the target's share of the Kullback-Leibler divergence and that of the other classes, apart."""

import jax
import jax.numpy as jnp

from compress_jax.distill.softened import Scalar, largest, pair, squared


def dkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
) -> jax.Array:
    """Return the decoupled divergence of the student from the teacher, in float32; add the labels' cross entropy yourself.

    ``T**2 * (alpha * TCKD + beta * NCKD)``. With ``p = softmax(logits / T)`` and y the label,
    ``TCKD = KL((p_t[y], 1 - p_t[y]) || (p_s[y], 1 - p_s[y]))`` and ``NCKD = KL(r_t || r_s)``, where
    ``r[c] = p[c] / (1 - p[y])`` for the classes c other than y. `kl` is this with ``alpha = 1`` and, for each example,
    ``beta = 1 - p_t[y]``. All of it is differences of logsumexps, so nothing is the logarithm of a rounded zero.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape; no gradient goes here.
      labels: integers ``[...]``.
      alpha: weight of the target's part.
      beta: weight of the other classes' part: 8 on CIFAR, 0.5 with T = 1 on ImageNet.
      temperature: T > 0.

    Returns:
      ``[...]``, in nats. The paper's objective is ``cross_entropy(s, y) + warmup * dkd(s, t, y)``, whose ``warmup`` is
      ``optax.linear_schedule(0.0, 1.0, transition_steps)`` over the first 20 epochs.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> student, teacher = jnp.zeros((1, 3)), jnp.array([[2.0, 1.0, 0.0]])
      >>> f"{dkd(student, teacher, jnp.array([0]), temperature=1.0)[0]:.3f}"
      '1.117'

    References:
      Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, section 3 (the decoupling into TCKD and NCKD,
      and the loss that weighs them).
    """
    student, teacher = pair(student_logits, teacher_logits, temperature)
    target = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)
    far = -4 * largest(student.dtype, temperature, student.shape[-1])  # finite, and yet of probability zero
    student_hit, student_miss, student_others = _decouple(student, target, far)
    teacher_hit, teacher_miss, teacher_others = _decouple(teacher, target, far)
    of_target = _term(teacher_hit, student_hit) + _term(teacher_miss, student_miss)
    of_others = _term(teacher_others, student_others).sum(axis=-1)
    alpha, beta = (jnp.asarray(weight, of_target.dtype) for weight in (alpha, beta))
    return squared(temperature, alpha * of_target + beta * of_others)


def _decouple(logits: jax.Array, target: jax.Array, far: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ``log p[y]``, ``log(1 - p[y])`` and, over all classes, ``log r``: that of y itself is about ``far``."""
    others = jnp.where(target, far, logits)
    odds = jnp.where(target, logits, 0).sum(axis=-1) - jax.nn.logsumexp(others, axis=-1)
    return -jax.nn.softplus(-odds), -jax.nn.softplus(odds), jax.nn.log_softmax(others)


def _term(log_teacher: jax.Array, log_student: jax.Array) -> jax.Array:
    return jnp.exp(log_teacher) * (log_teacher - log_student)
