"""Small floats with a float32 scale: fp8, fp4, nf4."""

from compress_jax.core.compression import Compression
from compress_jax.core.errors import ArgumentError
from compress_jax.core.layout import Granularity
from compress_jax.core.levels import Float
from compress_jax.quantize._scales.levels import E2M1, E4M3, E5M2, NF4, LevelRule
from compress_jax.quantize._weights.codebook import codebook


def fp8(
    kind: str = "e4m3",
    granularity: Granularity = "tensor",
    scale: str | LevelRule = "absmax",
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
) -> Compression:
    r"""Round weights to 8-bit floats times a scale, :math:`\hat w = s \, \ell(w / s)`, ties to even, saturating.

    The relative error of a weight is at most 2^-4 in e4m3 and 2^-3 in e5m2, however small it is
    beside the largest (down to 2^-14 and 2^-29 of it). Codes are the bit patterns of float8_e4m3fn
    and float8_e5m2.

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
      >>> params, c = {"kernel": jnp.array([448.0, -1.05, 0.01])}, fp8()
      >>> c.view(params, c.init(params))["kernel"].tolist()
      [448.0, -1.0, 0.009765625]

    References:
      Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    """
    return codebook(fp8_levels(kind), granularity, scale, axis, pad)


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
      >>> params, c = {"kernel": jnp.array([6.0, -2.6, 0.3])}, fp4()
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
      >>> params, c = {"kernel": jnp.array([-2.0, 0.1, 1.0])}, nf4("tensor")
      >>> c.view(params, c.init(params))["kernel"].round(4).tolist()
      [-2.0, 0.15919999778270721, 0.8813999891281128]

    References:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3 and appendix
      E.
    """
    return codebook(NF4, granularity, scale, axis, pad)


def fp8_levels(kind: str) -> Float:
    """Return the levels of a kind of 8-bit float.

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
