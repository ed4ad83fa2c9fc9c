"""Compression and distillation of Flax models as pure functions over parameter pytrees."""

from compress_jax.core import Compression, CompressionState, at, between, chain, coverage, every, leafwise, rules, unpack

__all__ = [
    "Compression",
    "CompressionState",
    "at",
    "between",
    "chain",
    "coverage",
    "every",
    "leafwise",
    "rules",
    "unpack",
]
