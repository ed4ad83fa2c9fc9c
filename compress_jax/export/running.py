"""An exported file as a function of arrays, whatever runtime it is for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from compress_jax.core.errors import ExportError

Runner = Callable[..., np.ndarray]


def runner(path: Path, threads: int = 0) -> Runner:
    """Return a function that runs a file: ``.onnx``, ``.tflite``, or ``.stablehlo`` (which always uses all threads).

    Args:
      path: the file.
      threads: how many; 0 is one for each core.

    Returns:
      ``(*inputs) -> result``, the first result if there are several. A flatbuffer is run on pieces of its own batch size.

    Raises:
      ExportError: if the suffix is none of these, or the runtime refuses the file.

    Example:
      >>> runner(Path("model.pdf"))
      Traceback (most recent call last):
      compress_jax.core.errors.ExportError: model.pdf has none of the suffixes .onnx, .tflite and .stablehlo
    """
    if path.suffix == ".onnx":
        from compress_jax.export.onnx.runtime import session

        run = session(path, threads=threads)
        names = [each.name for each in run.get_inputs()]
        return lambda *inputs: run.run(None, dict(zip(names, inputs, strict=True)))[0]
    if path.suffix == ".tflite":
        return _pieces(path, threads)
    if path.suffix == ".stablehlo":
        program = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
        return lambda *inputs: np.asarray(jax.tree.leaves(program(*inputs))[0])
    raise ExportError(f"{path} has none of the suffixes .onnx, .tflite and .stablehlo")


def batch_of(path: Path) -> int | None:
    """Return the only batch size that a file runs at; None if it runs any."""
    if path.suffix != ".tflite":
        return None
    from compress_jax.export.litert.interpreter import interpreter

    return int(interpreter(path).get_input_details()[0]["shape"][0])


def _pieces(path: Path, threads: int) -> Runner:
    """Run a flatbuffer on pieces of its batch size, the last one filled up."""
    import os

    from compress_jax.export.litert.interpreter import interpreter, run

    made: Any = interpreter(path, threads or os.cpu_count() or 1)
    size = int(made.get_input_details()[0]["shape"][0])

    def call(*inputs: np.ndarray) -> np.ndarray:
        count, results = len(inputs[0]), []
        for start in range(0, count, size):
            piece = [x[start : start + size] for x in inputs]
            filled = [np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)]) for x in piece]
            results.append(run(made, filled)[: len(piece[0])])
        return np.concatenate(results)

    return call
