"""Small unsigned integers in bytes, packed along one axis so that the array keeps its rank, its sharding and its meaning.

`core.bits` packs for storage, all axes in one row. For computing, codes of 4, 2 and 1 bits share bytes with their
neighbours along an axis, and other widths are cut into such fields: 3 = 2 + 1, 7 = 4 + 2 + 1 bits.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

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
      ``{"bits4", "bits2", "bits1"}``, those of `widths`: uint8, ``ceil(n * width / 8)`` long along the axis.

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
    return sum((groups[..., i] << np.uint8(i * width) for i in range(1, count)), start=groups[..., 0])


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
        apart = (jnp.expand_dims(field, at + 1) >> jnp.expand_dims(places, tuple(range(at + 1)))) & np.uint8(2**width - 1)
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
