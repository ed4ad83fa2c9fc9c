"""Quantization: weights on few levels.

`uniform` rounds to evenly spaced levels; `fp8`, `fp4`, `nf4`, `mxfp8`, `mxfp4`, `nvfp4`, `ternary` and `binary` to others,
and `tabled` to any of one's own. Scale rules, grids and level tables are their pieces.
"""

from compress_jax.core.levels import Float, Table
from compress_jax.quantize._binary import binary
from compress_jax.quantize._blocks import mxfp4, mxfp8, nvfp4
from compress_jax.quantize._floats import fp4, fp8, nf4
from compress_jax.quantize._gptq import gptq
from compress_jax.quantize._tabled import tabled
from compress_jax.quantize._ternary import ternary
from compress_jax.quantize._uniform import uniform
from compress_jax.quantize.formats import float_format
from compress_jax.quantize.grid import Grid
from compress_jax.quantize.least_squares import fit, mse
from compress_jax.quantize.scales import absmax, minmax, normal_clip, percentile, rms, spanning
from compress_jax.quantize.search_scales import entropy, pnorm
from compress_jax.quantize.solved import Solved, output_error

__all__ = [
    "Float",
    "Grid",
    "Solved",
    "Table",
    "absmax",
    "binary",
    "entropy",
    "fit",
    "float_format",
    "fp4",
    "fp8",
    "gptq",
    "minmax",
    "mse",
    "mxfp4",
    "mxfp8",
    "nf4",
    "normal_clip",
    "nvfp4",
    "output_error",
    "percentile",
    "pnorm",
    "rms",
    "spanning",
    "tabled",
    "ternary",
    "uniform",
]
