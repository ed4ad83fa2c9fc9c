"""The block formats of current hardware: small blocks of small floats, whose scales are small floats too."""

import jax.numpy as jnp

from compress_jax.core.compression import Compression
from compress_jax.quantize import block_scales
from compress_jax.quantize._floats import fp8_levels
from compress_jax.quantize._tabled import choice, on_levels
from compress_jax.quantize.formats import E2M1
from compress_jax.quantize.level_scales import LevelRule

_POWERS = {"floor": block_scales.floor, "ceil": block_scales.ceil, "mse": block_scales.best_power}
_TWO_LEVEL = {"absmax": block_scales.two_level, "mse": block_scales.best_two_level}


def mxfp8(
    kind: str = "e4m3", scale: str | LevelRule = "floor", axis: int | tuple[int, ...] | None = None, pad: bool = False
) -> Compression:
    r"""Round blocks of 32 weights to 8-bit floats times a power of two, the MXFP8 of the OCP specification.

    Args:
      kind: ``"e4m3"`` or ``"e5m2"``.
      scale: as of `mxfp4`.
      axis: the axis or axes of output channels; blocks run along all others, joined.
      pad: allow a last block that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32}``. Packs to `Tabled`, at 8.25 bits a weight.

    Raises:
      ValueError: if an argument is none of the above.
      ShapeError: in `init`, if 32 does not divide the contracting entries of a leaf and ``pad`` is False.

    Example:
      >>> params, c = {"kernel": jnp.full((32, 2), 0.3)}, mxfp8()
      >>> c.view(params, c.init(params))["kernel"][0].tolist(), c.pack(params, c.init(params))["kernel"].nbytes
      ([0.3125, 0.3125], 66)

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, sections 5.2 and 6.3.
    """
    return on_levels(fp8_levels(kind), choice(scale, _POWERS), 32, axis, pad, scale_dtype=jnp.float8_e8m0fnu)


def mxfp4(scale: str | LevelRule = "floor", axis: int | tuple[int, ...] | None = None, pad: bool = False) -> Compression:
    r"""Round blocks of 32 weights to 4-bit floats e2m1 times a power of two, the MXFP4 of the OCP specification.

    Args:
      scale: ``"floor"``, the specification's, which saturates what lies above the largest level; ``"ceil"``, the least power
        that saturates nothing; ``"mse"``, the power of least squared error, a choice for each block; or a function
        ``(w, layout, levels) -> {"scale": float32 powers of two}``.
      axis: the axis or axes of output channels; blocks run along all others, joined.
      pad: allow a last block that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32}``. Packs to `Tabled`, at 4.25 bits a weight: the scales are
      stored as float8_e8m0fnu.

    Raises:
      ValueError: if an argument is none of the above.
      ShapeError: in `init`, if 32 does not divide the contracting entries of a leaf and ``pad`` is False.

    Example:
      >>> params = {"kernel": jnp.array([7.0] + 31 * [0.4])[:, None]}
      >>> for c in (mxfp4(), mxfp4("ceil"), mxfp4("mse")):
      ...     print(c.view(params, c.init(params))["kernel"][:2, 0].tolist())
      [6.0, 0.5]
      [8.0, 0.0]
      [6.0, 0.5]

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, sections 5.2 and 6.3.
    """
    return on_levels(E2M1, choice(scale, _POWERS), 32, axis, pad, scale_dtype=jnp.float8_e8m0fnu)


def nvfp4(scale: str | LevelRule = "absmax", axis: int | tuple[int, ...] | None = None, pad: bool = False) -> Compression:
    r"""Round blocks of 16 weights to 4-bit floats e2m1 times an e4m3 scale of the block times a float32 scale of the tensor.

    Args:
      scale: ``"absmax"``, which puts the largest magnitude of a block on 6, as far as an e4m3 scale can; ``"mse"``, the e4m3
        scale of least squared error; or a function ``(w, layout, levels) -> {"scale": ..., "tensor_scale": ...}``.
      axis: the axis or axes of output channels; blocks run along all others, joined.
      pad: allow a last block that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32, "tensor_scale": float32 scalar}``. Packs to `Tabled`, at 4.5
      bits a weight: the scales of blocks are stored as float8_e4m3fn.

    Raises:
      ValueError: if an argument is none of the above.
      ShapeError: in `init`, if 16 does not divide the contracting entries of a leaf and ``pad`` is False.

    Example:
      >>> params, c = {"kernel": jnp.linspace(-3.0, 3.0, 16)[:, None]}, nvfp4()
      >>> node = c.pack(params, c.init(params))["kernel"]
      >>> node.unpack()[:5, 0].tolist(), node.scale.dtype.name, node.nbytes
      ([-3.0, -3.0, -2.0, -2.0, -1.5], 'float8_e4m3fn', 13)

    References:
      NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, section 2 and appendix C.
    """
    return on_levels(E2M1, choice(scale, _TWO_LEVEL), 16, axis, pad, scale_dtype=jnp.float8_e4m3fn)
