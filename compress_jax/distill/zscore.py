"""Rows centred and scaled to unit length, with finite gradients where a row is constant or huge."""

import jax
import jax.numpy as jnp


def unit(x: jax.Array, axis: int, floor: float | jax.Array) -> jax.Array:
    """Return ``(x - mean) / max(||x - mean||, floor)`` along an axis: rows of length 1, shorter below the floor.

    Constant rows give exact zeros: differences to the maximum are taken first, and these are zero before any rounding.
    Nothing is squared before it was divided by the row's largest difference, so that no square over- or underflows.

    Args:
      x: floats.
      axis: the axis that is normalised.
      floor: > 0, a number or an array that broadcasts against ``x``. Gradients are at most ``1 / floor``.

    Returns:
      An array of the shape of ``x``.
    """
    centred = x - jax.lax.stop_gradient(x.max(axis, keepdims=True))
    centred = centred - centred.mean(axis, keepdims=True)
    size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(centred).max(axis, keepdims=True), floor))
    scaled = centred / size
    return scaled * jax.lax.rsqrt(jnp.maximum(jnp.square(scaled).sum(axis, keepdims=True), jnp.square(floor / size)))
