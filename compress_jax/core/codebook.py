"""The packed node of codebook formats: small floats, normal floats, ternary, binary."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from compress_jax.core.bits import Bits
from compress_jax.core.finite import saturate
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Levels
from compress_jax.core.sparse import Sparse, nbytes, static, width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tabled:
    """Codes into a table of levels: ``value = level(code) * (scale * tensor_scale)``.

    Attributes:
      codes: unsigned codes in the shape of the array.
      scale: shape ``layout.scale_shape``, float32 or a small float it is exact in (float8_e8m0fnu,
        float8_e4m3fn).
      tensor_scale: float32 scalar (one a layer of a stack), or None for 1.
      levels: what the codes stand for.
      layout: which codes share a scale.
      dtype: of the unpacked array.

    Example:
      >>> import compress_jax as cj
      >>> codes = Bits.pack(jnp.array([1, 7, 15]), bits=4)
      >>> scale = jnp.full((1,), 0.5, jnp.float8_e8m0fnu)
      >>> node = cj.core.Tabled(codes, scale, None, cj.quantize.Float(2, 1), Layout((3,)))
      >>> node.unpack().tolist(), node.nbytes
      ([0.25, 3.0, -3.0], 3)
    """

    codes: Bits | Sparse
    scale: jax.Array
    tensor_scale: jax.Array | None
    levels: Levels = field(**static)
    layout: Layout = field(**static)
    dtype: jnp.dtype = field(default=jnp.dtype(jnp.float32), **static)

    @classmethod
    def pack(
        cls,
        codes: jax.Array,
        scale: jax.Array,
        tensor_scale: jax.Array | None,
        *,
        levels: Levels,
        layout: Layout,
        dtype: jnp.dtype,
    ) -> "Tabled":
        """Pack dense codes; where most of them stand for zero, only the others are stored."""
        node = cls(Bits.pack(codes, levels.bits), scale, tensor_scale, levels, layout, dtype)
        return min(node, node.keep(levels.decode(codes) != 0), key=nbytes)

    def keep(self, mask: jax.Array) -> "Tabled":
        """Store only the codes where ``mask`` is true; the others become exact zeros."""
        # What is already left out stays out: its code is not stored.
        if isinstance(self.codes, Sparse):
            mask = mask & self.codes.mask.unpack().astype(bool)
        codes = Sparse.pack(self.codes.unpack(), mask, bits=width(self.codes))
        return Tabled(codes, self.scale, self.tensor_scale, self.levels, self.layout, self.dtype)

    def unpack(self) -> jax.Array:
        """Return the dense array, computed in float32 and cast to `dtype`."""
        levels = self.levels.decode(self.codes.unpack().astype(jnp.int32))
        if isinstance(self.codes, Sparse):  # zero need not be a level
            levels = jnp.where(self.codes.mask.unpack() == 0, 0.0, levels)
        # The scales are multiplied first, as `view` does: another order would round otherwise.
        scale = self.scale.astype(jnp.float32)  # broadcastable to the arranged levels
        if self.tensor_scale is not None:
            scale = scale * self.layout.expand(self.tensor_scale)
        return saturate(self.layout.restore(self.layout.arrange(levels) * scale), self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return nbytes(self)
