"""Transforms of logits for any loss: standardized, virtual, and those of teacher ensembles."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import Scalar
from compress_jax.distill._losses.temperature import bounded
from compress_jax.distill._losses.tokens import masked_like
from compress_jax.distill._masks import Mask, kept
from compress_jax.distill._teachers.teacher import at_least_float32


def unit(
    x: jax.Array, axis: int, floor: float | jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """Return ``(x - mean) / max(||x - mean||, floor)`` along an axis.

    Constant rows give exact zeros: differences to the maximum are taken first, and these are zero
    before any rounding. Nothing is squared before it was divided by the row's largest difference,
    so that no square over- or underflows.

    Args:
      x: floats.
      axis: the axis that is normalized.
      floor: > 0, a number or an array that broadcasts against ``x``. Gradients are at most
        ``1 / floor``.
      counts: booleans of the shape of ``x``, which entries are there; the others are 0, and nothing
        depends on them.

    Returns:
      An array of the shape of ``x``.
    """
    counts = jnp.ones(x.shape, bool) if counts is None else counts
    lowest = jnp.finfo(x.dtype).min
    # The mean does not depend on what is subtracted first, so the maximum needs no gradient.
    highest = jax.lax.stop_gradient(jnp.where(counts, x, lowest).max(axis, keepdims=True))
    centered = jnp.where(counts, x, highest) - highest
    number = jnp.maximum(counts.sum(axis, keepdims=True), 1).astype(x.dtype)
    centered = jnp.where(counts, centered - centered.sum(axis, keepdims=True) / number, 0)
    size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(centered).max(axis, keepdims=True), floor))
    scaled = centered / size
    square = jnp.square(scaled).sum(axis, keepdims=True)
    # max(||x - mean||, floor), both divided by size.
    return scaled * jax.lax.rsqrt(jnp.maximum(square, jnp.square(floor / size)))


Teachers = Sequence[jax.Array] | jax.Array


NEVER = -1e9
"""A model masks a class out by a logit up to this, of probability 0 next to ordinary ones."""


def standardize(logits: jax.Array, floor: float = 1e-3, *, mask: Mask | None = None) -> jax.Array:
    """Return logits of mean 0 and standard deviation 1 over the classes, in float32.

    ``(z - mean(z)) / max(std(z), floor)``, to be given to `kl` for student and teacher alike: the
    student then matches the teacher's order and proportions, and is free in the range of its own
    logits. Classes that a model masks out (logits of -inf, or next to ordinary ones of -1e9
    or below, or of the least number of their dtype) are left out of mean and deviation; they are
    returned as -1e9, of probability 0.

    Args:
      logits: ``[..., classes]``, any floating dtype, any finite values.
      floor: a smaller deviation than this is taken as this. Gradients are at most its inverse;
        equal logits give zeros.
      mask: booleans that broadcast against ``logits``, which classes there are, where a model marks
        the others by a number of its own (-1e4, say). Classes masked by their logits stay masked.

    Returns:
      ``[..., classes]``. The paper's loss is
      ``0.1 * CE + 9 * kl(standardize(s), standardize(t), temperature=2.0)`` or so.

    Example:
      >>> print(standardize(jnp.array([1.0, 3.0, 5.0])).round(3))
      [-1.225  0.     1.225]

    References:
      Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, algorithm 1.
    """
    never = max(NEVER, float(jnp.finfo(logits.dtype).min))
    # Next to ordinary logits such a number is a mask; where even the largest logit is of that size,
    # all of them are logits.
    ordinary = jnp.abs(logits.max(axis=-1, keepdims=True)) < jnp.asarray(-never, logits.dtype)
    there = (
        jnp.isnan(logits)
        | (logits > jnp.asarray(never, logits.dtype))
        | (~ordinary & ~jnp.isneginf(logits))
    )
    if mask is not None:
        there &= jnp.broadcast_to(jnp.asarray(mask).astype(bool), logits.shape)
    classes = jnp.maximum(there.sum(axis=-1, keepdims=True), 1)
    # std = ||z - mean|| / sqrt(classes), so a unit vector times the root has deviation 1.
    root = jnp.sqrt(classes.astype(at_least_float32(logits).dtype))
    standardized = root * unit(bounded(kept(logits, there)), -1, floor * root, there)
    return jnp.where(there, standardized, NEVER)


def virtual_teacher(labels: jax.Array, classes: int, probability: float = 0.9) -> jax.Array:
    """Return the logits of a teacher without a network: the label has a fixed probability.

    ``log p`` with ``p[label] = probability`` and ``p[c] = (1 - probability) / (classes - 1)``
    elsewhere. With the student's logits and T = 20 or more in `kl` this is teacher-free
    distillation by regularization; the other teacher-free form, self-training, is `kl` with an
    earlier copy of the student as its `Teacher`.

    Args:
      labels: integers ``[...]``.
      classes: number of classes, at least 2.
      probability: of the label, between ``1 / classes`` and 1.

    Returns:
      float32 ``[..., classes]``.

    Raises:
      ArgumentError: if ``classes`` or ``probability`` is out of range.

    Example:
      >>> [f"{p:.3f}" for p in jax.nn.softmax(virtual_teacher(jnp.array(1), classes=3))]
      ['0.050', '0.900', '0.050']

    References:
      Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR
      2020, section 4 (Tf-KD: self-training and the manually designed teacher).
    """
    if classes < 2 or not 1 / classes < probability < 1:
        raise ArgumentError(
            "probability must be between 1/classes and 1, of at least 2 classes; got "
            f"{probability} of {classes}"
        )
    others = (1 - probability) / (classes - 1)
    one_hot = jax.nn.one_hot(labels, classes, dtype=bool)
    return jnp.log(jnp.where(one_hot, jnp.float32(probability), jnp.float32(others)))


def ensemble(
    teacher_logits: Teachers, weights: Sequence[float] | None = None, temperature: Scalar = 1.0
) -> jax.Array:
    """Return logits whose softened probabilities are the mean of several teachers', in float32.

    ``T * log sum_m w_m softmax(t_m / T)``: with the same temperature in `kl` the student learns the
    mean of probabilities. (The gradient of `kl` is then also that of the mean of the losses, see
    `averaged`.)

    Args:
      teacher_logits: ``[teachers, ..., classes]``, or a sequence of ``[..., classes]``. No gradient
        goes here.
      weights: one per teacher, not negative, of any sum; equal by default.
      temperature: T > 0, that of the loss.

    Returns:
      ``[..., classes]``.

    Raises:
      ArgumentError: if there is not one weight a teacher, or one is negative, or all are zero.

    Example:
      >>> certain, unsure = jnp.array([99.0, 0.0]), jnp.array([0.0, 0.0])
      >>> [f"{p:.3f}" for p in jax.nn.softmax(ensemble([certain, unsure]))]
      ['0.750', '0.250']

    References:
      Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 5.
    """
    # [teachers, ..., classes]
    stacked = jnp.stack([jax.lax.stop_gradient(each) for each in teacher_logits])
    shares = _shares(weights, len(stacked))
    # Teachers of weight 0 are left out: log 0 is -inf, and their logits may be anything.
    kept = jnp.asarray([index for index, share in enumerate(shares) if share > 0])
    log_p = jax.nn.log_softmax(bounded(stacked[kept], temperature))
    log_share = jnp.log(jnp.asarray([share for share in shares if share > 0], log_p.dtype))
    log_mean = jax.nn.logsumexp(log_p + log_share.reshape(-1, *[1] * (log_p.ndim - 1)), axis=0)
    return jnp.asarray(temperature, log_mean.dtype) * log_mean


def averaged(
    loss: Callable[..., jax.Array], weights: Sequence[float] | None = None
) -> Callable[..., jax.Array]:
    """Return a loss of several teachers: the weighted mean of the loss to each.

    ``sum_m w_m * loss(student_logits, t_m, ...)`` with weights of sum 1.

    Args:
      loss: ``(student_logits, teacher_logits, *rest) -> [...]``, such as `kl`, `dkd` or what
        `hinton` returns.
      weights: one per teacher, not negative, of any sum; equal by default.

    Returns:
      ``(student_logits, teacher_logits, *rest) -> [...]`` with teacher logits as `ensemble` takes
      them; it takes a ``mask`` if the loss does, and other options by name. It raises an
      ArgumentError if there is not one weight a teacher, or one is negative, or all are zero.

    Example:
      >>> import compress_jax as cj
      >>> teachers = [jnp.ones((1, 2)), jnp.zeros((1, 2))]
      >>> cj.distill.averaged(cj.distill.mse, weights=[3, 1])(jnp.zeros((1, 2)), teachers).tolist()
      [0.75]

    References:
      You et al., "Learning from Multiple Teacher Networks", KDD 2017, section 3.
    """

    def mean(
        student_logits: jax.Array, teacher_logits: Teachers, *rest: jax.Array, **options: Any
    ) -> jax.Array:
        shares = _shares(weights, len(teacher_logits))
        losses = [loss(student_logits, each, *rest, **options) for each in teacher_logits]
        return sum(
            (share * each for share, each in zip(shares[1:], losses[1:], strict=True)),
            shares[0] * losses[0],
        )

    return masked_like(loss, mean)


def ensembled(
    loss: Callable[..., jax.Array], weights: Sequence[float] | None = None
) -> Callable[..., jax.Array]:
    """Return a loss of several teachers: the loss to the mean of their probabilities (`ensemble`).

    ``loss(student_logits, ensemble(teacher_logits, weights, T), *rest, temperature=T)``.

    Args:
      loss: ``(student_logits, teacher_logits, *rest, temperature=...) -> [...]``, such as `kl` or
        `jsd`.
      weights: one per teacher, not negative, of any sum; equal by default.

    Returns:
      ``(student_logits, teacher_logits, *rest, temperature=1.0) -> [...]`` with teacher logits as
      `ensemble` takes them.

    Example:
      >>> import compress_jax as cj
      >>> certain, unsure = jnp.array([99.0, 0.0]), jnp.array([0.0, 0.0])
      >>> loss = cj.distill.ensembled(cj.distill.kl)
      >>> loss(jnp.array([jnp.log(3.0), 0.0]), [certain, unsure]).round(4).tolist()
      0.0

    References:
      Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, section 5.
    """

    def loss_to_mean(
        student_logits: jax.Array,
        teacher_logits: Teachers,
        *rest: jax.Array,
        temperature: Scalar = 1.0,
        **options: Any,
    ) -> jax.Array:
        mean = ensemble(teacher_logits, weights, temperature)
        return loss(student_logits, mean, *rest, temperature=temperature, **options)

    loss_to_mean.__name__ = getattr(loss, "__name__", "ensembled")
    return masked_like(loss, loss_to_mean)


def _shares(weights: Sequence[float] | None, teachers: int) -> list[float]:
    """Return weights of sum 1."""
    weights = [1.0] * teachers if weights is None else [float(weight) for weight in weights]
    if len(weights) != teachers or min(weights) < 0 or sum(weights) == 0:
        raise ArgumentError(
            f"{teachers} teachers need as many weights, none negative, not all zero; got {weights}"
        )
    return [weight / sum(weights) for weight in weights]
