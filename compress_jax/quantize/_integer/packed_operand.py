"""A quantized parameter, from the bytes that store it to the contraction that uses its codes.

From the bottom up: codes of fewer than 8 bits packed in bytes (`pack`, `unpack`), a quantized
parameter as integer inference stores it (`Stored`), the moves between a stored parameter and a
contraction (`routes`), and the parameter as an operand there (`PackedOperand`).

A parameter that is only transposed, reshaped, sliced, cast or passed to the iterations of a loop
has the same entries at the contraction as in storage. So its integer codes can be moved likewise,
without computing the float values in between.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from compress_jax.core.finite import saturate
from compress_jax.core.layout import Layout
from compress_jax.core.packed import Quantized
from compress_jax.core.sparse import Sparse
from compress_jax.core.sparse import width as bit_width
from compress_jax.core.types import Aval, DType
from compress_jax.quantize._integer.integer_dot import Coded, OperandAxes
from compress_jax.trace._jaxpr import primitives
from compress_jax.trace._jaxpr.evaluate import bind
from compress_jax.trace._jaxpr.find_sites import Traced
from compress_jax.trace._jaxpr.interpret import ConstantValue, Where, interpret
from compress_jax.trace._jaxpr.origin import Constant
from compress_jax.trace._jaxpr.primitives import CASTS, INDEXED, MOVES
from compress_jax.trace._jaxpr.site import Position

# Codes in bytes: packed along one axis, so that the array keeps its rank and its sharding.

Fields = dict[str, jax.Array]


def widths(bits: int) -> tuple[int, ...]:
    """Return the widths of the bit fields of a code, lowest bits last.

    Args:
      bits: 1 to 7.

    Returns:
      Different powers of 2 that add up to ``bits``.

    Example:
      >>> widths(4), widths(7)
      ((4,), (4, 2, 1))
    """
    return tuple(width for width in (4, 2, 1) if bits & width)


def pack(codes: jax.Array, bits: int, axis: int) -> Fields:
    """Pack codes along an axis, the first of them in the lowest bits of a byte.

    Args:
      codes: unsigned integers below ``2**bits``, of rank 1 or more.
      bits: 1 to 7.
      axis: along which codes share bytes; the last byte is filled with zeros.

    Returns:
      ``{"bits4", "bits2", "bits1"}``, those of `widths`: uint8, ``ceil(n * width / 8)`` long along
      the axis.

    Example:
      >>> codes = jnp.array([[1, 2], [3, 4], [5, 6]], jnp.uint8)
      >>> fields = pack(codes, bits=3, axis=0)
      >>> {name: each.shape for name, each in fields.items()}, unpack(fields, 3, 0, 3).tolist()
      ({'bits2': (1, 2), 'bits1': (1, 2)}, [[1, 2], [3, 4], [5, 6]])
    """
    fields: Fields = {}
    rest = jnp.moveaxis(codes, axis, -1).astype(jnp.uint8)  # [..., n]
    for width in reversed(widths(bits)):  # the lowest bits first
        share = rest & np.uint8(2**width - 1)
        rest = rest >> np.uint8(width)
        fields[f"bits{width}"] = jnp.moveaxis(_joined(share, width), -1, axis)
    return {f"bits{width}": fields[f"bits{width}"] for width in widths(bits)}


def _joined(share: jax.Array, width: int) -> jax.Array:
    """Join neighbours along the last axis in one byte."""
    count = 8 // width
    padded = jnp.pad(share, [(0, 0)] * (share.ndim - 1) + [(0, -share.shape[-1] % count)])
    groups = padded.reshape(*share.shape[:-1], -1, count)  # [..., bytes, codes of a byte]
    return sum(
        (groups[..., i] << np.uint8(i * width) for i in range(1, count)), start=groups[..., 0]
    )


def unpack(fields: Fields, bits: int, axis: int, size: int) -> jax.Array:
    """Return the codes again; works under ``jit``.

    Args:
      fields: what `pack` returned, or any slice of it across other axes.
      bits: 1 to 7.
      axis: as in `pack`, from either end.
      size: how many codes there are along it.

    Returns:
      uint8 codes.
    """
    codes = None
    for width in widths(bits):
        field = fields[f"bits{width}"]
        at = axis % field.ndim
        # Every byte is shifted by 0, width, ... 8 - width, along a new axis behind its own.
        places = np.arange(0, 8, width, dtype=np.uint8).reshape(-1, *(1,) * (field.ndim - at - 1))
        apart = (
            jnp.expand_dims(field, at + 1) >> jnp.expand_dims(places, tuple(range(at + 1)))
        ) & np.uint8(2**width - 1)
        # [..., bytes, codes of a byte, ...] -> [..., codes, ...], without those that fill the last
        share = apart.reshape(*field.shape[:at], -1, *field.shape[at + 1 :])
        share = jax.lax.slice_in_dim(share, 0, size, axis=at)
        codes = share if codes is None else (codes << np.uint8(width)) | share
    assert codes is not None
    return codes


def best_axis(shape: tuple[int, ...], bits: int, first: int = 0) -> int:
    """Return the axis along which packing wastes least; of several such, the longest.

    Args:
      shape: the codes' shape.
      bits: the bits of a code.
      first: the first axis to consider; those before it are sliced by loops.

    Returns:
      The axis.

    Example:
      >>> best_axis((3, 3, 16, 32), 4), best_axis((8, 5, 7), 4, first=1)
      (3, 2)
    """

    def cost(axis: int) -> tuple[int, int]:
        # All bytes if the codes are packed along the axis, one rounded-up run for each bit field.
        count = sum(math.ceil(shape[axis] * width / 8) for width in widths(bits))
        return count * math.prod(shape) // max(shape[axis], 1), -shape[axis]

    return min(range(min(first, len(shape) - 1), len(shape)), key=cost)


# A quantized parameter: signed codes under the parameter's own name and in its own shape.

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Stored:
    """The static description of a quantized parameter.

    The arrays are ``{"codes": int8}`` for 8 bits, else the `fields` of the codes, two of 4 bits a
    byte; ``"scale"``, float32, and ``"zero_point"``, uint8 and only if it is not the middle of the
    codes, both as the packed node holds them.

    Attributes:
      shape: the parameter's shape.
      dtype: the parameter's dtype.
      bits: the bits of a code, 1 to 8.
      axis: the axis along which codes share bytes.
      layout: which codes share a scale.
      symmetric: whether the middle code is zero everywhere.
    """

    shape: tuple[int, ...]
    dtype: DType
    bits: int
    axis: int
    layout: Layout
    symmetric: bool

    @classmethod
    def of(cls, node: Quantized, first: int = 0) -> "Stored":
        """Return the description of a packed node.

        Args:
          node: with concrete arrays.
          first: how many leading axes loops will slice.

        Returns:
          The description.
        """
        bits = bit_width(node.codes)
        symmetric = node.zero_point.size == 1 and int(node.zero_point.reshape(())) == 2 ** (
            bits - 1
        )
        axis = best_axis(node.shape, bits, first) if node.shape and bits < 8 else 0
        return cls(tuple(node.shape), jnp.dtype(node.dtype), bits, axis, node.layout, symmetric)

    @property
    def middle(self) -> int:
        """The code that signed codes count from."""
        return 2 ** (self.bits - 1)

    @property
    def format(self) -> str:
        """The format in words, ``"int4 channel"``."""
        sharing = f"group {self.layout.group_size}" if self.layout.group_size else "channel"
        sharing = sharing if np.prod(self.layout.scale_shape) > 1 else "tensor"
        return f"int{self.bits} {sharing}" + ("" if self.symmetric else " asymmetric")

    def arrays(self, node: Quantized) -> Arrays:
        """Return the arrays of a packed node."""
        codes = node.codes.unpack().astype(jnp.int32)  # of `shape`, in [0, 2**bits)
        if isinstance(node.codes, Sparse):
            # Entries that are not stored are zero: their code is the zero point, not 0.
            kept = self.layout.arrange(node.codes.mask.unpack()) != 0
            zero_point = node.zero_point.astype(jnp.int32)
            codes = self.layout.arrange(codes)
            codes = self.layout.restore(jnp.where(kept, codes, zero_point))
        if self.bits == 8:
            stored = {"codes": (codes - self.middle).astype(jnp.int8)}
        else:
            stored = pack(codes.reshape(self.shape or (1,)), self.bits, self.axis)
        stored["scale"] = node.scale
        if not self.symmetric:
            stored["zero_point"] = node.zero_point
        return stored

    def codes(self, arrays: Arrays, picked: Sequence[jax.Array] = ()) -> jax.Array:
        """Return the signed codes ``code - middle``, int8.

        Args:
          arrays: the parameter's.
          picked: indices of the first axes, which are sliced before anything is unpacked.

        Returns:
          Array of ``shape[len(picked):]``.
        """
        if self.bits == 8:
            return _pick(arrays["codes"], picked)
        names = [f"bits{width}" for width in widths(self.bits)]
        fields = {name: _pick(arrays[name], picked) for name in names}
        shape = self.shape or (1,)
        # The axis is counted from the end, as the first axes may be sliced away.
        codes = unpack(fields, self.bits, self.axis - len(shape), shape[self.axis])
        return (codes.astype(jnp.int8) - np.int8(self.middle)).reshape(self.shape[len(picked) :])

    def zero(self, arrays: Arrays) -> jax.Array | None:
        """Return the signed codes of zero, int32 in the shape of the scale; None if all are 0."""
        return None if self.symmetric else arrays["zero_point"].astype(jnp.int32) - self.middle

    def dense(self, arrays: Arrays) -> jax.Array:
        """Return the parameter itself, bit for bit what the packed node unpacks to."""
        # The operations of `Quantized.unpack` in its order: integers, one product, then the dtype.
        levels = self.layout.arrange(self.codes(arrays).astype(jnp.int32))
        zero = self.zero(arrays)
        if zero is not None:
            levels = levels - zero
        return saturate(
            self.layout.restore(levels.astype(jnp.float32) * arrays["scale"]), self.dtype
        )


def _pick(x: jax.Array, picked: Sequence[jax.Array]) -> jax.Array:
    """Return the slice at one index of each of the first axes."""
    for index in picked:
        x = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return x


# The moves between storage and the contractions that use a parameter.


@dataclass(frozen=True)
class Lost:
    """A value whose entries are not those of a stored parameter.

    Attributes:
      reason: what changed the parameter that it depends on; empty if it depends on none.
    """

    reason: str = ""


@dataclass(frozen=True)
class Move:
    """An equation that only moves entries.

    Attributes:
      eqn: the equation.
      result: which of its results is used.
      indices: its other operands.
    """

    eqn: JaxprEqn
    result: int = 0
    indices: tuple[Constant, ...] = ()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Move an array of any dtype."""
        return bind(self.eqn, [x, *(each.make() for each in self.indices)])[self.result]


@dataclass(frozen=True)
class Cast:
    """A cast to another floating-point dtype or to fewer digits, which codes need not follow."""

    eqn: JaxprEqn

    def __call__(self, x: jax.Array) -> jax.Array:
        """Cast an array of any shape."""
        params = self.eqn.params
        if "new_dtype" in params:  # convert_element_type
            return x.astype(params["new_dtype"])
        return jax.lax.reduce_precision(x, **params)


@dataclass(frozen=True)
class Iteration:
    """The slice of a stack that an iteration of a loop uses: one index of the first axis.

    Attributes:
      loop: which loop, counted from the outermost.
    """

    loop: int


Step = Move | Cast | Iteration


@dataclass(frozen=True)
class Route:
    """A parameter and the steps from storage to its use.

    Attributes:
      path: the parameter's.
      steps: in order.
    """

    path: str
    steps: tuple[Step, ...] = ()

    @property
    def loops(self) -> tuple[int, ...]:
        """The loops whose iterations pick a slice, in the order of the steps."""
        return tuple(step.loop for step in self.steps if isinstance(step, Iteration))

    @property
    def stacked(self) -> int:
        """How many first steps pick slices, and so can be taken before anything is unpacked."""
        return next(
            (i for i, step in enumerate(self.steps) if not isinstance(step, Iteration)),
            len(self.steps),
        )

    def take(self, x: jax.Array, iterations: Sequence[jax.Array] = (), done: int = 0) -> jax.Array:
        """Move a stored array of any dtype to the operand, in one iteration.

        Args:
          x: array of the stored shape, or of the shape after the first ``done`` steps.
          iterations: the current iteration of each loop in the remaining steps.
          done: how many steps to skip.

        Returns:
          Array of the operand's shape.
        """
        left = iter(iterations)
        for step in self.steps[done:]:  # casts are skipped: codes are no floats
            if isinstance(step, Iteration):
                x = jax.lax.dynamic_index_in_dim(x, next(left), keepdims=False)
            elif isinstance(step, Move):
                x = step(x)
        return x

    def every(self, x: jax.Array) -> jax.Array:
        """Move a stored array in all iterations at once: those of `loops` are the first axes."""
        return _every(self.steps, x)

    def cast(self, x: jax.Array) -> jax.Array:
        """Cast an array as the parameter is cast on its route."""
        for step in self.steps:
            if isinstance(step, Cast):
                x = step(x)
        return x


def _every(steps: Sequence[Step], x: jax.Array) -> jax.Array:
    for i, step in enumerate(steps):
        # vmap runs the other steps on all slices, and puts the loop's axis first.
        if isinstance(step, Iteration):
            return jax.vmap(lambda piece, rest=steps[i + 1 :]: _every(rest, piece))(x)
        x = step(x) if isinstance(step, Move) else x
    return x


Value = Constant | Lost | Route


@dataclass
class Routes:
    """The interpreter's domain of routes; ``found`` has each contraction's operands by position."""

    found: dict[Position, tuple[Value, Value]] = field(default_factory=dict)

    def constant(self, aval: Aval, value: ConstantValue) -> Value:
        """Return the value, if it is known."""
        return Constant(lambda: value.value) if value.known else Lost()

    def join(self, a: Value, b: Value) -> Value:
        """Return what may be either value."""
        return a if a == b else _lost([a, b], "it is not the same in every iteration or branch")

    def same(self, a: Value, b: Value) -> bool:
        """Tell whether two values are the same."""
        return a == b

    def unstack(self, a: Value, loop: int) -> Value:
        """Return the slice of an iteration."""
        return Route(a.path, (*a.steps, Iteration(loop))) if isinstance(a, Route) else _lost([a])

    def stack(self, a: Value, length: int) -> Value:
        """Return slices put together."""
        return _lost([a], "a loop returns it")

    def reshard(self, a: Value, aval: Aval) -> Value:
        """Return a device's piece."""
        return _lost([a], "each device of a shard_map has a piece of the parameter")

    def equation(self, eqn: JaxprEqn, args: list[Value], where: Where) -> Sequence[Value]:
        """Return the results of an equation; note the operands of a contraction."""
        if primitives.kind(eqn) is not None:  # a contraction: where routes end
            self.found[where.position] = (args[0], args[1])
            return [_lost(args, "a contraction changes the parameter on its way")]
        name = eqn.primitive.name
        outs = range(len(eqn.outvars))
        # Constants stay unevaluated until a route needs one as an index.
        if args and all(isinstance(arg, Constant) for arg in args) and not eqn.effects:
            return [Constant(_evaluated(eqn, args, i)) for i in outs]
        first = args[0] if args else None
        indices = tuple(arg for arg in args[1:] if isinstance(arg, Constant))
        # A route goes on through moves whose indices are known, and through casts between floats.
        if isinstance(first, Route) and len(indices) == len(args) - 1:
            if name in MOVES or name in INDEXED:
                return [Route(first.path, (*first.steps, Move(eqn, i, indices))) for i in outs]
            dtype = getattr(eqn.outvars[0].aval, "dtype", bool)
            if name in CASTS and jnp.issubdtype(dtype, jnp.floating):
                return [Route(first.path, (*first.steps, Cast(eqn)))]
        return [_lost(args, _changed(name, args))] * len(eqn.outvars)


def _evaluated(eqn: JaxprEqn, args: Sequence[Value], result: int) -> Callable[[], jax.Array]:
    constants = [arg for arg in args if isinstance(arg, Constant)]

    def make() -> jax.Array:
        # A route may be followed inside jit; its indices are computed while tracing.
        with jax.ensure_compile_time_eval():
            return bind(eqn, [constant.make() for constant in constants])[result]

    return make


def _changed(name: str, args: Sequence[Value]) -> str:
    if len({arg.path for arg in args if isinstance(arg, Route)}) > 1:
        return f"several parameters are joined ({name})"
    if name in INDEXED:
        return "a slice of the parameter is used, and data decide which"
    return f"the parameter is changed on its way ({name})"


def _lost(args: Sequence[Value], reason: str = "") -> Lost:
    """Return a lost value with the earliest reason, if it depends on a parameter."""
    earlier = next((arg.reason for arg in args if isinstance(arg, Lost) and arg.reason), "")
    return Lost(earlier or (reason if any(isinstance(arg, Route) for arg in args) else ""))


def routes(traced: Traced) -> Mapping[Position, tuple[Value, Value]]:
    """Return the operands of every contraction of a trace: routes of parameters where they are.

    Args:
      traced: the trace.

    Returns:
      ``{position of a site: (lhs, rhs)}``.

    Example:
      >>> from compress_jax.trace._jaxpr.find_sites import trace
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"].T) @ (2 * p["b"])
      >>> shape = jax.ShapeDtypeStruct((3, 3), jnp.float32)
      >>> found = routes(trace(fn, {"a": shape, "b": shape}, shape))
      >>> (_, a), (_, b) = found.values()
      >>> a.take(jnp.eye(3, 3, 1)).tolist()
      [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
      >>> b.reason
      'the parameter is changed on its way (mul)'
    """
    domain = Routes()
    inputs = [Lost()] * (len(traced.jaxpr.jaxpr.invars) - len(traced.params))
    interpret(domain, traced.jaxpr, [*(Route(path) for path in traced.params), *inputs])
    return domain.found


# A quantized parameter as an operand: its codes by the route it takes, its scales by rows.


class Captured(NamedTuple):
    """The data of a packed operand in all iterations of its loops.

    Attributes:
      arrays: the stored parameter.
      scale: float32 ``[*iterations, *kept axes, groups]``.
      zero: int32, likewise; None if all zeros are 0.
    """

    arrays: Arrays
    scale: jax.Array
    zero: jax.Array | None


@dataclass(frozen=True)
class PackedOperand:
    """A packed parameter as the operand of a contraction.

    Attributes:
      stored: how it is stored.
      route: the moves between storage and the contraction.
      axes: the operand's axes.
      scales: int32 ``[*iterations, *kept axes, groups]``, the index of the stored scale of each row
        and group; of length 1 along axes where it is constant.
    """

    stored: Stored
    route: Route
    axes: OperandAxes
    scales: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, stored: Stored, route: Route, axes: OperandAxes) -> "PackedOperand":
        """Follow the scales along a route.

        Args:
          stored: how the parameter is stored.
          route: the moves between storage and the contraction.
          axes: the operand's axes.

        Returns:
          The operand. Its groups are the longest runs of summed entries, all equally long, that
          share a scale.
        """
        shape = stored.layout.scale_shape
        indices = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
        # Move the index of each entry's scale as the entry itself is moved.
        every = np.asarray(route.every(stored.layout.spread(indices)))
        iterations = len(route.loops)
        order = (*range(iterations), *(iterations + axis for axis in (*axes.kept, *axes.summed)))
        kept = [axes.shape[axis] for axis in axes.kept]
        # [*iterations, *kept, products]
        table = every.transpose(order).reshape(*every.shape[:iterations], *kept, -1)
        # Groups are the longest even cut of the summed entries such that no group has two scales,
        # in any row of any iteration.
        changed = (table[..., 1:] != table[..., :-1]).any(tuple(range(table.ndim - 1)))
        starts = np.flatnonzero(changed) + 1  # where another scale begins
        size = math.gcd(table.shape[-1], *starts.tolist())
        return cls(stored, route, axes, _short(table[..., ::size], iterations))

    @property
    def groups(self) -> int:
        """How many groups with scales of their own are summed over."""
        return self.scales.shape[-1]

    @property
    def _picked(self) -> int:
        """How many of the first axes are sliced before the codes are unpacked."""
        if self.stored.bits == 8:
            return self.route.stacked
        return min(self.route.stacked, self.stored.axis)  # bytes join codes along this axis

    def captured(self, arrays: Arrays) -> Captured:
        """Return the data of all iterations: the arrays, and the scales by iteration and row."""
        zero = self.stored.zero(arrays)
        if zero is not None:
            shared = zero.size == 1  # one zero point for all scales
            zero = zero.reshape((1,) * self.scales.ndim) if shared else zero.ravel()[self.scales]
        return Captured(arrays, arrays["scale"].ravel()[self.scales], zero)

    def coded(self, captured: Captured, iterations: Sequence[jax.Array]) -> Coded:
        """Return the operand in integers.

        Args:
          captured: from `captured`.
          iterations: the current iteration of each loop of the route.

        Returns:
          The codes in the operand's shape, scales and zeros by rows and groups.
        """
        # Slices are taken while packed as far as possible, then the codes move as the entries do.
        done = self._picked
        codes = self.stored.codes(captured.arrays, iterations[:done])
        scale = _pick_iteration(captured.scale, iterations)
        zero = captured.zero
        if zero is not None:
            zero = _pick_iteration(zero, iterations)
        return Coded(self.route.take(codes, iterations[done:], done), scale, zero)

    def dense(self, captured: Captured, iterations: Sequence[jax.Array]) -> jax.Array:
        """Return the operand of the unpacked model, bit for bit; arguments as for `coded`."""
        coded = self.coded(captured, iterations)
        levels = coded.codes.astype(jnp.int32)
        if coded.zero is not None:
            levels = levels - self._spread(coded.zero)
        values = levels.astype(jnp.float32) * self._spread(coded.scale)
        return self.route.cast(saturate(values, self.stored.dtype))

    def _spread(self, rows: jax.Array) -> jax.Array:
        """Return values of rows and groups in the shape that broadcasts against the operand."""
        groups = rows.shape[-1]
        if groups > 1:
            rows = jnp.repeat(rows, self.axes.products // groups, axis=-1)  # [*kept, products]
        return self.axes.operand(rows)


def _short(table: np.ndarray, iterations: int) -> np.ndarray:
    """Shorten every axis of rows along which the table is constant to length 1."""
    for axis in range(iterations, table.ndim - 1):
        first = np.take(table, [0], axis)
        if (table == first).all():
            table = first
    return table.astype(np.int32)


def _pick_iteration(x: jax.Array, iterations: Sequence[jax.Array]) -> jax.Array:
    """Return the values of the current iterations; axes of length 1 are the same for all."""
    for iteration in iterations:
        shared = x.shape[0] == 1
        x = x[0] if shared else jax.lax.dynamic_index_in_dim(x, iteration, keepdims=False)
    return x
