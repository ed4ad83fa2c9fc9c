"""Quantization: weights on few levels.

`uniform` rounds to evenly spaced levels; `fp8`, `fp4`, `nf4`, `mxfp8`, `mxfp4`, `nvfp4`, `ternary` and `binary` to others,
and `tabled` to any of one's own. Scale rules, grids and level tables are their pieces.

Once, after training: `gptq`, `adaround` and `signed` choose roundings by the layers' outputs, `clip` and `awq` ranges and
scales, `smooth` and `equalize` move scales between layers of the same function, `rotate` its coordinates, `fold_batch_norm`
its norms into its kernels, and `correct_bias` takes out the mean of the error.

Activations enter through a model's trace: `activations` applies `dynamic`, `static`, `lsq_inputs` (LSQ, and LSQ+ with
``offset=True``) or `pact` at its contractions, `lsq` learns the steps of weights, `integer` runs packed params on integer
codes, and `contractions` lists every product with its operands' formats, or why it computes in floats.
"""

from compress_jax.core.levels import Float, Table
from compress_jax.quantize._activations import Activations, activations
from compress_jax.quantize._adaround import adaround
from compress_jax.quantize._awq import awq
from compress_jax.quantize._bias import Corrected, correct_bias
from compress_jax.quantize._binary import binary
from compress_jax.quantize._blocks import mxfp4, mxfp8, nvfp4
from compress_jax.quantize._clip import clip
from compress_jax.quantize._contractions import Contractions, contractions
from compress_jax.quantize._dynamic import dynamic
from compress_jax.quantize._equalize import equalize
from compress_jax.quantize._floats import fp4, fp8, nf4
from compress_jax.quantize._fold import fold_batch_norm
from compress_jax.quantize._gptq import gptq
from compress_jax.quantize._hqq import hqq
from compress_jax.quantize._integer import Integer, integer
from compress_jax.quantize._lsq import lsq, lsq_inputs
from compress_jax.quantize._pact import pact, pact_decay
from compress_jax.quantize._rotate import Rotated, rotate
from compress_jax.quantize._signed import signed
from compress_jax.quantize._smooth import smooth
from compress_jax.quantize._static import static
from compress_jax.quantize._tabled import tabled
from compress_jax.quantize._ternary import ternary
from compress_jax.quantize._uniform import uniform
from compress_jax.quantize.activation import ActivationQuantizer
from compress_jax.quantize.folding import Folded
from compress_jax.quantize.formats import float_format
from compress_jax.quantize.grid import Grid
from compress_jax.quantize.least_squares import fit, mse
from compress_jax.quantize.scales import absmax, minmax, normal_clip, percentile, rms, spanning
from compress_jax.quantize.search_scales import entropy, pnorm
from compress_jax.quantize.solved import Solved, output_error
from compress_jax.quantize.stochastic import quantized_backward, stochastic_round

__all__ = [
    "ActivationQuantizer",
    "Activations",
    "Contractions",
    "Corrected",
    "Float",
    "Folded",
    "Grid",
    "Integer",
    "Rotated",
    "Solved",
    "Table",
    "absmax",
    "activations",
    "adaround",
    "awq",
    "binary",
    "clip",
    "contractions",
    "correct_bias",
    "dynamic",
    "entropy",
    "equalize",
    "fit",
    "float_format",
    "fold_batch_norm",
    "fp4",
    "fp8",
    "gptq",
    "hqq",
    "integer",
    "lsq",
    "lsq_inputs",
    "minmax",
    "mse",
    "mxfp4",
    "mxfp8",
    "nf4",
    "normal_clip",
    "nvfp4",
    "output_error",
    "pact",
    "pact_decay",
    "percentile",
    "pnorm",
    "quantized_backward",
    "rms",
    "rotate",
    "signed",
    "smooth",
    "spanning",
    "static",
    "stochastic_round",
    "tabled",
    "ternary",
    "uniform",
]
