"""An exported file as a function of arrays, whatever runtime it is for.

Runtimes are native code: a file that is damaged, or made to do harm, may end the process. `verify` therefore uses this
module in a process of its own (see `isolated`); files that you wrote yourself may be run anywhere.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from compress_jax.core.errors import CompressError, ExportError
from compress_jax.export._artifact.seal import unsealed

Runner = Callable[..., np.ndarray]
SUFFIXES = (".onnx", ".tflite", ".stablehlo")


def runner(path: Path, threads: int = 0) -> Runner:
    """Return a function that runs a file: ``.onnx``, ``.tflite``, or ``.stablehlo`` (which always uses all threads).

    Args:
      path: the file.
      threads: how many; 0 is one for each core.

    Returns:
      ``(*inputs) -> result``, the first result if there are several. A flatbuffer is run on pieces of its own batch size.
      It raises ExportError if the runtime fails.

    Raises:
      ExportError: if the suffix is none of these, there is no such file, or the runtime refuses it.

    Example:
      >>> runner(Path("model.pdf"))
      Traceback (most recent call last):
      compress_jax.core.errors.ExportError: model.pdf has none of the suffixes .onnx, .tflite and .stablehlo
    """
    present(path)
    makers = {".onnx": _onnx, ".tflite": _pieces, ".stablehlo": _stablehlo}
    run = _named(path, "cannot be loaded", makers[path.suffix])(path, threads)
    return _named(path, "cannot be run on these inputs", run)


def present(path: Path) -> None:
    """Raise ExportError unless a path is a file with the suffix of a runtime."""
    if path.suffix not in SUFFIXES:
        raise ExportError(f"{path} has none of the suffixes .onnx, .tflite and .stablehlo")
    if not path.is_file():
        raise ExportError(f"{path} is no file; export the model first")


def _named(path: Path, what: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose every error is an ExportError that names the file; runtimes' own have no common root."""

    def call(*args: Any) -> Any:
        try:
            return run(*args)
        except Exception as error:
            kind = "" if isinstance(error, CompressError) else f"{type(error).__name__}: "
            raise ExportError(f"{path} {what}: {kind}{error}") from error

    return call


def _onnx(path: Path, threads: int) -> Runner:
    from compress_jax.export._onnx.runtime import session

    run = session(path, threads=threads)
    names = [each.name for each in run.get_inputs()]
    return lambda *inputs: run.run(None, dict(zip(names, inputs, strict=True)))[0]


def _stablehlo(path: Path, threads: int) -> Runner:
    program = jax.jit(jax.export.deserialize(bytearray(unsealed(path.read_bytes()))).call)
    return lambda *inputs: np.asarray(jax.tree.leaves(program(*inputs))[0])


def batch_of(path: Path) -> int | None:
    """Return the only batch size that a file runs at; None if it runs any."""
    if path.suffix != ".tflite":
        return None
    from compress_jax.export._litert.interpreter import interpreter

    return int(interpreter(path).get_input_details()[0]["shape"][0])


def _pieces(path: Path, threads: int) -> Runner:
    """Run a flatbuffer on pieces of its batch size, the last one filled up."""
    from compress_jax.export._litert.interpreter import interpreter, run

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


def scores(call: Callable[..., Any], arrays: Sequence[np.ndarray], size: int = 64) -> np.ndarray:
    """Return what a function gives for many examples, in batches of one size.

    Args:
      call: ``(*inputs) -> result``.
      arrays: the inputs; the first axis counts examples.
      size: of a batch.

    Returns:
      float64.
    """
    count, results = len(arrays[0]), []
    for start in range(0, count, size):
        piece = [x[start : start + size] for x in arrays]
        filled = [np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)]) for x in piece]
        results.append(np.asarray(call(*filled))[: len(piece[0])])
    return np.concatenate(results).astype(np.float64)


def interleaved(files: Mapping[str, Runner], batch: Sequence[np.ndarray], rounds: int) -> dict[str, list[float]]:
    """Time functions in turns; a first round does not count.

    Args:
      files: functions by name.
      batch: their inputs.
      rounds: how many count.

    Returns:
      Seconds by name, in the order of the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in files}
    for i in range(rounds + 1):
        for name in sorted(files, reverse=bool(i % 2)):
            start = time.perf_counter()
            files[name](*batch)
            times[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in times.items()}
