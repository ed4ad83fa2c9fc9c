"""What a post-training solver returns, and the error it lowers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.compression import Compression, CompressionState, Params


class Solved(NamedTuple):
    """New params whose view under the compression, with this state, is exact: ``view(params, state) == params``.

    Attributes:
      params: plain arrays, as before; the solved leaves lie on their grids.
      state: of the compression that was solved for.
      skipped: ``{path: reason}``: leaves that the solver left to plain rounding.
      notes: ``{path: what was out of the ordinary}``, such as a damping that had to be raised.
      compression: the one that was solved for, bound to the layouts that the calibrated sites tell: pack with this one.
    """

    params: Params
    state: CompressionState
    skipped: dict[str, str]
    notes: dict[str, str]
    compression: Compression | None = None


def output_error(kernel: jax.Array, rounded: jax.Array, gram: jax.Array) -> jax.Array:
    r"""Return the mean squared error of a layer's outputs, :math:`tr(\Delta^\top G \Delta)`, :math:`\Delta = \hat W - W`.

    Args:
      kernel: ``[..., k, n]``.
      rounded: of the same shape.
      gram: ``[..., k, k]``, the mean of x x^T over calibration rows.

    Returns:
      ``[...]``, summed over the n outputs, a mean over rows.

    Example:
      >>> float(output_error(jnp.zeros((2, 1)), jnp.ones((2, 1)), jnp.eye(2)))
      2.0
    """
    delta = (rounded - kernel).astype(jnp.float32)
    return jnp.einsum("...kn,...kl,...ln->...", delta, gram, delta, precision=jax.lax.Precision.HIGHEST)
