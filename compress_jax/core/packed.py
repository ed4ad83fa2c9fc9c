"""Packed nodes: what stands in a params tree where a compressed array stood, at its true size.

Each is a registered pytree whose children may be packed in turn, so that forms nest: ``Quantized(codes=Sparse(...))`` is a
pruned and quantized kernel. ``unpack`` returns the very bits the model was trained and evaluated with.
"""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from compress_jax.core.bits import Bits, bits_for
from compress_jax.core.gaps import Gaps
from compress_jax.core.layout import Layout

static: dict[str, Any] = {"metadata": {"static": True}}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sparse:
    """The entries a mask keeps, in C order; every other entry equals ``fill``.

    Attributes:
      values: the kept entries ``[kept]``, floating point or packed integers.
      mask: which entries are kept, as a bit each or as gaps, whichever `pack` found smaller.
      fill: the value of all other entries.

    Example:
      >>> node = Sparse.pack(jnp.array([[0.0, 2.0], [3.0, 0.0]]), jnp.array([[0, 1], [1, 0]]))
      >>> node.values.tolist(), node.unpack().tolist()
      ([2.0, 3.0], [[0.0, 2.0], [3.0, 0.0]])
    """

    values: jax.Array | Bits
    mask: Bits | Gaps
    fill: float = field(default=0, **static)

    @classmethod
    def pack(cls, dense: jax.Array, mask: jax.Array, *, fill: float = 0, bits: int | None = None) -> "Sparse":
        """Keep the entries of ``dense`` where ``mask`` is not zero (concrete arrays, not traced).

        Args:
          dense: the array, any shape.
          mask: same shape, nonzero where an entry is kept.
          fill: what stands for the others.
          bits: if given, the entries are unsigned integers of this width and are packed.

        Returns:
          The node, its mask in the smaller of the two forms.
        """
        mask = mask.astype(bool)
        values = dense[mask] if bits is None else Bits.pack(dense[mask], bits)
        width = Gaps.best_width(mask)
        forms = (Bits.pack(mask, 1), Gaps.pack(mask, width))
        return cls(values, min(forms, key=lambda form: form.nbytes), fill)

    def unpack(self) -> jax.Array:
        """Return the dense array."""
        mask = self.mask.unpack().ravel().astype(bool)
        values = self.values.unpack() if isinstance(self.values, Bits) else self.values
        values = values.astype(self.dtype)  # int32 for codes: the fill may be one more than their width can hold
        padded = jnp.append(values, jnp.asarray(self.fill, values.dtype))
        rank = jnp.where(mask, jnp.cumsum(mask) - 1, values.size)
        return padded[rank].reshape(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.mask.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the dense array."""
        return jnp.dtype(jnp.int32) if isinstance(self.values, Bits) else self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of entries and mask."""
        return nbytes(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """Integer codes on a uniform grid: ``value = (code - zero_point) * scale``.

    Attributes:
      codes: unsigned codes in the shape of the array.
      scale: float32, shape ``layout.scale_shape``.
      zero_point: uint8, the code of zero; a scalar or shape ``layout.scale_shape``.
      layout: which codes share a scale.
      dtype: of the unpacked array.
    """

    codes: Bits | Sparse
    scale: jax.Array
    zero_point: jax.Array
    layout: Layout = field(**static)
    dtype: jnp.dtype = field(default=jnp.dtype(jnp.float32), **static)

    @classmethod
    def pack(
        cls, codes: jax.Array, bits: int, scale: jax.Array, zero_point: jax.Array, layout: Layout, dtype: jnp.dtype
    ) -> "Quantized":
        """Pack dense codes; where most of them stand for zero, only the others are stored."""
        node = cls(Bits.pack(codes, bits), scale, zero_point, layout, dtype)
        return min(node, node.keep(node.unpack() != 0), key=nbytes)

    def keep(self, mask: jax.Array) -> "Quantized":
        """Store only the codes where ``mask`` is true; the others become exact zeros."""
        if isinstance(self.codes, Sparse):  # what is already left out stays out
            mask = mask & self.codes.mask.unpack().astype(bool)
        codes = Sparse.pack(self.codes.unpack(), mask, bits=_width(self.codes))
        return Quantized(codes, self.scale, self.zero_point, self.layout, self.dtype)

    def unpack(self) -> jax.Array:
        """Return the dense array, computed in float32 and cast to `dtype`."""
        levels = self.layout.arrange(self.codes.unpack().astype(jnp.int32)) - self.zero_point.astype(jnp.int32)
        if isinstance(self.codes, Sparse):
            levels = levels * self.layout.arrange(self.codes.mask.unpack().astype(jnp.int32))
        return self.layout.restore(levels.astype(jnp.float32) * self.scale).astype(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return nbytes(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clustered:
    """Indices into a codebook: ``value = codebook[code]``, and exact zero for the code ``len(codebook)``.

    Attributes:
      codes: unsigned indices in the shape of the array.
      codebook: float32 ``[clusters]``.
      dtype: of the unpacked array.
    """

    codes: Bits | Sparse
    codebook: jax.Array
    dtype: jnp.dtype = field(default=jnp.dtype(jnp.float32), **static)

    @classmethod
    def pack(cls, codes: jax.Array, codebook: jax.Array, dtype: jnp.dtype) -> "Clustered":
        """Pack dense indices, ``len(codebook)`` meaning zero; where most mean zero, only the others are stored."""
        zero = codebook.size
        node = cls(Bits.pack(codes, bits_for(zero + bool((codes == zero).any()))), codebook, dtype)
        return min(node, node.keep(codes != zero), key=nbytes)

    def keep(self, mask: jax.Array) -> "Clustered":
        """Store only the indices where ``mask`` is true; the others become exact zeros."""
        codes = self.codes.unpack().astype(jnp.int32)
        kept = mask & (codes != self.codebook.size)
        packed = Sparse.pack(codes, kept, fill=self.codebook.size, bits=bits_for(self.codebook.size))
        return Clustered(packed, self.codebook, self.dtype)

    def unpack(self) -> jax.Array:
        """Return the dense array."""
        return jnp.append(self.codebook, jnp.zeros((), self.codebook.dtype))[self.codes.unpack()].astype(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of indices and codebook."""
        return nbytes(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """Two thin factors: ``value = (left @ right)`` in the shape of the array.

    Attributes:
      left: ``[rows, rank]``, an array or a packed node.
      right: ``[rank, columns]``, an array or a packed node.
      shape: the shape of the array; its last axis has ``columns`` entries.
      dtype: of the unpacked array.
    """

    left: Any
    right: Any
    shape: tuple[int, ...] = field(**static)
    dtype: jnp.dtype = field(default=jnp.dtype(jnp.float32), **static)

    def unpack(self) -> jax.Array:
        """Return the dense array, the product taken in the highest precision of the device."""
        product = jnp.matmul(to_dense(self.left), to_dense(self.right), precision=jax.lax.Precision.HIGHEST)
        return product.reshape(self.shape).astype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return nbytes(self)


Packed: TypeAlias = Sparse | Quantized | Clustered | LowRank


def is_packed(x: Any) -> bool:
    """Tell whether ``x`` is a packed node that stands for one array."""
    return isinstance(x, Packed)


def _width(codes: Bits | Sparse) -> int:
    bits = codes.values if isinstance(codes, Sparse) else codes
    assert isinstance(bits, Bits), "codes are integers"
    return bits.bits


def to_dense(x: Any) -> Any:
    """Return the array that a packed node stands for, and anything else as it is."""
    return x.unpack() if isinstance(x, (Packed, Bits, Gaps)) else x


def unpack(tree: Any) -> Any:
    """Replace every packed node of a tree by the array it stands for.

    Works under ``jit``: a model may be served from packed params that are unpacked inside the compiled function.

    Args:
      tree: params whose leaves are arrays or packed nodes.

    Returns:
      Params of plain arrays.

    Example:
      >>> node = Clustered(Bits.pack(jnp.array([0, 1, 1]), 1), jnp.array([0.5, -0.5]))
      >>> unpack({"kernel": node})["kernel"].tolist()
      [0.5, -0.5, -0.5]
    """
    return jax.tree.map(to_dense, tree, is_leaf=is_packed)


def nbytes(tree: Any) -> int:
    """Return the bytes all arrays of a tree occupy, packed nodes at their packed size.

    Args:
      tree: any pytree of arrays and packed nodes.

    Returns:
      Bytes in memory, container overhead not included.

    Example:
      >>> nbytes({"kernel": Bits.pack(jnp.arange(8), 3), "bias": jnp.zeros(2)})
      11
    """
    return sum(leaf.nbytes if hasattr(leaf, "nbytes") else jnp.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))
