"""Masks of the k smallest entries, found by bisection, and of the n largest of every m.

Nothing is sorted or reshaped, so masks are the same bits under every sharding. Floats are mapped to
unsigned integers of the same order (`magnitude_bits`, `value_bits`). The k-th smallest of them is
found by halving an interval of integers and counting, about 32 passes for float32. Devices exchange
only the counts. Where several entries equal the threshold, one more bisection along each axis
selects those that come first.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import jax
import jax.numpy as jnp

from compress_jax.core.exact import Int64, add, choose, count, less, subtract, uint64

Interval = tuple[jax.Array, jax.Array, Int64]
"""The state of a bisection: low, high, and the count below low."""


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Return the bits of ``|x|`` as unsigned integers in the order of the magnitudes.

    -0.0 equals 0.0.

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
    # Without the sign bit: exponent first, then mantissa, so integers order as magnitudes do.
    return pattern & jnp.asarray(2 ** (bits - 1) - 1, pattern.dtype)


def value_bits(x: jax.Array) -> jax.Array:
    """Return unsigned integers in the order of the values of ``x``, negative ones first.

    -0.0 equals 0.0.

    Args:
      x: floating point, any shape.

    Returns:
      Unsigned integers of the same width and shape, at least 1.

    Example:
      >>> value_bits(jnp.array([-1.0, -0.0, 0.0, 1.0])).tolist()
      [1082130432, 2147483648, 2147483648, 3212836864]
    """
    magnitude = magnitude_bits(x)
    pattern = jax.lax.bitcast_convert_type(x, magnitude.dtype)
    # Above ``zero`` for positive values and below it for negative ones.
    zero = jnp.asarray(2 ** (jnp.iinfo(pattern.dtype).bits - 1), pattern.dtype)
    return jnp.where(pattern >= zero, zero - magnitude, zero + magnitude)


def smallest(
    arrays: Sequence[jax.Array],
    k: Int64,
    key: Callable[..., jax.Array] = magnitude_bits,
    candidates: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Return masks of the ``k`` smallest entries over all arrays, by default of smallest magnitude.

    They are the first k of a stable argsort of the concatenated keys: of equal entries the one in
    the earlier array, and in one array the one earlier in C order. Arrays of different dtypes are
    compared in float32, or in float64 if one has it.

    Args:
      arrays: floating point, any shapes.
      k: how many in all.
      key: the order, see `smallest_by`: `magnitude_bits` or `value_bits`.
      candidates: bool masks of the entries to choose among, at least k; by default all.

    Returns:
      One bool mask for each array, true for the ``k`` smallest.

    Example:
      >>> smallest([jnp.array([3.0, -1.0]), jnp.array([1.0])], uint64(1))[0].tolist()
      [False, True]
    """
    arrays = _same_dtype(arrays)
    if candidates is None:
        return smallest_by(key, [(x,) for x in arrays], k)
    key_where = _value_where if key is value_bits else _magnitude_where
    return smallest_by(key_where, list(zip(arrays, candidates, strict=True)), k)


@partial(jax.jit, static_argnums=0)
def smallest_by(
    key: Callable[..., jax.Array], operands: Sequence[tuple[jax.Array, ...]], k: Int64
) -> list[jax.Array]:
    """Return masks of the ``k`` entries of smallest key; of equal keys the earlier entry.

    Args:
      key: ``(*operands) -> unsigned integers`` of one dtype, entry by entry. The largest integer of
        the dtype marks an entry that must not be chosen. Pass the same function at every call, as
        the compiled program is cached by it.
      operands: for each mask the arrays its keys are computed from, all of one shape.
      k: how many in all, at most as many as may be chosen.

    Returns:
      One bool mask for each tuple of operands.

    Example:
      >>> def key(x, allowed):
      ...     return jnp.where(allowed, magnitude_bits(x), jnp.uint32(2**32 - 1))
      >>> x, allowed = jnp.array([1.0, 2.0, 3.0]), jnp.array([False, True, True])
      >>> smallest_by(key, [(x, allowed)], uint64(1))[0].tolist()
      [False, True, False]
    """
    top = jnp.iinfo(jax.eval_shape(key, *operands[0]).dtype)

    def below(t: jax.Array) -> Int64:
        # The barrier keeps XLA from storing all keys, which would be a second copy of the weights.
        t, inside = jax.lax.optimization_barrier((t, list(operands)))
        return reduce(add, [count(key(*each) < t) for each in inside])

    threshold, reached = bisect(below, k, jnp.asarray(top.max, top.dtype))
    left = subtract(k, reached)  # how many of those that equal the threshold
    masks = []
    for each in operands:
        ties = key(*each) == threshold
        tied = count(ties)
        taken = choose(less(left, tied), left, tied)
        # In most arrays all ties are taken, or none: `first` runs only where some are.
        ties = jax.lax.cond(less(taken, tied), first, lambda ties, _: ties, ties, taken)
        masks.append((key(*each) < threshold) | ties)
        left = subtract(left, taken)
    return masks


def bisect(
    below: Callable[[jax.Array], Int64], k: Int64, top: jax.Array
) -> tuple[jax.Array, Int64]:
    """Return the largest ``t < top`` with ``below(t) <= k``, and ``below(t)``.

    The search stops early at a ``t`` with ``below(t) == k``.

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

    def unfinished(interval: Interval) -> jax.Array:
        low, high, reached = interval
        return (high - low > 1) & less(reached, k)

    def halve(interval: Interval) -> Interval:
        low, high, reached = interval
        middle = low + (high - low) // 2
        found = below(middle)
        over = less(k, found)
        low = jnp.where(over, low, middle)
        high = jnp.where(over, middle, high)
        return low, high, choose(over, reached, found)

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
        # A new iota at each use: one that is shared is stored, 4 bytes an entry.
        position = partial(jax.lax.broadcasted_iota, jnp.uint32, flags.shape, axis)

        def below(
            t: jax.Array, flags: jax.Array = flags, position: Callable[[], jax.Array] = position
        ) -> Int64:
            return count(flags & (position() < t))

        end, taken = bisect(below, k, jnp.uint32(length + 1))
        chosen |= flags & (position() < end)
        # The k-th true entry lies in the slice at ``end``; continue along the next axis there.
        flags &= position() == end
        k = subtract(k, taken)
    return chosen | (flags & less(uint64(0), k))  # an array of rank 0 has no axis


def _magnitude_where(x: jax.Array, candidates: jax.Array) -> jax.Array:
    bits = magnitude_bits(x)
    return jnp.where(candidates, bits, jnp.asarray(jnp.iinfo(bits.dtype).max, bits.dtype))


def _value_where(x: jax.Array, candidates: jax.Array) -> jax.Array:
    bits = value_bits(x)
    return jnp.where(candidates, bits, jnp.asarray(jnp.iinfo(bits.dtype).max, bits.dtype))


def _same_dtype(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Return arrays of one dtype as they are, others in float32, or in float64 if there is one."""
    dtypes = {x.dtype for x in arrays}
    if len(dtypes) == 1:
        return list(arrays)
    common = jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32
    return [x.astype(common) for x in arrays]


def largest_of_each(keys: jax.Array, n: int, m: int, axes: tuple[int, ...]) -> jax.Array:
    """Return a mask of the ``n`` entries of largest key in every group of ``m``.

    Each entry is compared with the m - 1 others of its group. Several axes are joined in C order
    and then cut into groups. Of equal keys the later entry is kept. A last group of fewer than m
    keeps ``min(n, its size)``.

    Args:
      keys: unsigned integers, below the largest of their dtype.
      n: static, how many of each group are kept, at most m.
      m: static, the size of a group.
      axes: static, nonnegative: the axes that groups run along.

    Returns:
      bool, the shape of ``keys``.

    Example:
      >>> keys = jnp.array([3, 1, 2, 2, 9, 8, 7], jnp.uint32)
      >>> largest_of_each(keys, 2, 4, (0,)).tolist()
      [True, False, False, True, True, True, False]
    """
    start = min(axes)
    length = math.prod(keys.shape[axis] for axis in axes)
    target = tuple(range(start, start + len(axes)))
    moved = jnp.moveaxis(keys, axes, target)
    before = moved.shape[:start]
    after = moved.shape[start + len(axes) :]
    line = moved.reshape(*before, length, *after)
    mask = _largest_along(line, n, m, start)
    return jnp.moveaxis(mask.reshape(moved.shape), target, axes)


def _largest_along(line: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Return `largest_of_each` along one axis."""
    length = line.shape[axis]
    groups = -(-length // m)
    # Keys are raised by one, so that the padding, 0, is below every key and never kept.
    pads = [(0, groups * m - length if a == axis else 0) for a in range(line.ndim)]
    padded = jnp.pad(line + jnp.ones((), line.dtype), pads)
    shape = (*line.shape[:axis], groups, m, *line.shape[axis + 1 :])
    mask = _largest_in_group(padded.reshape(shape), n, m, axis + 1).reshape(padded.shape)
    return mask[(*(slice(None),) * axis, slice(length))]


def _largest_in_group(grid: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Return which entries have fewer than ``n`` larger or later equal ones along the axis."""
    place = jax.lax.broadcasted_iota(jnp.int32, grid.shape, axis)
    larger = jnp.zeros(grid.shape, jnp.int32)
    for j in range(m):
        other = jax.lax.slice_in_dim(grid, j, j + 1, axis=axis)
        wins = (other > grid) | ((other == grid) & (j > place))  # of equal keys the later
        larger += wins.astype(jnp.int32)
    return larger < n
