"""The last layer of every classifier: its matrix product itself is in float32, whatever the rest computes in."""

import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType


def head(classes: int, dtype: DType) -> nn.Dense:
    """Return the layer ``head`` that turns features into float32 logits.

    Rounding logits to bfloat16 before the softmax costs up to a tenth of the gradient, so this
    layer computes in at least float32 (float64 where the model does).

    Args:
      classes: number of logits.
      dtype: what the rest of the model computes in.

    Returns:
      A Dense layer, to be called inside a compact method.

    Example:
      >>> head(10, jnp.bfloat16).dtype.__name__
      'float32'
    """
    return nn.Dense(
        classes, dtype=dtype if jnp.finfo(dtype).bits > 32 else jnp.float32, name="head"
    )
