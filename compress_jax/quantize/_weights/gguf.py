"""Blocks of 32 weights as llama.cpp computes with them: Q8_0, Q4_0 and Q4_1."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from compress_jax.core.arguments import one_of
from compress_jax.core.compression import Compression
from compress_jax.core.layout import Layout
from compress_jax.quantize._scales import rules
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._weights.uniform import scale_rule, uniform

BLOCK = 32
# Bits, and whether the zero point is fixed.
KINDS = {"Q8_0": (8, True), "Q4_0": (4, True), "Q4_1": (4, False)}
SMALLEST = 2.0**-24  # of float16 numbers above 0
NORMAL = 2.0**-14  # below it float16 has fixed steps of `SMALLEST`
# The largest scales, and how many significant bits they have. Those of Q4_1 are such that the
# minimum of a block, 0 to 15 scales below 0, is a float16 too.
LARGEST = {True: 65504.0, False: 4352.0}
SIGNIFICANT = {True: 11, False: 7}


def gguf(
    kind: Literal["Q8_0", "Q4_0", "Q4_1"] = "Q4_0",
    scale: str | rules.Rule | None = None,
    axis: int | tuple[int, ...] | None = None,
    pad: bool = False,
) -> Compression:
    r"""Round weights to the blocks of GGUF files: what is trained is what llama.cpp loads.

    Runs of 32 inputs of an output share a scale d, a float16 number:

    .. math:: \hat w = d \, (clip(round(w / d) + z, 0, 2^{bits} - 1) - z)

    ``"Q8_0"`` has z = 128 and codes from 1, ``"Q4_0"`` z = 8. ``"Q4_1"`` has a z for every block;
    its file holds codes and the minimum :math:`m = -z d` as float16, so d has 7 significant bits
    here, with which m is exact and zero stays a level. It is `uniform` with such scales.

    Args:
      kind: llama.cpp's name of the blocks.
      scale: as in `uniform`; the scales of the rule are rounded. Default: absmax, and minmax for
        ``"Q4_1"``.
      axis: the axis or axes of output channels, as in `uniform`. For a table of tokens that is not
        bound (`cj.bind`) to a function it is 0, as blocks lie along a token's vector.
      pad: allow a last block that is not full, which no GGUF file can hold.

    Returns:
      The Compression; ``fixed[path]`` is ``{"scale": float32, "zero_point": uint8}``. Packs to
      `Quantized`, which `export.to_gguf` writes as it is.

    Raises:
      ArgumentError: if an argument is none of the above.
      ShapeError: in `init`, if 32 does not divide the inputs of a leaf and ``pad`` is False.

    Example:
      >>> import compress_jax as cj
      >>> params = {"kernel": jnp.linspace(-0.7, 0.7, 32)[:, None]}
      >>> c = cj.quantize.gguf("Q4_0")
      >>> float(c.init(params).fixed["kernel"]["scale"][0, 0, 0])  # 0.1 as a float16
      0.0999755859375

    References:
      ggml, ``block_q8_0``, ``block_q4_0`` and ``block_q4_1`` of ``ggml-common.h``.
    """
    bits, symmetric = KINDS[one_of("kind", kind, KINDS)]
    rule = partial(float16_scale, rule=scale_rule(scale, symmetric))
    # No code 0 in Q8_0: kernels of llama.cpp count on the negative of every level.
    return uniform(bits, symmetric, BLOCK, rule, axis, pad, narrow=kind == "Q8_0")


def float16_scale(w: jax.Array, layout: Layout, grid: Grid, *, rule: rules.Rule) -> rules.Scale:
    """Return the scales of another rule, rounded to float16, and its zero points.

    Args:
      w: float32, arranged by ``layout``.
      layout: which entries share a scale.
      grid: the levels.
      rule: the other rule.

    Returns:
      ``(scale, zero_point)``; the scale is float32, exact in float16, and times any zero point of
      an asymmetric grid of up to 4 bits exact in float16 too.
    """
    scale, zero_point = rule(w, layout, grid)
    return _rounded(scale, grid.symmetric), zero_point


@partial(jax.jit, static_argnums=1)
def _rounded(scale: jax.Array, symmetric: bool) -> jax.Array:
    fixed = jnp.round(scale * (1 / SMALLEST)) * SMALLEST
    scale = jnp.where(scale < NORMAL, fixed, scale)
    # Not a cast to float16 and back, which XLA may leave out as it changes precision alone.
    mantissa = SIGNIFICANT[symmetric] - 1
    rounded = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=mantissa)
    return jnp.clip(rounded, SMALLEST, LARGEST[symmetric])
