"""The last layer of every classifier, whose matrix product is in float32 for any model dtype."""

import jax.numpy as jnp
from flax import linen as nn

from compress_jax.core.types import DType


def head(classes: int, dtype: DType) -> nn.Dense:
    """Return the layer ``head`` from features to float32 logits.

    Logits in bfloat16 cost up to a tenth of the gradient, so this layer computes in at least
    float32 (float64 where the model does).

    Args:
      classes: the number of logits.
      dtype: the dtype of the rest of the model.

    Returns:
      A Dense layer, to be called inside a compact method.

    Example:
      >>> head(10, jnp.bfloat16).dtype.__name__
      'float32'
    """
    # Only a float64 model has more than 32 bits; every other one gets a float32 head.
    dtype = dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
    return nn.Dense(classes, dtype=dtype, name="head")
