"""LiteRT: StableHLO to a flatbuffer in a process of its own, quantized with our scales."""

from compress_jax.export.litert._to_litert import to_litert

__all__ = ["to_litert"]
