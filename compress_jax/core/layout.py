"""Which entries share one scale: the tensor, a channel, or a group along the contracted axes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from compress_jax.core.errors import ArgumentError, ShapeError

Granularity = str | int


class Layout(NamedTuple):
    """An arrangement of an array in which each set that shares a scale lies along `reduced` axes.

    ``"tensor"`` and ``"channel"`` leave the array as it is, so its sharding survives. Groups
    arrange it as ``[groups, group_size, channels]``: the contracting axes (all but the channel
    axes) are joined in C order and cut into runs of ``group_size``, the last one padded with zeros
    if need be. A stack of layers comes first in all of them, and no two layers share a scale.

    Attributes:
      shape: the shape of the array.
      channels: the axes that index output channels, non-negative; empty for one scale a tensor.
      group_size: entries in a group, or None.
      stack: the axes along which the array holds several layers, ascending.
    """

    shape: tuple[int, ...]
    channels: tuple[int, ...] = ()
    group_size: int | None = None
    stack: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        granularity: Granularity,
        axis: int | tuple[int, ...] = -1,
        *,
        pad: bool = False,
        stack: tuple[int, ...] = (),
    ) -> "Layout":
        """Return the layout of an array under a granularity.

        An array whose layers have rank 1 has no contracting axis beside its only one, so each layer
        is a single channel.

        Args:
          shape: the shape of the array.
          granularity: ``"tensor"``, ``"channel"``, or a group size.
          axis: the channel axes; Flax kernels keep their outputs last.
          pad: allow a last group that is not full.
          stack: the axes of stacked layers.

        Returns:
          The layout.

        Raises:
          ShapeError: if groups do not divide the contracting axes and ``pad`` is False, or an axis
            does not exist.
          ArgumentError: if the granularity is none of these.

        Example:
          >>> Layout.of((3, 3, 16, 32), "channel").scale_shape, Layout.of((256, 32), 64).scale_shape
          ((1, 1, 1, 32), (4, 1, 32))
          >>> Layout.of((12, 256, 32), 64, stack=(0,)).scale_shape
          (12, 4, 1, 32)
        """
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        rank = len(shape)
        if any(not -rank <= a < rank for a in axes if shape):
            raise ShapeError(f"channel axis {axis} does not exist in an array of shape {shape}")
        # A layer of rank 1 has no other axis to contract: it is one channel.
        wide = rank - len(stack) > 1
        channels = tuple(sorted({a % rank for a in axes} - set(stack))) if wide else ()
        if granularity == "tensor":
            return cls(tuple(shape), stack=stack)
        if granularity == "channel":
            return cls(tuple(shape), channels, stack=stack)
        if isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 1:
            raise ArgumentError(
                "granularity must be 'tensor', 'channel' or a group size of at least 1, got "
                f"{granularity!r}"
            )
        layout = cls(tuple(shape), channels, granularity, stack)
        if layout.contracting % granularity and not pad:
            raise ShapeError(
                f"groups of {granularity} do not divide the {layout.contracting} contracting "
                f"entries of shape {shape}; "
                "choose a divisor, or pad=True for a last group that is not full"
            )
        return layout

    @property
    def _inner(self) -> tuple[int, ...]:
        """The axes that are summed over, ascending."""
        return tuple(
            a for a in range(len(self.shape)) if a not in self.channels and a not in self.stack
        )

    @property
    def _layers(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.stack)

    @property
    def contracting(self) -> int:
        """How many entries one channel of one layer has."""
        return math.prod(self.shape[a] for a in self._inner)

    @property
    def groups(self) -> int:
        """How many groups one channel has, the padded one included."""
        return -(-self.contracting // self.group_size) if self.group_size else 1

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes of the arranged array that share one scale."""
        if self.group_size:
            return (len(self.stack) + 1,)
        left = [a for a in range(len(self.shape)) if a not in self.stack]
        return tuple(len(self.stack) + i for i, a in enumerate(left) if a not in self.channels)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of the scales, broadcastable to the arranged array, stacked layers first."""
        if self.group_size:
            return (*self._layers, self.groups, 1, math.prod(self.shape[a] for a in self.channels))
        own = (
            n if a in self.channels else 1 for a, n in enumerate(self.shape) if a not in self.stack
        )
        return (*self._layers, *own)

    @property
    def _order(self) -> tuple[int, ...]:
        """The axes as the arranged array has them."""
        if self.group_size:
            return (*self.stack, *self._inner, *self.channels)
        return (*self.stack, *(a for a in range(len(self.shape)) if a not in self.stack))

    def arrange(self, x: jax.Array) -> jax.Array:
        """Return ``x`` with the sets that share a scale along `reduced` axes, padded by zeros."""
        order = self._order
        # [layers..., other axes in place], for groups [layers..., contracting..., channels...]
        x = x if order == tuple(range(len(order))) else jnp.transpose(x, order)
        if not self.group_size:
            return x
        # [layers..., contracting, channels]
        matrix = x.reshape(*self._layers, self.contracting, -1)
        missing = self.groups * self.group_size - self.contracting
        padded = jnp.pad(matrix, (*((0, 0) for _ in self.stack), (0, missing), (0, 0)))
        # [layers..., groups, group_size, channels]
        return padded.reshape(*self._layers, self.groups, self.group_size, -1)

    def restore(self, y: jax.Array) -> jax.Array:
        """Undo `arrange`: drop the padding and return to the shape of the array."""
        order = self._order
        if self.group_size:
            # [layers..., groups * group_size, channels], then without the padding
            matrix = y.reshape(*self._layers, self.groups * self.group_size, -1)
            matrix = jax.lax.slice_in_dim(matrix, 0, self.contracting, axis=len(self.stack))
            y = matrix.reshape(tuple(self.shape[a] for a in order))
        if order == tuple(range(len(order))):
            return y
        return jnp.transpose(y, tuple(order.index(a) for a in range(len(order))))

    def spread(self, scale: jax.Array) -> jax.Array:
        """Return the scale of every entry, in the shape of the array."""
        scale = self.expand(scale)
        if self.group_size:
            full = (*self._layers, self.groups, self.group_size, self.scale_shape[-1])
        else:
            full = tuple(self.shape[a] for a in self._order)
        return self.restore(jnp.broadcast_to(scale, full))

    def expand(self, value: jax.Array) -> jax.Array:
        """Return one number a layer, or one for all, broadcastable to the arranged array.

        Args:
          value: of shape `scale_shape`, or the sizes of the stack, or a scalar.

        Returns:
          The same numbers; a value of shape `scale_shape` as it is.
        """
        if value.ndim == len(self.scale_shape):
            return value
        # [layers...] -> [layers..., 1, ..., 1]; a scalar gets ones alone.
        return value.reshape(*value.shape, *(1,) * (len(self.scale_shape) - value.ndim))
