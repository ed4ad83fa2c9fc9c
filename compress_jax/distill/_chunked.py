"""Distillation of language models without their logits: hidden states and heads in, losses of tokens out."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from compress_jax.core import ShapeError
from compress_jax.distill._losses.logits import mixture
from compress_jax.distill._losses.temperature import Scalar, bounded, squared
from compress_jax.distill._masks import fitted

# Sums of a softmax over classes that come slice by slice: the largest so far, and sums relative to
# it.


class Softmax(NamedTuple):
    """Of each row, the largest logit and the logarithm of ``sum exp(logit - top)``: two numbers, as their sum is rounded."""

    top: jax.Array
    log_sum: jax.Array

    def log_probs(self, logits: jax.Array) -> jax.Array:
        """Return the log-probabilities of a slice ``[rows, width]`` of the logits."""
        return (logits - self.top[:, None]) - self.log_sum[:, None]


class Running(NamedTuple):
    """Of each row, the largest logit so far and ``sum exp(logit - top)``."""

    top: jax.Array
    sum: jax.Array

    @classmethod
    def none(cls, like: jax.Array) -> "Running":
        """Return the sums before the first slice: below any bounded logit, and yet finite."""
        zero = jnp.zeros_like(like)
        return cls(zero + jnp.finfo(zero.dtype).min / 16, zero)

    def add(self, logits: jax.Array) -> "Running":
        """Return the sums with a slice ``[rows, width]`` of logits added."""
        top = jnp.maximum(self.top, logits.max(axis=-1))
        return Running(
            top, self.sum * jnp.exp(self.top - top) + jnp.exp(logits - top[:, None]).sum(axis=-1)
        )

    def done(self) -> Softmax:
        """Return the softmax, once every slice was added."""
        return Softmax(self.top, jnp.log(self.sum))


class Cross(NamedTuple):
    """Sums for ``KL(p || q)`` from logits x and y: ``sum`` is of ``exp(x - p.top) * ((x - p.top) - (y - q.top))``."""

    p: Running
    q: Running
    sum: jax.Array

    @classmethod
    def none(cls, like: jax.Array) -> "Cross":
        """Return the sums before the first slice."""
        return cls(Running.none(like), Running.none(like), jnp.zeros_like(like))

    def add(self, x: jax.Array, y: jax.Array) -> "Cross":
        """Return the sums with slices ``[rows, width]`` of both logits added."""
        p, q = self.p.add(x), self.q.add(y)
        raised, raised_q = self.p.top - p.top, self.q.top - q.top
        before = jnp.exp(raised) * (self.sum + self.p.sum * (raised - raised_q))
        x, y = x - p.top[:, None], y - q.top[:, None]
        return Cross(p, q, before + (jnp.exp(x) * (x - y)).sum(axis=-1))

    def divergence(self) -> jax.Array:
        """Return ``KL(p || q)`` of each row, once every slice was added."""
        return self.sum / self.p.sum - self.p.done().log_sum + self.q.done().log_sum


# Slices: a linear head over a large vocabulary, applied to some of its columns and to some tokens
# at a time.


Carry = TypeVar("Carry")


class Head(NamedTuple):
    """A linear head and what it is applied to: hidden states ``[tokens, width]``, kernel ``[width, vocabulary]``."""

    hidden: jax.Array
    kernel: jax.Array

    def columns(self, start: Scalar, width: int) -> jax.Array:
        """Return some columns of the kernel."""
        return jax.lax.dynamic_slice_in_dim(self.kernel, start, width, axis=1)

    def logits(self, start: Scalar, width: int, temperature: Scalar) -> jax.Array:
        """Return the bounded softened logits of some columns, float32 from the matrix product on."""
        return bounded(
            wide_matmul(self.hidden, self.columns(start, width)), temperature, self.kernel.shape[1]
        )


def wide_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return ``a @ b``, accumulated and returned in float32 at least, whatever short dtypes come in."""
    wide = widest(a, b)
    if a.dtype != b.dtype:
        a, b = a.astype(wide), b.astype(wide)
    return jnp.matmul(a, b, preferred_element_type=wide)


def widest(*arrays: jax.Array) -> jnp.dtype:
    """Return float32, or float64 if one of the arrays is."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


def alongside(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """Return the kernel as it is, but under `jax.shard_map` one of each device that has its own hidden states.

    It adds zeros that vary as the hidden states do (XLA drops the addition). The gradient to the
    kernel is then summed over the devices, outside of any custom derivative, as that of every
    shared array is.
    """
    return kernel + jnp.zeros_like(hidden, kernel.dtype, shape=(1, 1))


def over_columns(
    step: Callable[[Carry, Any, int], Carry], carry: Carry, columns: int, size: int
) -> Carry:
    """Return the carry after ``step(carry, start, width)`` over all columns, ``size`` at a time, the last ones fewer."""
    size = min(size, columns)
    full, rest = divmod(columns, size)
    carry, _ = jax.lax.scan(
        lambda carry, i: (step(carry, i * size, size), None), carry, jnp.arange(full)
    )
    return step(carry, full * size, rest) if rest else carry


def split(tokens: Any, size: int | None) -> Any:
    """Return arrays ``[tokens, ...]`` as ``[blocks, tokens of a block, ...]``, filled up with zeros.

    A block takes every so-many-th token, so that each holds some of every device's, where devices
    hold consecutive ones.
    """

    def one(x: jax.Array) -> jax.Array:
        blocks = max(1, -(-len(x) // (size or len(x) or 1)))
        filled = jnp.pad(x, ((0, -len(x) % blocks), *[(0, 0)] * (x.ndim - 1)))
        return filled.reshape(-1, blocks, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, tokens)


def join(blocks: Any, tokens: int) -> Any:
    """Return arrays ``[blocks, tokens of a block, ...]``, as `split` made them, as ``[tokens, ...]``."""

    def one(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]

    return jax.tree.map(one, blocks)


# Divergence and cross entropy of a student's and a teacher's head over a large vocabulary, without
# all their logits.


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
def fused(
    plan: Plan, student: Head, teacher: Head, labels: Any, temperature: jax.Array
) -> tuple[jax.Array, Any]:
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


def _forward(
    plan: Plan, student: Head, teacher: Head, labels: Any, temperature: jax.Array
) -> tuple[Any, Any]:
    def one(block: Any) -> tuple[Any, Sums]:
        hidden, teacher_hidden, of_labels = block
        return _losses(
            plan,
            Head(hidden, student.kernel),
            Head(teacher_hidden, teacher.kernel),
            of_labels,
            temperature,
        )

    blocks = split((student.hidden, teacher.hidden, labels), plan.block)
    losses, sums = join(jax.lax.map(one, blocks), len(student.hidden))
    return losses, (student, teacher, labels, temperature, sums)


def _losses(
    plan: Plan, student: Head, teacher: Head, labels: Any, temperature: jax.Array
) -> tuple[Any, Sums]:
    """Return the losses of a block of tokens and the sums that their gradients need."""
    like = wide_matmul(student.hidden[:, :1], student.kernel[:1, 0])

    def add(carry: Any, start: Any, width: int) -> Any:
        cross, plain, at_label = carry
        s, t = (head.logits(start, width, temperature) for head in (student, teacher))
        cross = cross.add(s, t) if plan.beta == 1 else cross.add(t, s)
        if labels is not None:
            hard = student.logits(start, width, 1.0)
            plain, at_label = (
                plain.add(hard),
                at_label + jnp.where(_hit(labels, start, width), hard, 0).sum(axis=-1),
            )
        return cross, plain, at_label

    start = (Cross.none(like), Running.none(like), jnp.zeros_like(like))
    cross, plain, at_label = over_columns(add, start, student.kernel.shape[1], plan.chunk)
    of_student, of_teacher = (cross.p, cross.q) if plan.beta == 1 else (cross.q, cross.p)
    sums = Sums(
        of_student.done(),
        of_teacher.done(),
        cross.divergence(),
        None if labels is None else plain.done(),
    )
    divergence = sums.mean
    if plan.beta not in (0, 1):
        divergence, mean = _mixed(plan, student, teacher, sums, temperature)
        sums = sums._replace(mean=mean)
    hard = None if sums.plain is None else sums.plain.log_sum + (sums.plain.top - at_label)
    return (squared(temperature, divergence), hard), sums


def _mixed(
    plan: Plan, student: Head, teacher: Head, sums: Sums, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
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
        to_kernel = jax.lax.dynamic_update_slice_in_dim(
            to_kernel, to_columns.astype(kernel.dtype), start, axis=1
        )
        return to_hidden + to_blocks, to_kernel

    zeros = jnp.zeros_like(blocks[0], cotangents[0].dtype), jnp.zeros_like(student.kernel)
    to_hidden, to_kernel = over_columns(columns, zeros, student.kernel.shape[1], plan.chunk)
    to_hidden = join(to_hidden, len(student.hidden))
    return Head(to_hidden.astype(student.hidden.dtype), to_kernel), None, None, None


def _slope_of_losses(
    plan: Plan, block: Any, temperature: jax.Array, start: Any, width: int
) -> jax.Array:
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

    ``kl(student_hidden @ student_head, teacher_hidden @ teacher_head, T)``, or `reverse_kl`, or
    `jsd`, with the head's matrix product inside. Running maxima and sums over slices of the
    vocabulary take the place of ``[tokens, vocabulary]`` arrays; the backward pass computes the
    slices again. The price is time: 6 matrix products (8 for "jsd") instead of 4.

    Args:
      student_hidden: ``[..., student_width]``, any floating dtype: what the student's head is
        applied to.
      student_head: ``[student_width, vocabulary]``. A bias is one more row, and a column of ones in
        the hidden states.
      teacher_hidden: ``[..., teacher_width]``, for the same tokens.
      teacher_head: ``[teacher_width, vocabulary]``, for the same vocabulary. No gradient goes to
        the teacher.
      temperature: T > 0, a number or a scalar array; no gradient goes here.
      chunk: columns of the vocabulary seen at a time. Two float32 arrays ``[tokens, chunk]`` exist,
        or a few.
      mask: which tokens count, see `masks`; where it is 0 the loss is 0, without gradient, whatever
        the hidden states are. Otherwise it does not weight: give it to `masked_mean` or
        `masked_total` too.
      direction: "forward", "reverse" or "jsd".
      beta: of `jsd`, for "jsd" only.
      block: tokens seen at a time; None is all of them. Where tokens are sharded, a multiple of the
        number of devices.

    Returns:
      ``[...]``, in nats. Reverse-mode derivatives of the first order only. Gradients have the
      dtypes of what they are of, but are summed in float32.

    Raises:
      ShapeError: if the shapes do not fit.
      ValueError: if ``chunk``, ``block``, ``direction`` or ``beta`` is out of range.

    Example:
      >>> hidden, head = jnp.ones((1, 2)), jnp.zeros((2, 6))
      >>> teacher_head = head.at[0, 0].set(jnp.log(5.0))
      >>> f"{chunked_kl(hidden, head, hidden, teacher_head, chunk=4)[0]:.3f}"
      '0.294'

    References:
      Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, section 3.2
      (FusedLinearCrossEntropy). Milakov and Gimelshein, "Online normalizer calculation for
      softmax", 2018, algorithm 3.
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

    ``alpha * CE(student, label) + (1 - alpha) * T**2 * KL(p_t || p_s)``, as `hinton` has it, from
    one pass over the vocabulary: the cross entropy costs no further matrix product.

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
      Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2. See
      also `chunked_kl`.
    """
    if labels.shape != student_hidden.shape[:-1]:
        raise ShapeError(
            f"labels {labels.shape} must have one entry of each token {student_hidden.shape[:-1]}"
        )
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
    plan: Plan,
    student: Head,
    teacher: Head,
    labels: jax.Array | None,
    temperature: Scalar,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return both losses of all tokens, whatever axes they are on; those of masked ones are 0."""
    _check(student, teacher)
    tokens = student.hidden.shape[:-1]
    counts = (
        jnp.ones(tokens, bool)
        if mask is None
        else fitted(mask, tokens, "the student's tokens") != 0
    )
    student, teacher = (
        Head(
            jnp.where(counts[..., None], hidden, 0).reshape(-1, hidden.shape[-1]),
            alongside(kernel, hidden),
        )
        for hidden, kernel in (student, jax.lax.stop_gradient(teacher))
    )
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, widest(*student)))
    losses = fused(plan, student, teacher, None if labels is None else labels.ravel(), temperature)
    return jax.tree.map(lambda loss: jnp.where(counts, loss.reshape(tokens), 0), losses)


def _check(student: Head, teacher: Head) -> None:
    tokens = student.hidden.shape[:-1]
    if teacher.hidden.shape[:-1] != tokens:
        raise ShapeError(
            f"the teacher must have the student's tokens {tokens}, got {teacher.hidden.shape[:-1]}"
        )
    for who, (hidden, kernel) in (("student", student), ("teacher", teacher)):
        if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
            raise ShapeError(
                f"the {who}'s head must be [{hidden.shape[-1]}, vocabulary], got {kernel.shape}"
            )
    if student.kernel.shape[1] != teacher.kernel.shape[1]:
        raise ShapeError(
            f"vocabularies differ: student {student.kernel.shape[1]}, teacher "
            f"{teacher.kernel.shape[1]}"
        )
