"""The grid of a decoder's keys and values: their levels, scales, and codes in few bytes."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.arguments import flag, one_of, whole
from compress_jax.core.bits import Bits
from compress_jax.core.errors import ShapeError
from compress_jax.quantize._rewrites.rotate import rotation

LEAST = 2.0**-14  # the smallest normal float16: XLA may flush smaller scales to 0
MOST = 65504.0  # the largest


@dataclass(frozen=True)
class KVGrid:
    r"""How many bits keys and values of attention take, and which of them share a scale.

    A level is :math:`low + s \cdot code` with :math:`s = (high - low) / (2^{bits} - 1)`, ``low``
    and ``high`` the extremes of the entries that share it. Zero need not be a level: channels of
    keys have means far from it. ``low`` and ``s`` are float16.

    Tokens come in blocks. A block is quantized once it is full, so that a channel of keys shares a
    scale over its tokens; until then its tokens are floats. Hence a query sees earlier blocks on
    the grid and its own block in floats.

    Attributes:
      key_bits: 2 to 8.
      value_bits: 2 to 8; values have a scale a token.
      keys: ``"channel"`` for a scale a channel over a block of tokens (KIVI), or ``"token"``.
      block: tokens of a block.
      group: features that share a scale of a token; None for those of a head.
      rotate: whether keys and queries are multiplied by a Hadamard matrix over the features of a
        head, which leaves scores as they are and spreads outliers.

    Example:
      >>> import compress_jax as cj
      >>> grid = cj.quantize.KVGrid(key_bits=4, value_bits=2, block=32)
      >>> grid.key_levels.overhead(head_width=64), grid.value_levels.overhead(head_width=64)
      (1.0, 0.5)

    References:
      Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024,
      arXiv:2402.02750, section 3; Ashkboos et al., "QuaRot", 2024, arXiv:2404.00456, section 4.
    """

    key_bits: int = 4
    value_bits: int = 4
    keys: Literal["channel", "token"] = "channel"
    block: int = 64
    group: int | None = None
    rotate: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        whole("key_bits", self.key_bits, 2, 8)
        whole("value_bits", self.value_bits, 2, 8)
        one_of("keys", self.keys, ("channel", "token"))
        whole("block", self.block, 1)
        if self.group is not None:
            whole("group", self.group, 1)
        flag("rotate", self.rotate)

    @property
    def key_levels(self) -> "EntryLevels":
        """The levels of keys."""
        return EntryLevels(self.key_bits, self.keys == "channel", self.block, self.group)

    @property
    def value_levels(self) -> "EntryLevels":
        """The levels of values."""
        return EntryLevels(self.value_bits, False, self.block, self.group)

    def rotated(self, x: jax.Array) -> jax.Array:
        """Return keys or queries ``[..., head_width]`` as they are compared; see ``rotate``."""
        return _turned(x, inverse=False) if self.rotate else x

    def unrotated(self, x: jax.Array) -> jax.Array:
        """Undo `rotated`."""
        return _turned(x, inverse=True) if self.rotate else x


class Coded(NamedTuple):
    """Blocks of keys or values in few bits.

    Attributes:
      codes: uint8 ``[..., block, bytes]``, the codes of a token's heads packed without gaps.
      scale: float16 ``[..., 1 or block, heads, groups, group or 1]``.
      low: of the shape of ``scale``.
    """

    codes: jax.Array
    scale: jax.Array
    low: jax.Array


class EntryLevels(NamedTuple):
    """The levels of keys, or of values; see `KVGrid`.

    Attributes:
      bits: of a code.
      by_channel: whether a channel shares a scale over a block, rather than a token over a group.
      block: tokens of a block.
      group: features of a group; None for those of a head.

    Example:
      >>> levels = EntryLevels(bits=2, by_channel=True, block=4)
      >>> x = jnp.arange(8.0).reshape(4, 1, 2)
      >>> coded = levels.encode(x)
      >>> coded.codes.shape, bool((levels.decode(coded, 1, 2) == x).all())
      ((4, 1), True)
    """

    bits: int
    by_channel: bool
    block: int
    group: int | None = None

    def overhead(self, head_width: int) -> float:
        """Return the bits that scale and lowest level add to each entry of a full block."""
        return 32 / (self.block if self.by_channel else self.group or head_width)

    def encode(self, x: jax.Array) -> Coded:
        """Return the codes of full blocks, ``[..., block, heads, head_width]``.

        Raises:
          ShapeError: if groups do not divide the features of a head.
        """
        x = self._grouped(x.astype(jnp.float32))
        axis = -4 if self.by_channel else -1
        top = 2**self.bits - 1
        # Codes refer to the float16 numbers that are stored: their rounding adds no error.
        least = x.min(axis, keepdims=True)
        most = x.max(axis, keepdims=True)
        low = jnp.clip(least, -MOST, MOST).astype(jnp.float16)
        scale = jnp.clip((most - low.astype(jnp.float32)) * np.float32(1 / top), LEAST, MOST)
        # No code can hold NaN or infinity: the scale does.
        finite = jnp.isfinite(least) & jnp.isfinite(most)
        scale = jnp.where(finite, scale, jnp.nan).astype(jnp.float16)
        steps = (x - low.astype(jnp.float32)) * (1 / scale.astype(jnp.float32))
        codes = jnp.clip(jnp.round(steps), 0, top).astype(jnp.uint8)
        rows = codes.reshape(-1, codes.shape[-3] * codes.shape[-2] * codes.shape[-1])
        packed = jax.vmap(lambda row: Bits.pack(row, self.bits).data)(rows)
        return Coded(packed.reshape(*codes.shape[:-3], -1), scale, low)

    def decode(self, coded: Coded, heads: int, head_width: int) -> jax.Array:
        """Return the levels of codes, float32 ``[..., block, heads, head_width]``."""
        rows = coded.codes.reshape(-1, coded.codes.shape[-1])
        entries = (heads, head_width)
        codes = jax.vmap(lambda row: Bits(row, self.bits, entries).unpack())(rows)
        steps = codes.reshape(*coded.codes.shape[:-1], *entries).astype(jnp.float32)
        steps = self._grouped(steps)
        x = coded.low.astype(jnp.float32) + steps * coded.scale.astype(jnp.float32)
        return x.reshape(*x.shape[:-2], head_width)

    def round(self, x: jax.Array) -> jax.Array:
        """Return ``[..., tokens, heads, head_width]`` with its full blocks on their levels."""
        tokens, heads, width = x.shape[-3:]
        full = tokens // self.block
        if not full:
            return x
        begin = x[..., : full * self.block, :, :]
        blocks = begin.reshape(*x.shape[:-3], full, self.block, heads, width)
        rounded = (
            self.decode(self.encode(blocks), heads, width).astype(x.dtype).reshape(begin.shape)
        )
        return jnp.concatenate([rounded, x[..., full * self.block :, :, :]], axis=-3)

    def _grouped(self, x: jax.Array) -> jax.Array:
        """Return ``[..., head_width]`` as ``[..., groups, group]``."""
        width = x.shape[-1]
        size = width if self.by_channel or self.group is None else self.group
        if width % size:
            raise ShapeError(f"groups of {size} do not divide the {width} features of a head")
        return x.reshape(*x.shape[:-1], width // size, size)


def _turned(x: jax.Array, inverse: bool) -> jax.Array:
    matrix = _hadamard(x.shape[-1])
    matrix = matrix.T if inverse else matrix
    turned = jnp.matmul(x.astype(jnp.float32), matrix, precision=jax.lax.Precision.HIGHEST)
    return turned.astype(x.dtype)


@lru_cache(maxsize=16)
def _hadamard(width: int) -> np.ndarray:
    """Return the rotation of heads of a width, the same in every program."""
    with jax.ensure_compile_time_eval():
        return rotation(width, jax.random.key(0)).astype(np.float32)
