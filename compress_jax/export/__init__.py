"""Export: the artifact file, and programs for other runtimes."""

from compress_jax.core.files import write_atomically
from compress_jax.export._artifact.artifact import load, save
from compress_jax.export._artifact.breakdown import Part, breakdown
from compress_jax.export._artifact.limits import Limits
from compress_jax.export._coding.stream import stream
from compress_jax.export._exported import Exported, Row
from compress_jax.export._language.to_gguf import to_gguf
from compress_jax.export._language.to_hugging_face import to_hugging_face
from compress_jax.export._litert.to_litert import to_litert
from compress_jax.export._onnx.to_onnx import to_onnx
from compress_jax.export._stablehlo import to_stablehlo
from compress_jax.export._verify.verify import Timing, Verification, verify
from compress_jax.export._weights import to_safetensors

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
    "to_gguf",
    "to_hugging_face",
    "to_litert",
    "to_onnx",
    "to_safetensors",
    "to_stablehlo",
    "verify",
    "write_atomically",
]


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
