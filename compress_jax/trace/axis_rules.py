"""What every known primitive does to axes: one table of small functions; whatever it lacks freezes all it touches."""

from collections.abc import Callable

from jax.extend.core import JaxprEqn

from compress_jax.trace import axis_moves as moves
from compress_jax.trace import contraction, primitives
from compress_jax.trace._unify import unify
from compress_jax.trace.axes import Axes, Axis, product
from compress_jax.trace.axis_moves import Dims, Results, alike, shape

Rule = Callable[[Axes, JaxprEqn, list[Dims]], Results]


def _elementwise(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Entry by entry: operands and results have the same axes."""
    dims = alike(axes, args)
    return [dims for _ in eqn.outvars]


def _each(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Every operand by itself becomes a result."""
    return args


def _free(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Random bits are as good in any order."""
    return [tuple(axes.leaf(size) for size in getattr(var.aval, "shape", ())) for var in eqn.outvars]


def _nothing(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Look only."""
    return []


def _iota(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Numbers along one axis tell its indices apart."""
    along = eqn.params["dimension"]
    return [tuple(axes.leaf(size, "numbered by iota" if i == along else None) for i, size in enumerate(eqn.params["shape"]))]


def _reduce(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Sum, maximum and the like, which any order gives alike."""
    return [tuple(axis for i, axis in enumerate(args[0]) if i not in eqn.params["axes"])]


def _arg_reduce(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """The result is an index."""
    for i in eqn.params["axes"]:
        axes.freeze(args[0][i], eqn.primitive.name)
    return _reduce(axes, eqn, args)


def _along(name: str) -> Rule:
    """Return the rule of what runs along one or more axes in order, named by a parameter: those are frozen."""

    def rule(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
        dims, chosen = alike(axes, args), eqn.params[name]
        for i in (chosen,) if isinstance(chosen, int) else chosen:
            axes.freeze(dims[i], eqn.primitive.name)
        return [dims for _ in eqn.outvars]

    return rule


def _top_k(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Some indices of one axis, the largest entry first."""
    i = eqn.params.get("axis", -1) % len(args[0])
    axes.freeze(args[0][i], "top_k")
    return [(*args[0][:i], axes.leaf(eqn.params["k"], "top_k"), *args[0][i + 1 :]) for _ in eqn.outvars]


def _window(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Pooling: an axis with a window of one goes through."""
    p = eqn.params
    windows = zip(args[0], p["window_dimensions"], p["window_strides"], p["padding"], shape(eqn), strict=True)
    return [tuple(_slide(axes, axis, (size, *rest)) for axis, size, *rest in windows)]


def _slide(axes: Axes, axis: Axis, window: tuple) -> Axis:
    """Return the axis that a window ``(size, stride, padding, length of the result)`` makes of another."""
    size, stride, padding, length = window
    if (size, stride, tuple(padding), length) == (1, 1, (0, 0), axis.size):
        return axis
    axes.freeze(axis, "spatial window")
    return axes.leaf(length, "spatial window")


def _dot_general(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """What is contracted or runs along is the same axis in both operands."""
    (left, right), (left_batch, right_batch) = contraction.axes(eqn)
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        unify(axes, args[0][i], args[1][j])
    lhs = [axis for i, axis in enumerate(args[0]) if i not in (*left, *left_batch)]
    rhs = [axis for j, axis in enumerate(args[1]) if j not in (*right, *right_batch)]
    return [(*(args[0][i] for i in left_batch), *lhs, *rhs)]


def _ragged(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Rows in groups, one matrix each: how many rows a group has is data, so neither can be reordered."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    rows, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
    if len(rows) != 1 or rows[0] in (*left, *left_batch):
        return None
    for axis in (*(args[0][i] for i in rows), *(args[1][j] for j in groups), *args[2]):
        axes.freeze(axis, "ragged group")
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        unify(axes, args[0][i], args[1][j])
    lhs = [axis for i, axis in enumerate(args[0]) if i not in (*left, *left_batch)]
    rhs = [axis for j, axis in enumerate(args[1]) if j not in (*right, *right_batch, *groups)]
    return [(*(args[0][i] for i in left_batch), *lhs, *rhs)]


def _convolution(axes: Axes, eqn: JaxprEqn, args: list[Dims]) -> Results:
    """Input channels are groups x the kernel's, output channels groups x the rest; windows of one go through."""
    p, numbers, (image, kernel) = eqn.params, eqn.params["dimension_numbers"], args
    if p["batch_group_count"] != 1:
        return None
    (batch, channel, *space), (out, into, *window) = numbers.lhs_spec, numbers.rhs_spec
    if p["feature_group_count"] == 1:
        unify(axes, image[channel], kernel[into])
    else:
        groups = axes.leaf(p["feature_group_count"])
        unify(axes, image[channel], product([groups, kernel[into]]))
        unify(axes, kernel[out], product([groups, axes.leaf(kernel[out].size // groups.size)]))
    results = dict(zip(numbers.out_spec, (image[batch], kernel[out]), strict=False))
    lengths = [shape(eqn)[i] for i in numbers.out_spec[2:]]
    for n, (i, j, target, length) in enumerate(zip(space, window, numbers.out_spec[2:], lengths, strict=True)):
        axes.freeze(kernel[j], "spatial window")
        results[target] = _slide(axes, image[i], (kernel[j].size, p["window_strides"][n], p["padding"][n], length))
    return [tuple(results[i] for i in range(len(results)))]


RULES: dict[str, Rule] = {
    **dict.fromkeys(primitives.ELEMENTWISE, _elementwise),
    **dict.fromkeys(primitives.COLLECTIVES, _each),
    **dict.fromkeys(primitives.REDUCTIONS, _reduce),
    **dict.fromkeys(primitives.NUMBERS | primitives.RANDOM, _free),
    **dict.fromkeys(primitives.INDEX_REDUCTIONS, _arg_reduce),
    **dict.fromkeys(primitives.RUNNING, _along("axis")),
    **dict.fromkeys(primitives.WINDOWS, _window),
    **dict.fromkeys(primitives.UPDATES, moves.scatter),
    **dict.fromkeys(primitives.SILENT, _nothing),
    "rev": _along("dimensions"),
    "sort": _along("dimension"),
    "top_k": _top_k,
    "iota": _iota,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolution,
    "reshape": moves.reshape,
    "broadcast_in_dim": moves.broadcast_in_dim,
    "transpose": moves.transpose,
    "squeeze": moves.squeeze,
    "expand_dims": moves.expand_dims,
    "tile": moves.tile,
    "stack": moves.stack,
    "concatenate": moves.concatenate,
    "split": moves.split,
    "unstack": moves.unstack,
    "slice": moves.slice_,
    "pad": moves.pad,
    "dynamic_slice": moves.dynamic_slice,
    "dynamic_update_slice": moves.dynamic_update_slice,
    "gather": moves.gather,
}


def summed(eqn: JaxprEqn) -> list[tuple[int, int]]:
    """Return the axes that an equation takes together, as ``(operand, axis)``: those that its result no longer has."""
    if contraction.kind(eqn) is not None:
        return [(1, axis) for axis in contraction.axes(eqn)[0][1]]
    return [(0, axis) for axis in eqn.params["axes"]] if eqn.primitive.name in primitives.REDUCTIONS else []
