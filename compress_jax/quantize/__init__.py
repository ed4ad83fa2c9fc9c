"""Quantization: weights and activations on few levels.

Formats of weights: `uniform` rounds to evenly spaced levels, `gguf` to those of llama.cpp's blocks;
`fp8`, `fp4`, `nf4`, `mxfp8`, `mxfp4`, `nvfp4`, `ternary` and `binary` to others, and `codebook` to
any table or small float. Scale rules (`absmax`, `mse`, `hqq`, ...) choose their scales; `lsq`
trains them. `rate_distortion` chooses codes for their error and for their bits in a coded file.

Once, after training: `gptq`, `adaround` and `signround` choose the rounding that changes a layer's
outputs least, `trellis` that of fewest bits at an error, `clip` and `awq` choose clipping ranges
and scales. `smooth`, `equalize`, `rotate` and `fold_batch_norm` rewrite params without changing the
function, and `correct_bias` removes the mean of the error.

Activations: `activations` applies `dynamic`, `static`, `lsq_inputs` or `pact` at the contractions
of a model. `integer` runs packed params on integer codes, and `contractions` lists every
contraction with the formats of its operands, or why it computes in floats.

README.md in this folder has a table of which method when.
"""

from compress_jax.core.deprecated import renamed
from compress_jax.core.levels import Float, Table
from compress_jax.layerwise._clip import clip
from compress_jax.layerwise._gptq import gptq
from compress_jax.layerwise._result import Rewritten as Rewritten
from compress_jax.layerwise._solve import output_error
from compress_jax.quantize._activations.activations import Activations, activations
from compress_jax.quantize._activations.dynamic import dynamic
from compress_jax.quantize._activations.kv_grid import KVGrid
from compress_jax.quantize._activations.quantizer import ActivationQuantizer
from compress_jax.quantize._activations.round_kv import round_kv
from compress_jax.quantize._activations.static import static
from compress_jax.quantize._activations.stochastic import quantized_backward, stochastic_round
from compress_jax.quantize._integer.integer import Contractions, Integer, contractions, integer
from compress_jax.quantize._learned.lsq import lsq, lsq_inputs
from compress_jax.quantize._learned.pact import pact, pact_decay
from compress_jax.quantize._rewrites.awq import awq
from compress_jax.quantize._rewrites.batch_norm import fold_batch_norm
from compress_jax.quantize._rewrites.bias import correct_bias
from compress_jax.quantize._rewrites.equalize import equalize
from compress_jax.quantize._rewrites.rotate import rotate
from compress_jax.quantize._rewrites.rotate_inputs import rotate_inputs
from compress_jax.quantize._rewrites.smooth import smooth
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._scales.hqq import hqq
from compress_jax.quantize._scales.least_squares import fit, mse
from compress_jax.quantize._scales.rules import (
    absmax,
    minmax,
    normal_clip,
    percentile,
    rms,
    scale_from_range,
)
from compress_jax.quantize._scales.search import entropy, pnorm
from compress_jax.quantize._solvers.adaround import adaround
from compress_jax.quantize._solvers.signround import signround
from compress_jax.quantize._solvers.trellis import trellis
from compress_jax.quantize._weights.binary import binary
from compress_jax.quantize._weights.blocks import mxfp4, mxfp8, nvfp4
from compress_jax.quantize._weights.codebook import codebook
from compress_jax.quantize._weights.floats import float_format, fp4, fp8, nf4
from compress_jax.quantize._weights.gguf import gguf
from compress_jax.quantize._weights.rate_distortion import rate_distortion, step_for_error
from compress_jax.quantize._weights.ternary import ternary
from compress_jax.quantize._weights.uniform import uniform

__all__ = [
    "ActivationQuantizer",
    "Activations",
    "Contractions",
    "Float",
    "Grid",
    "Integer",
    "KVGrid",
    "Table",
    "absmax",
    "activations",
    "adaround",
    "awq",
    "binary",
    "clip",
    "codebook",
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
    "gguf",
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
    "rate_distortion",
    "rms",
    "rotate",
    "rotate_inputs",
    "round_kv",
    "scale_from_range",
    "signround",
    "smooth",
    "static",
    "step_for_error",
    "stochastic_round",
    "ternary",
    "trellis",
    "uniform",
]

__getattr__ = renamed(
    {
        "signed": "signround",
        "spanning": "scale_from_range",
        "tabled": "codebook",
        "Corrected": "Rewritten",
        "Folded": "Rewritten",
        "Rotated": "Rewritten",
        "Solved": "Rewritten",
    },
    __name__,
)


def __dir__() -> list[str]:
    """Return the public names, without the modules that hold them."""
    return sorted(__all__)
