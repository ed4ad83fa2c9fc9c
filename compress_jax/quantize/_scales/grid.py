"""The grid of a uniform quantizer: integer levels, the codes that stand for them, and rounding to it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.finite import saturate, where_finite


class Grid(NamedTuple):
    """The ``2**bits`` levels ``code - zero_point`` that are multiplied by a scale, codes running from 0 to ``2**bits - 1``.

    A symmetric grid has the fixed zero point ``2**(bits - 1)``, hence the levels
    ``-2**(bits - 1) .. 2**(bits - 1) - 1`` of a signed integer. An asymmetric one has a zero point
    for every scale. Either way zero is a level, so that pruned weights stay exactly zero.

    Attributes:
      bits: 2 to 8.
      symmetric: whether the zero point is fixed in the middle.
      narrow: whether a symmetric grid leaves out its lowest level, so that the negative of every
        level is one.

    Example:
      >>> grid = Grid(bits=3, symmetric=True)
      >>> codes = grid.encode(jnp.array([-9.0, -0.2, 0.9]), jnp.array(0.5), grid.middle)
      >>> codes.tolist(), grid.decode(codes, jnp.array(0.5), grid.middle).tolist()
      ([0, 4, 6], [-2.0, 0.0, 1.0])
    """

    bits: int
    symmetric: bool = True
    narrow: bool = False

    @property
    def top(self) -> int:
        """The largest code, which is also the number of steps from the lowest level to the highest."""
        return 2**self.bits - 1

    @property
    def qmax(self) -> int:
        """The highest level of the symmetric grid; the lowest is ``-qmax - 1``, or ``-qmax`` if it is narrow."""
        return 2 ** (self.bits - 1) - 1

    @property
    def middle(self) -> jax.Array:
        """The zero point of the symmetric grid, uint8."""
        return jnp.array(2 ** (self.bits - 1), jnp.uint8)

    def levels(self, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
        """Return the nearest level of every entry, ``clip(round(x / scale), lowest, highest)``, in float32.

        The lowest is ``-zero_point``, or one more if the grid is narrow, and the highest
        ``top - zero_point``. The division is written as a multiplication by ``1 / scale``, as XLA
        turns it into one under ``jit`` wherever it can: so the levels are the same bits compiled or
        not.

        Args:
          x: float array in the arrangement of a `Layout`.
          scale: float32, broadcasts against ``x``.
          zero_point: uint8, broadcasts against ``x``.

        Returns:
          Whole numbers, float32, in the shape of ``x``.
        """
        zero = zero_point.astype(jnp.float32)
        return jnp.clip(
            jnp.round(x.astype(jnp.float32) * (1 / scale)), int(self.narrow) - zero, self.top - zero
        )

    def encode(self, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
        """Return the codes of the nearest levels, int32 in ``[0, top]``; arguments as in `levels`."""
        return self.levels(x, scale, zero_point).astype(jnp.int32) + zero_point.astype(jnp.int32)

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
        """Return ``(codes - zero_point) * scale`` in float32, by the very arithmetic of ``Quantized.unpack``."""
        return (codes - zero_point.astype(jnp.int32)).astype(jnp.float32) * scale

    def round(self, x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
        """Return what the codes of ``x`` stand for, in its dtype; NaN and infinity stay. Arguments as in `levels`."""
        seen = self.decode(self.encode(x, scale, zero_point), scale, zero_point)
        return where_finite(x, saturate(seen, x.dtype))
