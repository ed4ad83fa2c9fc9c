"""The n largest of every m consecutive entries along chosen axes, by comparing each entry with its m - 1 neighbours."""

import math

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]


def largest_of_each(keys: jax.Array, n: int, m: int, axes: Axes) -> jax.Array:
    """Return a mask of the ``n`` entries of largest key in every group of ``m``.

    Several axes are joined in C order and then cut into groups. Of equal keys the later entry is kept. A last group of
    fewer than m keeps ``min(n, its size)``: padded to m with entries that are never kept, it too has at most n.

    Args:
      keys: unsigned integers, below the largest of their dtype.
      n: static, how many of a group are kept, at most m.
      m: static, the size of a group.
      axes: static, nonnegative, along which groups run.

    Returns:
      bool, the shape of ``keys``.

    Example:
      >>> largest_of_each(jnp.array([[3], [1], [2], [2], [9], [8], [7]], jnp.uint32), 2, 4, (0,)).ravel().tolist()
      [True, False, False, True, True, True, False]
    """
    start, length = min(axes), math.prod(keys.shape[axis] for axis in axes)
    target = tuple(range(start, start + len(axes)))
    moved = jnp.moveaxis(keys, axes, target)
    before, after = moved.shape[:start], moved.shape[start + len(axes) :]
    line = moved.reshape(*before, length, *after)
    kept = _grouped(line, n, m, start)
    return jnp.moveaxis(kept.reshape(moved.shape), target, axes)


def _grouped(line: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Keep the largest along one axis."""
    length = line.shape[axis]
    groups = -(-length // m)
    pads = [(0, groups * m - length if a == axis else 0) for a in range(line.ndim)]
    ranked = jnp.pad(line + jnp.ones((), line.dtype), pads)  # padding, 0, is below every key
    grid = ranked.reshape(*line.shape[:axis], groups, m, *line.shape[axis + 1 :])
    return _above(grid, n, m, axis + 1).reshape(ranked.shape)[(*(slice(None),) * axis, slice(length))]


def _above(grid: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Return which entries have fewer than ``n`` others before them along the axis, in descending order of key."""
    place = jax.lax.broadcasted_iota(jnp.int32, grid.shape, axis)
    larger = jnp.zeros(grid.shape, jnp.int32)
    for j in range(m):
        other = jax.lax.slice_in_dim(grid, j, j + 1, axis=axis)
        wins = (other > grid) | ((other == grid) & (j > place))
        larger += wins.astype(jnp.int32)
    return larger < n
