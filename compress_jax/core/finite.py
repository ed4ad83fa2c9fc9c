"""What is not finite stays so, and what is finite becomes nothing else: the ends of every view."""

import jax
import jax.numpy as jnp


def saturate(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Cast an array to a float dtype, clipped to its largest finite number.

    Levels are computed in float32, and one of them may lie beyond the range of the leaf's dtype
    (65504 in float16) or of float32 itself, where a plain cast gives infinity. NaN stays NaN.

    Args:
      x: float array.
      dtype: floating.

    Returns:
      The array in that dtype.

    Example:
      >>> saturate(jnp.array([1e6, -jnp.inf, 2.0]), jnp.float16).tolist()
      [65504.0, -65504.0, 2.0]
    """
    bound = min(float(jnp.finfo(dtype).max), float(jnp.finfo(x.dtype).max))
    # `clip` keeps NaN and turns infinity into the bound.
    return jnp.clip(x, -bound, bound).astype(dtype)


def where_finite(x: jax.Array, seen: jax.Array) -> jax.Array:
    """Return what is seen of an array, and the array's own entry where that is NaN or infinite.

    Codes cannot stand for such numbers; seen as some level they would hide that training has
    diverged.

    Args:
      x: float array.
      seen: what a view makes of it, of its shape and dtype.

    Returns:
      Of the same shape and dtype.

    Example:
      >>> where_finite(jnp.array([1.2, jnp.nan]), jnp.array([1.0, 0.0])).tolist()
      [1.0, nan]
    """
    return jnp.where(jnp.isfinite(x), seen, x)
