"""Which entries of an array share one scale: the whole tensor, a channel, or a group along the contracting axes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ShapeError

Granularity = str | int


class Layout(NamedTuple):
    """How an array is arranged so that a statistic of every sharing set is a reduction over `reduced` axes.

    ``"tensor"`` and ``"channel"`` leave the array as it is, so its sharding survives. Groups arrange it as
    ``[groups, group_size, channels]``: the contracting axes (all but the channel axes) are joined in C order and cut into
    runs of ``group_size``, the last one padded with zeros if need be.

    Attributes:
      shape: the shape of the array.
      channels: the axes that index output channels, non-negative; empty for one scale a tensor.
      group_size: entries in a group, or None.
    """

    shape: tuple[int, ...]
    channels: tuple[int, ...] = ()
    group_size: int | None = None

    @classmethod
    def of(
        cls, shape: tuple[int, ...], granularity: Granularity, axis: int | tuple[int, ...] = -1, *, pad: bool = False
    ) -> "Layout":
        """Return the layout of an array under a granularity.

        An array of rank 1 has no contracting axis beside its only one, so it counts as a single channel.

        Args:
          shape: the shape of the array.
          granularity: ``"tensor"``, ``"channel"``, or a group size.
          axis: the channel axes; Flax kernels keep their outputs last.
          pad: allow a last group that is not full.

        Returns:
          The layout.

        Raises:
          ShapeError: if groups do not divide the contracting axes and ``pad`` is False, or an axis does not exist.
          ValueError: if the granularity is none of these.

        Example:
          >>> Layout.of((3, 3, 16, 32), "channel").scale_shape, Layout.of((256, 32), 64).scale_shape
          ((1, 1, 1, 32), (4, 1, 32))
        """
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        if any(not -len(shape) <= a < len(shape) for a in axes if shape):
            raise ShapeError(f"channel axis {axis} does not exist in an array of shape {shape}")
        channels = tuple(sorted({a % len(shape) for a in axes})) if len(shape) > 1 else ()
        if granularity == "tensor":
            return cls(tuple(shape))
        if granularity == "channel":
            return cls(tuple(shape), channels)
        if isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 1:
            raise ValueError(f"granularity must be 'tensor', 'channel' or a group size of at least 1, got {granularity!r}")
        layout = cls(tuple(shape), channels, granularity)
        if layout.contracting % granularity and not pad:
            raise ShapeError(
                f"groups of {granularity} do not divide the {layout.contracting} contracting entries of shape {shape}; "
                "choose a divisor, or pad=True for a last group that is not full"
            )
        return layout

    @property
    def contracting(self) -> int:
        """How many entries one channel has."""
        return math.prod(n for a, n in enumerate(self.shape) if a not in self.channels)

    @property
    def groups(self) -> int:
        """How many groups one channel has, the padded one included."""
        return -(-self.contracting // self.group_size) if self.group_size else 1

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes of the arranged array that share one scale."""
        if self.group_size:
            return (1,)
        return tuple(a for a in range(len(self.shape)) if a not in self.channels)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the scales, which broadcasts against the arranged array."""
        if self.group_size:
            return (self.groups, 1, math.prod(self.shape[a] for a in self.channels))
        return tuple(n if a in self.channels else 1 for a, n in enumerate(self.shape))

    @property
    def _order(self) -> tuple[int, ...]:
        return (*(a for a in range(len(self.shape)) if a not in self.channels), *self.channels)

    def arrange(self, x: jax.Array) -> jax.Array:
        """Return ``x`` arranged so that `reduced` axes hold what shares a scale; groups are padded with zeros."""
        if not self.group_size:
            return x
        matrix = jnp.transpose(x, self._order).reshape(self.contracting, -1)
        missing = self.groups * self.group_size - self.contracting
        return jnp.pad(matrix, ((0, missing), (0, 0))).reshape(self.groups, self.group_size, -1)

    def restore(self, y: jax.Array) -> jax.Array:
        """Undo `arrange`: drop the padding and return to the shape of the array."""
        if not self.group_size:
            return y
        order = self._order
        matrix = y.reshape(self.groups * self.group_size, -1)[: self.contracting]
        back = tuple(order.index(a) for a in range(len(order)))
        return jnp.transpose(matrix.reshape(tuple(self.shape[a] for a in order)), back)

    def spread(self, scale: jax.Array) -> jax.Array:
        """Return the scale of every entry, in the shape of the array."""
        full = (*self.scale_shape[:1], self.group_size, *self.scale_shape[2:]) if self.group_size else self.shape
        return self.restore(jnp.broadcast_to(scale, full))
