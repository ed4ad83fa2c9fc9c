"""The grid of a uniform quantizer: its levels, their integer codes, and rounding to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.finite import saturate, where_finite


class Grid(NamedTuple):
    """The ``2**bits`` evenly spaced levels ``scale * (code - zero_point)``, codes from 0.

    A symmetric grid has the fixed zero point ``2**(bits - 1)``, hence the levels
    ``-2**(bits - 1) .. 2**(bits - 1) - 1`` of a signed integer. An asymmetric one has a zero point
    for every scale. Either way zero is a level, so that pruned weights stay exactly zero.

    Attributes:
      bits: 2 to 8.
      symmetric: whether the zero point is fixed in the middle.
      narrow: whether a symmetric grid leaves out its lowest level, so that the negative of every
        level is one.

    Example:
      >>> import compress_jax as cj
      >>> grid = cj.quantize.Grid(bits=3, symmetric=True)
      >>> codes = grid.encode(jnp.array([-9.0, -0.2, 0.9]), jnp.array(0.5), grid.middle)
      >>> codes.tolist(), grid.decode(codes, jnp.array(0.5), grid.middle).tolist()
      ([0, 4, 6], [-2.0, 0.0, 1.0])
    """

    bits: int
    symmetric: bool = True
    narrow: bool = False

    @property
    def top(self) -> int:
        """The largest code; also the number of steps from the lowest level to the highest."""
        return 2**self.bits - 1

    @property
    def qmax(self) -> int:
        """The highest level of the symmetric grid.

        The lowest is ``-qmax - 1``, or ``-qmax`` on a narrow grid.
        """
        return 2 ** (self.bits - 1) - 1

    @property
    def middle(self) -> jax.Array:
        """The zero point of the symmetric grid, uint8."""
        return jnp.array(2 ** (self.bits - 1), jnp.uint8)

    def levels(self, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
        """Return the nearest integer level, ``clip(round(x / scale), lowest, highest)``, float32.

        The lowest is ``-zero_point``, or one more if the grid is narrow, and the highest
        ``top - zero_point``.

        Args:
          x: float array in the arrangement of a `Layout`.
          scale: float32, broadcasts against ``x``.
          zero_point: uint8, broadcasts against ``x``.

        Returns:
          Whole numbers, float32, in the shape of ``x``.
        """
        zero = zero_point.astype(jnp.float32)
        lowest = int(self.narrow) - zero
        # XLA turns a division under `jit` into this product wherever it can; written as a product,
        # the levels are the same bits compiled or not.
        steps = jnp.round(x.astype(jnp.float32) * (1 / scale))
        return jnp.clip(steps, lowest, self.top - zero)

    def encode(self, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
        """Return the codes of the nearest levels, int32 in ``[0, top]``; arguments of `levels`."""
        return self.levels(x, scale, zero_point).astype(jnp.int32) + zero_point.astype(jnp.int32)

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
        """Return ``(codes - zero_point) * scale`` in float32, bit for bit `Quantized.unpack`."""
        return (codes - zero_point.astype(jnp.int32)).astype(jnp.float32) * scale

    def round(self, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
        """Return the decoded codes of ``x`` in its dtype; NaN and infinity stay.

        The arguments are those of `levels`.
        """
        rounded = self.decode(self.encode(x, scale, zero_point), scale, zero_point)
        return where_finite(x, saturate(rounded, x.dtype))
