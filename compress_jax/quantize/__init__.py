"""Quantization: weights on few levels. `uniform` is the Compression; the scale rules and the grid are its pieces."""

from compress_jax.quantize._uniform import uniform
from compress_jax.quantize.grid import Grid
from compress_jax.quantize.least_squares import fit, mse
from compress_jax.quantize.scales import absmax, minmax, normal_clip, percentile, rms, spanning

__all__ = ["Grid", "absmax", "fit", "minmax", "mse", "normal_clip", "percentile", "rms", "spanning", "uniform"]
