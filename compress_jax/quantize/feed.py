"""How a quantized parameter feeds an operand of a contraction: its codes by the route it takes, its scale by rows."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.quantize.integer_dot import Coded
from compress_jax.quantize.route import Route
from compress_jax.quantize.sides import Side
from compress_jax.quantize.stored import Arrays, Stored


@dataclass(frozen=True)
class Feed:
    """A parameter at an operand.

    Attributes:
      stored: how it is kept.
      route: how it arrives.
      side: the operand.
      scales: int32 ``[*turns, *kept axes, groups]``: which of the stored scales belongs to each row and group; axes along
        which they are all the same are 1 long.
    """

    stored: Stored
    route: Route
    side: Side
    scales: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, stored: Stored, route: Route, side: Side) -> "Feed":
        """Follow the scales along a route.

        Args:
          stored: how the parameter is kept.
          route: how it arrives.
          side: the operand.

        Returns:
          The feed; its groups are the longest runs, all equally long, of summed entries that share a scale.
        """
        shape = stored.layout.scale_shape
        places = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
        every = np.asarray(route.every(stored.layout.spread(places)))
        turns = len(route.loops)
        order = (*range(turns), *(turns + axis for axis in (*side.kept, *side.summed)))
        kept = [side.shape[axis] for axis in side.kept]
        table = every.transpose(order).reshape(*every.shape[:turns], *kept, -1)
        changes = np.flatnonzero((table[..., 1:] != table[..., :-1]).any(tuple(range(table.ndim - 1)))) + 1
        size = math.gcd(table.shape[-1], *changes.tolist())
        return cls(stored, route, side, _short(table[..., ::size], turns))

    @property
    def groups(self) -> int:
        """How many groups with scales of their own are summed over."""
        return self.scales.shape[-1]

    @property
    def _picked(self) -> int:
        """How many of the first axes are sliced before the codes are unpacked."""
        return self.route.stacked if self.stored.bits == 8 else min(self.route.stacked, self.stored.axis)

    def captured(self, arrays: Arrays) -> dict[str, Any]:
        """Return what all turns share: the arrays, and the scales by turns and rows."""
        zero = self.stored.zero(arrays)
        zeros = None if zero is None or zero.size == 1 else zero.ravel()[self.scales]
        zeros = zero.reshape((1,) * self.scales.ndim) if zero is not None and zero.size == 1 else zeros
        return {"arrays": arrays, "scale": arrays["scale"].ravel()[self.scales], "zero": zeros}

    def coded(self, captured: dict[str, Any], turns: list[Any]) -> Coded:
        """Return the operand in integers.

        Args:
          captured: what `captured` returned.
          turns: for each loop of the route, the turn.

        Returns:
          The codes in the operand's shape, scales and zeros by rows and groups.
        """
        done = self._picked
        codes = self.stored.codes(captured["arrays"], tuple(turns[:done]))
        scale, zero = (_turn(captured[name], turns) for name in ("scale", "zero"))
        assert scale is not None
        return Coded(self.route.take(codes, turns[done:], done), scale, zero)

    def dense(self, captured: dict[str, Any], turns: list[Any]) -> jax.Array:
        """Return the operand as it is in the unpacked model, bit for bit; arguments as for `coded`."""
        coded = self.coded(captured, turns)
        levels = coded.codes.astype(jnp.int32)
        levels = levels if coded.zero is None else levels - self._spread(coded.zero)
        return self.route.cast((levels.astype(jnp.float32) * self._spread(coded.scale)).astype(self.stored.dtype))

    def _spread(self, rows: jax.Array) -> jax.Array:
        """Return what belongs to rows and groups in the shape that broadcasts against the operand."""
        groups = rows.shape[-1]
        return self.side.operand(jnp.repeat(rows, self.side.products // groups, axis=-1) if groups > 1 else rows)


def _short(table: np.ndarray, turns: int) -> np.ndarray:
    """Leave one index of every axis of rows along which all is the same."""
    for axis in range(turns, table.ndim - 1):
        first = np.take(table, [0], axis)
        table = first if (table == first).all() else table
    return table.astype(np.int32)


def _turn(x: jax.Array | None, turns: list[Any]) -> jax.Array | None:
    for turn in turns if x is not None else ():
        assert x is not None
        x = x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, turn, keepdims=False)
    return x
