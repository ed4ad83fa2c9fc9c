"""The packed node of pruned arrays, and the size of packed trees; other nodes build on both."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.bits import Bits, Gaps, is_host
from compress_jax.core.types import PyTree

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
    def pack(
        cls, dense: jax.Array, mask: jax.Array, *, fill: float = 0, bits: int | None = None
    ) -> "Sparse":
        """Keep the entries of ``dense`` where ``mask`` is not zero (concrete arrays, not traced).

        Args:
          dense: the array, any shape.
          mask: same shape, nonzero where an entry is kept.
          fill: what stands for the others.
          bits: if given, the entries are unsigned integers of this width and are packed.

        Returns:
          The node, its mask in the smaller of the two forms.
        """
        # NumPy, as `jit` would compile anew for every number of entries that are kept.
        chosen = np.asarray(mask).astype(bool)
        kept = np.asarray(dense)[chosen]
        values = jax.device_put(kept) if bits is None else Bits.pack(kept, bits)
        # A bit for each entry, or the gaps between kept ones, which are smaller where few are kept.
        width = Gaps.best_width(chosen)
        forms = (Bits.pack(chosen, 1), Gaps.pack(chosen, width))
        return cls(values, min(forms, key=lambda form: form.nbytes), fill)

    def unpack(self) -> jax.Array:
        """Return the dense array."""
        if is_host(*jax.tree.leaves(self)):
            return jax.device_put(self.on_host())
        values = self.values.unpack() if isinstance(self.values, Bits) else self.values
        mask = self.mask.unpack().ravel().astype(bool)  # [n]
        # int32 for codes: the fill may be one more than their width can hold.
        values = values.astype(self.dtype)
        padded = jnp.append(values, jnp.asarray(self.fill, values.dtype))  # [kept + 1]
        # A kept entry takes the value of its rank among the kept ones, any other the fill.
        rank = jnp.where(mask, jnp.cumsum(mask) - 1, values.size)
        return padded[rank].reshape(self.shape)

    def on_host(self) -> np.ndarray:
        """Return the dense array as one of NumPy's: `jit` would compile anew for each count."""
        values = self.values
        values = values.on_host() if isinstance(values, Bits) else np.asarray(values)
        mask = self.mask.on_host().ravel().astype(bool)  # [n]
        padded = np.append(values.astype(self.dtype), np.asarray(self.fill, self.dtype))
        rank = np.where(mask, np.cumsum(mask) - 1, values.size)
        return padded[np.minimum(rank, values.size)].reshape(self.shape)

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


def width(codes: Bits | Sparse) -> int:
    """Return the bits of one code, whether all are stored or only some."""
    bits = codes.values if isinstance(codes, Sparse) else codes
    assert isinstance(bits, Bits), "codes are integers"
    return bits.bits


def nbytes(tree: PyTree) -> int:
    """Return the bytes all arrays of a tree occupy, packed nodes at their packed size.

    Args:
      tree: any pytree of arrays and packed nodes.

    Returns:
      Bytes in memory, container overhead not included.

    Example:
      >>> nbytes({"kernel": Bits.pack(jnp.arange(8), 3), "bias": jnp.zeros(2)})
      11
    """
    return sum(
        leaf.nbytes if hasattr(leaf, "nbytes") else jnp.asarray(leaf).nbytes
        for leaf in jax.tree.leaves(tree)
    )
