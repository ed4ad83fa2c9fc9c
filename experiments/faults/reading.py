"""A second reader of packed nodes, in NumPy and without tolerance.

Whatever is not exactly right is an error.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.bits import Bits, Gaps
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Table
from compress_jax.core.packed import (
    Clustered,
    LowRank,
    Quantized,
    Sparse,
    Sum,
    Tabled,
    is_packed,
    to_dense,
)

KINDS = (Bits, Gaps, Sparse, Quantized, Tabled, Clustered, LowRank, Sum)


def assert_consistent(tree: Any) -> None:
    """Unpack every node of a tree in both ways, and raise AssertionError where they differ."""
    for node in jax.tree.leaves([tree], is_leaf=lambda x: isinstance(x, KINDS)):
        if isinstance(node, KINDS):
            ours, theirs = node.unpack(), reading(node)
            assert ours.shape == node.shape == theirs.shape, (ours.shape, node.shape, theirs.shape)
            # Products are clipped to what their dtype holds, see `saturate`; NaN stays.
            if is_packed(node) and not isinstance(node, Sparse):
                own = jnp.finfo(node.dtype).max  # pyright: ignore[reportAttributeAccessIssue]
                bound = min(float(own), float(jnp.finfo(np.float32).max))
                theirs = np.clip(theirs, -bound, bound)
            if is_packed(node):
                assert ours.dtype == node.dtype, (ours.dtype, node.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            wanted = np.asarray(jnp.asarray(theirs).astype(ours.dtype))
            with np.errstate(invalid="ignore"):  # a cast of a signaling NaN
                found, wanted = np.asarray(ours, np.float64), wanted.astype(np.float64)
            if isinstance(node, LowRank):
                _assert_near(found, wanted, node)
                continue
            # XLA takes numbers below the smallest normal one for zero.
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-33)


def _assert_near(found: np.ndarray, wanted: np.ndarray, node: LowRank) -> None:
    """Compare products, whose sums may be taken in another order."""
    # What counts is the size of the terms; where these overflow in one order, they need not in
    # another.
    with np.errstate(all="ignore"):
        left, right = (np.abs(reading(x).astype(np.float64)) for x in (node.left, node.right))
        terms = (left @ right).reshape(node.shape)
        fine = terms < 1e38
        assert (np.abs(found - wanted)[fine] <= 0.02 * terms[fine] + 1e-4).all()


def reading(node: Any) -> np.ndarray:
    """Return the dense array of a node, float32 or integers."""
    return (
        READINGS[type(node)](node)
        if type(node) in READINGS
        else np.asarray(node).astype(np.float32)
    )


def _bits(node: Bits) -> np.ndarray:
    count, data = int(np.prod(node.shape, dtype=object)), np.asarray(node.data)
    assert (
        data.dtype == np.uint8
        and data.shape == (-(-count * node.bits // 8),)
        and 1 <= node.bits <= 16
    )
    flags = np.unpackbits(data, bitorder="little")
    assert not flags[count * node.bits :].any()
    rows = flags[: count * node.bits].reshape(count, node.bits)
    return (rows.astype(np.int64) @ (1 << np.arange(node.bits))).reshape(node.shape)


def _gaps(node: Gaps) -> np.ndarray:
    mask, at, longest = np.zeros(int(np.prod(node.shape)), np.int64), 0, 2**node.runs.bits - 1
    for symbol in _bits(node.runs).tolist():
        at += symbol
        if symbol < longest:
            mask[at] = 1  # an IndexError if the gaps reach too far
            at += 1
    assert at <= mask.size
    return mask.reshape(node.shape)


def _sparse(node: Sparse) -> np.ndarray:
    mask, values = reading(node.mask), reading(node.values)
    assert values.ndim == 1 and set(np.unique(mask)) <= {0, 1} and mask.sum() == values.size
    dense = np.full(mask.shape, node.fill, values.dtype)
    assert dense.size == 0 or np.isfinite(node.fill)
    dense[mask == 1] = values
    return dense


def _kept(node: Any) -> np.ndarray:
    """Return where codes are there; elsewhere is an exact zero."""
    return reading(node.mask) == 1 if isinstance(node, Sparse) else np.ones(node.shape, bool)


def _quantized(node: Quantized) -> np.ndarray:
    codes, zero = reading(node.codes), np.asarray(node.zero_point)
    bits = node.codes.values.bits if isinstance(node.codes, Sparse) else node.codes.bits  # pyright: ignore
    assert (
        zero.dtype == np.uint8
        and zero.ndim in (0, len(node.layout.scale_shape))
        and zero.max(initial=0) < 2**bits
    )
    scale, zero = (
        _spread(node.layout, node.scale),
        _spread(node.layout, np.broadcast_to(zero, node.layout.scale_shape)),
    )
    levels = (codes - zero.astype(np.int64)) * _kept(node.codes)
    with np.errstate(all="ignore"):
        return levels.astype(np.float32) * scale.astype(np.float32)


def _tabled(node: Tabled) -> np.ndarray:
    codes = reading(node.codes)
    values = np.array(node.levels.values, np.float32)
    if isinstance(node.levels, Table):
        assert codes.max(initial=0) < values.size
    levels = np.where(_kept(node.codes), values[codes], np.float32(0))
    scale = np.asarray(node.scale).astype(np.float32)
    with np.errstate(all="ignore"):
        scale = scale if node.tensor_scale is None else scale * np.asarray(node.tensor_scale)
        return levels * _spread(node.layout, scale)


def _clustered(node: Clustered) -> np.ndarray:
    book = np.asarray(node.codebook)
    assert book.ndim == 1 and book.dtype == np.float32
    return np.append(book, np.float32(0))[reading(node.codes)]  # an IndexError if a code is beyond


def _low_rank(node: LowRank) -> np.ndarray:
    left, right = reading(node.left), reading(node.right)
    assert left.ndim == right.ndim == 2 and right.shape[1] == node.shape[-1]
    with np.errstate(all="ignore"):
        return (left @ right).astype(np.float32).reshape(node.shape)


def _sum(node: Sum) -> np.ndarray:
    terms = node.base, node.delta
    assert_consistent(terms)
    with np.errstate(all="ignore"):
        # Each as it is unpacked: its own dtype rounds it before it is added.
        base, delta = (np.asarray(to_dense(x)).astype(np.float32) for x in terms)
        return base + delta


def _spread(layout: Layout, scale: Any) -> np.ndarray:
    """Return a scale for every entry, by index arithmetic."""
    scale = np.asarray(scale)
    assert scale.shape == layout.scale_shape
    if not layout.group_size:
        return np.broadcast_to(scale, layout.shape)
    others = [axis for axis in range(len(layout.shape)) if axis not in layout.channels]
    places = np.indices(layout.shape, sparse=False).reshape(len(layout.shape), -1)

    def place(axes: Any) -> np.ndarray:
        shape = [layout.shape[axis] for axis in axes]
        return np.asarray(
            np.ravel_multi_index(places[list(axes)], shape)
            if axes
            else np.zeros(places.shape[1], np.int64)
        )

    return scale[place(others) // layout.group_size, 0, place(layout.channels)].reshape(
        layout.shape
    )


READINGS = {
    Bits: _bits,
    Gaps: _gaps,
    Sparse: _sparse,
    Quantized: _quantized,
    Tabled: _tabled,
    Clustered: _clustered,
    LowRank: _low_rank,
    Sum: _sum,
}


def same(a: Any, b: Any) -> bool:
    """Return whether two trees are the same: structure, static fields, dtypes, shapes, bits."""
    if repr(jax.tree.structure([a])) != repr(jax.tree.structure([b])):
        return False
    pairs = zip(jax.tree.leaves([a]), jax.tree.leaves([b]), strict=True)
    return all(
        (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, np.asarray(y).tobytes())
        for x, y in pairs
    )
