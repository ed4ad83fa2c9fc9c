"""Plan how each contraction is computed: in integers, or in floats and why.

From the bottom up: codes of fewer than 8 bits packed in bytes (`pack`, `unpack`), a quantized
parameter as integer inference stores it (`Stored`), that parameter as an operand of a contraction
(`PackedOperand`), and the plan of every site (`plan_sites`).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.layout import Layout
from compress_jax.core.packed import Quantized, is_packed
from compress_jax.core.sparse import Sparse
from compress_jax.core.sparse import width as bit_width
from compress_jax.core.types import DType, Leaves
from compress_jax.quantize._activations.quantizer import ActivationQuantizer
from compress_jax.quantize._activations.site_patterns import (
    QuantizerRules,
    SitePatterns,
    match_site,
    match_sites,
)
from compress_jax.quantize._integer.integer_dot import Coded, OperandAxes, fits, operand_axes
from compress_jax.quantize._integer.provenance import Lost, Route, Value, routes
from compress_jax.trace._jaxpr.find_sites import Traced
from compress_jax.trace._jaxpr.site import Site

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
    rest = jnp.moveaxis(codes, axis, -1).astype(jnp.uint8)
    for width in reversed(widths(bits)):  # the lowest bits first
        share = rest & np.uint8(2**width - 1)
        rest = rest >> np.uint8(width)
        fields[f"bits{width}"] = jnp.moveaxis(_joined(share, width), -1, axis)
    return {f"bits{width}": fields[f"bits{width}"] for width in widths(bits)}


def _joined(share: jax.Array, width: int) -> jax.Array:
    """Join neighbours along the last axis in one byte."""
    count = 8 // width
    padded = jnp.pad(share, [(0, 0)] * (share.ndim - 1) + [(0, -share.shape[-1] % count)])
    groups = padded.reshape(*share.shape[:-1], -1, count)
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
        places = np.arange(0, 8, width, dtype=np.uint8).reshape(-1, *(1,) * (field.ndim - at - 1))
        apart = (
            jnp.expand_dims(field, at + 1) >> jnp.expand_dims(places, tuple(range(at + 1)))
        ) & np.uint8(2**width - 1)
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
        codes = node.codes.unpack().astype(jnp.int32)
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
        levels = self.layout.arrange(self.codes(arrays).astype(jnp.int32))
        zero = self.zero(arrays)
        if zero is not None:
            levels = levels - zero
        return self.layout.restore(levels.astype(jnp.float32) * arrays["scale"]).astype(self.dtype)


def _pick(x: jax.Array, picked: Sequence[jax.Array]) -> jax.Array:
    """Return the slice at one index of each of the first axes."""
    for index in picked:
        x = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return x


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
            shared = zero.size == 1
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
        return self.route.cast(values.astype(self.stored.dtype))

    def _spread(self, rows: jax.Array) -> jax.Array:
        """Return values of rows and groups in the shape that broadcasts against the operand."""
        groups = rows.shape[-1]
        if groups > 1:
            rows = jnp.repeat(rows, self.axes.products // groups, axis=-1)
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


NOT_QUANTIZED = "its activations are not quantized"


@dataclass(frozen=True)
class SitePlan:
    """How one site is computed.

    Attributes:
      site: the site.
      quantizer: its activations' quantizer, or None.
      operand: its packed parameter, or None.
      weight: the parameter's format in words.
      activation: the activations' format.
      packed: whether the parameter is packed.
      reason: why it is not computed in integers; empty if it is.
    """

    site: Site
    quantizer: ActivationQuantizer | None
    operand: PackedOperand | None
    weight: str
    activation: str
    packed: bool
    reason: str

    @property
    def compute(self) -> str:
        """What is multiplied and added, in words."""
        if not self.reason:
            names = [each.split()[0] for each in (self.activation, self.weight or self.activation)]
            return (
                " x ".join(reversed(names) if self.site.operand == "lhs" else names) + " -> int32"
            )
        parts = ["weights unpacked"] * self.packed + ["activations rounded"] * (
            self.quantizer is not None
        )
        return ", ".join([self.site.out_dtype, *parts])


def plan_sites(
    traced: Traced, leaves: Leaves, how: QuantizerRules | None, where: SitePatterns
) -> tuple[dict[str, Stored], dict[str, SitePlan]]:
    """Plan how every site is computed.

    Args:
      traced: the function's trace.
      leaves: arrays and packed nodes by path.
      how: the quantizers of activations, or None.
      where: which sites' activations are quantized.

    Returns:
      How each quantized parameter is stored, by path, and the plan of each site by name, in program
      order.

    Raises:
      NoMatchError: if a glob matches no site.
    """
    found = routes(traced)
    stacked: dict[str, int] = {}  # how many first axes of each parameter loops slice
    for value in itertools.chain.from_iterable(found.values()):
        if isinstance(value, Route):
            stacked[value.path] = max(value.stacked, stacked.get(value.path, 0))
    stored = {
        path: Stored.of(leaf, stacked.get(path, 0))
        for path, leaf in leaves.items()
        if isinstance(leaf, Quantized)
    }
    if how is not None:
        match_sites(traced.sites.values(), how, where)  # a glob that matches nothing is an error
    plans = {
        site.name: _plan_site(site, found[position], leaves, stored, how, where)
        for position, site in traced.sites.items()
    }
    return stored, plans


def _plan_site(
    site: Site,
    operands: Sequence[Value],
    leaves: Leaves,
    stored: Mapping[str, Stored],
    how: QuantizerRules | None,
    where: SitePatterns,
) -> SitePlan:
    answer = NOT_QUANTIZED if how is None else match_site(site, how, where)
    operand, weight, reason = _weight(site, operands, leaves, stored)
    if isinstance(answer, str):
        quantizer = None
        reason = reason or answer
    else:
        quantizer = answer
        reason = reason or _not_exact(site, quantizer, operand)
    packed = is_packed(leaves.get(site.param or ""))
    activation = _activation(site, quantizer)
    return SitePlan(site, quantizer, operand, weight, activation, packed, reason)


def _weight(
    site: Site, operands: Sequence[Value], leaves: Leaves, stored: Mapping[str, Stored]
) -> tuple[PackedOperand | None, str, str]:
    """Return a site's packed parameter, its format, and why its codes cannot be used."""
    if site.param is None:
        return None, "", "" if site.kind == "dot" else "both operands are activations"
    leaf = leaves[site.param]
    value = operands[site.operand == "rhs"]
    if not is_packed(leaf):
        return None, str(leaf.dtype), "its parameter is not quantized"
    if site.param not in stored:
        name = type(leaf).__name__
        return None, name, f"its parameter is packed as {name}, not as integers with a scale"
    parameter = stored[site.param]
    if isinstance(value, Lost):
        return None, parameter.format, value.reason
    if not isinstance(value, Route):
        return None, parameter.format, "no parameter feeds it"
    axes = operand_axes(site, int(site.operand == "rhs"))
    operand = PackedOperand.of(parameter, value, axes)
    if operand.groups == axes.products > 1:
        reason = "the parameter's scale varies along the axes that are summed over"
        return None, parameter.format, reason
    return operand, parameter.format, ""


def _not_exact(site: Site, quantizer: ActivationQuantizer, operand: PackedOperand | None) -> str:
    """Say why a site's products cannot be summed exactly in int32; "" if they can."""
    if site.kind == "ragged_dot":
        return "a ragged product: the sizes of its groups are data"
    if site.kind == "conv" and site.params["batch_group_count"] > 1:
        return "a convolution with groups of examples"
    if site.kind == "conv" and operand is not None and operand.groups > 1:
        return "scales of groups along what a convolution sums over"
    sharing = [_sharing(site, index, quantizer) for index in site.inputs.values()]
    if "channel" in sharing:
        return "the activations' scale varies along the axes that are summed over"
    largest = 2 ** (quantizer.grid.bits - 1) if quantizer.grid.symmetric else quantizer.grid.top
    other = largest
    products = operand_axes(site, 1).products
    if operand is not None:
        # code - zero_point reaches from -2^bits to 2^bits where the zero point may be anything.
        other = operand.stored.middle * (1 if operand.stored.symmetric else 2)
        products = products // operand.groups
    if fits(products, (largest, other)):
        return ""
    return f"sums of {products} products may not fit in int32"


def _sharing(site: Site, index: int, quantizer: ActivationQuantizer) -> str:
    """Return which entries of an activation share a scale: tensor, token or channel."""

    def place(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        key = next(key for key, each in site.inputs.items() if each == index)
        reducer = quantizer.reducer
        own = {}
        if reducer is not None:
            own = quantizer.ranges(site, reducer.finish(reducer(site, lhs, rhs))[key])
        return quantizer.scale_fn(site, index, (lhs, rhs)[index], own)[0]

    lhs = jax.ShapeDtypeStruct(site.lhs_shape, site.lhs_dtype)
    rhs = jax.ShapeDtypeStruct(site.rhs_shape, site.rhs_dtype)
    shape = jax.eval_shape(place, lhs, rhs).shape
    if math.prod(shape) == 1:
        return "tensor"
    summed = operand_axes(site, index).summed
    return "channel" if any(shape[axis] > 1 for axis in summed) else "token"


def _activation(site: Site, quantizer: ActivationQuantizer | None) -> str:
    """Return the format of a site's activations in words."""
    if quantizer is None:
        return (site.lhs_dtype, site.rhs_dtype)[next(iter(site.inputs.values()))]
    kind = quantizer.call.partition("(")[0]
    sharing = _sharing(site, next(iter(site.inputs.values())), quantizer)
    asymmetric = "" if quantizer.grid.symmetric else " asymmetric"
    return f"int{quantizer.grid.bits} {sharing} {kind}{asymmetric}"
