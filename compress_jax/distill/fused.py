"""Divergence and cross entropy of a student's and a teacher's head over a large vocabulary, without all their logits.

Forward, one pass over slices of the vocabulary (two for the Jensen-Shannon divergence) keeps a few sums of each token.
Backward, every slice of logits is computed again, and given those sums its gradient is known at once.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.distill.divergences import mixture
from compress_jax.distill.online import Cross, Running, Softmax
from compress_jax.distill.slices import Head, join, over_columns, split, wide_matmul
from compress_jax.distill.softened import squared


class Plan(NamedTuple):
    """What is static: the divergence, ``beta`` as in `jsd`, and how many columns and tokens are seen at a time."""

    beta: float
    chunk: int
    block: int | None


class Sums(NamedTuple):
    """Of each token: both softened softmaxes, a mean that the divergence's gradient needs, the student's at T = 1."""

    student: Softmax
    teacher: Softmax
    mean: jax.Array
    plain: Softmax | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(plan: Plan, student: Head, teacher: Head, labels: Any, temperature: jax.Array) -> tuple[jax.Array, Any]:
    """Return ``T**2`` times the divergence and, given labels, the cross entropy of each token; gradients go to the student.

    Args:
      plan: the divergence and the sizes.
      student: hidden states and head.
      teacher: hidden states and head, for the same tokens and vocabulary.
      labels: integers ``[tokens]``, or None.
      temperature: of the divergence, a scalar array.

    Returns:
      ``(divergence, cross entropy)``, each ``[tokens]``; the latter is None without labels.
    """
    return _forward(plan, student, teacher, labels, temperature)[0]


def _forward(plan: Plan, student: Head, teacher: Head, labels: Any, temperature: jax.Array) -> tuple[Any, Any]:
    def one(block: Any) -> tuple[Any, Sums]:
        hidden, teacher_hidden, of_labels = block
        return _losses(plan, Head(hidden, student.kernel), Head(teacher_hidden, teacher.kernel), of_labels, temperature)

    blocks = split((student.hidden, teacher.hidden, labels), plan.block)
    losses, sums = join(jax.lax.map(one, blocks), len(student.hidden))
    return losses, (student, teacher, labels, temperature, sums)


def _losses(plan: Plan, student: Head, teacher: Head, labels: Any, temperature: jax.Array) -> tuple[Any, Sums]:
    """Return the losses of a block of tokens and the sums that their gradients need."""
    like = wide_matmul(student.hidden[:, :1], student.kernel[:1, 0])

    def add(carry: Any, start: Any, width: int) -> Any:
        cross, plain, at_label = carry
        s, t = (head.logits(start, width, temperature) for head in (student, teacher))
        cross = cross.add(s, t) if plan.beta == 1 else cross.add(t, s)
        if labels is not None:
            hard = student.logits(start, width, 1.0)
            plain, at_label = plain.add(hard), at_label + jnp.where(_hit(labels, start, width), hard, 0).sum(axis=-1)
        return cross, plain, at_label

    start = (Cross.none(like), Running.none(like), jnp.zeros_like(like))
    cross, plain, at_label = over_columns(add, start, student.kernel.shape[1], plan.chunk)
    of_student, of_teacher = (cross.p, cross.q) if plan.beta == 1 else (cross.q, cross.p)
    sums = Sums(of_student.done(), of_teacher.done(), cross.divergence(), None if labels is None else plain.done())
    divergence = sums.mean
    if plan.beta not in (0, 1):
        divergence, mean = _mixed(plan, student, teacher, sums, temperature)
        sums = sums._replace(mean=mean)
    hard = None if sums.plain is None else sums.plain.log_sum + (sums.plain.top - at_label)
    return (squared(temperature, divergence), hard), sums


def _mixed(plan: Plan, student: Head, teacher: Head, sums: Sums, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the generalised Jensen-Shannon divergence of each token and its student's part, both from a second pass."""

    def add(carry: Any, start: Any, width: int) -> Any:
        log_q = sums.student.log_probs(student.logits(start, width, temperature))
        log_p = sums.teacher.log_probs(teacher.logits(start, width, temperature))
        log_m = mixture(log_q, log_p, plan.beta)
        parts = ((jnp.exp(log) * (log - log_m)).sum(axis=-1) for log in (log_p, log_q))
        return tuple(total + part for total, part in zip(carry, parts, strict=True))

    zero = jnp.zeros_like(sums.mean)
    of_teacher, of_student = over_columns(add, (zero, zero), student.kernel.shape[1], plan.chunk)
    return plan.beta * of_teacher + (1 - plan.beta) * of_student, (1 - plan.beta) * of_student


def _hit(labels: jax.Array, start: Any, width: int) -> jax.Array:
    """Tell which of some columns ``[tokens, width]`` is the label."""
    return labels[:, None] - start == jnp.arange(width, dtype=labels.dtype)[None]


def _slope(beta: float, log_q: jax.Array, log_p: jax.Array, mean: jax.Array) -> jax.Array:
    """Return the gradient of the divergence to the student's softened logits, of some columns."""
    if beta == 0:
        return jnp.exp(log_q) - jnp.exp(log_p)
    pull = log_q - log_p if beta == 1 else (1 - beta) * (log_q - mixture(log_q, log_p, beta))
    return jnp.exp(log_q) * (pull - mean[:, None])


def _backward(plan: Plan, kept: Any, cotangents: Any) -> tuple[Head, None, None, None]:
    student, teacher, labels, temperature, sums = kept
    blocks = split((student.hidden, teacher.hidden, labels, sums, cotangents), plan.block)

    def columns(carry: Any, start: Any, width: int) -> Any:
        to_hidden, to_kernel = carry
        kernel = student.columns(start, width)

        def add(to_columns: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
            hidden, teacher_hidden, *rest = block
            heads = Head(hidden, student.kernel), Head(teacher_hidden, teacher.kernel)
            slope = _slope_of_losses(plan, (*heads, *rest), temperature, start, width)
            return to_columns + wide_matmul(hidden.T, slope), wide_matmul(slope, kernel.T)

        to_columns, to_blocks = jax.lax.scan(add, jnp.zeros_like(kernel, to_hidden.dtype), blocks)
        to_kernel = jax.lax.dynamic_update_slice_in_dim(to_kernel, to_columns.astype(kernel.dtype), start, axis=1)
        return to_hidden + to_blocks, to_kernel

    zeros = jnp.zeros_like(blocks[0], cotangents[0].dtype), jnp.zeros_like(student.kernel)
    to_hidden, to_kernel = over_columns(columns, zeros, student.kernel.shape[1], plan.chunk)
    to_hidden = join(to_hidden, len(student.hidden))
    return Head(to_hidden.astype(student.hidden.dtype), to_kernel), None, None, None


def _slope_of_losses(plan: Plan, block: Any, temperature: jax.Array, start: Any, width: int) -> jax.Array:
    """Return the gradient of both losses, times their cotangents, to the student's logits of some columns."""
    student, teacher, labels, sums, (to_soft, to_hard) = block
    log_q = sums.student.log_probs(student.logits(start, width, temperature))
    log_p = sums.teacher.log_probs(teacher.logits(start, width, temperature))
    slope = (temperature * to_soft)[:, None] * _slope(plan.beta, log_q, log_p, sums.mean)
    if sums.plain is None:
        return slope
    probability = jnp.exp(sums.plain.log_probs(student.logits(start, width, 1.0)))
    return slope + to_hard[:, None] * (probability - _hit(labels, start, width).astype(slope.dtype))


fused.defvjp(_forward, _backward)
