"""Where a value comes from: constants, one parameter (and which of its axes), several parameters, or data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.extend.core import JaxprEqn

from compress_jax.trace.primitives import INDEX_REDUCTIONS, RANDOM, REDUCTIONS
from compress_jax.trace.site import Axes, Position, Shape

CONSTANT, PARAMETER, DATA = 0, 1, 2
Dims = tuple[Axes, ...]


@dataclass(frozen=True)
class Origin:
    """Where one value comes from.

    Attributes:
      level: ``CONSTANT`` (known to the trace, or random), ``PARAMETER`` (of parameters and constants only) or ``DATA``.
      paths: the parameters it is a view of, the main one first; empty if it is data or made of parameters in another way.
      dims: for each axis of the value the axes of the stored main parameter that lie in it; None if they cannot be told.
      sliced: axes of the stored parameter of which the value holds one index, each with the loop whose turn is the index
        (counted from the outermost), or None.
      maker: position of the newest contraction in the data's past, or of its input or table.
      label: name of the input or table, where it was not a contraction.
    """

    level: int = CONSTANT
    paths: tuple[str, ...] = ()
    dims: Dims | None = None
    sliced: tuple[tuple[int, int | None], ...] = ()
    maker: Position = ()
    label: str = ""


def parameter(path: str, shape: Shape) -> Origin:
    """Return the origin of a parameter itself."""
    return Origin(PARAMETER, (path,), tuple((axis,) for axis in range(len(shape))))


def data(label: str) -> Origin:
    """Return the origin of an input."""
    return Origin(DATA, maker=(-1, label), label=label)


def join(origins: Sequence[Origin]) -> Origin:
    """Return the origin of what may be any of these values, or is made of all of them in an unknown way."""
    level = max((origin.level for origin in origins), default=CONSTANT)
    if level == DATA:
        return max((origin for origin in origins if origin.level == DATA), key=lambda origin: origin.maker)
    views = list(dict.fromkeys(origin for origin in origins if origin.paths))
    if len(views) <= 1:
        return views[0] if views else Origin(level)
    return Origin(level, tuple(dict.fromkeys(path for view in views for path in view.paths)))


def transfer(eqn: JaxprEqn, args: Sequence[Origin]) -> Origin:
    """Return the origin of an equation's results; contractions are not its business.

    Args:
      eqn: an equation that runs nothing inside.
      args: origins of its operands.

    Returns:
      The origin that its results share.
    """
    shapes = [getattr(var.aval, "shape", ()) for var in eqn.invars]
    name, out = eqn.primitive.name, getattr(eqn.outvars[0].aval, "shape", ()) if eqn.outvars else ()
    if name in RANDOM:
        return Origin()
    if name in ("gather", "dynamic_slice") and args[0].level == PARAMETER:
        return _gather(eqn, args, shapes, out) if name == "gather" else _slice(args[0], shapes[0], out)
    if name in REDUCTIONS or name in INDEX_REDUCTIONS:
        return args[0] if args[0].level == DATA else Origin(args[0].level)  # a sum of weights is no longer the weights
    if name in MOVES and args[0].dims is not None:
        return replace(args[0], **MOVES[name](eqn.params, args[0], shapes[0], out))
    return _combine(args, shapes, out)


def _combine(args: Sequence[Origin], shapes: list[Shape], out: Shape) -> Origin:
    """Element by element: what is broadcast along the result (a scale, a threshold) modifies what fills it."""
    if max((arg.level for arg in args), default=CONSTANT) == DATA:
        return join(args)
    filling = [arg for arg, shape in zip(args, shapes, strict=False) if arg.paths and shape == out and _fills(arg, shape)]
    known = {path for arg in filling if arg.dims is not None for path in arg.paths}
    views = [arg for arg in filling if arg.dims is not None or not known.issuperset(arg.paths)]
    if views:
        return join(views)
    return replace(join(args), dims=None)


def _fills(origin: Origin, shape: Shape) -> bool:
    """Tell whether a parameter's own axes run along every axis of the value: it was not broadcast to this shape."""
    return origin.dims is None or all(axes or size == 1 for axes, size in zip(origin.dims, shape, strict=True))


def _transpose(params: Any, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    return {"dims": tuple(_dims(origin)[axis] for axis in params["permutation"])}


def _squeeze(params: Any, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    return {"dims": tuple(axes for axis, axes in enumerate(_dims(origin)) if axis not in params["dimensions"])}


def _expand(params: Any, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    rest = iter(_dims(origin))
    return {"dims": tuple(() if axis in params["dimensions"] else next(rest) for axis in range(len(out)))}


def _broadcast(params: Any, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    dims: list[Axes] = [()] * len(out)
    for axis, target in enumerate(params["broadcast_dimensions"]):
        dims[target] = _dims(origin)[axis] if shape[axis] == out[target] else ()
    return {"dims": tuple(dims)}


def _keep(params: Any, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    return {}


def _cut(params: Any, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    sliced = _slice(origin, shape, out)
    return {"dims": sliced.dims, "sliced": sliced.sliced}


def _reshape(params: Any, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    """Match the smallest runs of axes with equal products; every axis of a run may hold every stored axis of it."""
    dims: list[Axes] = [()] * len(out)
    old, new = [i for i, size in enumerate(shape) if size != 1], [i for i, size in enumerate(out) if size != 1]
    while old and new:
        run, target = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(shape[i] for i in run)) != (right := math.prod(out[i] for i in target)):
            (run if left < right else target).append((old if left < right else new).pop(0))
        axes = tuple(dict.fromkeys(axis for i in run for axis in _dims(origin)[i]))
        for i in target:
            dims[i] = axes
    return {"dims": tuple(dims)}


MOVES = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _cut,
    "split": _cut,
    "pad": _keep,
}


def _dims(origin: Origin) -> Dims:
    assert origin.dims is not None
    return origin.dims


def _slice(origin: Origin, shape: Shape, out: Shape) -> Origin:
    """One index left of an axis: the value holds one slice of the stored axes that lay in it."""
    if origin.dims is None:
        return origin
    single = [1 == after < before for before, after in zip(shape, out, strict=True)]
    gone = tuple((axis, None) for axes, one in zip(origin.dims, single, strict=True) if one for axis in axes)
    dims = tuple(() if one else axes for axes, one in zip(origin.dims, single, strict=True))
    return replace(origin, dims=dims, sliced=(*origin.sliced, *gone))


def _gather(eqn: JaxprEqn, args: Sequence[Origin], shapes: list[Shape], out: Shape) -> Origin:
    """One slice of stacked layers is still the parameter; rows picked by data from a table (an embedding) are data."""
    table, numbers = args[0], eqn.params["dimension_numbers"]
    many = len(out) > len(numbers.offset_dims)
    if many and args[1].level == DATA and len(numbers.offset_dims) < 2:
        return data("/".join(table.paths[:1]) or "parameters")
    if table.dims is None:
        return table
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    picked = tuple(axis for i in gone for axis in table.dims[i])
    dims: list[Axes] = [picked] * len(out)
    kept = [i for i in range(len(shapes[0])) if i not in gone]
    for target, axis in zip(numbers.offset_dims, kept, strict=True):
        dims[target] = table.dims[axis]
    return replace(
        table, dims=tuple(dims), sliced=table.sliced if many else (*table.sliced, *((axis, None) for axis in picked))
    )
