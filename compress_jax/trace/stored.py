"""How the weights that enter a product are stored: in how many bits, and how many are not zero."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.bits import Bits
from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.errors import ShapeError, StateError
from compress_jax.core.packed import Sparse, is_packed, to_dense
from compress_jax.core.paths import flatten


@dataclass(frozen=True)
class Stored:
    """One leaf of params as it is stored.

    Attributes:
      size: number of entries.
      bits: width of the codes; None if it is stored as numbers (dense, sparse or low rank), used in the dtype they have.
      nonzero: entries that are not exactly zero; all of them where there is no compression.
    """

    size: int
    bits: int | None
    nonzero: int


def stored(params: Any, compression: Compression | None, state: CompressionState | None) -> dict[str, Stored]:
    """Return how every leaf is stored.

    Args:
      params: tree of arrays, or of shapes if there is no compression; leaves may be packed already.
      compression: whose packed form is looked at.
      state: its state; by default that of ``compression.init(params)``.

    Returns:
      The leaves by path.

    Raises:
      ShapeError: if there is a compression and a leaf is a shape, not an array.
      StateError: if there is a state without its compression.

    Example:
      >>> from compress_jax.core.packed import Clustered
      >>> codes = Clustered(Bits.pack(jnp.array([0, 1, 3]), 2), jnp.array([0.0, 1.0, 2.0, 3.0]))
      >>> stored({"kernel": codes, "bias": jnp.zeros(3)}, None, None)
      {'bias': Stored(size=3, bits=None, nonzero=3), 'kernel': Stored(size=3, bits=2, nonzero=2)}
    """
    if compression is None:
        if state is not None:
            raise StateError("a state was given without the compression it belongs to; pass compression=... too")
        return {path: _leaf(x, is_packed(x)) for path, x in flatten(params)[0].items()}
    for path, x in flatten(params)[0].items():
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ShapeError(
                f"{path!r} is only a shape: how a compression stores weights shows when arrays are packed; give arrays "
                "(model.init instead of jax.eval_shape), or leave compression out"
            )
    packed = compression.pack(params, compression.init(params) if state is None else state)
    return {path: _leaf(x, True) for path, x in flatten(packed)[0].items()}


def _leaf(x: Any, compressed: bool) -> Stored:
    size = math.prod(getattr(x, "shape", ()))
    codes = getattr(x, "codes", None)  # of whatever kind of node
    values = codes.values if isinstance(codes, Sparse) else codes
    bits = values.bits if isinstance(values, Bits) else None
    return Stored(size, bits, int(jnp.count_nonzero(to_dense(x))) if compressed else size)


def shapes(params: Any) -> Any:
    """Return params with the shape and dtype of each packed leaf in its place; other leaves stay."""

    def dense(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_packed(x) else x

    return jax.tree.map(dense, params, is_leaf=is_packed)


def dtype_bits(dtype: str) -> int:
    """Return the bits of one number of a dtype.

    Args:
      dtype: its name.

    Returns:
      Bits; a boolean takes 8, an int4 takes 4.

    Example:
      >>> dtype_bits("bfloat16"), dtype_bits("int4"), dtype_bits("bool")
      (16, 4, 8)
    """
    kind = jnp.dtype(dtype)
    if jnp.issubdtype(kind, jnp.integer):
        return jnp.iinfo(kind).bits
    return jnp.finfo(kind).bits if jnp.issubdtype(kind, jnp.floating) else 8 * kind.itemsize
