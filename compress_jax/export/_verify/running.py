"""Run an exported file as a function of arrays, here or in a child process.

Runtimes are native code: a damaged or malicious file may end the process, hang or fill the memory.
`verify` therefore calls `measured`, which runs this module in a child process; files that you wrote
yourself may be run anywhere.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from compress_jax.core.errors import CompressError, ExportError
from compress_jax.export._artifact.seal import unsealed

Runner = Callable[..., np.ndarray]
SUFFIXES = (".onnx", ".tflite", ".stablehlo")


def runner(path: Path, threads: int = 0) -> Runner:
    """Return a function that runs a ``.onnx``, ``.tflite`` or ``.stablehlo`` file.

    A StableHLO program always uses all threads.

    Args:
      path: the file.
      threads: how many; 0 is one for each core.

    Returns:
      ``(*inputs) -> result``, the first result if there are several. A flatbuffer is run on pieces
      of its own batch size. It raises ExportError if the runtime fails.

    Raises:
      ExportError: if the suffix is none of these, there is no such file, or the runtime refuses it.

    Example:
      >>> runner(Path("m.pdf"))
      Traceback (most recent call last):
      compress_jax.core.errors.ExportError: m.pdf has none of the suffixes .onnx, .tflite and .stablehlo
    """  # noqa: E501
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
    """Return a function that raises an ExportError naming the file for every error.

    The runtimes' own exceptions have no common base.
    """

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
    """Return a function that runs a flatbuffer in batches of its own size."""
    from compress_jax.export._litert.interpreter import interpreter, run

    made: Any = interpreter(path, threads or os.cpu_count() or 1)
    size = int(made.get_input_details()[0]["shape"][0])
    return lambda *inputs: in_batches(lambda *batch: run(made, batch), inputs, size)


def scores(call: Callable[..., Any], arrays: Sequence[np.ndarray], size: int = 64) -> np.ndarray:
    """Return the results of a function for many examples, float64 ``[examples, ...]``.

    Args:
      call: ``(*inputs) -> result``.
      arrays: the inputs; the first axis counts examples.
      size: of a batch.

    Returns:
      The results.
    """
    return in_batches(call, arrays, size).astype(np.float64)


def in_batches(call: Callable[..., Any], arrays: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Call a function on batches of exactly one size, the last one filled up, and concatenate.

    Example:
      >>> in_batches(lambda x: 2 * x, [np.arange(5)], size=2).tolist()
      [0, 2, 4, 6, 8]
    """
    results = []
    for start in range(0, len(arrays[0]), size):
        batch = [x[start : start + size] for x in arrays]
        count = len(batch[0])
        filled = [np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)]) for x in batch]
        results.append(np.asarray(call(*filled))[:count])
    return np.concatenate(results)


def interleaved(
    files: Mapping[str, Runner], batch: Sequence[np.ndarray], rounds: int
) -> dict[str, list[float]]:
    """Time functions alternately; a first round does not count.

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


FLOOR = 2**33  # bytes of memory that the child may take for any file
FACTOR = 64  # larger files and inputs may take this many times their size


class Measured(NamedTuple):
    """Results and times of a file.

    Attributes:
      scores: float64, for all inputs.
      times: for each number of threads and batch size
        ``{"threads", "batch", "export": seconds, "float": seconds}``.
    """

    scores: np.ndarray
    times: list[dict[str, Any]]


def measured(
    path: Path,
    arrays: Sequence[np.ndarray],
    job: Mapping[str, Any],
    *,
    timeout: float,
    max_bytes: int | None,
) -> Measured:
    """Run a file, and time it beside another, in a child process.

    Args:
      path: the file.
      arrays: inputs; the first axis counts examples.
      job: ``baseline`` (a path or None), ``threads`` (numbers), ``batch_sizes`` and ``rounds``.
      timeout: seconds after which the child is ended.
      max_bytes: memory that it may take beyond what it starts with; None for 8 GiB or 64 times
        files and inputs.

    Returns:
      Scores and times.

    Raises:
      ExportError: if the file cannot be run, crashes its runtime, or goes beyond time or memory.
    """
    files = [path] + ([Path(job["baseline"])] if job["baseline"] else [])
    size = sum(file.stat().st_size for file in files) + sum(x.nbytes for x in arrays)
    room = max(FLOOR, FACTOR * size) if max_bytes is None else max_bytes
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        job = {**job, "path": str(path), "max_bytes": room, "inputs": len(arrays)}
        (folder / "job.json").write_text(json.dumps(job))
        for i, x in enumerate(arrays):
            np.save(folder / f"{i}.npy", x)
        module = "compress_jax.export._verify.running"
        command = [sys.executable, "-W", "ignore", "-m", module, place]
        options: dict[str, Any] = {"capture_output": True, "check": False, "timeout": timeout}
        try:
            done = subprocess.run(command, env=_environment(), **options)
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"{path} has not answered after {timeout:g} seconds; pass a larger timeout= if it "
                "may"
            ) from error
        return _answer(path, folder, done)


def _answer(path: Path, folder: Path, done: subprocess.CompletedProcess[bytes]) -> Measured:
    """Return what a child wrote, or raise its error."""
    file = folder / "answer.json"
    if done.returncode or not file.exists():
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        how = "failed"
        if done.returncode < 0:
            how = f"crashed ({signal.Signals(-done.returncode).name})"
        raise ExportError(f"{path}: its runtime {how}; its last line of output: {lines[-1][:500]}")
    answer = json.loads(file.read_text())
    if "error" in answer:
        raise ExportError(answer["error"])
    return Measured(np.load(folder / "scores.npy"), answer["times"])


def _environment() -> dict[str, str]:
    """Return the child's environment: package path, matmul precision, shared device memory."""
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_ENABLE_X64": str(int(jax.config.read("jax_enable_x64"))),
    }
    if jax.default_backend() != "gpu":  # a TPU belongs to the one process that has it
        found["JAX_PLATFORMS"] = "cpu"
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **found}


def main(folder: Path) -> None:
    """Run what a folder describes; this is the child.

    Args:
      folder: see above.
    """
    job = json.loads((folder / "job.json").read_text())
    arrays = [np.load(folder / f"{i}.npy") for i in range(job["inputs"])]
    _confine(job["max_bytes"])
    try:
        path = Path(job["path"])
        np.save(folder / "scores.npy", scores(runner(path), arrays))
        answer = {"times": _times(path, job, arrays)}
    except CompressError as error:
        answer = {"error": str(error)}
    except Exception as error:
        answer = {"error": f"{job['path']} cannot be run: {type(error).__name__}: {error}"}
    (folder / "answer.json").write_text(json.dumps(answer))


def _times(
    path: Path, job: Mapping[str, Any], arrays: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """Return the times of the file and of its baseline, by threads and batch size."""
    fixed = batch_of(path)
    found: list[dict[str, Any]] = []
    sizes = [fixed] if fixed is not None and job["batch_sizes"] else job["batch_sizes"]
    for threads in job["threads"] if sizes else ():
        files = {"export": runner(path, threads)}
        if job["baseline"]:
            files["float"] = runner(Path(job["baseline"]), threads)
        for size in sizes:
            batch = [np.resize(x, (size, *x.shape[1:])) for x in arrays]
            times = interleaved(files, batch, job["rounds"])
            found.append({"threads": threads, "batch": size, **times})
    return found


def _confine(room: int) -> None:
    """Limit how much this process may grow, and disable core files, where the OS can."""
    with contextlib.suppress(ImportError, OSError, ValueError, StopIteration):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        jax.devices()  # what the device takes for itself is not the file's
        lines = Path("/proc/self/status").read_text().splitlines()
        data = int(next(line for line in lines if line.startswith("VmData")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
