"""Masked means of token losses, as sums and counts that add up over microbatches and devices."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from compress_jax.distill._masks import Mask, fitted, kept
from compress_jax.distill._teachers.teacher import at_least_float32

Result = TypeVar("Result")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Total:
    """A sum and a count, because a mean of means is wrong where the numbers of tokens differ.

    It is a pytree: add the totals of microbatches, or ``jax.lax.psum`` those of devices, and take
    the mean at the end. For gradients accumulated over microbatches, differentiate ``total.sum``
    and divide by the sum of all counts, which has no gradient.

    Attributes:
      sum: float32 scalar.
      count: float32 scalar.

    Example:
      >>> long = Total(jnp.float32(8.0), jnp.float32(4.0))
      >>> short = Total(jnp.float32(1.0), jnp.float32(1.0))
      >>> (long + short).mean.round(4).tolist()
      1.7999999523162842
    """

    sum: jax.Array
    count: jax.Array

    def __add__(self, other: "Total") -> "Total":
        """Return the total of both."""
        return Total(self.sum + other.sum, self.count + other.count)

    @property
    def mean(self) -> jax.Array:
        """The mean; of nothing at all it is 0, and so is its gradient."""
        # Without the where the gradient of 0 / 0 is NaN.
        return self.sum / jnp.where(self.count > 0, self.count, 1)


def masked_total(loss: jax.Array, mask: jax.Array) -> Total:
    """Return the sum of the losses that count and their number.

    ``sum_i mask[i] * loss[i]`` and ``sum_i mask[i]``. Losses whose mask is 0 are not read, even if
    they are NaN; their gradients are another matter, see `token_total`.

    Args:
      loss: ``[...]``, a floating dtype.
      mask: ``[...]`` or as `masks` tells: ``[batch]`` and ``[batch, sequence, 1]`` fit
        ``[batch, sequence]``. Booleans, or weights >= 0 of any number dtype.

    Returns:
      A `Total`.

    Raises:
      ShapeError: if the mask does not fit.

    Example:
      >>> masked_total(jnp.array([[1.0, 2.0, jnp.nan]]), jnp.array([[1, 1, 0]])).mean.tolist()
      1.5
    """
    weight = fitted(mask, loss.shape, "the losses")
    loss = at_least_float32(loss)
    weight = weight.astype(loss.dtype)
    # kept, as a loss of NaN times a weight of 0 is NaN.
    return Total((kept(loss, weight) * weight).sum(), weight.sum())


def masked_mean(loss: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean of the losses that count, 0 if none does.

    ``sum_i mask[i] * loss[i] / sum_i mask[i]``: right for a whole batch, under ``jit`` on any
    sharding. Where a batch is split (microbatches, ``shard_map``), add up the `masked_total` of
    each part instead.

    Args:
      loss: ``[...]``, a floating dtype.
      mask: see `masked_total`.

    Returns:
      A float32 scalar.

    Raises:
      ShapeError: if the mask does not fit.

    Example:
      >>> masked_mean(jnp.array([1.0, 5.0, 9.0]), jnp.array([True, True, False])).tolist()
      3.0
    """
    return masked_total(loss, mask).mean


def token_total(
    loss: Callable[..., jax.Array],
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    mask: jax.Array,
    **options: Any,
) -> Total:
    """Return a loss of logits summed over the tokens that count, and their number.

    ``sum_i mask[i] * loss(student_logits[i], teacher_logits[i])`` over tokens i. Logits of the
    others are replaced by zeros before the loss sees them, so that neither value nor gradient
    depends on them, even where padding made them NaN.

    Args:
      loss: per token, such as `kl`, `reverse_kl` or `jsd`.
      student_logits: ``[..., classes]``, such as ``[batch, sequence, vocabulary]``.
      teacher_logits: same shape.
      mask: see `masked_total`: 1 for tokens of an answer, 0 for prompt and padding.
      **options: options of the loss, such as ``temperature``; a loss that couples tokens (`dist`)
        receives the mask too.

    Returns:
      A `Total`.

    Raises:
      ShapeError: if the shapes do not fit.

    Example:
      >>> import compress_jax as cj
      >>> student, mask = jnp.zeros((1, 2, 2)), jnp.array([[1, 0]])
      >>> teacher = jnp.array([[[jnp.log(3.0), 0.0], [jnp.nan, 0.0]]])
      >>> cj.distill.token_total(cj.distill.kl, student, teacher, mask).mean.round(4).tolist()
      0.13079999387264252

    References:
      Kim and Rush, "Sequence-Level Knowledge Distillation", EMNLP 2016, section 3.1 (word-level
      distillation).
    """
    counts = fitted(mask, student_logits.shape[:-1], "the tokens")  # [batch, sequence]
    student = kept(student_logits, counts)
    teacher = kept(teacher_logits, counts)
    if takes_mask(loss):
        options["mask"] = counts
    return masked_total(loss(student, teacher, **options), counts)


def takes_mask(loss: Callable[..., object]) -> bool:
    """Return whether a function has an unbound parameter ``mask``, as coupling losses do.

    Example:
      >>> from compress_jax.distill import dist, kl
      >>> takes_mask(dist), takes_mask(kl)
      (True, False)
    """
    try:
        found = inspect.signature(loss).parameters.get("mask")
    except (TypeError, ValueError):  # a builtin
        return False
    # A partial that binds a mask has that mask as default: it is not to be given another.
    # By identity: a mask compares entry by entry.
    return found is not None and (found.default is None or found.default is found.empty)


def masked_like(loss: Callable[..., object], made: Callable[..., Result]) -> Callable[..., Result]:
    """Return ``made``, a loss built on another one, with a parameter ``mask`` only if that has one.

    Example:
      >>> from compress_jax.distill import dist
      >>> def twice(student, teacher, **options):
      ...     return 2 * dist(student, teacher, **options)
      >>> takes_mask(twice), takes_mask(masked_like(dist, twice))
      (False, True)
    """
    if not takes_mask(loss):
        return made

    @functools.wraps(made)
    def masked(*args: Any, mask: Mask | None = None, **options: Any) -> Result:
        return made(*args, mask=mask, **options)

    del masked.__wrapped__  # `inspect.signature` would follow it, and find no mask
    return masked
