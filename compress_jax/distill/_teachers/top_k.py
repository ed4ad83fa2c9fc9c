"""Compact teacher distributions: the top k classes, and one bucket for all others."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.distill._losses.logits import kl
from compress_jax.distill._losses.temperature import bounded, largest, squared
from compress_jax.distill._teachers.teacher import at_least_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """The likeliest classes of softened distributions, as a cache stores them.

    Attributes:
      ids: int32 ``[..., k]``, likeliest first.
      log_probs: float32 (or the cache's dtype) ``[..., k]``, at the temperature below.
      tail: float32 ``[...]``, the probability of all other classes together.
      temperature: temperature of the distributions, stored since a tail cannot be softened later.

    Example:
      >>> top_k(jnp.zeros((2, 5)), k=3).ids.shape
      (2, 3)
    """

    ids: jax.Array
    log_probs: jax.Array
    tail: jax.Array
    temperature: float = field(default=1.0, metadata={"static": True})


def top_k(teacher_logits: jax.Array, k: int, temperature: float = 1.0) -> TopK:
    """Return the k likeliest classes of a teacher and the probability of the rest.

    ``log softmax(t / T)`` of the k largest, and ``1 - sum`` of their probabilities, computed as the
    sum over the others.

    Args:
      teacher_logits: ``[..., classes]``, any floating dtype, any finite values. No gradient goes
        here.
      k: 1 to classes.
      temperature: T > 0, a number.

    Returns:
      A `TopK`.

    Raises:
      ArgumentError: if ``k`` is out of range.

    Example:
      >>> top = top_k(jnp.log(jnp.array([0.1, 0.6, 0.3])), k=2)
      >>> print(top.ids, jnp.exp(top.log_probs).round(3), top.tail.round(3))
      [1 2] [0.6 0.3] 0.1
    """
    if not 1 <= k <= teacher_logits.shape[-1]:
        raise ArgumentError(
            f"k must be 1 to {teacher_logits.shape[-1]}, the number of classes; got {k}"
        )
    log_p = jax.nn.log_softmax(bounded(jax.lax.stop_gradient(teacher_logits), temperature))
    log_probs, ids = jax.lax.top_k(log_p, k)  # [..., k]
    # Summed over the others: 1 minus the sum of the k would lose a small tail to rounding.
    tail = jnp.put_along_axis(jnp.exp(log_p), ids, 0, axis=-1, inplace=False).sum(axis=-1)
    return TopK(ids.astype(jnp.int32), log_probs, tail, temperature)


def top_k_kl(student_logits: jax.Array, top: TopK) -> jax.Array:
    """Return the divergence of the student from a teacher's top k classes, in float32.

    ``T**2 * (sum over the k of p_t * (log p_t - log p_s) + tail_t * (log tail_t - log tail_s))``,
    the student's tail being the probability of all its other classes: `kl` of the two distributions
    over k + 1 buckets. With ``k = classes`` it is `kl`, and it is never more. Its gradient reaches
    every class: those of the tail share one pull,
    ``dL/ds[c] = T * p_s[c] * (1 - tail_t / tail_s)``, which renormalizing over the k would lose.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      top: of the teacher, with leading axes as the student's; its temperature is used.

    Returns:
      ``[...]``, in nats.

    Raises:
      ShapeError: if the leading axes differ.

    Example:
      >>> student, teacher = jnp.zeros((1, 4)), jnp.log(jnp.array([[0.7, 0.1, 0.1, 0.1]]))
      >>> [f"{top_k_kl(student, top_k(teacher, k))[0]:.4f}" for k in (1, 4)]
      ['0.4458', '0.4458']

    References:
      Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL
      2025, section 3 (what truncation alone does to the gradient).
    """
    student, teacher = buckets(student_logits, top)
    return squared(top.temperature, kl(student, teacher))


def buckets(student_logits: jax.Array, top: TopK) -> tuple[jax.Array, jax.Array]:
    """Return both distributions over k + 1 buckets as logits, for any divergence.

    ``log p`` of the teacher's top k classes, at temperature 1, and last the logarithm of the
    probability of all others; where that is zero, a finite number below any log-probability.

    Args:
      student_logits: ``[..., classes]``, any floating dtype, any finite values.
      top: of the teacher, with leading axes as the student's; its temperature is used.

    Returns:
      ``(student, teacher)``, both ``[..., k + 1]``. Multiply a divergence of them by the squared
      temperature.

    Raises:
      ShapeError: if the leading axes differ.

    Example:
      >>> student, teacher = buckets(jnp.zeros(4), top_k(jnp.zeros(4), k=2))
      >>> print(jnp.exp(student).round(3), jnp.exp(teacher).round(3))
      [0.25 0.25 0.5 ] [0.25 0.25 0.5 ]
    """
    if student_logits.shape[:-1] != top.ids.shape[:-1]:
        shapes = f"{student_logits.shape[:-1]} and {top.ids.shape[:-1]}"
        raise ShapeError(
            "leading axes of student logits and of the teacher's top k must be the same, got "
            f"{shapes}"
        )
    log_q = jax.nn.log_softmax(bounded(student_logits, top.temperature))
    # Below every log-probability, so that the k classes add 0 to the tail; finite, for gradients.
    far = -4 * largest(log_q.dtype, top.temperature, log_q.shape[-1])
    others = jnp.put_along_axis(log_q, top.ids, far, axis=-1, inplace=False)
    log_tail_q = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    # [..., k + 1]
    student = jnp.concatenate([jnp.take_along_axis(log_q, top.ids, axis=-1), log_tail_q], axis=-1)
    # A cache may store bfloat16.
    log_probs, tail = (
        jax.lax.stop_gradient(at_least_float32(x)).astype(log_q.dtype)
        for x in (top.log_probs, top.tail)
    )
    log_tail = jnp.where(tail > 0, jnp.log(jnp.where(tail > 0, tail, 1)), far)
    return student, jnp.concatenate([log_probs, log_tail[..., None]], axis=-1)
