"""Dynamic quantization of activations: the range is that of the operand itself, in every call."""

from typing import Literal

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError
from compress_jax.quantize._activations.quantizer import (
    ActivationQuantizer,
    OperandState,
    activation_grid,
    round_to_grid,
    stable_scale_from_range,
)
from compress_jax.quantize._scales.rules import Scale
from compress_jax.trace._jaxpr.site import Site


def dynamic(
    bits: int = 8, symmetric: bool = True, granularity: Literal["tensor", "token"] = "tensor"
) -> ActivationQuantizer:
    r"""Quantize an operand by its own range, :math:`s = \max |x| / q_{max}`.

    Nothing is clipped, and nothing needs calibration.

    Args:
      bits: 2 to 8.
      symmetric: whether the grid's zero is its middle; else the range is from min(x, 0) to max(x,
        0).
      granularity: ``"tensor"`` for one scale, ``"token"`` for one scale a row: for all entries that
        are contracted together. In a convolution these are all windows of an example, so that each
        example has a scale.

    Returns:
      The quantizer, with the derivative of the identity.

    Raises:
      ArgumentError: if an argument is none of the above.

    Example:
      >>> import compress_jax as cj
      >>> fn, params = lambda p, x: x @ p["kernel"], {"kernel": jnp.eye(2)}
      >>> x = jnp.array([[1.0, 0.2], [0.1, -0.08]])
      >>> quantized = cj.quantize.activations(fn, cj.quantize.dynamic(2, granularity="token"))
      >>> quantized.apply(params, quantized.init(params), x).tolist()
      [[1.0, 0.0], [0.10000000149011612, -0.10000000149011612]]

    References:
      Yao et al., "ZeroQuant", 2022, arXiv:2206.01861, section 4.1 (token-wise).
    """
    grid = activation_grid(bits, symmetric)
    if granularity not in ("tensor", "token"):
        raise ArgumentError(
            f"granularity must be 'tensor' or 'token', got {granularity!r}; per channel is "
            "`static`'s"
        )

    def scale_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> Scale:
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        # A tensor gets scalars; rows keep their axes at size 1, to broadcast against the operand.
        axes = row_axes(site, index) if granularity == "token" else None
        # The initial 0 keeps zero in the range, and makes that of an empty operand finite.
        low = jnp.min(x, axis=axes, keepdims=axes is not None, initial=0)
        high = jnp.max(x, axis=axes, keepdims=axes is not None, initial=0)
        return stable_scale_from_range(low, high, grid)

    def quantize_fn(site: Site, index: int, x: jax.Array, state: OperandState) -> jax.Array:
        return round_to_grid(grid, False, x, *scale_fn(site, index, x, state))

    call = f"dynamic(bits={bits}, symmetric={symmetric}, granularity={granularity!r})"
    return ActivationQuantizer(grid, scale_fn, quantize_fn, call=call)


def row_axes(site: Site, index: int) -> tuple[int, ...]:
    """Return the axes of an operand along which entries are contracted with each other.

    Args:
      site: the contraction.
      index: which operand.

    Returns:
      Axes; of a convolution's input its channels and its space, of its kernel all but the output
      channels.

    Example:
      >>> shapes, float32 = ((2, 5, 3), (3, 4), (2, 5, 4)), ["float32"] * 3
      >>> row_axes(Site("a", "dot", None, None, *shapes, *float32, ((2,), (0,))), 0)
      (2,)
    """
    # A pixel is in several windows, so all windows of an example share one scale.
    if site.kind == "conv" and index == 0:
        batch = site.params["dimension_numbers"].lhs_spec[0]
        return tuple(axis for axis in range(len(site.lhs_shape)) if axis != batch)
    return site.contracting[index]
