"""The gains from zeros, by pattern and hardware: bytes always, time only for some."""

from dataclasses import dataclass

import jax
import numpy as np

from compress_jax.core.compression import CompressionState
from compress_jax.core.packed import Sparse
from compress_jax.core.paths import flatten
from compress_jax.core.types import Params
from compress_jax.prune._sparsities import masks_in

BUYS = {
    "dense": "nothing",
    "channels": "bytes, and time on any hardware once `shrink` removes the channels",
    "2:4": (
        "bytes, and up to half the time of the product on GPUs with sparse tensor cores (NVIDIA, "
        "from Ampere on), by a kernel for 2:4; plain XLA uses none, and CPUs and TPUs have none"
    ),
    "blocks": (
        "bytes, and time with a block-sparse kernel of these tiles; plain XLA multiplies the zeros"
    ),
    "unstructured": "bytes only: dense products multiply the zeros on CPU, GPU and TPU",
}


@dataclass(frozen=True)
class Gain:
    """The gain from the zeros of one leaf.

    Attributes:
      path: the leaf's path.
      sparsity: the share of entries that are pruned.
      pattern: ``"channels"``, ``"2:4"``, ``"blocks"``, ``"unstructured"`` or ``"dense"``; the most
        useful one that the mask has.
      dense: bytes of the dense array.
      stored: bytes of the packed array.
      buys: the gain in words.

    Example:
      >>> import compress_jax as cj
      >>> cj.prune.Gain("kernel", 0.5, "2:4", 128, 80, "bytes").stored
      80
    """

    path: str
    sparsity: float
    pattern: str
    dense: int
    stored: int
    buys: str


@dataclass(frozen=True)
class Gains:
    """The gains of all pruned leaves; prints as a table.

    Attributes:
      rows: one for each leaf, in tree order.

    Example:
      >>> import compress_jax as cj
      >>> print(cj.prune.Gains((cj.prune.Gain("kernel", 0.5, "2:4", 128, 80, "bytes"),)))
      path    sparsity  pattern  bytes
      kernel  50.0%     2:4      80 of 128
      2:4: bytes
    """

    rows: tuple[Gain, ...]

    def __str__(self) -> str:
        """Return the table as aligned text, with the gain of each pattern below it."""
        table = [("path", "sparsity", "pattern", "bytes")]
        for row in self.rows:
            size = f"{row.stored:,} of {row.dense:,}"
            table.append((row.path, f"{row.sparsity:.1%}", row.pattern, size))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for cells in table:
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            lines.append("  ".join(padded).rstrip())
        legend = {row.pattern: f"{row.pattern}: {row.buys}" for row in self.rows}
        return "\n".join([*lines, *legend.values()])


def gains(params: Params, state: CompressionState) -> Gains:
    """Return the gain in size and speed of each pruned leaf, by the pattern of its mask.

    Only the masks count, not the method: ``"channels"`` if whole channels of one of the last two
    axes hold at least half of the zeros; ``"2:4"`` if no four consecutive inputs (axis -2) keep
    more than two; ``"blocks"`` if tiles of 8 x 8 along the last axes hold at least half of the
    zeros.

    Args:
      params: tree of arrays.
      state: the state of a pruning method, alone or inside combinators; concrete arrays.

    Returns:
      The table, a row for each leaf with a mask.

    Example:
      >>> import jax
      >>> import compress_jax as cj
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> state = cj.prune.magnitude(None, cj.prune.n_m(2, 4)).init(params)
      >>> cj.prune.gains(params, state).rows[0].pattern
      '2:4'

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3 (2:4).
      Gray, Radford and Kingma, "GPU Kernels for Block-Sparse Weights", 2017.
    """
    leaves = flatten(params)[0]
    masks = masks_in(state.fixed, leaves)
    return Gains(tuple(_gain(path, leaves[path], mask) for path, mask in masks.items()))


def _gain(path: str, x: jax.Array, mask: jax.Array) -> Gain:
    pattern = _pattern(np.asarray(mask))
    sparsity = 1 - float(np.asarray(mask).mean())
    dense = int(x.size * x.dtype.itemsize)
    # Packing keeps the dense array where that is smaller.
    stored = min(dense, Sparse.pack(x, mask).nbytes)
    return Gain(path, sparsity, pattern, dense, stored, BUYS[pattern])


def _pattern(mask: np.ndarray) -> str:
    zeros = int((~mask).sum())
    # From the most useful pattern to the least.
    if not zeros:
        return "dense"
    if mask.ndim < 2:
        return "unstructured"
    for axis in (-1, -2):
        others = tuple(i for i in range(mask.ndim) if i != axis % mask.ndim)
        empty = ~mask.any(axis=others)  # [channels]
        # Zeros in empty channels, at least half of all.
        if 2 * int(empty.sum()) * (mask.size // mask.shape[axis]) >= zeros:
            return "channels"
    if _at_most_half(mask):
        return "2:4"
    return "blocks" if 2 * _in_tiles(mask, 8) >= zeros else "unstructured"


def _at_most_half(mask: np.ndarray) -> bool:
    """Return whether at most two of every four along axis -2 are kept."""
    lines = np.moveaxis(mask, -2, 0)  # [inputs, ...]
    if len(lines) % 4:
        return False
    return bool((lines.reshape(-1, 4, *lines.shape[1:]).sum(1) <= 2).all())


def _in_tiles(mask: np.ndarray, side: int) -> int:
    """Count the zeros in tiles that hold only zeros, along the last two axes."""
    rows = mask.shape[-2] // side
    columns = mask.shape[-1] // side
    # [batch, tile rows, side, tile columns, side]
    tiles = mask[..., : rows * side, : columns * side].reshape(-1, rows, side, columns, side)
    return int((~tiles.any(axis=(2, 4))).sum()) * side * side
