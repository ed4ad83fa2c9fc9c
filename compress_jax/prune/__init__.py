"""Pruning: weights seen as zero, chosen by a score, an amount and a schedule."""

from compress_jax.prune._cubic import cubic
from compress_jax.prune._magnitude import magnitude

__all__ = ["cubic", "magnitude"]
