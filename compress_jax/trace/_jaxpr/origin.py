"""Where a value comes from: constants, one parameter (and which of its axes), several parameters, or data."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from compress_jax.core.types import Params
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.evaluate import bind
from compress_jax.trace._jaxpr.interpret import Where, interpret
from compress_jax.trace._jaxpr.primitives import INDEX_REDUCTIONS, RANDOM, REDUCTIONS
from compress_jax.trace._jaxpr.site import AxisIndices, Position, Shape
from compress_jax.trace._jaxpr.strided import Piece

CONSTANT, PARAMETER, DATA = 0, 1, 2
Dims = tuple[AxisIndices, ...]


@dataclass(frozen=True)
class Origin:
    """Where one value comes from.

    Attributes:
      level: ``CONSTANT`` (known to the trace, or random), ``PARAMETER`` (of parameters and
        constants only) or ``DATA``.
      paths: the parameters it is a view of, the main one first; empty if it is data or made of
        parameters in another way.
      dims: for each axis of the value the axes of the stored main parameter that lie in it; None if
        they cannot be told.
      sliced: axes of the stored parameter of which the value holds one index, each with the loop
        whose turn is the index (counted from the outermost), or None.
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
        return max(
            (origin for origin in origins if origin.level == DATA), key=lambda origin: origin.maker
        )
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
        return (
            _gather(eqn, args, shapes, out) if name == "gather" else _slice(args[0], shapes[0], out)
        )
    if name in REDUCTIONS or name in INDEX_REDUCTIONS:
        return (
            args[0] if args[0].level == DATA else Origin(args[0].level)
        )  # a sum of weights is no longer the weights
    if name in MOVES and args[0].dims is not None:
        return replace(args[0], **MOVES[name](eqn.params, args[0], shapes[0], out))
    return _combine(args, shapes, out)


def _combine(args: Sequence[Origin], shapes: list[Shape], out: Shape) -> Origin:
    """Element by element: what is broadcast along the result (a scale, a threshold) modifies what fills it."""
    if max((arg.level for arg in args), default=CONSTANT) == DATA:
        return join(args)
    filling = [
        arg
        for arg, shape in zip(args, shapes, strict=False)
        if arg.paths and shape == out and _fills(arg, shape)
    ]
    known = {path for arg in filling if arg.dims is not None for path in arg.paths}
    views = [arg for arg in filling if arg.dims is not None or not known.issuperset(arg.paths)]
    if views:
        return join(views)
    return replace(join(args), dims=None)


def _fills(origin: Origin, shape: Shape) -> bool:
    """Tell whether a parameter's own axes run along every axis of the value: it was not broadcast to this shape."""
    return origin.dims is None or all(
        axes or size == 1 for axes, size in zip(origin.dims, shape, strict=True)
    )


def _transpose(params: Params, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    return {"dims": tuple(_dims(origin)[axis] for axis in params["permutation"])}


def _squeeze(params: Params, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    return {
        "dims": tuple(
            axes for axis, axes in enumerate(_dims(origin)) if axis not in params["dimensions"]
        )
    }


def _expand(params: Params, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    rest = iter(_dims(origin))
    return {
        "dims": tuple(
            () if axis in params["dimensions"] else next(rest) for axis in range(len(out))
        )
    }


def _broadcast(params: Params, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    dims: list[AxisIndices] = [()] * len(out)
    for axis, target in enumerate(params["broadcast_dimensions"]):
        dims[target] = _dims(origin)[axis] if shape[axis] == out[target] else ()
    return {"dims": tuple(dims)}


def _keep(params: Params, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    return {}


def _cut(params: Params, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    sliced = _slice(origin, shape, out)
    return {"dims": sliced.dims, "sliced": sliced.sliced}


def _reshape(params: Params, origin: Origin, shape: Shape, out: Shape) -> dict[str, Any]:
    """Match the smallest runs of axes with equal products; every axis of a run may hold every stored axis of it."""
    dims: list[AxisIndices] = [()] * len(out)
    old, new = (
        [i for i, size in enumerate(shape) if size != 1],
        [i for i, size in enumerate(out) if size != 1],
    )
    while old and new:
        run, target = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(shape[i] for i in run)) != (
            right := math.prod(out[i] for i in target)
        ):
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
    gone = tuple(
        (axis, None) for axes, one in zip(origin.dims, single, strict=True) if one for axis in axes
    )
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
    dims: list[AxisIndices] = [picked] * len(out)
    kept = [i for i in range(len(shapes[0])) if i not in gone]
    for target, axis in zip(numbers.offset_dims, kept, strict=True):
        dims[target] = table.dims[axis]
    return replace(
        table,
        dims=tuple(dims),
        sliced=table.sliced if many else (*table.sliced, *((axis, None) for axis in picked)),
    )


# Which parts of which parameters lie where in the operands of every contraction: one walk over a
# jaxpr.


JOINED = frozenset(("concatenate", "stack"))


@dataclass(frozen=True)
class Laid:
    """A value in which parameters lie; what none of the pieces covers is constant."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Lost:
    """A value in which no parameter can be told from another.

    Attributes:
      reason: why; empty if there is no parameter in it.
      data: whether it depends on inputs too.
    """

    reason: str = ""
    data: bool = True


@dataclass(frozen=True)
class Known:
    """A value that depends on no parameter and no input; computed only if an index asks for it."""

    make: Callable[[], Any] = field(repr=False)


Value = Laid | Lost | Known


@dataclass
class Pieces:
    """The domain for the interpreter; ``found`` holds the operands of every contraction by position."""

    found: dict[Position, tuple[Value, Value]] = field(default_factory=dict)

    def constant(self, aval: Any, value: Any) -> Value:
        """Return a known value."""
        return Known(lambda: value)

    def join(self, a: Value, b: Value) -> Value:
        """Return what may be either value."""
        return a if a == b else _lost([a, b], "it is not the same in every turn or branch")

    def same(self, a: Value, b: Value) -> bool:
        """Tell whether two values are the same."""
        return a == b

    def unstack(self, a: Value, loop: int) -> Value:
        """Return the slice that a turn sees."""
        return (
            _laid([piece.unstacked(loop) for piece in a.pieces])
            if isinstance(a, Laid)
            else _lost([a])
        )

    def stack(self, a: Value, length: int) -> Value:
        """Return slices put together."""
        return _lost([a], "a loop returns it")

    def reshard(self, a: Value, aval: Any) -> Value:
        """Return a device's piece, known only if it is the whole."""
        whole = isinstance(a, Laid) and all(piece.sizes == aval.shape for piece in a.pieces)
        return a if whole else _lost([a], "each device of a shard_map has a piece of the parameter")

    def equation(self, eqn: JaxprEqn, args: list[Value], where: Where) -> Sequence[Value]:
        """Return the results of an equation; note the operands of a contraction."""
        if primitives.kind(eqn) is not None:
            self.found[where.position] = (args[0], args[1])
            return [_lost(args, f"it is changed on its way ({eqn.primitive.name})")]
        count, name = len(eqn.outvars), eqn.primitive.name
        if args and all(isinstance(arg, Known) for arg in args) and not eqn.effects:
            return [Known(_computed(eqn, args, i)) for i in range(count)]
        if not any(isinstance(arg, Laid) for arg in args):
            return [_lost(args)] * count
        if name in JOINED:
            return [_joined(eqn, args)]
        if name == "split" and isinstance(args[0], Laid):
            return _parts(eqn, args[0].pieces)
        if (
            name in PIECE_MOVES
            and isinstance(args[0], Laid)
            and all(isinstance(arg, Known) for arg in args[1:])
        ):
            shape, out = (getattr(var.aval, "shape", ()) for var in (eqn.invars[0], eqn.outvars[0]))
            move = PIECE_MOVES[name]
            return [_laid([move(piece, eqn, args, shape, out) for piece in args[0].pieces])]
        if name in ("gather", "dynamic_slice") and isinstance(args[0], Laid):
            return [
                _lost(args, "a slice of it is used, and data or the turn of a loop decide which")
            ] * count
        return [_combined(eqn, args)] * count


def pieces(closed: ClosedJaxpr, params: Mapping[str, Any]) -> dict[Position, tuple[Value, Value]]:
    """Return what lies in the operands of every contraction of a jaxpr.

    Args:
      closed: its first inputs are the parameters.
      params: their shapes by path.

    Returns:
      ``{position: (lhs, rhs)}``.

    Example:
      >>> w = jnp.ones((2, 3, 4))
      >>> ((_, right),) = pieces(jax.make_jaxpr(lambda w, x: x @ w[1])(w, jnp.ones((5, 3))), {"w": w}).values()
      >>> right.pieces[0].offset, right.pieces[0].axes
      (12, (((3, 4),), ((4, 1),)))
    """
    domain = Pieces()
    rest = [Lost()] * (len(closed.jaxpr.invars) - len(params))
    interpret(
        domain,
        closed,
        [*(Laid((Piece.whole(path, x.shape),)) for path, x in params.items()), *rest],
    )
    return domain.found


def _computed(eqn: JaxprEqn, args: Sequence[Any], result: int) -> Callable[[], Any]:
    def make() -> Any:
        with jax.ensure_compile_time_eval():
            return bind(eqn, [arg.make() for arg in args])[result]

    return make


def _lost(args: Sequence[Value], reason: str = "") -> Lost:
    """Return what is lost: for the first reason that was met, if a parameter is in it."""
    earlier = next((arg.reason for arg in args if isinstance(arg, Lost) and arg.reason), "")
    data = any(isinstance(arg, Lost) and arg.data for arg in args)
    return Lost(earlier or (reason if any(isinstance(arg, Laid) for arg in args) else ""), data)


def _laid(moved: Sequence[Piece | str | None]) -> Value:
    """Return a value of the pieces that are left, lost if one of them is."""
    if reason := next((each for each in moved if isinstance(each, str)), None):
        return Lost(reason, data=False)
    left = tuple(each for each in moved if isinstance(each, Piece))
    return Laid(left) if left else Lost(data=False)


def _joined(eqn: JaxprEqn, args: Sequence[Value]) -> Value:
    """Put values side by side along an axis, a new one for ``stack``."""
    if any(isinstance(arg, Lost) for arg in args):
        return _lost(args, "it is joined with data")
    stacked = eqn.primitive.name == "stack"
    axis, place, found = eqn.params["axis" if stacked else "dimension"], 0, []
    for arg, var in zip(args, eqn.invars, strict=True):
        shape = var.aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        for piece in arg.pieces if isinstance(arg, Laid) else ():
            if stacked:
                out = (*shape[:axis], 1, *shape[axis:])
                piece = piece.broadcast(out, shape, tuple(i for i in range(len(out)) if i != axis))
            found.append(piece.shifted(axis, place))
        place += 1 if stacked else shape[axis]
    return _laid(found)


def _parts(eqn: JaxprEqn, given: tuple[Piece, ...]) -> list[Value]:
    ends = np.cumsum([0, *eqn.params["sizes"]]).tolist()
    axis = eqn.params["axis"]
    return [
        _laid([piece.cut(axis, *span) for piece in given])
        for span in zip(ends[:-1], ends[1:], strict=True)
    ]


def _combined(eqn: JaxprEqn, args: Sequence[Value]) -> Value:
    """Entry by entry: what is broadcast along the result (a scale, a threshold) modifies what fills it."""
    name = eqn.primitive.name
    if any(isinstance(arg, Lost) and arg.data for arg in args):
        return _lost(args, f"data change it on its way ({name})")
    outs = {getattr(var.aval, "shape", None) for var in eqn.outvars}
    filling: dict[Laid, None] = {}
    for arg, var in zip(args, eqn.invars, strict=True):
        if (
            isinstance(arg, Laid)
            and {getattr(var.aval, "shape", None)} == outs
            and not any(map(_repeated, arg.pieces))
        ):
            filling[Laid(tuple(replace(piece, changed=()) for piece in arg.pieces))] = None
    if len(filling) != 1:
        paths = {piece.path for arg in args if isinstance(arg, Laid) for piece in arg.pieces}
        several = len(paths) > 1
        return _lost(
            args,
            f"several parameters are combined ({name})"
            if several
            else f"it is changed on its way ({name})",
        )
    if name == "convert_element_type" and jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return args[0]
    done = tuple(
        dict.fromkeys(
            [c for arg in args if isinstance(arg, Laid) for p in arg.pieces for c in p.changed]
            + [name]
        )
    )
    return Laid(tuple(replace(piece, changed=done) for piece in next(iter(filling)).pieces))


def _repeated(piece: Piece) -> bool:
    return any(stride == 0 for digits in piece.axes for _, stride in digits)


def _slice_piece(piece: Piece, eqn: JaxprEqn, args: Any, shape: Shape, out: Shape) -> Any:
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    return _box(piece, starts, ends, eqn.params["strides"] or (1,) * len(starts))


def _dynamic_slice(piece: Piece, eqn: JaxprEqn, args: Any, shape: Shape, out: Shape) -> Any:
    starts = [
        min(max(int(arg.make()), 0), n - m) for arg, n, m in zip(args[1:], shape, out, strict=True)
    ]
    return _box(
        piece, starts, [start + n for start, n in zip(starts, out, strict=True)], (1,) * len(starts)
    )


def _gather_piece(piece: Piece, eqn: JaxprEqn, args: Any, shape: Shape, out: Shape) -> Any:
    """One index along some axes, everything along the others: how ``take`` spells a slice."""
    numbers, sizes, index = (
        eqn.params["dimension_numbers"],
        eqn.params["slice_sizes"],
        np.asarray(args[1].make()),
    )
    gone = tuple(numbers.collapsed_slice_dims)
    if (
        index.ndim != 1
        or numbers.operand_batching_dims
        or any(sizes[i] != n for i, n in enumerate(shape) if i not in gone)
    ):
        return "several indices are picked by one lookup"
    place = dict(zip(numbers.start_index_map, index.tolist(), strict=True))
    for axis in gone:
        if not 0 <= place.get(axis, 0) < shape[axis]:
            return "an index is out of bounds"
    left = _box(piece, [place.get(i, 0) if i in gone else 0 for i in range(len(shape))],
                [place.get(i, 0) + 1 if i in gone else n for i, n in enumerate(shape)], (1,) * len(shape))  # fmt: skip
    return left.squeezed(gone) if isinstance(left, Piece) else left


def _box(
    piece: Piece, starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]
) -> Piece | str | None:
    for axis, span in enumerate(zip(starts, ends, steps, strict=True)):
        left = piece.cut(axis, *map(int, span))
        if not isinstance(left, Piece):
            return left
        piece = left
    return piece


def _pad(piece: Piece, eqn: JaxprEqn, args: Any, shape: Shape, out: Shape) -> Any:
    for axis, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        if inner and shape[axis] > 1:
            return "it is padded inside"
        left = piece.cut(axis, max(-low, 0), shape[axis] - max(-high, 0))
        if not isinstance(left, Piece):
            return left
        piece = left.shifted(axis, max(low, 0))
    return piece


PIECE_MOVES: dict[str, Callable[..., Piece | str | None]] = {
    "transpose": lambda piece, eqn, *_: piece.transposed(eqn.params["permutation"]),
    "squeeze": lambda piece, eqn, *_: piece.squeezed(eqn.params["dimensions"]),
    "expand_dims": lambda piece, eqn, args, shape, out: piece.broadcast(
        out, shape, tuple(i for i in range(len(out)) if i not in eqn.params["dimensions"])
    ),
    "broadcast_in_dim": lambda piece, eqn, args, shape, out: piece.broadcast(
        out, shape, eqn.params["broadcast_dimensions"]
    ),
    "reshape": lambda piece, eqn, args, shape, out: piece.reshaped(shape, out),
    "rev": lambda piece, eqn, args, shape, out: piece.reversed(eqn.params["dimensions"], shape),
    "slice": _slice_piece,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather_piece,
    "pad": _pad,
}
