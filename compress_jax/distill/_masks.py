"""Masks: which examples or tokens of a batch count. One rule fits masks to arrays everywhere.

A mask has leading axes of the array it masks: ``[batch]`` for examples, ``[batch, sequence]`` for
tokens, booleans or weights >= 0. It is matched axis by axis from the left: each of its axes is as
long as the array's or 1, it may have extra axes of 1 at its end (``[batch, sequence, 1]``), and
axes that it lacks are broadcast: ``[batch]`` fits ``[batch, sequence]``. For an array with one
entry per example, a mask of tokens becomes a mask of examples: one counts if any of its tokens
does. Anything else is refused. Masked entries are replaced by zeros *before* anything is computed
from them, so that neither value nor gradient depends on them, even if they are NaN.
"""

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.types import Array, Shape

Mask = jax.Array


def fitted(
    mask: Array, leading: Shape, what: str = "an array", *, examples: bool = False
) -> jax.Array:
    """Return a mask as weights of some leading axes, float32; see this module for the rule.

    Args:
      mask: booleans, or numbers >= 0; a number below 0 becomes NaN, and so does every mean with
        it.
      leading: the axes whose entries are weighted, such as ``loss.shape``.
      what: description of the array, for the error.
      examples: whether a mask of tokens may stand for its examples, where ``leading`` is
        ``(batch,)``: the weight of one is the mean weight of its tokens that count.

    Returns:
      float32 of shape ``leading``.

    Raises:
      ShapeError: if the mask does not fit.
      ArgumentError: if it is of another type.

    Example:
      >>> fitted(jnp.array([True, False]), (2, 3)).tolist()
      [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
      >>> fitted(jnp.array([[1, 0], [0, 0]]), (2,), examples=True).tolist()
      [1.0, 0.0]
    """
    weight = _weights(mask)
    own = _without_ones(weight.shape, len(leading))
    # A mask of tokens for an array of examples: the mean weight of the tokens that count.
    if examples and len(leading) == 1 and len(own) > 1:
        positions = tuple(range(1, weight.ndim))
        number = jnp.maximum((weight > 0).sum(positions), 1)  # [batch]
        weight = weight.sum(positions) / number.astype(weight.dtype)  # [batch]
        own = weight.shape
    padded = own + (1,) * (len(leading) - len(own))  # axes that the mask lacks are broadcast
    if len(padded) > len(leading) or any(
        n not in (1, size) for n, size in zip(padded, leading, strict=True)
    ):
        raise ShapeError(
            f"a mask of shape {tuple(jnp.shape(mask))} does not fit {what}, which has the leading "
            f"axes {tuple(leading)}: its axes must be those, from the left, each as long or 1 "
            "([batch], [batch, sequence], [batch, sequence, 1])"
        )
    return jnp.broadcast_to(weight.reshape(padded), leading)


def fits(mask: Array, leading: Shape, *, examples: bool = False) -> bool:
    """Return whether `fitted` accepts a mask.

    Example:
      >>> fits(jnp.ones((2, 3)), (2, 3)), fits(jnp.ones((2, 3)), (2, 4))
      (True, False)
    """
    try:
        jax.eval_shape(lambda: fitted(mask, leading, examples=examples))
    except ShapeError:
        return False
    return True


def kept(x: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Return an array with zeros for masked entries; its gradient is zero there too.

    Args:
      x: ``[*leading, ...]``.
      counts: weights or booleans ``[*leading]``; None for all.

    Returns:
      The like of ``x``.

    Example:
      >>> kept(jnp.array([[1.0], [jnp.nan]]), jnp.array([1.0, 0.0])).tolist()
      [[1.0], [0.0]]
    """
    if counts is None:
        return x
    shown = counts.astype(bool).reshape(*counts.shape, *(1,) * (x.ndim - counts.ndim))
    # No product with the mask: NaN times 0 is NaN.
    return jnp.where(shown, x, jnp.zeros((), x.dtype))


def of_features(mask: Array, features: jax.Array, what: str = "features") -> jax.Array:
    """Return a mask as weights ``[batch, *positions]`` of features.

    Example:
      >>> mask = jnp.array([[1, 0]])
      >>> of_features(mask, jnp.ones((1, 2, 4))).tolist()
      [[1.0, 0.0]]
      >>> of_features(mask, jnp.ones((1, 4))).tolist()
      [1.0]
    """
    return fitted(
        mask,
        features.shape[:-1],
        f"{what} {tuple(features.shape)}, [batch, *positions, channels]",
        examples=True,
    )


def of_examples(mask: Array, batch: int) -> jax.Array:
    """Return a mask as weights of examples: one counts if any of its tokens does.

    Example:
      >>> of_examples(jnp.array([[1, 0], [0, 0]]), 2).tolist()
      [1.0, 0.0]
    """
    return fitted(mask, (batch,), "the examples", examples=True)


def has_positions(mask: Array) -> bool:
    """Return whether a mask distinguishes positions within an example."""
    return len(_without_ones(jnp.shape(mask), 1)) > 1


def mean_of_each(values: jax.Array, mask: Array | None) -> jax.Array:
    """Return each example's mean over its positions that count and all channels, 0 without any.

    Args:
      values: ``[batch, *positions, channels]``, finite.
      mask: see `of_features`; None for all.

    Returns:
      ``[batch]``.

    Example:
      >>> mean_of_each(jnp.array([[[1.0], [9.0]]]), jnp.array([[1, 0]])).tolist()
      [1.0]
    """
    if mask is None:
        return values.reshape(values.shape[0], -1).mean(axis=1)
    counts = of_features(mask, values)
    number = (counts > 0).reshape(values.shape[0], -1).sum(axis=1) * values.shape[-1]  # [batch]
    total = kept(values, counts).reshape(values.shape[0], -1).sum(axis=1)
    return total / jnp.maximum(number, 1).astype(total.dtype)


def mean_of_positions(values: jax.Array, mask: Array | None) -> jax.Array:
    """Return means ``[batch]``; with a mask of positions, means ``[batch, *positions]``.

    Masked entries are 0. The mean over positions is left to `masked_total`, so that all positions
    of a batch weigh alike.

    Args:
      values: ``[batch, *positions, channels]``, finite.
      mask: see `of_features`; None for all.

    Returns:
      Means.

    Example:
      >>> values = jnp.array([[[1.0], [9.0]]])
      >>> mean_of_positions(values, None).tolist()
      [5.0]
      >>> mean_of_positions(values, jnp.array([[1, 0]])).tolist()
      [[1.0, 0.0]]
    """
    if mask is None or not has_positions(mask) or values.ndim == 2:
        return mean_of_each(values, mask)
    return kept(values, of_features(mask, values)).mean(axis=-1)


def _weights(mask: Array) -> jax.Array:
    array = jnp.asarray(mask)
    if array.dtype == bool:
        return array.astype(jnp.float32)
    if not (jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)):
        raise ArgumentError(
            f"a mask holds booleans or weights >= 0, got {array.dtype}: give 1 or True for what "
            "counts"
        )
    # Under jit no value can be refused; a NaN shows in every mean that has it.
    return jnp.where(array < 0, jnp.nan, array.astype(jnp.float32))


def _without_ones(shape: Shape, keep: int) -> Shape:
    """Return a shape without trailing axes of 1, but with at least ``keep`` axes."""
    while len(shape) > keep and shape[-1] == 1:
        shape = shape[:-1]
    return shape
