"""One leaf as a matrix, and as the product of two thin factors."""

import math

import jax
import jax.numpy as jnp

from compress_jax.core import LowRank
from compress_jax.core.axes import Axes
from compress_jax.core.types import DType

Factors = dict[str, jax.Array]
"""``{"left": float32 [m, r], "right": float32 [r, n]}``, behind the axes of a stack."""


def matrix(x: jax.Array, axes: Axes) -> jax.Array:
    """Return one layer as a float32 matrix ``[m, n]``: contracted axes against outputs.

    Args:
      x: the layer.
      axes: its axes.

    Returns:
      The matrix.

    Example:
      >>> matrix(jnp.ones((3, 3, 2, 5)), Axes.convention((3, 3, 2, 5))).shape
      (18, 5)
    """
    order = (*axes.contracted, *axes.outputs)
    if order != tuple(range(x.ndim)):
        x = jnp.transpose(x, order)
    return x.reshape(-1, sides(axes)[1]).astype(jnp.float32)


def sides(axes: Axes) -> tuple[int, int]:
    """Return the rows and columns of one layer's matrix.

    Example:
      >>> sides(Axes((4, 3, 5), outputs=(2,), stack=(0,)))
      (3, 5)
    """
    rows, columns = (
        math.prod(axes.shape[a] for a in own) for own in (axes.contracted, axes.outputs)
    )
    return rows, columns


def product(factors: Factors, axes: Axes, dtype: DType) -> LowRank:
    """Return the node of a leaf, a whole stack or one layer, that its factors make.

    Args:
      factors: of the leaf.
      axes: of the leaf.
      dtype: of the unpacked array.

    Returns:
      The node.

    Example:
      >>> factors = {"left": jnp.ones((2, 1)), "right": jnp.ones((1, 3))}
      >>> product(factors, Axes.convention((2, 3)), jnp.float32).unpack().shape
      (2, 3)
    """
    # The usual outputs are written as -1, which takes no room in a file.
    columns = (-1,) if axes.outputs == (len(axes.shape) - 1,) else axes.outputs
    left, right = factors["left"], factors["right"]
    return LowRank(left, right, tuple(axes.shape), jnp.dtype(dtype), columns, axes.stack)


def too_thin(axes: Axes) -> str | None:
    """Return why one layer is no matrix, or None if it is one.

    Example:
      >>> too_thin(Axes.convention((8,)))
      'it has 1 axes and a factorization needs 2'
    """
    if len(axes.shape) < 2:
        return f"it has {len(axes.shape)} axes and a factorization needs 2"
    if not axes.outputs or not axes.contracted:
        return "all its axes are inputs, or all are outputs"
    return None
