"""Dynamic quantization of activations: the range is that of the very operand, anew in every call."""

from typing import Literal

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError
from compress_jax.quantize._activations.quantizer import (
    ActivationQuantizer,
    Own,
    Placed,
    checked,
    rounded,
    spanned,
)
from compress_jax.trace._jaxpr.site import Site


def dynamic(
    bits: int = 8, symmetric: bool = True, granularity: Literal["tensor", "token"] = "tensor"
) -> ActivationQuantizer:
    r"""Quantize an operand by its own range, :math:`s = \max |x| / q_{max}`; nothing is clipped, nothing calibrated.

    Args:
      bits: 2 to 8.
      symmetric: whether the grid's zero is its middle; else the range is from min(x, 0) to max(x,
        0).
      granularity: ``"tensor"`` for one scale, ``"token"`` for one for each row: for all entries
        that are contracted together. Of a convolution these are all windows of an example, so that
        each example has a scale.

    Returns:
      The quantizer, with the derivative of the identity.

    Raises:
      ArgumentError: if an argument is none of the above.

    Example:
      >>> from compress_jax.trace import rewrite
      >>> how, x = dynamic(bits=2, granularity="token"), jnp.array([[1.0, 0.2], [0.1, -0.08]])
      >>> seen = rewrite(lambda w, x: x @ w, lambda site, lhs, rhs: (how.see(site, 0, lhs, {}), rhs))
      >>> seen(jnp.eye(2), x).tolist()
      [[1.0, 0.0], [0.10000000149011612, -0.10000000149011612]]

    References:
      Yao et al., "ZeroQuant", 2022, arXiv:2206.01861, section 4.1 (token-wise).
    """
    grid = checked(bits, symmetric)
    if granularity not in ("tensor", "token"):
        raise ArgumentError(
            f"granularity must be 'tensor' or 'token', got {granularity!r}; per channel is "
            "`static`'s"
        )

    def place(site: Site, index: int, x: jax.Array, own: Own) -> Placed:
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        axes = together(site, index) if granularity == "token" else None
        low, high = (
            reduction(x, axis=axes, keepdims=axes is not None, initial=0)
            for reduction in (jnp.min, jnp.max)
        )
        return spanned(low, high, grid)

    def see(site: Site, index: int, x: jax.Array, own: Own) -> jax.Array:
        return rounded(grid, False, x, *place(site, index, x, own))

    call = f"dynamic(bits={bits}, symmetric={symmetric}, granularity={granularity!r})"
    return ActivationQuantizer(grid, place, see, call=call)


def together(site: Site, index: int) -> tuple[int, ...]:
    """Return the axes of an operand along which entries are contracted with each other: a row's, or an image's.

    Args:
      site: the contraction.
      index: which operand.

    Returns:
      Axes; of a convolution's input its channels and its space, of its kernel all but the output
      channels.

    Example:
      >>> together(Site("a", "dot", None, None, (2, 5, 3), (3, 4), (2, 5, 4), *["float32"] * 3, ((2,), (0,))), 0)
      (2,)
    """
    if site.kind == "conv" and index == 0:
        return tuple(
            axis
            for axis in range(len(site.lhs_shape))
            if axis != site.params["dimension_numbers"].lhs_spec[0]
        )
    return site.contracting[index]
