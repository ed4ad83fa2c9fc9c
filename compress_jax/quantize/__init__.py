"""Quantization: weights on few levels.

`uniform` rounds to evenly spaced levels; `fp8`, `fp4`, `nf4`, `mxfp8`, `mxfp4`, `nvfp4`, `ternary` and `binary` to others,
and `tabled` to any of one's own. Scale rules, grids and level tables are their pieces.

Once, after training: `gptq`, `adaround` and `signed` choose roundings by the layers' outputs, `clip` and `awq` ranges and
scales, `smooth` and `equalize` move scales between layers of the same function, `rotate` its coordinates, `fold_batch_norm`
its norms into its kernels, and `correct_bias` takes out the mean of the error.
"""

from compress_jax.core.levels import Float, Table
from compress_jax.quantize._adaround import adaround
from compress_jax.quantize._awq import awq
from compress_jax.quantize._bias import correct_bias
from compress_jax.quantize._binary import binary
from compress_jax.quantize._blocks import mxfp4, mxfp8, nvfp4
from compress_jax.quantize._clip import clip
from compress_jax.quantize._floats import fp4, fp8, nf4
from compress_jax.quantize._gptq import gptq
from compress_jax.quantize._hqq import hqq
from compress_jax.quantize._signed import signed
from compress_jax.quantize._smooth import smooth
from compress_jax.quantize._tabled import tabled
from compress_jax.quantize._ternary import ternary
from compress_jax.quantize._uniform import uniform
from compress_jax.quantize.folding import Folded
from compress_jax.quantize.formats import float_format
from compress_jax.quantize.grid import Grid
from compress_jax.quantize.least_squares import fit, mse
from compress_jax.quantize.scales import absmax, minmax, normal_clip, percentile, rms, spanning
from compress_jax.quantize.search_scales import entropy, pnorm
from compress_jax.quantize.solved import Solved, output_error

__all__ = [
    "Float",
    "Folded",
    "Grid",
    "Solved",
    "Table",
    "absmax",
    "adaround",
    "awq",
    "binary",
    "clip",
    "correct_bias",
    "entropy",
    "fit",
    "float_format",
    "fp4",
    "fp8",
    "gptq",
    "hqq",
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
    "signed",
    "smooth",
    "spanning",
    "tabled",
    "ternary",
    "uniform",
]
