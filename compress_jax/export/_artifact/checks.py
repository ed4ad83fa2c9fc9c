"""Consistency of the fields of a packed node, one function for each kind of node.

Each takes a node whose arrays are NumPy's, or a `Spec` of shape and dtype where nothing is decoded
yet; values are checked once they are decoded. A new kind of node is one more function and one more
entry of `CHECKS`.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.bits import Bits, Gaps
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Table
from compress_jax.core.packed import Clustered, LowRank, Packed, Quantized, Sparse, Sum, Tabled
from compress_jax.core.sparse import width
from compress_jax.core.types import Array, PyTree
from compress_jax.export._artifact.fields import refuse
from compress_jax.export._artifact.structure import Node
from compress_jax.export._coding.bitstream import pieces

SCALES = ("float32", "float8_e8m0fnu", "float8_e4m3fn")
COUNTED = 2**31  # entries of a mask: their places are int32


class Spec(NamedTuple):
    """An array that is not decoded yet.

    Attributes:
      shape: its shape.
      dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype


def check(node: PyTree, where: str) -> None:
    """Check that a packed node is consistent in itself.

    Args:
      node: its arrays are NumPy's or `Spec`.
      where: the entry of the file, for errors.

    Raises:
      ArtifactError: if it is not; says which field of which entry.

    Example:
      >>> check(Bits(Spec((1,), np.dtype("uint8")), 3, (2,)), "dense/kernel")
      >>> check(Bits(Spec((1,), np.dtype("uint8")), 3, (1000,)), "w")
      Traceback (most recent call last):
      compress_jax.core.errors.ArtifactError: entry 'w': it has shape [1], and the other fields ask for [375]
    """  # noqa: E501
    CHECKS[type(node)](node, where)


def memory(node: PyTree) -> int:
    """Return the bytes that a node takes at most while it is decoded and unpacked.

    Its arrays count twice, and every entry of it and of the nodes inside it four bytes, padded
    groups included: an int32 code, or a float32 value.

    Args:
      node: a packed node, an array or a `Spec`.

    Returns:
      Bytes.

    Example:
      >>> memory(Bits(Spec((4,), np.dtype("uint8")), 8, (4,)))
      24
    """
    # Twice: as it is decoded, and on the device.
    if type(node) not in CHECKS:
        return 0 if node is None else 2 * _nbytes(node)
    entries = math.prod(node.shape)
    layout = getattr(node, "layout", None)
    # Scales are [..., groups, 1, channels], and each group is padded to its full size, which a
    # damaged file may set far above the size of the array.
    if layout is not None and layout.group_size:
        entries = max(entries, math.prod(layout.scale_shape) * layout.group_size)
    size = max(4, getattr(node, "dtype", np.dtype(np.uint8)).itemsize)
    return size * entries + sum(memory(getattr(node, name)) for name in _children(node))


def intact(array: np.ndarray, where: str) -> None:
    """Check that the bytes of an array are valid for its dtype.

    A bool is 0 or 1; an int4 fills only the lower half of its byte.

    Args:
      array: as it was read.
      where: the entry of the file, for errors.

    Raises:
      ArtifactError: if they are not.
    """
    if array.dtype == bool:
        valid = array.view(np.uint8) <= 1
    elif array.dtype.name in NARROW:
        # What a narrow dtype cannot hold comes back as other bytes.
        again = array.astype(np.float32).astype(array.dtype)
        valid = again.view(np.uint8) == array.view(np.uint8)
    else:
        return
    _need(bool(valid.all()), where, f"some bytes stand for no {array.dtype.name}")


NARROW = frozenset(
    "int1 int2 int4 uint1 uint2 uint4 float4_e2m1fn float6_e2m3fn float6_e3m2fn".split()
)


def _need(fine: bool, where: str, problem: str) -> None:
    if not fine:
        raise refuse(where, problem)


def _children(node: Node) -> list[str]:
    return [field.name for field in dataclasses.fields(node) if not field.metadata.get("static")]


def _nbytes(array: Array | Spec) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _array(
    x: PyTree, where: str, dtypes: Collection[str] = (), shape: tuple[int, ...] | None = None
) -> None:
    """Check that a field is an array, of one of some dtypes, of a shape."""
    is_array = isinstance(x, (Spec, np.ndarray))
    _need(is_array, where, f"an array must stand here, not a {type(x).__name__}")
    name = x.dtype.name
    # JAX would cut 64 bits to 32, and the node would unpack to other numbers than it was saved for.
    known = jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype
    advice = "inside a packed node needs jax.config.update('jax_enable_x64', True)"
    _need(known, where, f"{name} {advice}")
    if dtypes:
        problem = f"it has dtype {name}, and it must be {' or '.join(dtypes)}"
        _need(name in dtypes, where, problem)
    if shape is not None:
        problem = f"it has shape {list(x.shape)}, and the other fields ask for {list(shape)}"
        _need(tuple(x.shape) == shape, where, problem)
    if isinstance(x, np.ndarray):
        intact(x, where)


def _kind(x: object, where: str, *kinds: type) -> None:
    names = " or ".join(kind.__name__ for kind in kinds)
    _need(isinstance(x, kinds), where, f"a {names} must stand here, not a {type(x).__name__}")


def _bits(node: Bits, where: str) -> None:
    used = math.prod(node.shape) * node.bits  # bits, of which the last byte may have fewer than 8
    _array(node.data, where, ("uint8",), (-(-used // 8),))
    # The same codes have one form only.
    if isinstance(node.data, np.ndarray) and used % 8:
        _need(not node.data[-1] >> used % 8, where, "bits after the last code are not zero")


def _gaps(node: Gaps, where: str) -> None:
    _kind(node.runs, where, Bits)
    _bits(node.runs, where)
    size = math.prod(node.shape)
    longest = 2**node.runs.bits - 1
    one_row = len(node.runs.shape) == 1 and size < COUNTED
    _need(one_row, where, "gaps must be one row of symbols for fewer than 2**31 entries")
    # Every symbol skips that many entries; all but the longest are followed by a nonzero one.
    total = sum(int(s.sum(dtype=np.int64)) + int((s < longest).sum()) for s in _symbols(node.runs))
    _need(total <= size, where, f"the gaps reach to entry {total:,} of a mask that has {size:,}")


def _sparse(node: Sparse, where: str) -> None:
    _kind(node.mask, f"{where}.mask", Bits, Gaps)
    check(node.mask, f"{where}.mask")
    if isinstance(node.mask, Bits):
        bits = node.mask.bits
        _need(bits == 1, f"{where}.mask", f"a mask has 1 bit an entry, not {bits}")
    _need(math.prod(node.shape) < COUNTED, where, "a mask must have fewer than 2**31 entries")
    # Values are codes, whose fill is a code, or floats, whose fill they must be able to hold.
    if isinstance(node.values, Bits):
        _bits(node.values, f"{where}.values")
        # 2**16 is the fill beside a codebook of 2**16 entries: the code after its last.
        is_code = isinstance(node.fill, int) and 0 <= node.fill <= 2**16
        _need(is_code, where, f"the fill of codes cannot be {node.fill}")
    else:
        _array(node.values, f"{where}.values")
        dtype = node.values.dtype
        problem = f"{dtype.name} does not hold the fill {node.fill}"
        _need(_holds(dtype, node.fill), where, problem)
    shape = node.values.shape  # [kept]
    problem = f"values must be in one row, and have shape {list(shape)}"
    _need(len(shape) == 1, f"{where}.values", problem)
    ones = _ones(node.mask)
    problem = f"the mask keeps {ones} entries, and there are {shape[0]} values"
    _need(ones in (None, shape[0]), where, problem)


def _quantized(node: Quantized, where: str) -> None:
    bits = _codes(node.codes, f"{where}.codes")
    _layout(node.layout, node.shape, where)
    _array(node.scale, f"{where}.scale", ("float32",), node.layout.scale_shape)
    _array(node.zero_point, f"{where}.zero_point", ("uint8",))
    shape = node.zero_point.shape
    scales = node.layout.scale_shape
    problem = f"it has shape {list(shape)}, and scales have {list(scales)}"
    _need(_broadcasts(shape, scales), f"{where}.zero_point", problem)
    # A zero point is a code itself.
    if isinstance(node.zero_point, np.ndarray):
        top = int(node.zero_point.max(initial=0))
        _need(top < 2**bits, f"{where}.zero_point", f"{top} is no code of {bits} bits")
    _dtype(node.dtype, where)


def _tabled(node: Tabled, where: str) -> None:
    bits = _codes(node.codes, f"{where}.codes")
    _layout(node.layout, node.shape, where)
    _array(node.scale, f"{where}.scale", SCALES, node.layout.scale_shape)
    if node.tensor_scale is not None:
        layers = tuple(node.shape[a] for a in node.layout.stack)
        _array(node.tensor_scale, f"{where}.tensor_scale", ("float32",), layers)
    problem = f"codes have {bits} bits, and the levels need {node.levels.bits}"
    _need(bits == node.levels.bits, where, problem)
    # A table may have fewer entries than its bits have codes; a float format has a value for each.
    if isinstance(node.levels, Table):
        _below(node.codes, len(node.levels.values), f"{where}.codes")
    _dtype(node.dtype, where)


def _clustered(node: Clustered, where: str) -> None:
    _codes(node.codes, f"{where}.codes", fill=True)
    _array(node.codebook, f"{where}.codebook", ("float32",))
    layers = _layers(node.stack, node.shape, where)
    rows = node.codebook.shape  # [*layers, clusters]
    problem = f"codebooks are one row a layer of {list(layers)}, not {list(rows)}"
    _need(rows[:-1] == layers and bool(rows), f"{where}.codebook", problem)
    _below(node.codes, rows[-1] + 1, f"{where}.codes")  # one more code stands for zero
    _dtype(node.dtype, where)


def _low_rank(node: LowRank, where: str) -> None:
    layers = _layers(node.stack, node.shape, where)
    left = _factor(node.left, layers, f"{where}.left")  # [rows, rank]
    right = _factor(node.right, layers, f"{where}.right")  # [rank, columns]
    # The columns are some axes of the shape, the rows all others but those of the layers.
    factors = f"factors of {list(left)} and {list(right)}"
    shape = list(node.shape)
    _need(left[1] == right[0], where, f"{factors} have no product")
    ndim = len(shape)
    exist = all(-ndim <= a < ndim for a in node.columns)
    _need(exist, where, f"the columns {list(node.columns)} are no axes of the shape {shape}")
    columns = {a % ndim for a in node.columns}
    distinct = len(columns) == len(node.columns) and not columns & set(node.stack)
    _need(distinct, where, "an axis has two purposes")
    fits = math.prod(shape[a] for a in columns) == right[1]
    fits = fits and math.prod(shape) == left[0] * right[1] * math.prod(layers)
    _need(fits, where, f"{factors} do not make the shape {shape}")
    _dtype(node.dtype, where)


def _sum(node: Sum, where: str) -> None:
    for name in ("base", "delta"):
        _floats(getattr(node, name), f"{where}.{name}")
    base, delta = tuple(node.base.shape), tuple(node.delta.shape)
    _need(base == delta, where, f"terms of {list(base)} and {list(delta)} have no sum")
    _dtype(node.dtype, where)


def _floats(x: PyTree, where: str) -> None:
    """Check an array of floats, or a packed node that stands for one."""
    if isinstance(x, Packed):
        check(x, where)
    else:
        _array(x, where)
    fine = jnp.issubdtype(x.dtype, jnp.floating)
    _need(fine, where, f"a term or factor is floating point, not {x.dtype.name}")


def _layers(stack: tuple[int, ...], shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Return the sizes of the axes that hold layers."""
    ascending = all(0 <= a < len(shape) for a in stack) and list(stack) == sorted(set(stack))
    problem = f"the stack {list(stack)} is no list of ascending axes of the shape {list(shape)}"
    _need(ascending, where, problem)
    return tuple(shape[a] for a in stack)


def _factor(x: PyTree, layers: tuple[int, ...], where: str) -> tuple[int, int]:
    _floats(x, where)
    shape = x.shape
    fits = len(shape) == len(layers) + 2 and shape[: len(layers)] == layers
    axes = f"two axes behind its layers {list(layers)}"
    _need(fits, where, f"a factor has {axes}, and this has shape {list(shape)}")
    rows, columns = shape[-2:]  # of [*layers, rows, columns]
    return rows, columns


def _codes(node: Bits | Sparse, where: str, fill: bool = False) -> int:
    """Check the codes of another node, all of them or those a mask keeps; return their bits."""
    _kind(node, where, Bits, Sparse)
    if isinstance(node, Sparse):
        _kind(node.values, f"{where}.values", Bits)
        problem = f"codes that are left out stand for zero, and the fill is {node.fill}"
        _need(fill or node.fill == 0, where, problem)
    check(node, where)
    return width(node)


def _layout(layout: Layout, shape: tuple[int, ...], where: str) -> None:
    problem = f"the layout is of shape {list(layout.shape)}, and the codes of {list(shape)}"
    _need(layout.shape == shape, where, problem)


def _dtype(dtype: np.dtype, where: str) -> None:
    known = jax.dtypes.canonicalize_dtype(dtype) == dtype
    _need(known, where, f"to unpack {dtype.name} needs jax.config.update('jax_enable_x64', True)")


def _below(codes: Bits | Sparse, end: int, where: str) -> None:
    """Check that all codes, and the fill for masked ones, are below an end."""
    valid = f"there are codes for 0 to {end - 1} only"
    if isinstance(codes, Sparse):
        _need(codes.fill < end, where, f"the fill is {codes.fill}, and {valid}")
    bits = codes.values if isinstance(codes, Sparse) else codes
    assert isinstance(bits, Bits)
    if 2**bits.bits > end:  # else no code of so few bits can be too large
        top = max((int(symbols.max(initial=0)) for symbols in _symbols(bits)), default=0)
        _need(top < end, where, f"one of the codes is {top}, and {valid}")


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if not shape:  # a scalar
        return True
    if len(shape) != len(wanted):
        return False
    return all(n in (1, m) for n, m in zip(shape, wanted, strict=True))


def _holds(dtype: np.dtype, fill: float) -> bool:
    # jnp's classes: NumPy's own do not count bfloat16 and fp8 among the floats.
    if jnp.issubdtype(dtype, jnp.integer):
        return isinstance(fill, int) and jnp.iinfo(dtype).min <= fill <= jnp.iinfo(dtype).max
    return not jnp.issubdtype(dtype, jnp.floating) or abs(fill) <= float(jnp.finfo(dtype).max)


def _symbols(bits: Bits) -> Iterator[np.ndarray]:
    """Yield the symbols of bits, some at a time; nothing where they are not decoded yet."""
    if isinstance(bits.data, np.ndarray):
        for _, symbols in pieces(bits.data, bits.bits, math.prod(bits.shape)):
            yield symbols


def _ones(mask: Bits | Gaps) -> int | None:
    """Return how many entries a mask keeps; None where it is not decoded yet."""
    bits = mask if isinstance(mask, Bits) else mask.runs
    if not isinstance(bits.data, np.ndarray):
        return None
    if isinstance(mask, Bits):
        return sum(int(symbols.sum()) for symbols in _symbols(bits))
    # Each symbol but the longest run ends in a one, see `Gaps`.
    return sum(int((symbols < 2**bits.bits - 1).sum()) for symbols in _symbols(bits))


CHECKS: dict[type, Callable[[Any, str], None]] = {
    Bits: _bits,
    Gaps: _gaps,
    Sparse: _sparse,
    Quantized: _quantized,
    Tabled: _tabled,
    Clustered: _clustered,
    LowRank: _low_rank,
    Sum: _sum,
}
