"""Distillation of language models without their logits: hidden states and heads in, losses of tokens out."""

from typing import Literal

import jax
import jax.numpy as jnp

from compress_jax.core import ShapeError
from compress_jax.distill.fused import Plan, fused
from compress_jax.distill.masks import fitted
from compress_jax.distill.slices import Head, alongside, widest
from compress_jax.distill.softened import Scalar

Direction = Literal["forward", "reverse", "jsd"]


def chunked_kl(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    temperature: Scalar = 1.0,
    chunk: int = 4096,
    mask: jax.Array | None = None,
    direction: Direction = "forward",
    *,
    beta: float = 0.5,
    block: int | None = None,
) -> jax.Array:
    """Return the divergence of each token, equal to that of its logits, which never exist as a whole; in float32.

    ``kl(student_hidden @ student_head, teacher_hidden @ teacher_head, T)``, or `reverse_kl`, or `jsd`, with the head's
    matrix product inside. Running maxima and sums over slices of the vocabulary take the place of ``[tokens, vocabulary]``
    arrays; the backward pass computes the slices again. The price is time: 6 matrix products (8 for "jsd") instead of 4.

    Args:
      student_hidden: ``[..., student_width]``, any floating dtype: what the student's head is applied to.
      student_head: ``[student_width, vocabulary]``. A bias is one more row, and a column of ones in the hidden states.
      teacher_hidden: ``[..., teacher_width]``, for the same tokens.
      teacher_head: ``[teacher_width, vocabulary]``, for the same vocabulary. No gradient goes to the teacher.
      temperature: T > 0, a number or a scalar array; no gradient goes here.
      chunk: columns of the vocabulary seen at a time. Two float32 arrays ``[tokens, chunk]`` exist, or a few.
      mask: which tokens count, see `masks`; where it is 0 the loss is 0, without gradient, whatever the hidden states are.
        Otherwise it does not weight: give it to `masked_mean` or `masked_total` too.
      direction: "forward", "reverse" or "jsd".
      beta: of `jsd`, for "jsd" only.
      block: tokens seen at a time; None is all of them. Where tokens are sharded, a multiple of the number of devices.

    Returns:
      ``[...]``, in nats. Reverse-mode derivatives of the first order only. Gradients have the dtypes of what they are of,
      but are summed in float32.

    Raises:
      ShapeError: if the shapes do not fit.
      ValueError: if ``chunk``, ``block``, ``direction`` or ``beta`` is out of range.

    Example:
      >>> hidden, head = jnp.ones((1, 2)), jnp.zeros((2, 6))
      >>> teacher_head = head.at[0, 0].set(jnp.log(5.0))
      >>> f"{chunked_kl(hidden, head, hidden, teacher_head, chunk=4)[0]:.3f}"
      '0.294'

    References:
      Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, section 3.2 (FusedLinearCrossEntropy).
      Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, algorithm 3.
    """
    plan = _plan(direction, beta, chunk, block)
    student, teacher = Head(student_hidden, student_head), Head(teacher_hidden, teacher_head)
    return _tokens(plan, student, teacher, None, temperature, mask)[0]


def chunked_hinton(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    labels: jax.Array,
    alpha: Scalar = 0.1,
    temperature: Scalar = 4.0,
    chunk: int = 4096,
    mask: jax.Array | None = None,
    direction: Direction = "forward",
    *,
    beta: float = 0.5,
    block: int | None = None,
) -> jax.Array:
    """Return the classical objective of each token, part labels and part teacher, without whole logits; in float32.

    ``alpha * CE(student, label) + (1 - alpha) * T**2 * KL(p_t || p_s)``, as `hinton` has it, from one pass over the
    vocabulary: the cross entropy costs no further matrix product.

    Args:
      student_hidden: see `chunked_kl`, as for all that is not listed here.
      student_head: ``[student_width, vocabulary]``.
      teacher_hidden: ``[..., teacher_width]``.
      teacher_head: ``[teacher_width, vocabulary]``.
      labels: integers ``[...]``; those of masked tokens may be anything, such as -1.
      alpha: weight of the labels, 0 to 1.
      temperature: of the divergence; labels are met at 1.
      chunk: columns of the vocabulary seen at a time.
      mask: ``[...]`` or None.
      direction: of the divergence.
      beta: of `jsd`, for "jsd" only.
      block: tokens seen at a time.

    Returns:
      ``[...]``, in nats.

    Raises:
      ShapeError: if the shapes do not fit.
      ValueError: if ``chunk``, ``block``, ``direction`` or ``beta`` is out of range.

    Example:
      >>> hidden, head, labels = jnp.ones((1, 2)), jnp.zeros((2, 6)), jnp.array([3])
      >>> f"{chunked_hinton(hidden, head, hidden, head, labels, alpha=1.0, chunk=4)[0]:.3f}"
      '1.792'

    References:
      Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2. See also `chunked_kl`.
    """
    if labels.shape != student_hidden.shape[:-1]:
        raise ShapeError(f"labels {labels.shape} must have one entry of each token {student_hidden.shape[:-1]}")
    plan = _plan(direction, beta, chunk, block)
    student, teacher = Head(student_hidden, student_head), Head(teacher_hidden, teacher_head)
    soft, hard = _tokens(plan, student, teacher, labels, temperature, mask)
    alpha = jnp.asarray(alpha, soft.dtype)
    return alpha * hard + (1 - alpha) * soft


def _plan(direction: Direction, beta: float, chunk: int, block: int | None) -> Plan:
    betas = {"forward": 0.0, "reverse": 1.0, "jsd": beta}
    if direction not in betas:
        raise ValueError(f"direction must be one of {', '.join(betas)}; got {direction!r}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be 0 (forward) to 1 (reverse), got {beta}")
    if chunk < 1 or (block is not None and block < 1):
        raise ValueError(f"chunk and block are sizes and must be positive, got {chunk} and {block}")
    return Plan(betas[direction], chunk, block)


def _tokens(
    plan: Plan, student: Head, teacher: Head, labels: jax.Array | None, temperature: Scalar, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return both losses of all tokens, whatever axes they are on; those of masked ones are 0."""
    _check(student, teacher)
    tokens = student.hidden.shape[:-1]
    counts = jnp.ones(tokens, bool) if mask is None else fitted(mask, tokens, "the student's tokens") != 0
    student, teacher = (
        Head(jnp.where(counts[..., None], hidden, 0).reshape(-1, hidden.shape[-1]), alongside(kernel, hidden))
        for hidden, kernel in (student, jax.lax.stop_gradient(teacher))
    )
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, widest(*student)))
    losses = fused(plan, student, teacher, None if labels is None else labels.ravel(), temperature)
    return jax.tree.map(lambda loss: jnp.where(counts, loss.reshape(tokens), 0), losses)


def _check(student: Head, teacher: Head) -> None:
    tokens = student.hidden.shape[:-1]
    if teacher.hidden.shape[:-1] != tokens:
        raise ShapeError(f"the teacher must have the student's tokens {tokens}, got {teacher.hidden.shape[:-1]}")
    for who, (hidden, kernel) in (("student", student), ("teacher", teacher)):
        if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
            raise ShapeError(f"the {who}'s head must be [{hidden.shape[-1]}, vocabulary], got {kernel.shape}")
    if student.kernel.shape[1] != teacher.kernel.shape[1]:
        raise ShapeError(f"vocabularies differ: student {student.kernel.shape[1]}, teacher {teacher.kernel.shape[1]}")
