"""Small floats with a float32 scale: fp8, fp4, nf4, and formats of one's own."""

from compress_jax.core.arguments import whole
from compress_jax.core.compression import Compression
from compress_jax.core.errors import ArgumentError
from compress_jax.core.layout import Granularity
from compress_jax.core.levels import Float, Table
from compress_jax.quantize._scales.levels import LevelRule
from compress_jax.quantize._weights.codebook import codebook

E4M3 = Float(4, 3, reserved=1)
"""float8_e4m3fn: up to 448. Micikevicius et al., "FP8 Formats for Deep Learning", 2022, table 1."""

E5M2 = Float(5, 2, reserved=4)
"""float8_e5m2: up to 57344; infinities and NaNs are never used. The same table."""

E2M1 = Float(2, 1)
"""float4_e2m1fn: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. OCP MX v1.0, table 5."""

# The constants of appendix E: zero is among them, with 7 levels below it and 8 above.
NF4 = Table(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
"""NormalFloat4: quantiles of a normal distribution. Dettmers et al., "QLoRA", 2023, appendix E."""


def fp8(
    kind: str = "e4m3",
    granularity: Granularity = "tensor",
    scale: str | LevelRule = "absmax",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
) -> Compression:
    r"""Round weights to 8-bit floats times a scale, :math:`\hat w = s \, \ell(w / s)`.

    Ties go to even, and what is too large saturates. The relative error of a weight is at most 2^-4
    in e4m3 and 2^-3 in e5m2, however small it is beside the largest (down to 2^-14 and 2^-29 of
    it). Codes are the bit patterns of float8_e4m3fn and float8_e5m2.

    Args:
      kind: ``"e4m3"`` or ``"e5m2"``.
      granularity: ``"tensor"``, ``"channel"``, or the number of entries of a channel that form a
        group.
      scale: ``"absmax"``, ``"mse"``, or a function ``(w, layout, levels) -> {"scale": float32}``.
      axis: the axis or axes of output channels.
      pad: allow a last group that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32}``. Packs to `Tabled`.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if groups do not divide a leaf and ``pad`` is False, or a leaf has no
        such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params, c = {"kernel": jnp.array([448.0, -1.05, 0.01])}, cj.quantize.fp8()
      >>> c.view(params, c.init(params))["kernel"].tolist()
      [448.0, -1.0, 0.009765625]

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    """
    return codebook(fp8_format(kind), granularity, scale, axis, pad)


def fp4(
    granularity: Granularity = "tensor",
    scale: str | LevelRule = "absmax",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
) -> Compression:
    r"""Round weights to 4-bit floats e2m1 times a scale, :math:`\hat w = s \, \ell(w / s)`.

    The levels are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, with a float32 scale for each
    set; `mxfp4` and `nvfp4` have small scales for small blocks.

    Args:
      granularity: ``"tensor"``, ``"channel"``, or the number of entries of a channel that form a
        group.
      scale: ``"absmax"``, ``"mse"``, or a function ``(w, layout, levels) -> {"scale": float32}``.
      axis: the axis or axes of output channels.
      pad: allow a last group that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32}``. Packs to `Tabled`.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if groups do not divide a leaf and ``pad`` is False, or a leaf has no
        such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params, c = {"kernel": jnp.array([6.0, -2.6, 0.3])}, cj.quantize.fp4()
      >>> c.view(params, c.init(params))["kernel"].tolist()
      [6.0, -3.0, 0.5]

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, section
      5.3.3.
    """
    return codebook(E2M1, granularity, scale, axis, pad)


def nf4(
    granularity: Granularity = 64,
    scale: str | LevelRule = "absmax",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
) -> Compression:
    r"""Round weights to NormalFloat4, 16 quantiles of a normal distribution, times a scale.

    Args:
      granularity: ``"tensor"``, ``"channel"``, or the number of entries of a channel that form a
        group; QLoRA's is 64.
      scale: ``"absmax"`` (QLoRA's), ``"mse"``, or a function
        ``(w, layout, levels) -> {"scale": float32}``.
      axis: the axis or axes of output channels.
      pad: allow a last group that is not full.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32}``. Packs to `Tabled`.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if groups do not divide a leaf and ``pad`` is False, or a leaf has no
        such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> params, c = {"kernel": jnp.array([-2.0, 0.1, 1.0])}, cj.quantize.nf4("tensor")
      >>> c.view(params, c.init(params))["kernel"].round(4).tolist()
      [-2.0, 0.15919999778270721, 0.8813999891281128]

    References:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3 and appendix
      E.
    """
    return codebook(NF4, granularity, scale, axis, pad)


def float_format(exponent_bits: int, mantissa_bits: int, *, reserved: int = 0) -> Float:
    """Return a floating-point format of a sign, an exponent and a mantissa.

    The exponent bias is ``2**(exponent_bits - 1) - 1``, and an exponent of zeros means a subnormal
    number, as in IEEE 754.

    Args:
      exponent_bits: 1 to 7.
      mantissa_bits: 0 to 8; 0 leaves powers of two, where the tie between two of them goes to the
        larger.
      reserved: how many of the largest magnitude codes are kept for infinity and NaN; such codes
        are never used.

    Returns:
      The format, for `codebook`.

    Raises:
      ArgumentError: if the numbers of bits are out of range, or no magnitude but 0 is left.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> e3m2 = cj.quantize.float_format(3, 2)  # MXFP6
      >>> e3m2.bits, e3m2.largest, e3m2.round(jnp.array([0.3, -30.0])).tolist()
      (6, 28.0, [0.3125, -28.0])

    References:
      Open Compute Project, "OCP Microscaling Formats (MX) Specification", v1.0, 2023, section 5.3.
    """
    exponent_bits = whole("exponent_bits", exponent_bits)
    mantissa_bits = whole("mantissa_bits", mantissa_bits)
    reserved = whole("reserved", reserved)
    if exponent_bits not in range(1, 8) or mantissa_bits not in range(9):
        raise ArgumentError(
            f"a float takes 1 to 7 exponent and 0 to 8 mantissa bits, got {exponent_bits} and "
            f"{mantissa_bits}"
        )
    # All codes without the sign; the last `reserved` of them are not numbers.
    magnitudes = 2 ** (exponent_bits + mantissa_bits)
    if reserved not in range(magnitudes - 1):
        raise ArgumentError(
            f"reserved must leave a number above 0 among {magnitudes} magnitudes, got {reserved}"
        )
    return Float(exponent_bits, mantissa_bits, reserved)


def fp8_format(kind: str) -> Float:
    """Return the format of a kind of 8-bit float.

    Args:
      kind: ``"e4m3"`` or ``"e5m2"``.

    Returns:
      The format.

    Raises:
      ArgumentError: if it is neither.
    """
    if kind not in ("e4m3", "e5m2"):
        raise ArgumentError(f"kind must be 'e4m3' or 'e5m2', got {kind!r}")
    return E4M3 if kind == "e4m3" else E5M2
