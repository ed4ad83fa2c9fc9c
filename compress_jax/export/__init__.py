"""Leaving the lab: the artifact file, and programs for other runtimes."""

from compress_jax.export._breakdown import Part, breakdown
from compress_jax.export._stablehlo import to_stablehlo
from compress_jax.export._stream import stream
from compress_jax.export.artifact import load, save, write_atomically
from compress_jax.export.exported import Exported, Row

__all__ = ["Exported", "Part", "Row", "breakdown", "load", "save", "stream", "to_stablehlo", "write_atomically"]
