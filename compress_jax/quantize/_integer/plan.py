"""How each contraction is computed: in integers, or in floats and why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from compress_jax.quantize._integer.integer_dot import Coded, Side, fits, side
from compress_jax.quantize._integer.provenance import Lost, Route, Value, routes
from compress_jax.trace._jaxpr.find_sites import Traced
from compress_jax.trace._jaxpr.site import Site

# Small unsigned integers in bytes, packed along one axis so that the array keeps its rank, its
# sharding and its meaning.


Fields = dict[str, jax.Array]


def widths(bits: int) -> tuple[int, ...]:
    """Return the widths of the fields that codes are cut into, lowest bits last.

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
    fields, left = {}, jnp.moveaxis(codes, axis, -1).astype(jnp.uint8)
    for width in reversed(widths(bits)):
        share, left = left & np.uint8(2**width - 1), left >> np.uint8(width)
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
    """Return the axis along which packing wastes least, the longest of several such, not before ``first``.

    Args:
      shape: of the codes.
      bits: of one.
      first: axes before it are sliced by loops and stay whole.

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


# A quantized parameter as integer inference keeps it: signed codes under the parameter's own name
# and in its own shape.


Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Stored:
    """What is known of a quantized parameter beside its arrays.

    The arrays are ``{"codes": int8}`` for 8 bits, else the `fields` of the codes, two of 4 bits a
    byte; ``"scale"``, float32, and ``"zero_point"``, uint8 and only if it is not the middle of the
    codes, both as the packed node holds them.

    Attributes:
      shape: of the parameter.
      dtype: of the parameter.
      bits: of a code, 1 to 8.
      axis: along which codes share bytes.
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
        """Return the form of a packed node.

        Args:
          node: of concrete arrays.
          first: how many leading axes loops will slice.

        Returns:
          The form.
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
        if isinstance(node.codes, Sparse):  # what was left out stands for zero
            kept = self.layout.arrange(node.codes.mask.unpack()) != 0
            codes = self.layout.restore(
                jnp.where(kept, self.layout.arrange(codes), node.zero_point.astype(jnp.int32))
            )
        if self.bits == 8:
            stored = {"codes": (codes - self.middle).astype(jnp.int8)}
        else:
            stored = pack(codes.reshape(self.shape or (1,)), self.bits, self.axis)
        rest = (
            {"scale": node.scale}
            if self.symmetric
            else {"scale": node.scale, "zero_point": node.zero_point}
        )
        return {**stored, **rest}

    def codes(self, arrays: Arrays, picked: tuple[Any, ...] = ()) -> jax.Array:
        """Return the signed codes ``code - middle``, int8, of all or of one index of each of the first axes.

        Args:
          arrays: of the parameter.
          picked: the indices.

        Returns:
          Array of ``shape[len(picked):]``.
        """
        names = ("codes",) if self.bits == 8 else tuple(f"bits{each}" for each in widths(self.bits))
        parts = {name: _pick(arrays[name], picked) for name in names}
        if self.bits == 8:
            return parts["codes"]
        shape = self.shape or (1,)
        codes = unpack(parts, self.bits, self.axis - len(shape), shape[self.axis])
        return (codes.astype(jnp.int8) - np.int8(self.middle)).reshape(self.shape[len(picked) :])

    def zero(self, arrays: Arrays) -> jax.Array | None:
        """Return the signed codes that stand for zero, int32 in the shape of the scale; None if they are 0."""
        return None if self.symmetric else arrays["zero_point"].astype(jnp.int32) - self.middle

    def dense(self, arrays: Arrays) -> jax.Array:
        """Return the parameter itself, bit for bit what the packed node unpacks to."""
        levels, zero = self.layout.arrange(self.codes(arrays).astype(jnp.int32)), self.zero(arrays)
        levels = levels if zero is None else levels - zero
        return self.layout.restore(levels.astype(jnp.float32) * arrays["scale"]).astype(self.dtype)


def _pick(x: jax.Array, picked: tuple[Any, ...]) -> jax.Array:
    for index in picked:
        x = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return x


# How a quantized parameter feeds an operand of a contraction: its codes by the route it takes, its
# scale by rows.


@dataclass(frozen=True)
class Feed:
    """A parameter at an operand.

    Attributes:
      stored: how it is kept.
      route: how it arrives.
      side: the operand.
      scales: int32 ``[*turns, *kept axes, groups]``: which of the stored scales belongs to each row
        and group; axes along which they are all the same are 1 long.
    """

    stored: Stored
    route: Route
    side: Side
    scales: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, stored: Stored, route: Route, side: Side) -> "Feed":
        """Follow the scales along a route.

        Args:
          stored: how the parameter is kept.
          route: how it arrives.
          side: the operand.

        Returns:
          The feed; its groups are the longest runs, all equally long, of summed entries that share
          a scale.
        """
        shape = stored.layout.scale_shape
        places = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
        every = np.asarray(route.every(stored.layout.spread(places)))
        turns = len(route.loops)
        order = (*range(turns), *(turns + axis for axis in (*side.kept, *side.summed)))
        kept = [side.shape[axis] for axis in side.kept]
        table = every.transpose(order).reshape(*every.shape[:turns], *kept, -1)
        changes = (
            np.flatnonzero((table[..., 1:] != table[..., :-1]).any(tuple(range(table.ndim - 1))))
            + 1
        )
        size = math.gcd(table.shape[-1], *changes.tolist())
        return cls(stored, route, side, _short(table[..., ::size], turns))

    @property
    def groups(self) -> int:
        """How many groups with scales of their own are summed over."""
        return self.scales.shape[-1]

    @property
    def _picked(self) -> int:
        """How many of the first axes are sliced before the codes are unpacked."""
        return (
            self.route.stacked
            if self.stored.bits == 8
            else min(self.route.stacked, self.stored.axis)
        )

    def captured(self, arrays: Arrays) -> dict[str, Any]:
        """Return what all turns share: the arrays, and the scales by turns and rows."""
        zero = self.stored.zero(arrays)
        zeros = None if zero is None or zero.size == 1 else zero.ravel()[self.scales]
        zeros = (
            zero.reshape((1,) * self.scales.ndim) if zero is not None and zero.size == 1 else zeros
        )
        return {"arrays": arrays, "scale": arrays["scale"].ravel()[self.scales], "zero": zeros}

    def coded(self, captured: dict[str, Any], turns: list[Any]) -> Coded:
        """Return the operand in integers.

        Args:
          captured: what `captured` returned.
          turns: for each loop of the route, the turn.

        Returns:
          The codes in the operand's shape, scales and zeros by rows and groups.
        """
        done = self._picked
        codes = self.stored.codes(captured["arrays"], tuple(turns[:done]))
        scale, zero = (_turn(captured[name], turns) for name in ("scale", "zero"))
        assert scale is not None
        return Coded(self.route.take(codes, turns[done:], done), scale, zero)

    def dense(self, captured: dict[str, Any], turns: list[Any]) -> jax.Array:
        """Return the operand as it is in the unpacked model, bit for bit; arguments as for `coded`."""
        coded = self.coded(captured, turns)
        levels = coded.codes.astype(jnp.int32)
        levels = levels if coded.zero is None else levels - self._spread(coded.zero)
        return self.route.cast(
            (levels.astype(jnp.float32) * self._spread(coded.scale)).astype(self.stored.dtype)
        )

    def _spread(self, rows: jax.Array) -> jax.Array:
        """Return what belongs to rows and groups in the shape that broadcasts against the operand."""
        groups = rows.shape[-1]
        return self.side.operand(
            jnp.repeat(rows, self.side.products // groups, axis=-1) if groups > 1 else rows
        )


def _short(table: np.ndarray, turns: int) -> np.ndarray:
    """Leave one index of every axis of rows along which all is the same."""
    for axis in range(turns, table.ndim - 1):
        first = np.take(table, [0], axis)
        table = first if (table == first).all() else table
    return table.astype(np.int32)


def _turn(x: jax.Array | None, turns: list[Any]) -> jax.Array | None:
    for turn in turns if x is not None else ():
        assert x is not None
        x = x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, turn, keepdims=False)
    return x


FLOAT = "its activations are not quantized"


@dataclass(frozen=True)
class Step:
    """What is done at one site.

    Attributes:
      site: the site.
      quantizer: of its activations, or None.
      feed: how its quantized parameter arrives, or None.
      weight: the parameter's format in words.
      activation: the activations'.
      packed: whether the parameter is.
      reason: why it is not computed in integers; empty if it is.
    """

    site: Site
    quantizer: ActivationQuantizer | None
    feed: Feed | None
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


def decide(
    traced: Traced, leaves: Leaves, how: QuantizerRules | None, where: SitePatterns
) -> tuple[dict[str, Stored], dict[str, Step]]:
    """Return what is done at every site.

    Args:
      traced: the function's trace.
      leaves: arrays and packed nodes by path.
      how: the quantizers of activations, or None.
      where: which sites' activations are quantized.

    Returns:
      How each quantized parameter is kept, by path, and the steps by the names of sites, in program
      order.

    Raises:
      NoMatchError: if a glob matches no site.
    """
    found = routes(traced)
    every = [value for operands in found.values() for value in operands if isinstance(value, Route)]
    stored = {
        path: Stored.of(
            leaf, max((route.stacked for route in every if route.path == path), default=0)
        )
        for path, leaf in leaves.items()
        if isinstance(leaf, Quantized)
    }
    if how is not None:
        match_sites(traced.sites.values(), how, where)  # a glob that matches nothing is an error
    steps = {
        site.name: _step(site, found[position], leaves, stored, how, where)
        for position, site in traced.sites.items()
    }
    return stored, steps


def _step(
    site: Site,
    operands: Sequence[Value],
    leaves: Leaves,
    stored: Mapping[str, Stored],
    how: QuantizerRules | None,
    where: SitePatterns,
) -> Step:
    answer = FLOAT if how is None else match_site(site, how, where)
    quantizer = None if isinstance(answer, str) else answer
    feed, weight, reason = _weight(site, operands, leaves, stored)
    reasons = [
        reason,
        quantizer and _not_exact(site, quantizer, feed),
        None if quantizer else answer,
    ]
    reason = next((each for each in reasons if each), "")
    return Step(
        site,
        quantizer,
        feed,
        weight,
        _activation(site, quantizer),
        is_packed(leaves.get(site.param or "")),
        str(reason),
    )


def _weight(
    site: Site, operands: Sequence[Value], leaves: Leaves, stored: Mapping[str, Stored]
) -> tuple[Feed | None, str, str]:
    """Return how the parameter of a site arrives, its format, and why its codes cannot be computed with."""
    if site.param is None:
        return None, "", "" if site.kind == "dot" else "both operands are activations"
    leaf, value = leaves[site.param], operands[site.operand == "rhs"]
    if not is_packed(leaf):
        return None, str(leaf.dtype), "its parameter is not quantized"
    if site.param not in stored:
        return (
            None,
            type(leaf).__name__,
            f"its parameter is packed as {type(leaf).__name__}, not as integers with a scale",
        )
    form = stored[site.param]
    if not isinstance(value, Route):
        return (
            None,
            form.format,
            value.reason if isinstance(value, Lost) else "no parameter feeds it",
        )
    feed = Feed.of(form, value, side(site, int(site.operand == "rhs")))
    if feed.groups == feed.side.products > 1:
        return None, form.format, "the parameter's scale varies along the axes that are summed over"
    return feed, form.format, ""


def _not_exact(site: Site, quantizer: ActivationQuantizer, feed: Feed | None) -> str:
    """Say why a site's products cannot be summed exactly in int32 before they are scaled."""
    if site.kind == "ragged_dot":
        return "a ragged product: the sizes of its groups are data"
    if site.kind == "conv" and site.params["batch_group_count"] > 1:
        return "a convolution with groups of examples"
    if site.kind == "conv" and feed is not None and feed.groups > 1:
        return "scales of groups along what a convolution sums over"
    sharing = [_sharing(site, index, quantizer) for index in site.inputs.values()]
    if "channel" in sharing:
        return "the activations' scale varies along the axes that are summed over"
    largest = 2 ** (quantizer.grid.bits - 1) if quantizer.grid.symmetric else quantizer.grid.top
    other = largest if feed is None else feed.stored.middle * (1 if feed.stored.symmetric else 2)
    products = side(site, 1).products // (1 if feed is None else feed.groups)
    return (
        ""
        if fits(products, (largest, other))
        else f"sums of {products} products may not fit in int32"
    )


def _sharing(site: Site, index: int, quantizer: ActivationQuantizer) -> str:
    """Return which entries of an activation share a scale: ``"tensor"``, ``"token"`` or ``"channel"``."""

    def place(lhs: jax.Array, rhs: jax.Array) -> Any:
        key = next(key for key, each in site.inputs.items() if each == index)
        reducer = quantizer.reducer
        own = (
            {}
            if reducer is None
            else quantizer.ranges(site, reducer.finish(reducer(site, lhs, rhs))[key])
        )
        return quantizer.scale_fn(site, index, (lhs, rhs)[index], own)[0]

    lhs = jax.ShapeDtypeStruct(site.lhs_shape, site.lhs_dtype)
    shape = jax.eval_shape(place, lhs, jax.ShapeDtypeStruct(site.rhs_shape, site.rhs_dtype)).shape
    if math.prod(shape) == 1:
        return "tensor"
    return "channel" if any(shape[axis] > 1 for axis in side(site, index).summed) else "token"


def _activation(site: Site, quantizer: ActivationQuantizer | None) -> str:
    if quantizer is None:
        return (site.lhs_dtype, site.rhs_dtype)[next(iter(site.inputs.values()))]
    kind = quantizer.call.partition("(")[0]
    sharing = _sharing(site, next(iter(site.inputs.values())), quantizer)
    return f"int{quantizer.grid.bits} {sharing} {kind}" + (
        "" if quantizer.grid.symmetric else " asymmetric"
    )
