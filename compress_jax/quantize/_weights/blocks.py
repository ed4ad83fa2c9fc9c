"""Block formats of current hardware: small blocks of small floats with small floats as scales."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.compression import Compression
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Levels, exponent_of, power_of_two
from compress_jax.quantize._scales.levels import Fixed, LevelRule
from compress_jax.quantize._scales.rules import group_absmax, safe_scale
from compress_jax.quantize._weights.codebook import from_levels, scale_rule
from compress_jax.quantize._weights.floats import E2M1, E4M3, fp8_format

_compiled = partial(jax.jit, static_argnames=("layout", "levels"))


def mxfp8(
    kind: str = "e4m3",
    scale: str | LevelRule = "floor",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
) -> Compression:
    r"""Round blocks of 32 weights to 8-bit floats times a power of two: MXFP8.

    Args:
      kind: ``"e4m3"`` or ``"e5m2"``.
      scale: as in `mxfp4`.
      axis: the axis or axes of output channels; blocks run along all others, joined.
      pad: allow a last block that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32}``. Packs to `Tabled`, at 8.25 bits a
      weight.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if 32 does not divide the contracting entries of a leaf and ``pad`` is
        False.

    Example:
      >>> import compress_jax as cj
      >>> params, c = {"kernel": jnp.full((32, 2), 0.3)}, cj.quantize.mxfp8()
      >>> state = c.init(params)
      >>> c.view(params, state)["kernel"][0].tolist(), c.pack(params, state)["kernel"].nbytes
      ([0.3125, 0.3125], 66)

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, sections 5.2
      and 6.3.
    """
    return from_levels(
        fp8_format(kind),
        scale_rule(scale, _powers()),
        32,
        axis,
        pad,
        scale_dtype=jnp.float8_e8m0fnu,
    )


def mxfp4(
    scale: str | LevelRule = "floor", axis: int | tuple[int, ...] | None = None, pad: bool = False
) -> Compression:
    r"""Round blocks of 32 weights to 4-bit floats e2m1 times a power of two: MXFP4.

    Args:
      scale: ``"floor"``, the specification's, which saturates what lies above the largest level;
        ``"ceil"``, the least power that saturates nothing; ``"mse"``, the power of least squared
        error, a choice for each block; or a function
        ``(w, layout, levels) -> {"scale": float32 powers of two}``.
      axis: the axis or axes of output channels; blocks run along all others, joined.
      pad: allow a last block that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32}``. Packs to `Tabled`, at 4.25 bits a
      weight: the scales are stored as float8_e8m0fnu.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if 32 does not divide the contracting entries of a leaf and ``pad`` is
        False.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.array([7.0] + 31 * [0.4])[:, None]}
      >>> for scale in ("floor", "ceil", "mse"):
      ...     c = cj.quantize.mxfp4(scale)
      ...     print(c.view(params, c.init(params))["kernel"][:2, 0].tolist())
      [6.0, 0.5]
      [8.0, 0.0]
      [6.0, 0.5]

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, sections 5.2
      and 6.3.
    """
    return from_levels(
        E2M1, scale_rule(scale, _powers()), 32, axis, pad, scale_dtype=jnp.float8_e8m0fnu
    )


def nvfp4(
    scale: str | LevelRule = "absmax", axis: int | tuple[int, ...] | None = None, pad: bool = False
) -> Compression:
    r"""Round blocks of 16 weights to 4-bit floats e2m1 times two scales: NVFP4.

    Each block has an e4m3 scale, and the tensor a float32 scale that multiplies them all.

    Args:
      scale: ``"absmax"``, which puts the largest magnitude of a block on 6, as far as an e4m3 scale
        can; ``"mse"``, the e4m3 scale of least squared error; or a function
        ``(w, layout, levels) -> {"scale": ..., "tensor_scale": ...}``.
      axis: the axis or axes of output channels; blocks run along all others, joined.
      pad: allow a last block that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32, "tensor_scale": float32 scalar}``.
      Packs to `Tabled`, at 4.5 bits a weight: the scales of blocks are stored as float8_e4m3fn.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if 16 does not divide the contracting entries of a leaf and ``pad`` is
        False.

    Example:
      >>> import compress_jax as cj
      >>> params, c = {"kernel": jnp.linspace(-3.0, 3.0, 16)[:, None]}, cj.quantize.nvfp4()
      >>> node = c.pack(params, c.init(params))["kernel"]
      >>> node.unpack()[:5, 0].tolist(), node.scale.dtype.name, node.nbytes
      ([-3.0, -3.0, -2.0, -2.0, -1.5], 'float8_e4m3fn', 13)

    References:
      NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, section 2 and appendix C.
    """
    return from_levels(
        E2M1,
        scale_rule(scale, {"absmax": two_level, "mse": best_two_level}),
        16,
        axis,
        pad,
        scale_dtype=jnp.float8_e4m3fn,
    )


def _powers() -> dict[str, LevelRule]:
    """Return the named scale rules of the MX formats."""
    return {"floor": floor, "ceil": ceil, "mse": best_power}


# Scale rules: powers of two for MX, e4m3 times a float32 of the tensor for NVFP4.


@_compiled
def floor(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Take the power of two of the OCP MX specification.

    It is :math:`s = 2^{\lfloor \log_2 \max|w| \rfloor - e_{max}}` with
    :math:`e_{max} = \lfloor \log_2 \ell_{max} \rfloor`. A block whose largest magnitude, in
    units of s, lies above the largest level saturates: beyond 6 of up to 8 in e2m1, beyond 448 of
    up to 512 in e4m3.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: what they are rounded to.

    Returns:
      ``{"scale": float32}``, a power of two from 2^-126 on, exact in float8_e8m0fnu; 1 for a block
      of zeros.

    Example:
      >>> floor(jnp.array([0.5, -7.0]), Layout.of((2,), "tensor"), E2M1)["scale"].tolist()
      [1.0]

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, section 6.3.
    """
    return {"scale": _floor(group_absmax(w, layout), levels)}


@_compiled
def ceil(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Take the least power of two that clips nothing.

    It is :math:`s = 2^{\lceil \log_2 (\max|w| / \ell_{max}) \rceil}`.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: what they are rounded to.

    Returns:
      ``{"scale": float32}`` as `floor`.
    """
    return {"scale": _ceil(group_absmax(w, layout), levels)}


@_compiled
def best_power(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Take the power of two that minimises :math:`\sum (w - s \, \ell(w / s))^2` exactly.

    The candidates are the one that clips nothing and those below it, down to where the largest
    level is less than half the least possible root mean square of a block with that absolute
    maximum. No larger power has less error: it has no further level within the maximum.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      levels: what they are rounded to.

    Returns:
      ``{"scale": float32}`` as `floor`.
    """
    top = group_absmax(w, layout)
    size = layout.group_size or w.size
    # Blocks are brought near 1 by exact powers of two: no square under- or overflows.
    unit = 1 / jnp.minimum(_power_below(top), 2.0**126)
    largest = _ceil(top * unit, levels)
    # rms >= absmax / sqrt(size), so log2(size) / 2 octaves down and one more for the half.
    octaves = 2 + int(np.ceil(np.log2(size) / 2))
    halvings = jnp.asarray(0.5 ** np.arange(octaves), jnp.float32)
    scale = _cheapest(w * unit, lambda i: largest * halvings[i], octaves, layout, levels)
    return {"scale": _clip_power(scale * (1 / unit), levels)}


@_compiled
def two_level(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Scale blocks by an e4m3 number and the tensor by a float32.

    :math:`s_b = e4m3(\max_b |w| / (\ell_{max} t))` with :math:`t = \max |w| / (448 \, \ell_{max})`,
    so that the block of the largest magnitude has the largest scale.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a block.
      levels: what they are rounded to.

    Returns:
      ``{"scale": float32, exact in float8_e4m3fn and not 0, "tensor_scale": float32 scalar}``.

    References:
      NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, appendix C.
    """
    tensor, codes = _block_codes(w, layout, levels)
    return {"scale": E4M3.decode(codes), "tensor_scale": tensor}


@_compiled
def best_two_level(w: jax.Array, layout: Layout, levels: Levels) -> Fixed:
    r"""Scale as `two_level`, each block by the e4m3 number of least squared error.

    The candidates reach from two octaves below the scale of `two_level` to one above.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a block.
      levels: what they are rounded to.

    Returns:
      As `two_level`.
    """
    tensor, codes = _block_codes(w, layout, levels)

    # Neighboring codes are neighboring e4m3 numbers; 0 and 127 (NaN) are no scales.
    def trial(i: jax.Array) -> jax.Array:
        return E4M3.decode(jnp.clip(codes + 8 - i, 1, 126))  # eight codes to the octave

    return {"scale": _cheapest(w * (1 / tensor), trial, 25, layout, levels), "tensor_scale": tensor}


def _block_codes(w: jax.Array, layout: Layout, levels: Levels) -> tuple[jax.Array, jax.Array]:
    """Return the scale of the tensor, and the e4m3 code of the scale of every block."""
    tensor = safe_scale(jnp.abs(w).max() * np.float32(1 / (E4M3.largest * levels.largest)))
    # The tensor's scale maps the largest block's scale, absmax / largest level, to 448.
    codes = E4M3.encode(group_absmax(w, layout) * np.float32(1 / levels.largest) * (1 / tensor))
    return tensor, jnp.maximum(codes, 1)  # no block has the scale 0


def _cheapest(
    w: jax.Array,
    trial: Callable[[jax.Array], jax.Array],
    trials: int,
    layout: Layout,
    levels: Levels,
) -> jax.Array:
    """Return the scale of least squared error among ``trial(0 .. trials - 1)``, first of equals."""

    def body(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scale = trial(i)
        residual = w - levels.round(w * (1 / scale)) * scale
        error = (residual**2).sum(layout.reduced, keepdims=True)
        return jnp.minimum(error, best[0]), jnp.where(error < best[0], scale, best[1])

    start = jnp.full(layout.scale_shape, jnp.inf), jnp.zeros(layout.scale_shape)
    return jax.lax.fori_loop(0, trials, body, start)[1]


def _power_below(x: jax.Array) -> jax.Array:
    """Return ``2**floor(log2(x))`` of positive float32, and 1 for 0."""
    return jnp.where(x == 0, 1.0, power_of_two(jnp.maximum(exponent_of(x), -126)))


def _floor(absmax: jax.Array, levels: Levels) -> jax.Array:
    # The exponent of the largest level: 2 in e2m1 (6), 8 in e4m3 (448).
    exponent = int(np.floor(np.log2(levels.largest)))
    power = _clip_power(_power_below(absmax) * np.float32(2.0**-exponent), levels)
    return jnp.where(absmax == 0, 1.0, power)


def _ceil(absmax: jax.Array, levels: Levels) -> jax.Array:
    power = _floor(absmax, levels)
    # Twice the specification's power never clips: 2 s 2^e_max = 2^(floor(log2(absmax)) + 1).
    clips = absmax > power * np.float32(levels.largest)
    return _clip_power(jnp.where(clips, 2 * power, power), levels)


def _clip_power(scale: jax.Array, levels: Levels) -> jax.Array:
    """Keep a power of two, and its product with the largest level, a normal number."""
    return jnp.clip(scale, 2.0**-126, 2.0 ** (127 - int(np.floor(np.log2(levels.largest)))))
