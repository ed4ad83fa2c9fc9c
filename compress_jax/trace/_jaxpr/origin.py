"""Where a value comes from: constants, one parameter (and which of its axes), several, or data.

Two analyses, a coarse and an exact one. `Origin`: a value is a view of which parameters, and which
stored axes lie in which of its axes. `pieces`: which entries of which parameters lie where in the
operands of every contraction.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from compress_jax.core.types import Aval, Leaves
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.evaluate import bind
from compress_jax.trace._jaxpr.interpret import ConstantValue, Where, interpret
from compress_jax.trace._jaxpr.primitives import INDEX_REDUCTIONS, RANDOM, REDUCTIONS
from compress_jax.trace._jaxpr.site import AxisIndices, EqnParams, Position, Shape
from compress_jax.trace._jaxpr.strided import Piece, runs

CONSTANT = 0
PARAMETER = 1
DATA = 2
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
        they are unknown.
      sliced: axes of the stored parameter of which the value holds one index, each with the loop
        whose iteration is the index (counted from the outermost), or None.
      maker: position of the newest contraction that the data went through, or of its input or
        table.
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
    """Join abstract values: the origin of a value that is any of these, or made of all of them."""
    level = max((origin.level for origin in origins), default=CONSTANT)
    # Data absorbs parameters: its newest contraction names what comes after.
    if level == DATA:
        inputs = [origin for origin in origins if origin.level == DATA]
        return max(inputs, key=lambda origin: origin.maker)
    views = list(dict.fromkeys(origin for origin in origins if origin.paths))
    if not views:
        return Origin(level)
    if len(views) == 1:
        return views[0]
    # Of several views (a mean of weights, a concatenation) the paths are known, the axes are not.
    paths = itertools.chain.from_iterable(view.paths for view in views)
    return Origin(level, tuple(dict.fromkeys(paths)))


def transfer(eqn: JaxprEqn, args: Sequence[Origin]) -> Origin:
    """Return the origin of an equation's results.

    Args:
      eqn: an equation that has no jaxpr inside and does not contract.
      args: origins of its operands.

    Returns:
      The origin that its results share.
    """
    shapes = [_shape(var) for var in eqn.invars]
    out = _shape(eqn.outvars[0]) if eqn.outvars else ()
    name = eqn.primitive.name
    # Random numbers count as constants, whatever the key: a weight with noise is that weight.
    if name in RANDOM:
        return Origin()
    if name == "gather" and args[0].level == PARAMETER:
        return _gather(eqn, args, shapes, out)
    if name == "dynamic_slice" and args[0].level == PARAMETER:
        return _slice(args[0], shapes[0], out)
    if name in REDUCTIONS or name in INDEX_REDUCTIONS:
        # A sum of weights is no view of the weights.
        return args[0] if args[0].level == DATA else Origin(args[0].level)
    if name in MOVE_RULES and args[0].dims is not None:
        return MOVE_RULES[name](eqn.params, args[0], shapes[0], out)
    return _combine(args, shapes, out)


def _shape(var: Var | Literal) -> Shape:
    return getattr(var.aval, "shape", ())


def _combine(args: Sequence[Origin], shapes: list[Shape], out: Shape) -> Origin:
    """Combine operands entry by entry.

    What is broadcast along the result (a scale, a threshold) modifies what fills the result: the
    result is a view of the latter only.
    """
    if max((arg.level for arg in args), default=CONSTANT) == DATA:
        return join(args)
    # A mask made of the weight fills the result as the weight does; a scale [1, out] does not.
    shaped = zip(args, shapes, strict=False)
    filling = [arg for arg, shape in shaped if arg.paths and shape == out and _fills(arg, shape)]
    # A view whose axes are known replaces one of the same parameter whose axes are not.
    known: set[str] = set()
    for arg in filling:
        if arg.dims is not None:
            known.update(arg.paths)
    views = [arg for arg in filling if arg.dims is not None or not known.issuperset(arg.paths)]
    if views:
        return join(views)
    return replace(join(args), dims=None)


def _fills(origin: Origin, shape: Shape) -> bool:
    """Tell whether a parameter's own axes run along every axis of the value, none broadcast."""
    if origin.dims is None:
        return True
    return all(axes or size == 1 for axes, size in zip(origin.dims, shape, strict=True))


def _dims(origin: Origin) -> Dims:
    assert origin.dims is not None
    return origin.dims


def _transpose(params: EqnParams, origin: Origin, shape: Shape, out: Shape) -> Origin:
    dims = _dims(origin)
    return replace(origin, dims=tuple(dims[axis] for axis in params["permutation"]))


def _squeeze(params: EqnParams, origin: Origin, shape: Shape, out: Shape) -> Origin:
    removed = params["dimensions"]
    left = tuple(axes for axis, axes in enumerate(_dims(origin)) if axis not in removed)
    return replace(origin, dims=left)


def _expand_dims(params: EqnParams, origin: Origin, shape: Shape, out: Shape) -> Origin:
    added = params["dimensions"]
    rest = iter(_dims(origin))
    dims = tuple(() if axis in added else next(rest) for axis in range(len(out)))
    return replace(origin, dims=dims)


def _broadcast(params: EqnParams, origin: Origin, shape: Shape, out: Shape) -> Origin:
    dims: list[AxisIndices] = [()] * len(out)
    for axis, target in enumerate(params["broadcast_dimensions"]):
        # An axis of size 1 that becomes longer repeats one entry: no stored axis runs along it.
        if shape[axis] == out[target]:
            dims[target] = _dims(origin)[axis]
    return replace(origin, dims=tuple(dims))


def _reshape(params: EqnParams, origin: Origin, shape: Shape, out: Shape) -> Origin:
    """Every axis of a run may hold every stored axis of it."""
    dims: list[AxisIndices] = [()] * len(out)
    for run, target in runs(shape, out):
        axes = tuple(dict.fromkeys(itertools.chain.from_iterable(_dims(origin)[i] for i in run)))
        for i in target:
            dims[i] = axes
    return replace(origin, dims=tuple(dims))


def _cut(params: EqnParams, origin: Origin, shape: Shape, out: Shape) -> Origin:
    return _slice(origin, shape, out)


def _pad(params: EqnParams, origin: Origin, shape: Shape, out: Shape) -> Origin:
    return origin


MOVE_RULES: Mapping[str, Callable[[EqnParams, Origin, Shape, Shape], Origin]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _cut,
    "split": _cut,
    "pad": _pad,
}


def _slice(origin: Origin, shape: Shape, out: Shape) -> Origin:
    """Note the stored axes of which one index is left: those in an axis that now has size 1."""
    if origin.dims is None:
        return origin
    dims: list[AxisIndices] = []
    gone: list[tuple[int, int | None]] = []
    for axes, before, after in zip(origin.dims, shape, out, strict=True):
        single = 1 == after < before
        dims.append(() if single else axes)
        gone += [(axis, None) for axis in axes if single]
    return replace(origin, dims=tuple(dims), sliced=(*origin.sliced, *gone))


def _gather(eqn: JaxprEqn, args: Sequence[Origin], shapes: list[Shape], out: Shape) -> Origin:
    """One slice of stacked layers is still the parameter; rows that data choose are data."""
    table = args[0]
    numbers = eqn.params["dimension_numbers"]
    # The result has the offset axes, which are those of a slice, and one more for each axis of the
    # indices if there are several: [batch, tokens] look up rows as [batch, tokens, features].
    several = len(out) > len(numbers.offset_dims)
    # Slices of rank 2 or more are not rows but whole kernels, as of experts: still the parameter.
    if several and args[1].level == DATA and len(numbers.offset_dims) < 2:
        return data("/".join(table.paths[:1]) or "parameters")  # an embedding
    if table.dims is None:
        return table
    # Axes along which one index is taken; each offset axis of the result is a whole axis.
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    picked = tuple(itertools.chain.from_iterable(table.dims[i] for i in gone))
    dims: list[AxisIndices] = [picked] * len(out)
    left = [i for i in range(len(shapes[0])) if i not in gone]
    for target, axis in zip(numbers.offset_dims, left, strict=True):
        dims[target] = table.dims[axis]
    single = () if several else tuple((axis, None) for axis in picked)
    return replace(table, dims=tuple(dims), sliced=(*table.sliced, *single))


@dataclass(frozen=True)
class Strided:
    """A value in which pieces of parameters lie; the entries that no piece covers are constant."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Unknown:
    """A value in which the entries of a parameter cannot be told from others.

    Attributes:
      reason: why; empty if there is no parameter in it.
      data: whether it depends on inputs too. Without a parameter and data it is a constant that is
        not known, as a caller's ``jit`` traces it.
    """

    reason: str = ""
    data: bool = True


@dataclass(frozen=True)
class Constant:
    """A known value, which depends on no parameter and no input.

    Attributes:
      make: computes it; called only where an index needs the value.
    """

    make: Callable[[], Any] = field(repr=False)


Value = Strided | Unknown | Constant


def pieces(closed: ClosedJaxpr, params: Leaves) -> dict[Position, tuple[Value, Value]]:
    """Return the pieces of parameters in the operands of every contraction of a jaxpr.

    Args:
      closed: its first inputs are the parameters.
      params: arrays or shapes by path.

    Returns:
      ``{position: (lhs, rhs)}``.

    Example:
      >>> w = jnp.ones((2, 3, 4))
      >>> jaxpr = jax.make_jaxpr(lambda w, x: x @ w[1])(w, jnp.ones((5, 3)))
      >>> ((_, right),) = pieces(jaxpr, {"w": w}).values()
      >>> right.pieces[0].offset, right.pieces[0].axes
      (12, (((3, 4),), ((4, 1),)))
    """
    domain = PieceDomain()
    whole = [Strided((Piece.whole(path, x.shape),)) for path, x in params.items()]
    inputs = [Unknown()] * (len(closed.jaxpr.invars) - len(params))
    interpret(domain, closed, [*whole, *inputs])
    return domain.found


@dataclass
class PieceDomain:
    """The domain of pieces; ``found`` holds the operands of every contraction by position."""

    found: dict[Position, tuple[Value, Value]] = field(default_factory=dict)

    def constant(self, aval: Aval, value: ConstantValue) -> Value:
        """Return the value of a literal or a captured array."""
        return Constant(lambda: value.value) if value.known else Unknown(data=False)

    def join(self, a: Value, b: Value) -> Value:
        """Join two abstract values."""
        return a if a == b else _unknown([a, b], "it is not the same in every iteration or branch")

    def same(self, a: Value, b: Value) -> bool:
        """Tell whether two abstract values are equal."""
        return a == b

    def unstack(self, a: Value, loop: int) -> Value:
        """Return the slice of one iteration."""
        if isinstance(a, Strided):
            return _strided(piece.unstacked(loop) for piece in a.pieces)
        return _unknown([a])

    def stack(self, a: Value, length: int) -> Value:
        """Return the slices put together."""
        return _unknown([a], "a loop returns it")

    def reshard(self, a: Value, aval: Aval) -> Value:
        """Return a device's shard, known only if it is the whole."""
        if isinstance(a, Strided) and all(piece.sizes == aval.shape for piece in a.pieces):
            return a
        return _unknown([a], "each device of a shard_map has a piece of the parameter")

    def equation(self, eqn: JaxprEqn, args: list[Value], where: Where) -> Sequence[Value]:
        """Return the results of an equation; note the operands of a contraction."""
        name = eqn.primitive.name
        # A product's result holds sums, in which no entry of a parameter can be found again.
        if primitives.kind(eqn) is not None:
            self.found[where.position] = (args[0], args[1])
            return [_unknown(args, f"it is changed on its way ({name})")]
        count = len(eqn.outvars)
        # Constants stay unevaluated until an index needs their value.
        constants = [arg for arg in args if isinstance(arg, Constant)]
        if args and len(constants) == len(args) and not eqn.effects:
            return [Constant(_computed(eqn, constants, i)) for i in range(count)]
        if not any(isinstance(arg, Strided) for arg in args):
            return [_unknown(args)] * count
        if name in PIECE_JOINS:
            return [_joined(eqn, args)]
        # A move of pieces: exact if every index is known. Padding must only be constant.
        operand = args[0]
        rest = args[1:]
        if isinstance(operand, Strided):
            if name == "split":
                return _parts(eqn, operand.pieces)
            exact = all(map(_is_constant, rest)) if name == "pad" else len(constants) == len(rest)
            if name in PIECE_RULES and exact:
                shape = _shape(eqn.invars[0])
                out = _shape(eqn.outvars[0])
                move = PIECE_RULES[name]
                moved = [move(each, eqn, constants, shape, out) for each in operand.pieces]
                return [_strided(moved)]
            if name in primitives.INDEXED:
                reason = "a slice of it is used, and data or the iteration of a loop decide which"
                return [_unknown(args, reason)] * count
            if name == "pad":
                return [_unknown(args, "it is padded with data or a parameter")] * count
        return [_combined(eqn, args)] * count


def _is_constant(arg: Value) -> bool:
    """Tell whether a value depends on no parameter and no input, whether it is known or not."""
    if isinstance(arg, Unknown):
        return not arg.reason and not arg.data
    return isinstance(arg, Constant)


def _computed(eqn: JaxprEqn, args: Sequence[Constant], result: int) -> Callable[[], jax.Array]:
    def make() -> jax.Array:
        # The analysis may run while a caller's jit traces; the index is needed as a number now.
        with jax.ensure_compile_time_eval():
            return bind(eqn, [arg.make() for arg in args])[result]

    return make


def _unknown(args: Sequence[Value], reason: str = "") -> Unknown:
    """Return an unknown value: for the first reason there was, if a parameter is in it."""
    unknown = [arg for arg in args if isinstance(arg, Unknown)]
    earlier = next((arg.reason for arg in unknown if arg.reason), "")
    has_parameter = any(isinstance(arg, Strided) for arg in args)
    own = reason if has_parameter else ""
    return Unknown(earlier or own, any(arg.data for arg in unknown))


def _strided(moved: Iterable[Piece | str | None]) -> Value:
    """Return the value of the pieces that are left; unknown for the reason one of them gives."""
    moved = list(moved)
    if reason := next((each for each in moved if isinstance(each, str)), None):
        return Unknown(reason, data=False)
    left = tuple(each for each in moved if isinstance(each, Piece))
    return Strided(left) if left else Unknown("a slice leaves nothing of it", data=False)


PIECE_JOINS = frozenset(("concatenate", "stack"))


def _joined(eqn: JaxprEqn, args: Sequence[Value]) -> Value:
    """Put values side by side along an axis, a new one for ``stack``."""
    if not all(isinstance(arg, Strided) or _is_constant(arg) for arg in args):
        return _unknown(args, "it is joined with data")
    stacked = eqn.primitive.name == "stack"
    axis = eqn.params["axis" if stacked else "dimension"]
    place = 0  # where the next operand begins along the axis
    found = []
    for arg, var in zip(args, eqn.invars, strict=True):
        shape = _shape(var)
        for piece in arg.pieces if isinstance(arg, Strided) else ():
            # `stack` gives every operand the new axis, of size 1, before it joins them.
            if stacked:
                out = (*shape[:axis], 1, *shape[axis:])
                old = tuple(i for i in range(len(out)) if i != axis)
                piece = piece.broadcast(out, shape, old)
            found.append(piece.shifted(axis, place))
        place += 1 if stacked else shape[axis]
    return _strided(found)


def _parts(eqn: JaxprEqn, given: tuple[Piece, ...]) -> list[Value]:
    """Return the pieces in each result of a ``split``."""
    ends = np.cumsum([0, *eqn.params["sizes"]]).tolist()
    axis = eqn.params["axis"]
    parts = []
    for low, high in itertools.pairwise(ends):
        parts.append(_strided(piece.cut(axis, low, high) for piece in given))
    return parts


def _combined(eqn: JaxprEqn, args: Sequence[Value]) -> Value:
    """Combine operands entry by entry; see `_combine`."""
    name = eqn.primitive.name
    if any(isinstance(arg, Unknown) and arg.data for arg in args):
        return _unknown(args, f"data change it on its way ({name})")
    every = list(_all_pieces(args))
    filling = _filling(eqn, args)
    # Exactly one operand may fill the result; the others (a scale, a zero point) are broadcast.
    if len(filling) != 1:
        paths = {piece.path for piece in every}
        how = "several parameters are combined" if len(paths) > 1 else "it is changed on its way"
        return _unknown(args, f"{how} ({name})")
    # A cast to another floating dtype keeps every entry's value, up to rounding: no change.
    if name == "convert_element_type" and jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return args[0]
    # The result carries the changes of all operands, also of those that are only broadcast.
    earlier = itertools.chain.from_iterable(piece.changed for piece in every)
    changed = tuple(dict.fromkeys([*earlier, name]))
    return Strided(tuple(replace(piece, changed=changed) for piece in filling[0]))


def _all_pieces(args: Sequence[Value]) -> Iterable[Piece]:
    for arg in args:
        if isinstance(arg, Strided):
            yield from arg.pieces


def _filling(eqn: JaxprEqn, args: Sequence[Value]) -> list[tuple[Piece, ...]]:
    """Return the pieces, without their changes, of each operand that fills the result."""
    outs = {_shape(var) for var in eqn.outvars}
    # A set in order: in w * (w > 0) both operands are the same pieces, apart from their changes.
    filling: dict[tuple[Piece, ...], None] = {}
    for arg, var in zip(args, eqn.invars, strict=True):
        if not isinstance(arg, Strided) or {_shape(var)} != outs:
            continue
        if not any(map(_repeated, arg.pieces)):
            filling[tuple(replace(piece, changed=()) for piece in arg.pieces)] = None
    return list(filling)


def _repeated(piece: Piece) -> bool:
    """Tell whether a piece is broadcast: it has a stride of 0 along an axis."""
    return any(stride == 0 for _, stride in itertools.chain.from_iterable(piece.axes))


Moved = Piece | str | None
"""The piece in the result; None if nothing of it is left, or why what is left is no piece."""
Constants = Sequence[Constant]

# Rules for moves of pieces: (piece, equation, its further operands, which are indices or the value
# to pad with, shape of the first operand, shape of the result) to what `Moved` says.


def _transpose_piece(
    piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape
) -> Moved:
    return piece.transposed(eqn.params["permutation"])


def _squeeze_piece(piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape) -> Moved:
    return piece.squeezed(eqn.params["dimensions"])


def _expand_piece(piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape) -> Moved:
    old = tuple(i for i in range(len(out)) if i not in eqn.params["dimensions"])
    return piece.broadcast(out, shape, old)


def _broadcast_piece(
    piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape
) -> Moved:
    return piece.broadcast(out, shape, eqn.params["broadcast_dimensions"])


def _reshape_piece(piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape) -> Moved:
    return piece.reshaped(shape, out)


def _reverse_piece(piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape) -> Moved:
    return piece.reversed(eqn.params["dimensions"], shape)


def _slice_piece(piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape) -> Moved:
    starts = eqn.params["start_indices"]
    steps = eqn.params["strides"] or (1,) * len(starts)
    return _box(piece, starts, eqn.params["limit_indices"], steps)


def _dynamic_slice_piece(
    piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape
) -> Moved:
    indices = [int(index.make()) for index in rest]
    # XLA moves a slice that would reach beyond the operand back inside.
    starts = [min(max(i, 0), n - m) for i, n, m in zip(indices, shape, out, strict=True)]
    ends = [start + n for start, n in zip(starts, out, strict=True)]
    return _box(piece, starts, ends, (1,) * len(starts))


def _gather_piece(piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape) -> Moved:
    """One index along some axes, everything along the others: how ``take`` makes a slice."""
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    index = np.asarray(rest[0].make())  # [k]: a coordinate for each axis in start_index_map
    gone = tuple(numbers.collapsed_slice_dims)
    partial = any(sizes[i] != n for i, n in enumerate(shape) if i not in gone)
    if index.ndim != 1 or numbers.operand_batching_dims or partial:
        return "several indices are picked by one lookup"
    # The box that the slice cuts out: one index along the collapsed axes, all along the others.
    places = dict(zip(numbers.start_index_map, index.tolist(), strict=True))
    starts = [0] * len(shape)
    ends = list(shape)
    for axis in gone:
        starts[axis] = places.get(axis, 0)
        ends[axis] = starts[axis] + 1
        if not 0 <= starts[axis] < shape[axis]:
            return "an index is out of bounds"
    left = _box(piece, starts, ends, (1,) * len(shape))
    return left.squeezed(gone) if isinstance(left, Piece) else left


def _pad_piece(piece: Piece, eqn: JaxprEqn, rest: Constants, shape: Shape, out: Shape) -> Moved:
    for axis, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        if inner and shape[axis] > 1:  # with one entry there is no inside
            return "it is padded inside"
        left = piece.cut(axis, max(-low, 0), shape[axis] - max(-high, 0))  # negative padding crops
        if not isinstance(left, Piece):
            return left
        piece = left.shifted(axis, max(low, 0))
    return piece


def _box(
    piece: Piece, starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]
) -> Piece | str | None:
    """Return what a slice along every axis leaves of a piece."""
    for axis, span in enumerate(zip(starts, ends, steps, strict=True)):
        left = piece.cut(axis, *map(int, span))
        if not isinstance(left, Piece):
            return left
        piece = left
    return piece


PIECE_RULES: Mapping[str, Callable[[Piece, JaxprEqn, Constants, Shape, Shape], Moved]] = {
    "transpose": _transpose_piece,
    "squeeze": _squeeze_piece,
    "expand_dims": _expand_piece,
    "broadcast_in_dim": _broadcast_piece,
    "reshape": _reshape_piece,
    "rev": _reverse_piece,
    "slice": _slice_piece,
    "dynamic_slice": _dynamic_slice_piece,
    "gather": _gather_piece,
    "pad": _pad_piece,
}
