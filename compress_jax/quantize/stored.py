"""A quantized parameter as integer inference keeps it: signed codes under the parameter's own name and in its own shape."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.layout import Layout
from compress_jax.core.packed import Quantized
from compress_jax.core.sparse import Sparse, width
from compress_jax.quantize import fields

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Stored:
    """What is known of a quantized parameter beside its arrays.

    The arrays are ``{"codes": int8}`` for 8 bits, else the `fields` of the codes, two of 4 bits a byte; ``"scale"``,
    float32, and ``"zero_point"``, uint8 and only if it is not the middle of the codes, both as the packed node holds them.

    Attributes:
      shape: of the parameter.
      dtype: of the parameter.
      bits: of a code, 1 to 8.
      axis: along which codes share bytes.
      layout: which codes share a scale.
      symmetric: whether the middle code is zero everywhere.
    """

    shape: tuple[int, ...]
    dtype: Any
    bits: int
    axis: int
    layout: Layout
    symmetric: bool

    @classmethod
    def of(cls, node: Quantized, first: int = 0) -> "Stored":
        """Return the form of a packed node.

        Args:
          node: of concrete arrays.
          first: how many leading axes loops will slice.

        Returns:
          The form.
        """
        bits = width(node.codes)
        symmetric = node.zero_point.size == 1 and int(node.zero_point.reshape(())) == 2 ** (bits - 1)
        axis = fields.best_axis(node.shape, bits, first) if node.shape and bits < 8 else 0
        return cls(tuple(node.shape), jnp.dtype(node.dtype), bits, axis, node.layout, symmetric)

    @property
    def middle(self) -> int:
        """The code that signed codes count from."""
        return 2 ** (self.bits - 1)

    @property
    def format(self) -> str:
        """The format in words, ``"int4 channel"``."""
        sharing = f"group {self.layout.group_size}" if self.layout.group_size else "channel"
        sharing = sharing if np.prod(self.layout.scale_shape) > 1 else "tensor"
        return f"int{self.bits} {sharing}" + ("" if self.symmetric else " asymmetric")

    def arrays(self, node: Quantized) -> Arrays:
        """Return the arrays of a packed node."""
        codes = node.codes.unpack().astype(jnp.int32)
        if isinstance(node.codes, Sparse):  # what was left out stands for zero
            kept = self.layout.arrange(node.codes.mask.unpack()) != 0
            codes = self.layout.restore(jnp.where(kept, self.layout.arrange(codes), node.zero_point.astype(jnp.int32)))
        if self.bits == 8:
            stored = {"codes": (codes - self.middle).astype(jnp.int8)}
        else:
            stored = fields.pack(codes.reshape(self.shape or (1,)), self.bits, self.axis)
        rest = {"scale": node.scale} if self.symmetric else {"scale": node.scale, "zero_point": node.zero_point}
        return {**stored, **rest}

    def codes(self, arrays: Arrays, picked: tuple[Any, ...] = ()) -> jax.Array:
        """Return the signed codes ``code - middle``, int8, of all or of one index of each of the first axes.

        Args:
          arrays: of the parameter.
          picked: the indices.

        Returns:
          Array of ``shape[len(picked):]``.
        """
        names = ("codes",) if self.bits == 8 else tuple(f"bits{each}" for each in fields.widths(self.bits))
        parts = {name: _pick(arrays[name], picked) for name in names}
        if self.bits == 8:
            return parts["codes"]
        shape = self.shape or (1,)
        codes = fields.unpack(parts, self.bits, self.axis - len(shape), shape[self.axis])
        return (codes.astype(jnp.int8) - np.int8(self.middle)).reshape(self.shape[len(picked) :])

    def zero(self, arrays: Arrays) -> jax.Array | None:
        """Return the signed codes that stand for zero, int32 in the shape of the scale; None if they are 0."""
        return None if self.symmetric else arrays["zero_point"].astype(jnp.int32) - self.middle

    def dense(self, arrays: Arrays) -> jax.Array:
        """Return the parameter itself, bit for bit what the packed node unpacks to."""
        levels, zero = self.layout.arrange(self.codes(arrays).astype(jnp.int32)), self.zero(arrays)
        levels = levels if zero is None else levels - zero
        return self.layout.restore(levels.astype(jnp.float32) * arrays["scale"]).astype(self.dtype)


def _pick(x: jax.Array, picked: tuple[Any, ...]) -> jax.Array:
    for index in picked:
        x = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return x
