"""What a compression does to each leaf, and why it leaves some alone: no silent no-op, ever."""

import math
from dataclasses import dataclass, replace

import jax.numpy as jnp

from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.errors import NoMatchError
from compress_jax.core.packed import is_packed, nbytes, to_dense
from compress_jax.core.paths import flatten
from compress_jax.core.table import aligned
from compress_jax.core.types import Leaf, Leaves, Params

# Reasons to doubt the convention that a leaf's last axis is its outputs, from names and shapes
# alone.

BIASES = ("bias", "b", "offset", "beta")
TORCH = ("weight", "weights")


def doubts(path: str, axes: Axes, leaves: Leaves) -> str:
    """Return the reason to doubt the axes assumed for a leaf; empty if there is none.

    Args:
      path: the name of the leaf.
      axes: what it is taken to have.
      leaves: all leaves of the tree by path, for those beside it.

    Returns:
      A sentence that says what to do, or an empty text.

    Example:
      >>> import jax.numpy as jnp
      >>> leaves = {"dense/weight": jnp.ones((8, 4)), "dense/bias": jnp.ones(8)}
      >>> doubts("dense/weight", Axes.convention((8, 4)), leaves)
      'its bias has 8 entries, as many as axis 0: outputs may be there; use cj.bind'
    """
    if axes.source != "convention" or len(axes.shape) < 2:
        return axes.note
    reason = axes.note or _beside(path, axes, leaves) or _by_shape(axes) or _by_name(path)
    return f"{reason}; use cj.bind" if reason else ""


def _beside(path: str, axes: Axes, leaves: Leaves) -> str:
    """Compare with the bias of the same layer."""
    shape, layer = axes.shape, path.rpartition("/")[0]
    names = (f"{layer}/{name}" if layer else name for name in BIASES)
    for bias in (leaves[name] for name in names if name in leaves and name != path):
        if not hasattr(bias, "shape"):
            continue
        outputs = tuple(shape[a] for a in axes.outputs)
        # A bias [n] beside a kernel [n, m], as PyTorch stores it.
        if len(bias.shape) == 1 and bias.shape != outputs and bias.shape[0] == shape[0]:
            return f"its bias has {bias.shape[0]} entries, as many as axis 0: outputs may be there"
        # A bias [layers, out] beside a kernel [layers, in, out].
        stacked = (shape[0], *shape[len(shape) - len(bias.shape) + 1 :])
        if len(bias.shape) > 1 and bias.shape == stacked:
            return (
                f"its bias has shape {tuple(bias.shape)}: both may be stacks of {shape[0]} layers"
            )
        # A bias [heads, head_dim] beside a kernel [in, heads, head_dim].
        if len(bias.shape) > 1 and bias.shape == shape[len(shape) - len(bias.shape) :]:
            own = tuple(bias.shape)
            return f"its bias has shape {own}: outputs may be on the last {len(own)} axes"
    return ""


def _by_shape(axes: Axes) -> str:
    shape = axes.shape
    if shape[-1] == 1 and math.prod(shape) > 1:
        return "its last axis has size 1: one output; if it is depthwise, outputs are elsewhere"
    # A small square window on the last two axes, and channels before it.
    if len(shape) == 4 and shape[2] == shape[3] and shape[2] <= 7 < max(shape[:2]):
        return "it looks like a kernel stored [out, in, height, width]"
    if len(shape) == 3 or len(shape) > 4:
        return f"its {len(shape)} axes may hold stacked layers, experts or heads"
    return ""


def _by_name(path: str) -> str:
    name = path.rpartition("/")[2]
    if name in TORCH:
        return f"leaves named {name!r} are stored [out, in] in PyTorch and Equinox"
    if name in ("embedding", "embeddings", "table", "wte"):
        return "a table that is also the last layer has its outputs on axis 0"
    return ""


@dataclass(frozen=True)
class Row:
    """One leaf of a coverage table.

    Attributes:
      path: the name of the leaf.
      shape: of the array.
      form: how it is stored: ``"Quantized"``, ``"Sparse"``, ..., or ``"dense"``.
      bits: stored bits for each entry, scales, masks and codebooks included.
      sparsity: share of entries that are exactly zero, 0 to 1.
      nbytes: stored bytes.
      reason: why the leaf was left alone; empty if it was compressed.
      axes: one letter an axis, as the compression takes it: ``s`` stacked layers, ``w`` window,
        ``i`` input, ``o`` output; empty if the leaf was left alone.
      doubt: what speaks against these axes, or that a layer has no weight left, and what to do;
        empty if nothing does.

    Example:
      >>> import compress_jax as cj
      >>> row = cj.core.Row("kernel", (4, 4), "Sparse", bits=9.0, sparsity=0.75, nbytes=18)
      >>> row.bits * 4 * 4 / 8 == row.nbytes
      True
    """

    path: str
    shape: tuple[int, ...]
    form: str
    bits: float
    sparsity: float
    nbytes: int
    reason: str = ""
    axes: str = ""
    doubt: str = ""


@dataclass(frozen=True)
class Coverage:
    """The table of all leaves; prints as text, and its totals are attributes.

    The column of axes has a letter for each: ``s`` stacked layers, ``w`` window, ``i`` input, ``o``
    output.

    Attributes:
      rows: one for each leaf, in tree order.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> table = cj.coverage(cj.identity(), {"kernel": jnp.ones((2, 2))})
      >>> table.nbytes, table.bits, table["kernel"].reason
      (16, 32.0, 'no compression is applied')
    """

    rows: tuple[Row, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes of all leaves."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bits(self) -> float:
        """Stored bits for each entry, over all leaves."""
        entries = sum(math.prod(row.shape) for row in self.rows)
        return 8 * self.nbytes / max(entries, 1)

    def __getitem__(self, path: str) -> Row:
        """Return the row of a leaf by name."""
        for row in self.rows:
            if row.path == path:
                return row
        raise NoMatchError(
            f"no leaf is named {path!r}; there are: {', '.join(row.path for row in self.rows)}"
        )

    def __str__(self) -> str:
        """Return the table as aligned text."""
        head = ("path", "shape", "axes", "form", "bits", "sparsity", "bytes", "notes")
        body = [
            (
                row.path,
                "x".join(map(str, row.shape)),
                row.axes,
                row.form,
                f"{row.bits:.2f}",
                f"{row.sparsity:.1%}",
                f"{row.nbytes:,}",
                "; ".join(filter(None, (row.reason, row.doubt))),
            )
            for row in self.rows
        ]
        total = ("total", "", "", "", f"{self.bits:.2f}", "", f"{self.nbytes:,}", "")
        return aligned([head, *body, total], right=(4, 5, 6))


def coverage(
    compression: Compression | None, params: Params, state: CompressionState | None = None
) -> Coverage:
    """Return what a compression does to each leaf, as a table.

    Args:
      compression: the compression, or None if ``params`` is already packed.
      params: the params (or packed params).
      state: its state; by default that of ``compression.init(params)``.

    Returns:
      The table, one row a leaf. ``print`` shows it.

    Example:
      >>> import compress_jax as cj
      >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}}
      >>> double = cj.at("**/kernel", cj.leafwise(lambda x, learned, fixed: 2 * x))
      >>> table = cj.coverage(double, params)
      >>> table["dense/bias"].reason, table.nbytes
      ('no pattern matches', 24)
    """
    if compression is None:
        return Coverage(
            tuple(_row(path, x, "", compressing=False) for path, x in flatten(params)[0].items())
        )
    reasons = compression.skipped(params)
    axes = compression.axes(params)
    leaves = flatten(params)[0]
    packed = compression.pack(params, compression.init(params) if state is None else state)
    rows = []
    for path, x in flatten(packed)[0].items():
        row = _row(path, x, reasons.get(path, ""), compressing=True)
        if path in axes and path not in reasons:
            found = (doubts(path, axes[path], leaves), _emptied(leaves[path], x, axes[path]))
            row = replace(row, axes=axes[path].letters, doubt="; ".join(filter(None, found)))
        rows.append(row)
    return Coverage(tuple(rows))


def _emptied(before: Leaf, node: Leaf, axes: Axes) -> str:
    """Say which layers of a leaf have lost their last weight."""
    left = [a for a in range(len(axes.shape)) if a not in axes.stack]
    some = (jnp.asarray(to_dense(before)) != 0).any(left)  # [*layers]
    kept = (jnp.asarray(to_dense(node)) != 0).any(left)  # [*layers]
    # A layer of zeros, such as a new bias, has lost nothing.
    empty = jnp.argwhere(some & jnp.logical_not(kept))  # [found, stack axes]
    if len(empty) == 0:
        return ""
    if not axes.stack:
        return "every weight is zero: prune it less (floor=)"
    layers = ", ".join("/".join(map(str, layer)) for layer in empty.tolist())
    return f"every weight of layer {layers} is zero: prune it less (floor=)"


def _row(path: str, node: Leaf, reason: str, *, compressing: bool) -> Row:
    dense = jnp.asarray(to_dense(node))
    size = dense.size
    form = type(node).__name__ if is_packed(node) else "dense"
    stored = nbytes(node) if is_packed(node) else dense.nbytes
    if compressing and form == "dense":
        reason = reason or "no packed form of it is smaller"
    # Keys and flags are not numbers: zeros among them are no sparsity.
    zeros = float((dense == 0).mean()) if size and jnp.issubdtype(dense.dtype, jnp.number) else 0.0
    return Row(path, tuple(dense.shape), form, 8 * stored / max(size, 1), zeros, stored, reason)
