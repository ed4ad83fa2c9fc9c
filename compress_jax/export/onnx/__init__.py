"""ONNX: the float graph of a function, the paths of its parameters in it, and their integer codes put in their place."""

from compress_jax.export.onnx._to_onnx import to_onnx

__all__ = ["to_onnx"]
