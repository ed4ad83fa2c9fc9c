"""Packed nodes: what stands in a params tree where a compressed array stood, at its true size.

Each is a registered pytree whose children may be packed in turn, so that forms nest:
``Quantized(codes=Sparse(...))`` is a pruned and quantized kernel. ``unpack`` returns the very bits
the model was trained and evaluated with.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from compress_jax.core.axes import Axes, over_layers
from compress_jax.core.bits import Bits, Gaps, bits_for
from compress_jax.core.codebook import Tabled
from compress_jax.core.finite import saturate
from compress_jax.core.layout import Layout
from compress_jax.core.sparse import Sparse, nbytes, static, width
from compress_jax.core.types import Leaf, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """Integer codes on a uniform grid: ``value = (code - zero_point) * scale``.

    Attributes:
      codes: unsigned codes in the shape of the array.
      scale: float32, shape ``layout.scale_shape``.
      zero_point: uint8, the code of zero; a scalar, one a layer of a stack, or shape
        ``layout.scale_shape``.
      layout: which codes share a scale.
      dtype: of the unpacked array.

    Example:
      >>> import compress_jax as cj
      >>> codes = Bits.pack(jnp.array([[0, 7], [4, 2]]), bits=3)
      >>> zero_point = jnp.array(4, jnp.uint8)
      >>> node = cj.core.Quantized(codes, jnp.full((1, 1), 0.5), zero_point, Layout((2, 2)))
      >>> node.unpack().tolist(), node.nbytes
      ([[-2.0, 1.5], [0.0, -1.0]], 7)
    """

    codes: Bits | Sparse
    scale: jax.Array
    zero_point: jax.Array
    layout: Layout = field(**static)
    dtype: jnp.dtype = field(default=jnp.dtype(jnp.float32), **static)

    @classmethod
    def pack(
        cls,
        codes: jax.Array,
        bits: int,
        scale: jax.Array,
        zero_point: jax.Array,
        layout: Layout,
        dtype: jnp.dtype,
    ) -> "Quantized":
        """Pack dense codes; where most of them stand for zero, only the others are stored."""
        node = cls(Bits.pack(codes, bits), scale, zero_point, layout, dtype)
        return min(node, node.keep(node.unpack() != 0), key=nbytes)

    def keep(self, mask: jax.Array) -> "Quantized":
        """Store only the codes where ``mask`` is true; the others become exact zeros."""
        # What is already left out stays out: its code is not stored.
        if isinstance(self.codes, Sparse):
            mask = mask & self.codes.mask.unpack().astype(bool)
        codes = Sparse.pack(self.codes.unpack(), mask, bits=width(self.codes))
        return Quantized(codes, self.scale, self.zero_point, self.layout, self.dtype)

    def unpack(self) -> jax.Array:
        """Return the dense array, computed in float32 and cast to `dtype`."""
        mask = self.codes.mask.unpack() if isinstance(self.codes, Sparse) else None
        codes = self.codes.unpack()
        return _dequantized(codes, mask, self.scale, self.zero_point, self.layout, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return nbytes(self)


# Compiled once for all leaves of a shape; how many codes are stored is no part of it.
@partial(jax.jit, static_argnames=("layout", "dtype"))
def _dequantized(
    codes: jax.Array,
    mask: jax.Array | None,
    scale: jax.Array,
    zero_point: jax.Array,
    layout: Layout,
    dtype: jnp.dtype,
) -> jax.Array:
    # The difference of integers is exact: only its product with the scale is rounded.
    zero = layout.expand(zero_point.astype(jnp.int32))
    levels = layout.arrange(codes.astype(jnp.int32)) - zero
    # A code left out is unpacked as 0, which stands for -zero_point.
    if mask is not None:
        levels = levels * layout.arrange(mask.astype(jnp.int32))
    return saturate(layout.restore(levels.astype(jnp.float32) * scale), dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clustered:
    """Indices into a codebook: ``value = codebook[code]``; the code ``clusters`` is exact zero.

    Attributes:
      codes: unsigned indices in the shape of the array.
      codebook: float32 ``[clusters]``; of a stack of layers ``[layers..., clusters]``, one for
        each.
      dtype: of the unpacked array.
      stack: the axes along which the array holds layers, ascending.

    Example:
      >>> import compress_jax as cj
      >>> codes = Bits.pack(jnp.array([0, 1, 2, 1]), bits=2)
      >>> cj.core.Clustered(codes, jnp.array([0.5, -0.5])).unpack().tolist()
      [0.5, -0.5, 0.0, -0.5]
    """

    codes: Bits | Sparse
    codebook: jax.Array
    dtype: jnp.dtype = field(default=jnp.dtype(jnp.float32), **static)
    stack: tuple[int, ...] = field(default=(), **static)

    @classmethod
    def pack(
        cls, codes: jax.Array, codebook: jax.Array, dtype: jnp.dtype, stack: tuple[int, ...] = ()
    ) -> "Clustered":
        """Pack dense indices, ``clusters`` for zero; store only nonzeros where zeros prevail."""
        zero = codebook.shape[-1]
        # The code for zero may cost a bit, so it has none where no entry needs it.
        levels = zero + bool((codes == zero).any())
        node = cls(Bits.pack(codes, bits_for(levels)), codebook, dtype, stack)
        return min(node, node.keep(codes != zero), key=nbytes)

    def keep(self, mask: jax.Array) -> "Clustered":
        """Store only the indices where ``mask`` is true; the others become exact zeros."""
        zero = self.codebook.shape[-1]
        codes = self.codes.unpack().astype(jnp.int32)
        kept = mask & (codes != zero)
        packed = Sparse.pack(codes, kept, fill=zero, bits=bits_for(zero))
        return Clustered(packed, self.codebook, self.dtype, self.stack)

    def unpack(self) -> jax.Array:
        """Return the dense array."""
        axes = Axes(tuple(self.shape), (), self.stack)
        look_up = over_layers(_look_up, axes, ("leaf", "state"), "leaf")
        return saturate(look_up(self.codes.unpack(), self.codebook), self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of indices and codebook."""
        return nbytes(self)


def _look_up(codes: jax.Array, codebook: jax.Array) -> jax.Array:
    return jnp.append(codebook, jnp.zeros((), codebook.dtype))[codes]  # of [clusters + 1] values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """Two thin factors: ``value = (left @ right)`` in the shape of the array.

    Attributes:
      left: ``[rows, rank]``, of a stack of layers ``[layers..., rows, rank]``; an array or a packed
        node.
      right: ``[rank, columns]``, or ``[layers..., rank, columns]``; an array or a packed node.
      shape: the shape of the array.
      dtype: of the unpacked array.
      columns: the axes of the array that the columns are made of, ascending; the rows are made of
        all others.
      stack: the axes along which the array holds layers, ascending.

    Example:
      >>> import compress_jax as cj
      >>> node = cj.core.LowRank(jnp.ones((2, 1)), jnp.array([[1.0, 2.0, 3.0]]), shape=(2, 3))
      >>> node.unpack().tolist(), node.nbytes
      ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], 20)
    """

    left: "jax.Array | Packed"
    right: "jax.Array | Packed"
    shape: tuple[int, ...] = field(**static)
    dtype: jnp.dtype = field(default=jnp.dtype(jnp.float32), **static)
    columns: tuple[int, ...] = field(default=(-1,), **static)
    stack: tuple[int, ...] = field(default=(), **static)

    def unpack(self) -> jax.Array:
        """Return the dense array, the product taken in the highest precision of the device."""
        # Accelerators multiply float32 in fewer bits by default.
        product = jnp.matmul(
            to_dense(self.left), to_dense(self.right), precision=jax.lax.Precision.HIGHEST
        )  # [layers..., rows, columns]
        order = self._order
        x = saturate(product.reshape(tuple(self.shape[a] for a in order)), self.dtype)
        if order == tuple(range(len(order))):
            return x
        return jnp.transpose(x, tuple(map(order.index, range(len(order)))))  # the inverse of order

    @property
    def _order(self) -> tuple[int, ...]:
        """The axes of the array as the product has them: layers, rows, columns."""
        columns = tuple(a % len(self.shape) for a in self.columns)
        rows = (a for a in range(len(self.shape)) if a not in columns and a not in self.stack)
        return (*self.stack, *rows, *columns)

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return nbytes(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """Two arrays of one shape, each packed in its own way: ``value = base + delta``.

    A quantized kernel and a low-rank adapter beside it, or the few entries that its grid misses.

    Attributes:
      base: an array or a packed node.
      delta: an array or a packed node of the same shape.
      dtype: of the unpacked array.

    Example:
      >>> import compress_jax as cj
      >>> delta = LowRank(jnp.ones((2, 1)), jnp.array([[1.0, 2.0]]), shape=(2, 2))
      >>> node = cj.core.Sum(jnp.array([[0.0, 1.0], [2.0, 3.0]]), delta)
      >>> node.unpack().tolist(), node.nbytes
      ([[1.0, 3.0], [3.0, 5.0]], 32)
    """

    base: "jax.Array | Packed"
    delta: "jax.Array | Packed"
    dtype: jnp.dtype = field(default=jnp.dtype(jnp.float32), **static)

    def unpack(self) -> jax.Array:
        """Return the dense array, added in float32 and cast to `dtype`."""
        # Both terms end in a clip or a choice, never in a product, which a compiler would fuse
        # with the sum and round once instead of twice.
        base, delta = (to_dense(x).astype(jnp.float32) for x in (self.base, self.delta))
        return saturate(base + delta, self.dtype)

    def on(self, base: Leaf) -> "Sum":
        """Return the sum on the packed form of its base; one that is packed already stays."""
        return replace(self, base=base) if is_packed(base) and not is_packed(self.base) else self

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return tuple(self.base.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of both terms."""
        return nbytes(self)


Packed: TypeAlias = Sparse | Quantized | Tabled | Clustered | LowRank | Sum


def is_packed(x: object) -> bool:
    """Tell whether ``x`` is a packed node that stands for one array."""
    return isinstance(x, Packed)


def to_dense(x: Leaf) -> Leaf:
    """Return the array that a packed node stands for, and anything else as it is."""
    return x.unpack() if isinstance(x, (Packed, Bits, Gaps)) else x


def unpack(tree: PyTree) -> PyTree:
    """Replace every packed node of a tree by the array it stands for.

    Works under ``jit``: a model may be served from packed params that are unpacked inside the
    compiled function.

    Args:
      tree: params whose leaves are arrays or packed nodes.

    Returns:
      Params of plain arrays.

    Example:
      >>> import compress_jax as cj
      >>> node = Clustered(Bits.pack(jnp.array([0, 1, 1]), 1), jnp.array([0.5, -0.5]))
      >>> cj.unpack({"kernel": node})["kernel"].tolist()
      [0.5, -0.5, -0.5]
    """
    return jax.tree.map(to_dense, tree, is_leaf=is_packed)
