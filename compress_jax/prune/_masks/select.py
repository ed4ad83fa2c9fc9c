"""The k smallest entries, found by bisection: no sort, no reshape, and so the same bits under every sharding.

Floats order like unsigned integers made of their bits (`magnitude_bits`, `value_bits`), so the k-th
smallest of them is found by halving an interval of integers and counting, about 32 passes for
float32. The counts are all that devices exchange. Where several entries equal the threshold,
further bisections on their position, one an axis, single out the first ones.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp

from compress_jax.core.exact import Int64, add, choose, count, less, subtract, uint64


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Return the bit pattern of ``|x|`` as unsigned integers, ordered as the magnitudes are; -0.0 equals 0.0.

    Args:
      x: floating point, any shape.

    Returns:
      Unsigned integers of the same width and shape.

    Example:
      >>> magnitude_bits(jnp.array([-0.0, 0.0, -1.0, 1.5])).tolist()
      [0, 0, 1065353216, 1069547520]
    """
    bits = jnp.finfo(x.dtype).bits
    pattern = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    return pattern & jnp.asarray(2 ** (bits - 1) - 1, pattern.dtype)


def bisect(
    below: Callable[[jax.Array], Int64], k: Int64, top: jax.Array
) -> tuple[jax.Array, Int64]:
    """Return the largest ``t < top`` with ``below(t) <= k``, or any ``t`` with ``below(t) == k``, and ``below(t)``.

    Args:
      below: a nondecreasing count, zero at 0.
      k: the count to reach.
      top: the end of the range of ``t``; an unsigned integer scalar.

    Returns:
      ``(t, below(t))``, ``t`` in the dtype of ``top``.

    Example:
      >>> squares = lambda t: Int64(jnp.uint32(0), t * t)
      >>> int(bisect(squares, uint64(50), jnp.uint32(100))[0])
      7
    """

    def unfinished(carry: tuple[jax.Array, jax.Array, Int64]) -> jax.Array:
        low, high, reached = carry
        return (high - low > 1) & less(reached, k)

    def halve(carry: tuple[jax.Array, jax.Array, Int64]) -> tuple[jax.Array, jax.Array, Int64]:
        low, high, reached = carry
        middle = low + (high - low) // 2
        counted = below(middle)
        over = less(k, counted)
        return (
            jnp.where(over, low, middle),
            jnp.where(over, middle, high),
            choose(over, reached, counted),
        )

    low, _, reached = jax.lax.while_loop(unfinished, halve, (jnp.zeros_like(top), top, uint64(0)))
    return low, reached


def first(flags: jax.Array, k: Int64) -> jax.Array:
    """Return a mask of the first ``k`` true entries in C order, found axis by axis.

    Args:
      flags: bool, any shape.
      k: how many; all, if there are fewer.

    Returns:
      bool, the shape of ``flags``.

    Example:
      >>> first(jnp.array([[True, False, True], [True, True, False]]), uint64(3)).tolist()
      [[True, False, True], [True, False, False]]
    """
    chosen = jnp.zeros_like(flags)
    for axis, length in enumerate(flags.shape):
        where = partial(
            jax.lax.broadcasted_iota, jnp.uint32, flags.shape, axis
        )  # made anew: kept it is 4 bytes an entry
        end, taken = bisect(
            lambda t, f=flags, p=where: count(f & (p() < t)), k, jnp.uint32(length + 1)
        )
        chosen |= flags & (where() < end)
        flags &= where() == end
        k = subtract(k, taken)
    return chosen | (flags & less(uint64(0), k))  # an array of rank 0 has no axis to look along


def value_bits(x: jax.Array) -> jax.Array:
    """Return unsigned integers ordered as the numbers themselves are, negative ones first; -0.0 equals 0.0.

    Args:
      x: floating point, any shape.

    Returns:
      Unsigned integers of the same width and shape, at least 1.

    Example:
      >>> value_bits(jnp.array([-1.0, -0.0, 0.0, 1.0])).tolist()
      [1082130432, 2147483648, 2147483648, 3212836864]
    """
    pattern, magnitude = (
        jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}")),
        magnitude_bits(x),
    )
    zero = jnp.asarray(2 ** (jnp.iinfo(pattern.dtype).bits - 1), pattern.dtype)
    return jnp.where(pattern >= zero, zero - magnitude, zero + magnitude)


def _magnitude_if(x: jax.Array, may: jax.Array) -> jax.Array:
    bits = magnitude_bits(x)
    return jnp.where(may, bits, jnp.asarray(jnp.iinfo(bits.dtype).max, bits.dtype))


def _value_if(x: jax.Array, may: jax.Array) -> jax.Array:
    bits = value_bits(x)
    return jnp.where(may, bits, jnp.asarray(jnp.iinfo(bits.dtype).max, bits.dtype))


def smallest(
    arrays: Sequence[jax.Array],
    k: Int64,
    key: Callable[..., jax.Array] = magnitude_bits,
    may: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Return masks of the ``k`` smallest entries among all arrays taken together; by default of smallest magnitude.

    They are those a stable argsort of the concatenated keys lists first: of equal ones, the one in
    the earlier array, and in an array the one earlier in C order. Arrays of different dtypes are
    compared in the wider one.

    Args:
      arrays: floating point, any shapes.
      k: how many in all.
      key: what to order by, see `smallest_by`: `magnitude_bits` or `value_bits`.
      may: bool masks of the entries to choose among, at least k; by default all.

    Returns:
      One bool mask an array, true for the ``k`` smallest.

    Example:
      >>> smallest([jnp.array([3.0, -1.0]), jnp.array([1.0])], uint64(1))[0].tolist()
      [False, True]
    """
    if may is None:
        return smallest_by(key, [(x,) for x in _same_dtype(arrays)], k)
    allowed = _value_if if key is value_bits else _magnitude_if
    return smallest_by(allowed, list(zip(_same_dtype(arrays), may, strict=True)), k)


@partial(jax.jit, static_argnums=0)
def smallest_by(
    key: Callable[..., jax.Array], parts: Sequence[tuple[jax.Array, ...]], k: Int64
) -> list[jax.Array]:
    """Return masks of the ``k`` entries whose key is smallest, the earlier one first where keys are equal.

    Args:
      key: ``(*part) -> unsigned integers`` of one dtype, entry by entry. The largest integer of the
        dtype says that an entry must not be chosen. One and the same function at every call, as
        what is compiled belongs to it.
      parts: for each array what its keys are made of: arrays of one shape.
      k: how many in all, at most as many as may be chosen.

    Returns:
      One bool mask a part.

    Example:
      >>> def kept_only(x, kept):
      ...     return jnp.where(kept, magnitude_bits(x), jnp.uint32(2**32 - 1))
      >>> part = (jnp.array([1.0, 2.0, 3.0]), jnp.array([False, True, True]))
      >>> smallest_by(kept_only, [part], uint64(1))[0].tolist()
      [False, True, False]
    """
    top = jnp.iinfo(jax.eval_shape(key, *parts[0]).dtype)

    def below(t: jax.Array) -> Int64:
        t, own = jax.lax.optimization_barrier(
            (t, list(parts))
        )  # else all keys are kept: another copy of the weights
        return reduce(add, [count(key(*part) < t) for part in own])

    threshold, reached = bisect(below, k, jnp.asarray(top.max, top.dtype))
    left, masks = subtract(k, reached), []
    for part in parts:
        ties = key(*part) == threshold
        tied = count(ties)
        taken = choose(less(left, tied), left, tied)
        ties = jax.lax.cond(
            less(taken, tied), first, lambda ties, _: ties, ties, taken
        )  # in most cases all of them, or none
        masks.append((key(*part) < threshold) | ties)
        left = subtract(left, taken)
    return masks


def _same_dtype(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Return arrays of one dtype as they are, others in float32, or in float64 if there is one."""
    dtypes = {x.dtype for x in arrays}
    if len(dtypes) == 1:
        return list(arrays)
    common = jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32
    return [x.astype(common) for x in arrays]


# The n largest of every m consecutive entries along chosen axes, by comparing each entry with its m
# - 1 neighbours.


Axes = tuple[int, ...]


def largest_of_each(keys: jax.Array, n: int, m: int, axes: Axes) -> jax.Array:
    """Return a mask of the ``n`` entries of largest key in every group of ``m``.

    Several axes are joined in C order and then cut into groups. Of equal keys the later entry is
    kept. A last group of fewer than m keeps ``min(n, its size)``: padded to m with entries that are
    never kept, it too has at most n.

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
    return _above(grid, n, m, axis + 1).reshape(ranked.shape)[
        (*(slice(None),) * axis, slice(length))
    ]


def _above(grid: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Return which entries have fewer than ``n`` others before them along the axis, in descending order of key."""
    place = jax.lax.broadcasted_iota(jnp.int32, grid.shape, axis)
    larger = jnp.zeros(grid.shape, jnp.int32)
    for j in range(m):
        other = jax.lax.slice_in_dim(grid, j, j + 1, axis=axis)
        wins = (other > grid) | ((other == grid) & (j > place))
        larger += wins.astype(jnp.int32)
    return larger < n
