"""What equations that move entries about do to axes: reshape, transpose, broadcast, slice, concatenate, index."""

from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from compress_jax.trace._unify import pieces, unify
from compress_jax.trace.axes import UNIT, Axes, Axis, concatenation, product
from compress_jax.trace.site import Shape

Dims = tuple[Axis, ...]  # the axes of one value
Results = Sequence[Dims] | None  # of an equation; None where a rule does not know this form of it


def alike(axes: Axes, values: Iterable[Dims]) -> Dims:
    """Unify values axis by axis and return the axes of what they make; scalars and axes of size 1 are broadcast."""
    results: list[Axis] = []
    for along in zip(*(dims for dims in values if dims), strict=True):
        first, *others = [axis for axis in along if axis.size != 1] or [UNIT]
        for other in others:
            unify(axes, first, other)
        results.append(first)
    return tuple(results)


def shape(eqn: JaxprEqn) -> Shape:
    """Return the shape of an equation's first result."""
    aval: Any = eqn.outvars[0].aval
    return aval.shape


def part(axes: Axes, axis: Axis, size: int, reason: str) -> Axis:
    """Return an axis that stays whole, else freeze it and return some of its indices."""
    if axis.size == size:
        return axis
    axes.freeze(axis, reason)
    return axes.leaf(size, reason)


def reshape(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Match the shortest runs of axes whose sizes multiply to the same."""
    old, new = [axis.size for axis in args[0]], eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None or 0 in old:
        return None
    results: list[Axis] = [UNIT] * len(new)
    for old_run, new_run in _runs(old, new):
        whole = product([args[0][i] for i in old_run])
        made = [whole] if len(new_run) == 1 else [axes.leaf(new[i]) for i in new_run]
        unify(axes, whole, product(made))
        for i, axis in zip(new_run, made, strict=True):
            results[i] = axis
    return [tuple(results)]


def _runs(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Yield which axes become which, those of size 1 left out."""
    left, right = ([i for i, size in enumerate(sizes) if size != 1] for sizes in (old, new))
    while left:
        runs, sizes = ([left.pop(0)], [right.pop(0)]), [0, 0]
        sizes = [old[runs[0][0]], new[runs[1][0]]]
        while sizes[0] != sizes[1]:
            behind = int(sizes[1] < sizes[0])
            runs[behind].append((left, right)[behind].pop(0))
            sizes[behind] *= (old, new)[behind][runs[behind][-1]]
        yield runs


def broadcast_in_dim(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """What is broadcast is the same at every index: a new axis is free."""
    results: list[Axis] = [axes.leaf(size) for size in eqn.params["shape"]]
    for axis, i in zip(args[0], eqn.params["broadcast_dimensions"], strict=True):
        results[i] = axis if axis.size == results[i].size else results[i]
    return [tuple(results)]


def transpose(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Reorder."""
    return [tuple(args[0][i] for i in eqn.params["permutation"])]


def squeeze(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Drop axes of size 1."""
    return [tuple(axis for i, axis in enumerate(args[0]) if i not in eqn.params["dimensions"])]


def expand_dims(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Add axes of size 1."""
    rest = iter(args[0])
    return [tuple(UNIT if i in eqn.params["dimensions"] else next(rest) for i in range(len(shape(eqn))))]


def tile(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Repeat: the number of the copy is a free axis in front of the old one."""
    return [tuple(product([axes.leaf(times), axis]) for axis, times in zip(args[0], eqn.params["reps"], strict=True))]


def stack(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Put values side by side along a new axis, every index of which is another value."""
    results = list(alike(axes, args))
    results.insert(eqn.params["axis"], concatenation([UNIT] * len(args)))
    return [tuple(results)]


def concatenate(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Put axes end to end."""
    i = eqn.params["dimension"]
    rest = alike(axes, [(*dims[:i], UNIT, *dims[i + 1 :]) for dims in args])
    return [(*rest[:i], concatenation([dims[i] for dims in args]), *rest[i + 1 :])]


def split(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Cut an axis into consecutive pieces."""
    i = eqn.params["axis"]
    cut = pieces(axes, args[0][i], eqn.params["sizes"])
    return [(*args[0][:i], piece, *args[0][i + 1 :]) for piece in cut]


def unstack(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Hand out the indices of an axis, each by itself."""
    i = eqn.params["axis"]
    pieces(axes, args[0][i], [1] * args[0][i].size)
    return [(*args[0][:i], *args[0][i + 1 :]) for _ in eqn.outvars]


def slice_(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Take a piece of each axis, or every n-th index of one."""
    p = eqn.params
    strides = p["strides"] or [1] * len(args[0])
    limits = zip(args[0], p["start_indices"], p["limit_indices"], strides, strict=True)
    return [tuple(_piece(axes, axis, *limit) for axis, *limit in limits)]


def _piece(axes: Axes, axis: Axis, start: int, limit: int, stride: int) -> Axis:
    """Return a piece of an axis. Every n-th index of whole rows of n is a column of them: interleaved channels."""
    if stride == 1:
        return pieces(axes, axis, [start, limit - start, axis.size - limit])[1]
    first, count = interleaved(start, limit, stride)
    if count > 1 and first + count * stride <= axis.size:
        rows = pieces(axes, axis, [first, count * stride, axis.size - first - count * stride])[1]
        column = axes.leaf(count)
        unify(axes, rows, product([column, concatenation([UNIT] * stride)]))
        return column
    axes.freeze(axis, "strided slice")
    return axes.leaf(-(-(limit - start) // stride), "strided slice")


def interleaved(start: int, limit: int, stride: int) -> tuple[int, int]:
    """Return where the rows begin of which a strided slice takes one index each, and how many they are.

    Example:
      >>> interleaved(1, 8, 2), interleaved(5, 8, 2)
      ((0, 4), (4, 2))
    """
    return start - start % stride, -(-(limit - start) // stride)


def pad(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Put an axis between two constant ones, within which every index is the same."""
    results = []
    for axis, (low, high, interior) in zip(args[0], eqn.params["padding_config"], strict=True):
        if interior or low < 0 or high < 0:
            axes.freeze(axis, "dilated or cropped")
            size = axis.size + max(axis.size - 1, 0) * interior + low + high
            results.append(axes.leaf(size, "dilated or cropped"))
        else:
            results.append(concatenation([axes.leaf(low), axis, axes.leaf(high)]))
    return [tuple(results)]


def dynamic_slice(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Take a piece of which the start is not known."""
    sizes = eqn.params["slice_sizes"]
    return [tuple(part(axes, axis, size, "dynamic slice") for axis, size in zip(args[0], sizes, strict=True))]


def dynamic_update_slice(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Replace a piece of which the start is not known."""
    for axis, new in zip(args[0], args[1], strict=True):
        if axis.size == new.size:
            unify(axes, axis, new)
        else:
            axes.freeze(axis, "dynamic update")
            axes.freeze(new, "dynamic update")
    return [args[0]]


def gather(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Look up: axes that indices point into are frozen; those taken whole go through."""
    numbers, sizes, (table, indices) = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], args[:2]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    for i in numbers.collapsed_slice_dims:
        axes.freeze(table[i], "looked up by index")
    for i, j in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        unify(axes, table[i], indices[j])
    whole = iter([part(axes, table[i], sizes[i], "looked up by index") for i in range(len(table)) if i not in gone])
    rest = iter(indices[:-1])
    return [tuple(next(whole if i in numbers.offset_dims else rest) for i in range(len(shape(eqn))))]


def scatter(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Write or add at indices: as `gather`, the other way round."""
    numbers, (table, indices, updates) = eqn.params["dimension_numbers"], args
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    for i in numbers.inserted_window_dims:
        axes.freeze(table[i], "written by index")
    for i, j in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        unify(axes, table[i], indices[j])
    whole, rest = iter([table[i] for i in range(len(table)) if i not in gone]), iter(indices[:-1])
    for i, axis in enumerate(updates):
        other = next(whole if i in numbers.update_window_dims else rest)
        unify(axes, axis, other)
    return [table]
