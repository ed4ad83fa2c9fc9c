"""Leaving the lab: the artifact file, and programs for other runtimes."""

from compress_jax.export._breakdown import Part, breakdown
from compress_jax.export._stablehlo import to_stablehlo
from compress_jax.export._stream import stream
from compress_jax.export._verify import Timing, Verification, verify
from compress_jax.export._weights import to_safetensors
from compress_jax.export.artifact import load, save, write_atomically
from compress_jax.export.exported import Exported, Row
from compress_jax.export.limits import Limits
from compress_jax.export.litert import to_litert
from compress_jax.export.onnx import to_onnx

__all__ = [
    "Exported",
    "Limits",
    "Part",
    "Row",
    "Timing",
    "Verification",
    "breakdown",
    "load",
    "save",
    "stream",
    "to_litert",
    "to_onnx",
    "to_safetensors",
    "to_stablehlo",
    "verify",
    "write_atomically",
]
