"""What the zeros of a model buy, and on which hardware: bytes always, time only where a pattern is something can use."""

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
    "channels": "bytes, and time on any hardware once `shrink` takes the channels out",
    "2:4": "bytes, and up to half the time of the product on GPUs with sparse tensor cores "
    "(NVIDIA, from Ampere on), by a "
    "kernel for 2:4; plain XLA uses none, and CPUs and TPUs have none",
    "blocks": "bytes, and time with a block-sparse kernel of these tiles; plain XLA multiplies "
    "the zeros",
    "unstructured": "bytes only: dense products multiply the zeros on CPU, GPU and TPU",
}


@dataclass(frozen=True)
class Gain:
    """What is gained at one leaf.

    Attributes:
      path: the leaf.
      sparsity: share of entries that are pruned.
      pattern: ``"channels"``, ``"2:4"``, ``"blocks"``, ``"unstructured"`` or ``"dense"``; the most
        useful one that holds.
      dense: bytes of the dense array.
      stored: bytes in the smaller of the packed forms.
      buys: what that is worth, in words.
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
      rows: one a leaf, in tree order.
    """

    rows: tuple[Gain, ...]

    def __str__(self) -> str:
        """Return the table as aligned text, and what each pattern in it buys."""
        head = ("path", "sparsity", "pattern", "bytes")
        body = [
            (r.path, f"{r.sparsity:.1%}", r.pattern, f"{r.stored:,} of {r.dense:,}")
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in (head, *body)
        ]
        legend = {r.pattern: f"{r.pattern}: {r.buys}" for r in self.rows}
        return "\n".join([*lines, *legend.values()])


def gains(params: Params, state: CompressionState) -> Gains:
    """Return what the masks of a pruned model buy on which hardware, by what pattern is found in them.

    The masks themselves are looked at, not how they were made: ``"channels"`` if all entries at
    some index of one of the last two axes are pruned and they are at least half of all pruned ones;
    ``"2:4"`` if no four consecutive inputs (axis -2) keep more than two; ``"blocks"`` if tiles of 8
    x 8 and more along the last axes hold at least half of the zeros.

    Args:
      params: the params.
      state: of any pruning method, alone or inside combinators; concrete arrays.

    Returns:
      The table, a row for each leaf with a mask.

    Example:
      >>> from compress_jax.prune import magnitude, n_m
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> gains(params, magnitude(None, n_m(2, 4)).init(params)).rows[0].pattern
      '2:4'

    References:
      Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, section 3 (2:4).
      Gray, Radford and Kingma, "GPU Kernels for Block-Sparse Weights", 2017.
    """
    leaves = flatten(params)[0]
    return Gains(
        tuple(
            _gain(path, leaves[path], mask) for path, mask in masks_in(state.fixed, leaves).items()
        )
    )


def _gain(path: str, x: jax.Array, mask: jax.Array) -> Gain:
    pattern, dense = _pattern(np.asarray(mask)), int(x.size * x.dtype.itemsize)
    stored = min(dense, Sparse.pack(x, mask).nbytes)
    return Gain(path, 1 - float(np.asarray(mask).mean()), pattern, dense, stored, BUYS[pattern])


def _pattern(mask: np.ndarray) -> str:
    zeros = int((~mask).sum())
    if not zeros:
        return "dense"
    if mask.ndim < 2:
        return "unstructured"
    for axis in (-1, -2):
        gone = ~mask.any(axis=tuple(i for i in range(mask.ndim) if i != axis % mask.ndim))
        if 2 * int(gone.sum()) * (mask.size // mask.shape[axis]) >= zeros:
            return "channels"
    if _at_most_half(mask):
        return "2:4"
    return "blocks" if 2 * _in_tiles(mask, 8) >= zeros else "unstructured"


def _at_most_half(mask: np.ndarray) -> bool:
    """Tell whether at most two of every four along axis -2 are kept."""
    lines = np.moveaxis(mask, -2, 0)
    if len(lines) % 4:
        return False
    return bool((lines.reshape(-1, 4, *lines.shape[1:]).sum(1) <= 2).all())


def _in_tiles(mask: np.ndarray, side: int) -> int:
    """Count the zeros that lie in whole tiles of zeros along the last two axes."""
    rows, columns = (n // side * side for n in mask.shape[-2:])
    cut = mask[..., :rows, :columns].reshape(-1, rows // side, side, columns // side, side)
    return int((~cut.any(axis=(2, 4))).sum()) * side * side
