"""Losses on logits, one number per example; finite with finite gradients at any finite logits."""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.errors import ArgumentError
from compress_jax.distill._losses.temperature import (
    Scalar,
    bounded,
    largest,
    log_distributions,
    pair,
    squared,
)

Objective: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(student_logits, teacher_logits, labels) -> loss of each example``."""


def kl(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 1.0
) -> jax.Array:
    """Return the divergence of the student's softened distribution from the teacher's, in float32.

    ``T**2 * KL(p_t || p_s) = T**2 * sum_c p_t[c] * (log p_t[c] - log p_s[c])`` with
    ``p = softmax(logits / T)``. The factor keeps the gradient's size:
    ``dL/dstudent_logits = T * (p_s - p_t)``, and ``p_s - p_t`` shrinks as ``1/T``.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape. A target: no gradient goes here, so that in mutual learning each
        of two students takes the other's logits as they are.
      temperature: T > 0, a number or a scalar array, such as an optax schedule's value at this
        step.

    Returns:
      ``[...]``, in nats: summed over classes. Its mean over examples is "batchmean".

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[jnp.log(3.0), 0.0]])
      >>> kl(student, teacher).round(4).tolist()
      [0.13079999387264252]

    References:
      Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2
      (equation 2: the gradient).
    """
    log_student, log_teacher = log_distributions(student_logits, teacher_logits, temperature)
    return squared(temperature, (jnp.exp(log_teacher) * (log_teacher - log_student)).sum(axis=-1))


def mse(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Return the mean squared difference of the logits, in float32.

    ``1/C * sum_c (s[c] - t[c])**2``. For logits of equal means it is twice the limit of `kl` at
    infinite temperature.

    Args:
      student_logits: ``[..., classes]``, any floating dtype.
      teacher_logits: same shape; no gradient goes here.

    Returns:
      ``[...]``: the mean over classes. Beyond differences of about 1e19 it overflows float32, as
        its value does.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> mse(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]])).tolist()
      [2.0]

    References:
      Kim et al., "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge
      Distillation", IJCAI 2021, equations 2 and 5.
    """
    student, teacher = pair(student_logits, teacher_logits)
    return jnp.square(student - teacher).mean(axis=-1)


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Return the cross entropy of the labels, in float32.

    ``-sum_c q[c] * log softmax(logits)[c]`` with
    ``q = (1 - label_smoothing) * onehot(label) + label_smoothing / C``.

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
      Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016,
      section 7 (smoothing).
    """
    logits = bounded(logits)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing == 0.0:
        return loss
    # The cross entropy is linear in q: that of the label, and that of the uniform distribution.
    return (1 - label_smoothing) * loss - label_smoothing * jax.nn.log_softmax(logits).mean(axis=-1)


def hard_label(
    student_logits: jax.Array, teacher_logits: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Return the cross entropy of the teacher's prediction, in float32: the teacher as a labeler.

    ``-sum_c q[c] * log softmax(s)[c]`` with
    ``q = (1 - label_smoothing) * onehot(argmax t) + label_smoothing / C``.

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
      Touvron et al., "Training data-efficient image transformers and distillation through
      attention", ICML 2021, equation 3. Szegedy et al., "Rethinking the Inception Architecture for
      Computer Vision", CVPR 2016, section 7 (smoothing).
    """
    student, teacher = pair(student_logits, teacher_logits)
    return cross_entropy(student, teacher.argmax(axis=-1), label_smoothing)


def hinton(
    alpha: Scalar = 0.1, temperature: Scalar = 4.0, *, label_smoothing: float = 0.0
) -> Objective:
    """Return the classical objective of distillation: part labels, part teacher.

    ``alpha * CE(student, label) + (1 - alpha) * T**2 * KL(p_t || p_s)``.

    Args:
      alpha: weight of the labels, 0 to 1. 0.1 with T = 4 is usual on CIFAR, 0.5 with T = 1 on
        ImageNet. It may be an array, such as an optax schedule's value at this step; only numbers
        are checked.
      temperature: T > 0, see `kl`.
      label_smoothing: of the labels, see `cross_entropy`.

    Returns:
      ``(student_logits, teacher_logits, labels) -> [...]``, the loss of each example.

    Raises:
      ArgumentError: if ``alpha`` or ``temperature`` is out of range.

    Example:
      >>> objective = hinton(alpha=0.5, temperature=2.0)
      >>> objective(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([1])).round(4).tolist()
      [0.3465999960899353]

    References:
      Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    # The value of an array may be known only when the step runs: numbers alone are checked.
    if isinstance(alpha, (int, float)) and not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha is the share of the labels and must be 0 to 1, got {alpha}")
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise ArgumentError(f"temperature must be positive, got {temperature}")

    def objective(
        student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array
    ) -> jax.Array:
        hard = cross_entropy(student_logits, labels, label_smoothing)
        share = jnp.asarray(alpha, hard.dtype)
        return share * hard + (1 - share) * kl(student_logits, teacher_logits, temperature)

    return objective


def reverse_kl(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 1.0
) -> jax.Array:
    """Return the divergence of the teacher's softened distribution from the student's, in float32.

    ``T**2 * KL(p_s || p_t) = T**2 * sum_c p_s[c] * (log p_s[c] - log p_t[c])``: it seeks a mode,
    where `kl` covers all of them.
    ``dL/ds[c] = T * p_s[c] * (log p_s[c] - log p_t[c] - KL(p_s || p_t))``.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape; no gradient goes here.
      temperature: T > 0.

    Returns:
      ``[...]``, in nats.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> student, teacher = jnp.array([[jnp.log(3.0), 0.0]]), jnp.array([[0.0, 0.0]])
      >>> reverse_kl(student, teacher).round(4).tolist()
      [0.13079999387264252]

    References:
      Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, equation 1.
    """
    log_student, log_teacher = log_distributions(student_logits, teacher_logits, temperature)
    return squared(temperature, (jnp.exp(log_student) * (log_student - log_teacher)).sum(axis=-1))


def jsd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: Scalar = 1.0,
    beta: float = 0.5,
) -> jax.Array:
    """Return the generalized Jensen-Shannon divergence, in float32.

    ``T**2 * (beta * KL(p_t || m) + (1 - beta) * KL(p_s || m))`` with
    ``m = beta * p_t + (1 - beta) * p_s``. Divided by ``beta`` it tends to `kl` as beta goes to 0,
    and divided by ``1 - beta`` to `reverse_kl` as beta goes to 1; at 0 and at 1 themselves, where
    the formula would be zero, it is `kl` and `reverse_kl`. Between them it is at most
    ``T**2 * log 2``.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape; no gradient goes here.
      temperature: T > 0.
      beta: 0 (forward) to 1 (reverse), a number; 0.5 is the symmetric Jensen-Shannon divergence.

    Returns:
      ``[...]``, in nats.

    Raises:
      ShapeError: if the shapes of the logits differ.
      ArgumentError: if ``beta`` is out of range.

    Example:
      >>> jsd(jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 50.0]])).round(4).tolist()
      [0.6930999755859375]

    References:
      Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
      Mistakes", ICLR 2024, section 2 (generalised Jensen-Shannon divergence).
    """
    if not 0 <= beta <= 1:
        raise ArgumentError(f"beta must be 0 (forward) to 1 (reverse), got {beta}")
    # There the formula is 0 for any student; `kl` and `reverse_kl` are its limits, rescaled.
    if beta in (0, 1):
        return (kl, reverse_kl)[int(beta)](student_logits, teacher_logits, temperature)
    log_student, log_teacher = log_distributions(student_logits, teacher_logits, temperature)
    log_mixture = mixture(log_student, log_teacher, beta)
    teacher_kl = jnp.exp(log_teacher) * (log_teacher - log_mixture)  # [..., classes]
    student_kl = jnp.exp(log_student) * (log_student - log_mixture)
    return squared(temperature, (beta * teacher_kl + (1 - beta) * student_kl).sum(axis=-1))


def mixture(log_student: jax.Array, log_teacher: jax.Array, beta: float) -> jax.Array:
    """Return ``log(beta * p_t + (1 - beta) * p_s)`` for 0 < beta < 1."""
    return jnp.logaddexp(math.log(beta) + log_teacher, math.log1p(-beta) + log_student)


def total_variation(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Return the total variation distance of the two distributions, in float32, 0 to 1.

    ``1/2 * sum_c |p_s[c] - p_t[c]|`` at temperature 1. ``1 - `` this is the share of a student's
    samples that speculative decoding with the teacher accepts.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape; no gradient goes here.

    Returns:
      ``[...]``. There is no temperature, as a distance has no natural ``T**2``.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> teacher = jnp.array([[jnp.log(3.0), 0.0]])
      >>> total_variation(jnp.array([[0.0, 0.0]]), teacher).round(4).tolist()
      [0.25]

    References:
      Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023,
      section 3. Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative
      Decoding", ICML 2023, corollary 3.6.
    """
    log_student, log_teacher = log_distributions(student_logits, teacher_logits)
    return 0.5 * jnp.abs(jnp.exp(log_student) - jnp.exp(log_teacher)).sum(axis=-1)


def dkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: Scalar = 4.0,
) -> jax.Array:
    """Return the decoupled divergence of the student from the teacher, in float32.

    ``T**2 * (alpha * TCKD + beta * NCKD)``. With ``p = softmax(logits / T)`` and y the label,
    ``TCKD = KL((p_t[y], 1 - p_t[y]) || (p_s[y], 1 - p_s[y]))`` and ``NCKD = KL(r_t || r_s)``, where
    ``r[c] = p[c] / (1 - p[y])`` for the classes c other than y. `kl` is this with ``alpha = 1``
    and, for each example, ``beta = 1 - p_t[y]``. All of it is differences of logsumexps, so nothing
    is the logarithm of a rounded zero.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape; no gradient goes here.
      labels: integers ``[...]``.
      alpha: weight of the target's part.
      beta: weight of the other classes' part: 8 on CIFAR, 0.5 with T = 1 on ImageNet.
      temperature: T > 0.

    Returns:
      ``[...]``, in nats. The paper's objective is ``cross_entropy(s, y) + warmup * dkd(s, t, y)``,
      whose ``warmup`` is ``optax.linear_schedule(0.0, 1.0, transition_steps)`` over the first 20
      epochs.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> student, teacher = jnp.zeros((1, 3)), jnp.array([[2.0, 1.0, 0.0]])
      >>> f"{dkd(student, teacher, jnp.array([0]), temperature=1.0)[0]:.3f}"
      '1.117'

    References:
      Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, section 3 (the decoupling into
      TCKD and NCKD, and the loss that weighs them).
    """
    student, teacher = pair(student_logits, teacher_logits, temperature)
    target = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)
    far = -4 * largest(student.dtype, temperature, student.shape[-1])  # probability 0, yet finite
    # hit and miss are [...], the label against all other classes; others is [..., classes].
    student_hit, student_miss, student_others = _decouple(student, target, far)
    teacher_hit, teacher_miss, teacher_others = _decouple(teacher, target, far)
    tckd = _kl_term(teacher_hit, student_hit) + _kl_term(teacher_miss, student_miss)
    nckd = _kl_term(teacher_others, student_others).sum(axis=-1)
    alpha = jnp.asarray(alpha, tckd.dtype)
    beta = jnp.asarray(beta, tckd.dtype)
    return squared(temperature, alpha * tckd + beta * nckd)


def _decouple(
    logits: jax.Array, target: jax.Array, far: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ``log p[y]``, ``log(1 - p[y])`` and ``log r`` over all classes, about ``far`` at y."""
    others = jnp.where(target, far, logits)
    # The log-odds log(p[y] / (1 - p[y])): p[y] is their sigmoid, log sigmoid(x) = -softplus(-x).
    odds = jnp.where(target, logits, 0).sum(axis=-1) - jax.nn.logsumexp(others, axis=-1)
    return -jax.nn.softplus(-odds), -jax.nn.softplus(odds), jax.nn.log_softmax(others)


def _kl_term(log_teacher: jax.Array, log_student: jax.Array) -> jax.Array:
    return jnp.exp(log_teacher) * (log_teacher - log_student)
