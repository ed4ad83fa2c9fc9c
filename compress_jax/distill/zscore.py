"""Rows centred and scaled to unit length, with finite gradients where a row is constant or huge."""

import jax
import jax.numpy as jnp


def unit(x: jax.Array, axis: int, floor: float | jax.Array, counts: jax.Array | None = None) -> jax.Array:
    """Return ``(x - mean) / max(||x - mean||, floor)`` along an axis: rows of length 1, shorter below the floor.

    Constant rows give exact zeros: differences to the maximum are taken first, and these are zero before any rounding.
    Nothing is squared before it was divided by the row's largest difference, so that no square over- or underflows.

    Args:
      x: floats.
      axis: the axis that is normalised.
      floor: > 0, a number or an array that broadcasts against ``x``. Gradients are at most ``1 / floor``.
      counts: booleans of the shape of ``x``, which entries are there; the others are 0, and nothing depends on them.

    Returns:
      An array of the shape of ``x``.
    """
    counts = jnp.ones(x.shape, bool) if counts is None else counts
    lowest = jnp.finfo(x.dtype).min
    highest = jax.lax.stop_gradient(jnp.where(counts, x, lowest).max(axis, keepdims=True))
    centred = jnp.where(counts, x, highest) - highest
    number = jnp.maximum(counts.sum(axis, keepdims=True), 1).astype(x.dtype)
    centred = jnp.where(counts, centred - centred.sum(axis, keepdims=True) / number, 0)
    size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(centred).max(axis, keepdims=True), floor))
    scaled = centred / size
    return scaled * jax.lax.rsqrt(jnp.maximum(jnp.square(scaled).sum(axis, keepdims=True), jnp.square(floor / size)))
