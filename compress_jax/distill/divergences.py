"""Other distances between the two distributions: reverse and generalised Jensen-Shannon divergence, total variation."""

import math

import jax
import jax.numpy as jnp

from compress_jax.distill.logits import kl
from compress_jax.distill.softened import Scalar, log_distributions, squared


def reverse_kl(student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 1.0) -> jax.Array:
    """Return the divergence of the teacher's softened distribution from the student's, in float32.

    ``T**2 * KL(p_s || p_t) = T**2 * sum_c p_s[c] * (log p_s[c] - log p_t[c])``: it seeks a mode, where `kl` covers all of
    them. ``dL/ds[c] = T * p_s[c] * (log p_s[c] - log p_t[c] - KL(p_s || p_t))``.

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


def jsd(student_logits: jax.Array, teacher_logits: jax.Array, temperature: Scalar = 1.0, beta: float = 0.5) -> jax.Array:
    """Return the generalised Jensen-Shannon divergence, in float32.

    ``T**2 * (beta * KL(p_t || m) + (1 - beta) * KL(p_s || m))`` with ``m = beta * p_t + (1 - beta) * p_s``. Divided by
    ``beta`` it tends to `kl` as beta goes to 0, and divided by ``1 - beta`` to `reverse_kl` as beta goes to 1; at 0 and at 1
    themselves, where the formula would be zero, it is `kl` and `reverse_kl`. Between them it is at most ``T**2 * log 2``.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape; no gradient goes here.
      temperature: T > 0.
      beta: 0 (forward) to 1 (reverse), a number; 0.5 is the symmetric Jensen-Shannon divergence.

    Returns:
      ``[...]``, in nats.

    Raises:
      ShapeError: if the shapes of the logits differ.
      ValueError: if ``beta`` is out of range.

    Example:
      >>> jsd(jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 50.0]])).round(4).tolist()
      [0.6930999755859375]

    References:
      Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", ICLR 2024,
      section 2 (generalised Jensen-Shannon divergence).
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be 0 (forward) to 1 (reverse), got {beta}")
    if beta in (0, 1):
        return (kl, reverse_kl)[int(beta)](student_logits, teacher_logits, temperature)
    log_student, log_teacher = log_distributions(student_logits, teacher_logits, temperature)
    log_mixture = mixture(log_student, log_teacher, beta)
    of_teacher = jnp.exp(log_teacher) * (log_teacher - log_mixture)
    of_student = jnp.exp(log_student) * (log_student - log_mixture)
    return squared(temperature, (beta * of_teacher + (1 - beta) * of_student).sum(axis=-1))


def mixture(log_student: jax.Array, log_teacher: jax.Array, beta: float) -> jax.Array:
    """Return ``log(beta * p_t + (1 - beta) * p_s)`` for 0 < beta < 1."""
    return jnp.logaddexp(math.log(beta) + log_teacher, math.log1p(-beta) + log_student)


def total_variation(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Return the total variation distance of the two distributions, in float32, 0 to 1.

    ``1/2 * sum_c |p_s[c] - p_t[c]|`` at temperature 1. ``1 - `` this is the share of a student's samples that speculative
    decoding with the teacher accepts.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      teacher_logits: same shape; no gradient goes here.

    Returns:
      ``[...]``. There is no temperature, as a distance has no natural ``T**2``.

    Raises:
      ShapeError: if the shapes of the logits differ.

    Example:
      >>> total_variation(jnp.array([[0.0, 0.0]]), jnp.array([[jnp.log(3.0), 0.0]])).round(4).tolist()
      [0.25]

    References:
      Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023, section 3.
      Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", ICML 2023, corollary 3.6.
    """
    log_student, log_teacher = log_distributions(student_logits, teacher_logits)
    return 0.5 * jnp.abs(jnp.exp(log_student) - jnp.exp(log_teacher)).sum(axis=-1)
