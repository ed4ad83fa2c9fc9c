"""Packed leaves as blocks of GGUF: the codes as they are, no weight is quantized again."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from compress_jax.core.packed import Quantized
from compress_jax.core.sparse import Sparse

BLOCK = 32
Kind = Literal["Q4_0", "Q4_1", "Q8_0"]


class Entries(NamedTuple):
    """A packed leaf entry by entry: ``levels * scale``.

    Attributes:
      levels: codes less their zero points, int16, in the shape of the leaf.
      scale: float32, in that shape.
      zero: zero points, int16, in that shape.
    """

    levels: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


class Blocks(NamedTuple):
    """Rows of blocks.

    Attributes:
      kind: llama.cpp's name of them.
      data: uint8 ``[rows, bytes]``.
    """

    kind: Kind
    data: np.ndarray


def entries_of(node: Quantized) -> Entries:
    """Return level, scale and zero point of every entry.

    Example:
      >>> import compress_jax as cj
      >>> c = cj.quantize.gguf("Q8_0")
      >>> params = {"kernel": jnp.arange(32.0)[:, None]}
      >>> entries_of(c.pack(params, c.init(params))["kernel"]).levels[-1].tolist()
      [127]
    """
    zero = node.layout.spread(node.zero_point.astype(jnp.int16))
    levels = node.codes.unpack().astype(jnp.int16) - zero
    if isinstance(node.codes, Sparse):  # a code left out stands for zero
        levels = jnp.where(node.codes.mask.unpack() != 0, levels, 0)
    scale = node.layout.spread(node.scale)
    return Entries(np.asarray(levels), np.asarray(scale), np.asarray(zero))


def blocks_of(entries: Entries) -> Blocks | str:
    """Return entries as the smallest blocks that hold them exactly, or why none do.

    Args:
      entries: of a matrix ``[out, in]``, as the file has it.

    Returns:
      The blocks, or a reason.
    """
    rows, width = entries.levels.shape
    if width % BLOCK:
        return f"{BLOCK} does not divide its {width} inputs"
    shape = (rows, width // BLOCK, BLOCK)
    levels, scale, zero = (x.reshape(shape) for x in entries)
    if not (scale == scale[..., :1]).all():
        return f"{BLOCK} inputs in turn do not share a scale"
    scale = scale[..., :1]
    d = scale.astype(np.float16)
    if not (d == scale).all():
        return "its scales are not exact in float16"
    if -8 <= levels.min() and levels.max() <= 7:
        return Blocks("Q4_0", _joined(rows, d, _nibbles(levels + 8)))
    one = (zero == zero[..., :1]).all()
    codes = levels + zero
    least = -(zero[..., :1] * scale)
    m = least.astype(np.float16)
    if one and codes.min() >= 0 and codes.max() <= 15 and (m == least).all():
        return Blocks("Q4_1", _joined(rows, d, m, _nibbles(codes)))
    if -128 <= levels.min() and levels.max() <= 127:
        return Blocks("Q8_0", _joined(rows, d, levels.astype(np.int8)))
    return "its levels do not fit into 8 bits with a sign"


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Return codes of 4 bits two a byte: the first half of a block in the low ones."""
    codes = codes.astype(np.uint8)
    half = BLOCK // 2
    return codes[..., :half] | (codes[..., half:] << 4)


def _joined(rows: int, *parts: np.ndarray) -> np.ndarray:
    """Return the bytes of each block's parts one behind the other."""
    # Each part is [rows, blocks, entries]; files are little endian.
    little = [np.ascontiguousarray(x.astype(x.dtype.newbyteorder("<"))) for x in parts]
    data = np.concatenate([x.view(np.uint8) for x in little], axis=-1)
    return data.reshape(rows, -1)
