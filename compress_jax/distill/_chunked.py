"""Language-model distillation without whole logits: hidden states and heads in, token losses out.

The logits ``hidden @ head`` of a large vocabulary are computed slice by slice. A forward pass keeps
a streaming softmax of each token; the backward pass computes the slices again.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.types import PyTree, Scalar
from compress_jax.distill._losses.logits import mixture
from compress_jax.distill._losses.temperature import bounded, squared
from compress_jax.distill._masks import fitted

Direction: TypeAlias = Literal["forward", "reverse", "jsd"]


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
    """Return the divergence of each token from hidden states and heads, without whole logits.

    ``kl(student_hidden @ student_head, teacher_hidden @ teacher_head, T)``, or `reverse_kl`, or
    `jsd`, with the head's matrix product inside, in float32. A streaming softmax over slices of the
    vocabulary replaces the ``[tokens, vocabulary]`` arrays; the backward pass computes the slices
    again. The price is time: 6 matrix products (8 for "jsd") instead of 4.

    Args:
      student_hidden: ``[..., student_width]``, any floating dtype: the input of the student's head.
      student_head: ``[student_width, vocabulary]``. Give a bias as one more row, with a column of
        ones in the hidden states.
      teacher_hidden: ``[..., teacher_width]``, for the same tokens.
      teacher_head: ``[teacher_width, vocabulary]``, for the same vocabulary. No gradient goes to
        the teacher.
      temperature: T > 0, a number or a scalar array; no gradient goes here.
      chunk: columns of the vocabulary per slice. A few float32 arrays ``[tokens, chunk]`` exist at
        a time.
      mask: which tokens count, see `masks`; where it is 0 the loss is 0, without gradient, whatever
        the hidden states are. It does not weight the other losses: give it to `masked_mean` or
        `masked_total` too.
      direction: "forward", "reverse" or "jsd".
      beta: the beta of `jsd`, for "jsd" only.
      block: tokens per block; None takes all at once. Where tokens are sharded, a multiple of the
        number of devices.

    Returns:
      ``[...]``, in nats. Reverse-mode derivatives of the first order only. Gradients have the
      dtypes of their arguments, but are summed in float32.

    Raises:
      ShapeError: if the shapes do not fit.
      ArgumentError: if ``chunk``, ``block``, ``direction`` or ``beta`` is out of range.

    Example:
      >>> hidden = jnp.ones((1, 2))
      >>> head = jnp.zeros((2, 6))
      >>> teacher_head = head.at[0, 0].set(jnp.log(5.0))
      >>> f"{chunked_kl(hidden, head, hidden, teacher_head, chunk=4)[0]:.3f}"
      '0.294'

    References:
      Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, section 3.2
      (FusedLinearCrossEntropy). Milakov and Gimelshein, "Online normalizer calculation for
      softmax", 2018, algorithm 3.
    """
    plan = checked_plan(direction, beta, chunk, block)
    student = Head(student_hidden, student_head)
    teacher = Head(teacher_hidden, teacher_head)
    return _token_losses(plan, student, teacher, None, temperature, mask).soft


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
    """Return `hinton` of each token from hidden states and heads, without whole logits.

    ``alpha * CE(student, label) + (1 - alpha) * T**2 * KL(p_t || p_s)``, in float32, from
    one pass over the vocabulary: the cross entropy costs no further matrix product.

    Args:
      student_hidden: ``[..., student_width]``, see `chunked_kl`.
      student_head: ``[student_width, vocabulary]``.
      teacher_hidden: ``[..., teacher_width]``.
      teacher_head: ``[teacher_width, vocabulary]``.
      labels: integers ``[...]``; those of masked tokens may be anything, such as -1.
      alpha: weight of the labels, 0 to 1.
      temperature: of the divergence; the cross entropy is at temperature 1.
      chunk: columns of the vocabulary per slice.
      mask: ``[...]`` or None.
      direction: "forward", "reverse" or "jsd", the direction of the divergence.
      beta: the beta of `jsd`, for "jsd" only.
      block: tokens per block.

    Returns:
      ``[...]``, in nats.

    Raises:
      ShapeError: if the shapes do not fit.
      ArgumentError: if ``chunk``, ``block``, ``direction`` or ``beta`` is out of range.

    Example:
      >>> hidden = jnp.ones((1, 2))
      >>> head = jnp.zeros((2, 6))
      >>> labels = jnp.array([3])
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
    plan = checked_plan(direction, beta, chunk, block)
    student = Head(student_hidden, student_head)
    teacher = Head(teacher_hidden, teacher_head)
    return _token_losses(plan, student, teacher, labels, temperature, mask).mixed(alpha)


def vocabulary_losses(
    student: "Head",
    teacher: "Head",
    labels: jax.Array | None,
    temperature: Scalar,
    mask: jax.Array | None,
    chunk: int,
    direction: Direction,
    beta: float,
    block: int | None,
) -> "Losses":
    """Return the losses of each token and what student and teacher predict, in one pass.

    The arguments are those of `chunked_kl` and `chunked_hinton`; labels may be None.

    Example:
      >>> student = Head(jnp.ones((1, 2)), jnp.eye(2, 6))
      >>> found = vocabulary_losses(student, student, None, 1.0, None, 4, "forward", 0.5, None)
      >>> found.soft.tolist(), found.student.tolist()
      ([0.0], [0])
    """
    plan = checked_plan(direction, beta, chunk, block)._replace(predicts=True)
    return _token_losses(plan, student, teacher, labels, temperature, mask)


class Plan(NamedTuple):
    """The static options: the divergence as the ``beta`` of `jsd`, and the sizes of slices."""

    beta: float
    chunk: int
    block: int | None
    predicts: bool = False


def checked_plan(direction: Direction, beta: float, chunk: int, block: int | None) -> Plan:
    """Return the plan of some options; raise ArgumentError if one is out of range.

    Example:
      >>> checked_plan("reverse", 0.5, 4096, None).beta
      1.0
    """
    betas = {"forward": 0.0, "reverse": 1.0, "jsd": beta}
    if direction not in betas:
        raise ArgumentError(f"direction must be one of {', '.join(betas)}; got {direction!r}")
    if not 0 <= beta <= 1:
        raise ArgumentError(f"beta must be 0 (forward) to 1 (reverse), got {beta}")
    if chunk < 1 or (block is not None and block < 1):
        raise ArgumentError(
            f"chunk and block are sizes and must be positive, got {chunk} and {block}"
        )
    return Plan(betas[direction], chunk, block)


# The streaming softmax: a maximum and a sum that are updated by each slice of classes.


class Normalizer(NamedTuple):
    """The largest logit of each row and the logarithm of ``sum exp(logit - top)``.

    Two numbers, because their sum would be rounded.
    """

    top: jax.Array  # [rows]
    log_sum: jax.Array  # [rows]

    def log_probs(self, logits: jax.Array) -> jax.Array:
        """Return the log-probabilities of a slice ``[rows, width]`` of the logits."""
        return (logits - self.top[:, None]) - self.log_sum[:, None]


class StreamingSoftmax(NamedTuple):
    """The largest logit so far of each row, and ``sum exp(logit - top)``."""

    top: jax.Array  # [rows]
    sum: jax.Array  # [rows]

    @classmethod
    def start(cls, like: jax.Array) -> "StreamingSoftmax":
        """Return the state before the first slice: a top below any bounded logit, yet finite."""
        zero = jnp.zeros_like(like)
        # The lowest float would not do: logit - top must not overflow, since `StreamingKL.add`
        # multiplies the shift of the top by a sum that is still 0.
        return cls(zero + jnp.finfo(zero.dtype).min / 16, zero)

    def add(self, logits: jax.Array) -> "StreamingSoftmax":
        """Return the state after a slice ``[rows, width]`` of logits."""
        top = jnp.maximum(self.top, logits.max(axis=-1))
        # The old sum is relative to the old top (Milakov and Gimelshein, algorithm 3).
        rescaled = self.sum * jnp.exp(self.top - top)
        return StreamingSoftmax(top, rescaled + jnp.exp(logits - top[:, None]).sum(axis=-1))

    def normalizer(self) -> Normalizer:
        """Return the normalizer, once every slice was added."""
        return Normalizer(self.top, jnp.log(self.sum))


class StreamingKL(NamedTuple):
    """The state of ``KL(p || q)`` from logits x and y.

    ``sum`` is that of ``exp(x - p.top) * ((x - p.top) - (y - q.top))`` over the classes so far.
    """

    p: StreamingSoftmax
    q: StreamingSoftmax
    sum: jax.Array  # [rows]

    @classmethod
    def start(cls, like: jax.Array) -> "StreamingKL":
        """Return the state before the first slice."""
        return cls(StreamingSoftmax.start(like), StreamingSoftmax.start(like), jnp.zeros_like(like))

    def add(self, x: jax.Array, y: jax.Array) -> "StreamingKL":
        """Return the state after slices ``[rows, width]`` of both logits."""
        p = self.p.add(x)
        q = self.q.add(y)
        # Bring the old sum to the new tops: with d = old top - new top, each term
        # exp(x - top) * (x - y) becomes exp(d_p) * exp(x - top) * ((x - y) + d_p - d_q).
        shift_p = self.p.top - p.top
        shift_q = self.q.top - q.top
        before = jnp.exp(shift_p) * (self.sum + self.p.sum * (shift_p - shift_q))
        x = x - p.top[:, None]
        y = y - q.top[:, None]
        return StreamingKL(p, q, before + (jnp.exp(x) * (x - y)).sum(axis=-1))

    def divergence(self) -> jax.Array:
        """Return ``KL(p || q)`` of each row, once every slice was added."""
        return self.sum / self.p.sum - self.p.normalizer().log_sum + self.q.normalizer().log_sum


class Largest(NamedTuple):
    """The largest logit so far of each row, and its class; the first of several."""

    value: jax.Array  # [rows]
    index: jax.Array  # int32 [rows]

    @classmethod
    def start(cls, like: jax.Array) -> "Largest":
        """Return the state before the first slice."""
        return cls(jnp.full_like(like, -jnp.inf), jnp.zeros_like(like, jnp.int32))

    def add(self, logits: jax.Array, start: "Start") -> "Largest":
        """Return the state after a slice ``[rows, width]`` of logits."""
        value = logits.max(axis=-1)
        index = jnp.argmax(logits, axis=-1).astype(jnp.int32) + jnp.asarray(start, jnp.int32)
        larger = value > self.value
        return Largest(jnp.where(larger, value, self.value), jnp.where(larger, index, self.index))


_Streams: TypeAlias = tuple[StreamingKL, StreamingSoftmax, jax.Array, tuple[Largest, ...]]


# Slices of a head, by columns of the vocabulary and by blocks of tokens.

Carry = TypeVar("Carry")
Start: TypeAlias = int | jax.Array
"""The first column of a slice: a number for the last slice, an int32 scalar within the scan."""


class Head(NamedTuple):
    """A linear head and its input."""

    hidden: jax.Array  # [tokens, width]
    kernel: jax.Array  # [width, vocabulary]

    def columns(self, start: Start, width: int) -> jax.Array:
        """Return some columns of the kernel."""
        return jax.lax.dynamic_slice_in_dim(self.kernel, start, width, axis=1)

    def logits(self, start: Start, width: int, temperature: Scalar) -> jax.Array:
        """Return bounded softened logits ``[tokens, width]``, in float32 from the product on."""
        logits = _wide_matmul(self.hidden, self.columns(start, width))
        return bounded(logits, temperature, self.kernel.shape[1])


def _wide_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return ``a @ b``, accumulated and returned in float32 at least."""
    wide = _widest(a, b)
    if a.dtype != b.dtype:
        a = a.astype(wide)
        b = b.astype(wide)
    return jnp.matmul(a, b, preferred_element_type=wide)


def _widest(*arrays: jax.Array) -> jnp.dtype:
    """Return float32, or float64 if one of the arrays is."""
    any_double = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if any_double else jnp.float32)


def _varying_like(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
    """Return the kernel, varying over the devices of `jax.shard_map` as the hidden states do.

    It adds zeros that vary so (XLA drops the addition). The gradient of the kernel is then summed
    over the devices outside of the custom derivative, like that of every shared array.
    """
    return kernel + jnp.zeros_like(hidden, kernel.dtype, shape=(1, 1))


def _scan_columns(
    step: Callable[[Carry, Start, int], Carry], carry: Carry, columns: int, size: int
) -> Carry:
    """Return the carry after ``step(carry, start, width)`` over all columns, ``size`` at a time."""
    size = min(size, columns)
    full, rest = divmod(columns, size)

    def body(carry: Carry, i: jax.Array) -> tuple[Carry, None]:
        return step(carry, i * size, size), None

    carry, _ = jax.lax.scan(body, carry, jnp.arange(full))
    # A scan's slices have one width; the columns that are left make a narrower one after it.
    return step(carry, full * size, rest) if rest else carry


def _split_tokens(tokens: PyTree, size: int | None) -> PyTree:
    """Return arrays ``[tokens, ...]`` as ``[blocks, tokens of a block, ...]``, padded with zeros.

    A block takes every n-th token, so that it holds some of every device's, where devices hold
    consecutive ones.
    """

    def one(x: jax.Array) -> jax.Array:
        blocks = max(1, -(-len(x) // (size or len(x) or 1)))
        padded = jnp.pad(x, ((0, -len(x) % blocks), *[(0, 0)] * (x.ndim - 1)))
        padded = padded.reshape(-1, blocks, *x.shape[1:])  # [tokens of a block, blocks, ...]
        return padded.swapaxes(0, 1)

    return jax.tree.map(one, tokens)


def _join_tokens(blocks: PyTree, tokens: int) -> PyTree:
    """Return what `_split_tokens` made as ``[tokens, ...]`` again."""

    def one(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]

    return jax.tree.map(one, blocks)


# The losses and their gradients.


class Sums(NamedTuple):
    """What the backward pass needs of each token, all ``[tokens]``.

    Attributes:
      student: normalizer of the student's softened logits.
      teacher: normalizer of the teacher's.
      mean: the mean in the divergence's gradient, see `_divergence_gradient`.
      hard: normalizer of the student's logits at T = 1; None without labels.
    """

    student: Normalizer
    teacher: Normalizer
    mean: jax.Array
    hard: Normalizer | None


class Losses(NamedTuple):
    """Losses and predictions of tokens.

    Attributes:
      soft: ``T**2`` times the divergence.
      hard: the cross entropy; None without labels.
      student: the class of the student's largest logit, int32; None if nobody asked.
      teacher: likewise.
    """

    soft: jax.Array
    hard: jax.Array | None
    student: jax.Array | None = None
    teacher: jax.Array | None = None

    def mixed(self, alpha: Scalar) -> jax.Array:
        """Return ``alpha * hard + (1 - alpha) * soft``."""
        assert self.hard is not None
        alpha = jnp.asarray(alpha, self.soft.dtype)
        return alpha * self.hard + (1 - alpha) * self.soft


Residuals: TypeAlias = tuple[Head, Head, jax.Array | None, jax.Array, Sums]
"""The arguments of the losses (student, teacher, labels, temperature) and their sums."""


def _token_losses(
    plan: Plan,
    student: Head,
    teacher: Head,
    labels: jax.Array | None,
    temperature: Scalar,
    mask: jax.Array | None,
) -> Losses:
    """Return losses and predictions of tokens on any leading axes, 0 where masked."""
    _check_shapes(student, teacher)
    tokens = student.hidden.shape[:-1]
    counts = jnp.ones(tokens, bool)
    if mask is not None:
        counts = fitted(mask, tokens, "the student's tokens") != 0

    def flat(head: Head) -> Head:
        # Before the product: the head's gradient would be NaN if padding were, as NaN * 0 is NaN.
        hidden = jnp.where(counts[..., None], head.hidden, 0)
        hidden = hidden.reshape(-1, hidden.shape[-1])  # [tokens, width]
        return Head(hidden, _varying_like(head.kernel, head.hidden))

    student = flat(student)
    teacher = flat(jax.lax.stop_gradient(teacher))
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, _widest(*student)))
    flat_labels = None if labels is None else labels.ravel()
    losses = _fused(plan, student, teacher, flat_labels, temperature)
    # Hidden states of zeros have a cross entropy too, log(vocabulary), so it is masked again.
    return jax.tree.map(
        lambda x: jnp.where(counts, x.reshape(tokens), jnp.zeros((), x.dtype)), losses
    )


def _check_shapes(student: Head, teacher: Head) -> None:
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    plan: Plan, student: Head, teacher: Head, labels: jax.Array | None, temperature: jax.Array
) -> Losses:
    """Return ``T**2`` times the divergence, and the cross entropy, of each token.

    Args:
      plan: the divergence and the sizes.
      student: hidden states and head; gradients go here only.
      teacher: hidden states and head, for the same tokens and vocabulary.
      labels: integers ``[tokens]``, or None.
      temperature: temperature of the divergence, a scalar array.

    Returns:
      The losses, each ``[tokens]``.
    """
    return _forward(plan, student, teacher, labels, temperature)[0]


def _forward(
    plan: Plan, student: Head, teacher: Head, labels: jax.Array | None, temperature: jax.Array
) -> tuple[Losses, Residuals]:
    def one(block: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[Losses, Sums]:
        hidden, teacher_hidden, block_labels = block
        own = Head(hidden, student.kernel)
        other = Head(teacher_hidden, teacher.kernel)
        return _block_losses(plan, own, other, block_labels, temperature)

    blocks = _split_tokens((student.hidden, teacher.hidden, labels), plan.block)
    losses, sums = _join_tokens(jax.lax.map(one, blocks), len(student.hidden))
    return losses, (student, teacher, labels, temperature, sums)


def _block_losses(
    plan: Plan, student: Head, teacher: Head, labels: jax.Array | None, temperature: jax.Array
) -> tuple[Losses, Sums]:
    """Return the losses of a block of tokens, and the sums that their gradients need."""
    # Sums start as zeros that vary over devices as the logits do.
    like = _wide_matmul(student.hidden[:, :1], student.kernel[:1, 0])  # [tokens]
    reverse = plan.beta == 1

    def add(carry: _Streams, start: Start, width: int) -> _Streams:
        kl, hard, label_logit, predictions = carry
        # Named, as these products belong to the models: their FLOPs are counted with them.
        with jax.named_scope("student_head"):
            s = student.logits(start, width, temperature)  # [tokens, width]
        with jax.named_scope("teacher_head"):
            t = teacher.logits(start, width, temperature)
        kl = kl.add(s, t) if reverse else kl.add(t, s)
        if labels is not None:
            # The cross entropy is at T = 1. XLA computes the common matrix product once.
            plain = student.logits(start, width, 1.0)
            hard = hard.add(plain)
            hit = _is_label(labels, start, width)
            # One slice holds the token's label; all others add 0.
            label_logit = label_logit + jnp.where(hit, plain, 0).sum(axis=-1)
        both = zip(predictions, (s, t), strict=False)  # none are followed if nobody asked
        predictions = tuple(best.add(logits, start) for best, logits in both)
        return kl, hard, label_logit, predictions

    predictions = (Largest.start(like),) * 2 if plan.predicts else ()
    first = (StreamingKL.start(like), StreamingSoftmax.start(like), jnp.zeros_like(like))
    columns = student.kernel.shape[1]
    kl, hard, label_logit, predictions = _scan_columns(
        add, (*first, predictions), columns, plan.chunk
    )
    # In `StreamingKL(p, q)` the teacher is p, but for the reverse divergence it is q.
    student_softmax, teacher_softmax = (kl.p, kl.q) if reverse else (kl.q, kl.p)
    sums = Sums(
        student=student_softmax.normalizer(),
        teacher=teacher_softmax.normalizer(),
        mean=kl.divergence(),
        hard=None if labels is None else hard.normalizer(),
    )
    divergence = sums.mean
    if plan.beta not in (0, 1):
        divergence, mean = _jsd(plan, student, teacher, sums, temperature)
        sums = sums._replace(mean=mean)
    cross_entropy = None
    if sums.hard is not None:
        cross_entropy = sums.hard.log_sum + (sums.hard.top - label_logit)
    classes = (best.index for best in predictions)
    return Losses(squared(temperature, divergence), cross_entropy, *classes), sums


def _jsd(
    plan: Plan, student: Head, teacher: Head, sums: Sums, temperature: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the generalized Jensen-Shannon divergence of each token and its student share.

    The mixture needs both normalizers, so this is a second pass over the vocabulary.
    """

    def add(
        carry: tuple[jax.Array, jax.Array], start: Start, width: int
    ) -> tuple[jax.Array, jax.Array]:
        teacher_kl, student_kl = carry  # [tokens]
        log_q = sums.student.log_probs(student.logits(start, width, temperature))
        log_p = sums.teacher.log_probs(teacher.logits(start, width, temperature))
        log_m = mixture(log_q, log_p, plan.beta)  # [tokens, width]
        teacher_kl = teacher_kl + (jnp.exp(log_p) * (log_p - log_m)).sum(axis=-1)
        student_kl = student_kl + (jnp.exp(log_q) * (log_q - log_m)).sum(axis=-1)
        return teacher_kl, student_kl

    zero = jnp.zeros_like(sums.mean)
    columns = student.kernel.shape[1]
    teacher_kl, student_kl = _scan_columns(add, (zero, zero), columns, plan.chunk)
    student_share = (1 - plan.beta) * student_kl
    return plan.beta * teacher_kl + student_share, student_share


def _is_label(labels: jax.Array, start: Start, width: int) -> jax.Array:
    """Return booleans ``[tokens, width]``: whether a column is the token's label."""
    return labels[:, None] - start == jnp.arange(width, dtype=labels.dtype)[None]


def _backward(
    plan: Plan, residuals: Residuals, cotangents: Losses
) -> tuple[Head, None, None, None]:
    student, teacher, labels, temperature, sums = residuals
    # Predictions have no gradient.
    tokens = (student.hidden, teacher.hidden, labels, sums, (cotangents.soft, cotangents.hard))
    blocks = _split_tokens(tokens, plan.block)

    # Slices outside, blocks inside: the gradient of a slice of the kernel is summed over all blocks
    # in float32, and rounded to the kernel's dtype once.
    def columns(
        carry: tuple[jax.Array, jax.Array], start: Start, width: int
    ) -> tuple[jax.Array, jax.Array]:
        hidden_grad, kernel_grad = carry  # [blocks, tokens, width of hidden] and as the kernel
        kernel = student.columns(start, width)  # [width of hidden, width]

        def add(columns_grad: jax.Array, block: PyTree) -> tuple[jax.Array, jax.Array]:
            hidden, teacher_hidden, *rest = block
            own = Head(hidden, student.kernel)
            other = Head(teacher_hidden, teacher.kernel)
            # [tokens, width]
            grad = _logits_gradient(plan, (own, other, *rest), temperature, start, width)
            columns_grad = columns_grad + _wide_matmul(hidden.T, grad)
            return columns_grad, _wide_matmul(grad, kernel.T)

        zeros = jnp.zeros_like(kernel, hidden_grad.dtype)
        columns_grad, block_grads = jax.lax.scan(add, zeros, blocks)
        kernel_grad = jax.lax.dynamic_update_slice_in_dim(
            kernel_grad, columns_grad.astype(kernel.dtype), start, axis=1
        )
        return hidden_grad + block_grads, kernel_grad

    zeros = (jnp.zeros_like(blocks[0], cotangents.soft.dtype), jnp.zeros_like(student.kernel))
    hidden_grad, kernel_grad = _scan_columns(columns, zeros, student.kernel.shape[1], plan.chunk)
    hidden_grad = _join_tokens(hidden_grad, len(student.hidden))
    return Head(hidden_grad.astype(student.hidden.dtype), kernel_grad), None, None, None


def _logits_gradient(
    plan: Plan, block: PyTree, temperature: jax.Array, start: Start, width: int
) -> jax.Array:
    """Return the gradient ``[tokens, width]`` of both losses to the student's unsoftened logits."""
    student, teacher, labels, sums, (soft_cotangent, hard_cotangent) = block
    log_q = sums.student.log_probs(student.logits(start, width, temperature))
    log_p = sums.teacher.log_probs(teacher.logits(start, width, temperature))
    # T**2 * d/dlogits = T * d/d(logits / T).
    scale = (temperature * soft_cotangent)[:, None]
    grad = scale * _divergence_gradient(plan.beta, log_q, log_p, sums.mean)
    if sums.hard is None:
        return grad
    # The cross entropy's gradient is softmax - onehot, at T = 1.
    probs = jnp.exp(sums.hard.log_probs(student.logits(start, width, 1.0)))
    one_hot = _is_label(labels, start, width).astype(grad.dtype)
    return grad + hard_cotangent[:, None] * (probs - one_hot)


def _divergence_gradient(
    beta: float, log_q: jax.Array, log_p: jax.Array, mean: jax.Array
) -> jax.Array:
    """Return the gradient of the divergence to the student's softened logits, of some columns.

    Forward: ``q - p``. Otherwise ``q * (d - mean)``, where d is ``log q - log p`` (reverse) or
    ``(1 - beta) * (log q - log m)`` (Jensen-Shannon), and mean is ``sum_c q[c] * d[c]``.
    """
    if beta == 0:
        return jnp.exp(log_q) - jnp.exp(log_p)
    if beta == 1:
        difference = log_q - log_p
    else:
        difference = (1 - beta) * (log_q - mixture(log_q, log_p, beta))
    return jnp.exp(log_q) * (difference - mean[:, None])


_fused.defvjp(_forward, _backward)
