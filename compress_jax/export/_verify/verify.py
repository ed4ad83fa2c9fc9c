"""Verify an export: agreement with JAX, accuracy, size and speed in its own runtime.

Runtimes are native code: a damaged or malicious file may end the process, hang or fill the memory.
`verify` therefore calls `measured`, which runs this module in a child process (`main`); files that
you wrote yourself may be run anywhere, by `runner`.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from compress_jax.core.errors import CompressError, ExportError
from compress_jax.core.table import aligned
from compress_jax.core.types import Array, JsonObject, Model, PyTree
from compress_jax.export._artifact.seal import unsealed
from compress_jax.export._exported import as_inputs
from compress_jax.tasks import Task, scored
from compress_jax.tasks import accuracy as accuracy_metric
from compress_jax.tasks._metrics import number_text

FLOOR = 2**33  # bytes of memory that the child may take for any file
FACTOR = 64  # larger files and inputs may take this many times their size
SUFFIXES = (".onnx", ".tflite", ".stablehlo")
Runner = Callable[..., np.ndarray]
T = TypeVar("T")


class Timing(NamedTuple):
    """The time of one call, compared with the float export.

    Attributes:
      batch: examples a call.
      threads: threads of the runtime.
      seconds: of the export, median.
      baseline: of the float export, median; NaN without one.
      speedup: median over rounds of baseline over export in the same round; NaN without one.
      low: lower quartile of the same.
      high: upper quartile.

    Example:
      >>> print(Timing(1, 1, seconds=2e-3, baseline=3e-3, speedup=1.5, low=1.4, high=1.6))
      1.50x faster (1.40 to 1.60)
      >>> print(Timing(1, 1, seconds=2e-3, baseline=1.7e-3, speedup=0.87, low=0.85, high=0.89))
      13 % slower (0.85 to 0.89)
    """

    batch: int
    threads: int
    seconds: float
    baseline: float
    speedup: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the speed-up or the slowdown, with the quartiles of baseline over export."""
        if np.isnan(self.speedup):
            return "no float export to compare with"
        quartiles = f"({self.low:.2f} to {self.high:.2f})"
        if self.speedup >= 1:
            return f"{self.speedup:.2f}x faster {quartiles}"
        return f"{100 * (1 - self.speedup):.0f} % slower {quartiles}"


class Verification(NamedTuple):
    """What `verify` measured.

    Attributes:
      path: the file.
      examples: how many were run.
      agreement: share of examples whose largest result is the same as in JAX.
      difference: root mean square difference from the results in JAX, relative to their size.
      accuracy: in the target's runtime, or another metric; NaN without labels.
      reference: the same in JAX.
      nbytes: of the file.
      baseline_bytes: of the float export; 0 without one.
      timings: one for each batch size and number of threads.
      failures: what is wrong, in words; empty if the export passes.
      metric: the name of what ``accuracy`` is.
      percent: whether it is a share.

    Example:
      >>> print(Verification(Path("m.onnx"), 100, 0.99, 1e-4, 0.97, 0.97, 2048, 8192, (), ()))
      m.onnx
      agreement with JAX   99.00 % of 100 examples
      difference from JAX  0.0001 of the result's size
      accuracy             97.00 %, in JAX 97.00 %
      size                 2,048 bytes, 4.00x smaller than the float export's 8,192
    """

    path: Path
    examples: int
    agreement: float
    difference: float
    accuracy: float
    reference: float
    nbytes: int
    baseline_bytes: int
    timings: tuple[Timing, ...]
    failures: tuple[str, ...]
    metric: str = "accuracy"
    percent: bool = True

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    def rows(self) -> list[tuple[str, str]]:
        """Return the table: the name of each measurement, and its value beside the reference's."""
        rows = [
            ("agreement with JAX", f"{100 * self.agreement:.2f} % of {self.examples:,} examples"),
            ("difference from JAX", f"{self.difference:.2g} of the result's size"),
        ]
        if not np.isnan(self.accuracy):
            here = number_text(self.accuracy, self.percent)
            rows.append(
                (self.metric, f"{here}, in JAX {number_text(self.reference, self.percent)}")
            )
        size = f"{self.nbytes:,} bytes"
        if self.baseline_bytes:
            ratio = self.baseline_bytes / self.nbytes
            how = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"
            size += f", {how} than the float export's {self.baseline_bytes:,}"
        rows.append(("size", size))
        for each in self.timings:
            name = f"batch {each.batch}, {each.threads} thread{'s' * (each.threads > 1)}"
            rows.append((name, f"{1e3 * each.seconds:.3f} ms, {each}"))
        return [*rows, *(("FAILED", each) for each in self.failures)]

    def __str__(self) -> str:
        """Return the table as lines."""
        return f"{self.path}\n{aligned(self.rows(), left=2)}"

    def record(self) -> JsonObject:
        """Return everything as JSON takes it."""
        fields = {
            **self._asdict(),
            "path": self.path.name,
            "timings": [each._asdict() for each in self.timings],
        }
        return {**fields, "passed": self.passed, "failures": list(self.failures)}


def verify(
    path: str | os.PathLike[str],
    reference: Callable[..., Array],
    inputs: PyTree,
    labels: Array | Sequence[int] | None = None,
    *,
    task: Task | None = None,
    split: Mapping[str, Array] | None = None,
    baseline: str | os.PathLike[str] | None = None,
    batch_sizes: Sequence[int] = (1, 64),
    threads: Sequence[int] | None = None,
    rounds: int = 30,
    min_agreement: float = 0.98,
    max_drop: float = 0.01,
    timeout: float = 600.0,
    max_bytes: int | None = None,
) -> Verification:
    """Run an exported file in its own runtime; compare it with JAX and with the float export.

    The file runs in a process of its own: a damaged or malicious file raises an error and does not
    end the caller.

    Args:
      path: ``.onnx``, ``.tflite`` or ``.stablehlo``.
      reference: ``(*inputs) -> scores [batch, classes]`` in JAX: the simulation that the export
        must follow.
      inputs: test inputs, an array or a tuple of arrays; the first axis counts examples.
      labels: integer labels, for accuracies.
      task: with ``split``, what is measured in place of the accuracy of ``labels``. Where outputs
        are no logits, the agreement is 1 less the relative difference.
      split: the examples of ``inputs``, with the entries that the task names.
      baseline: the float export for the same runtime; sizes and times are compared with its.
      batch_sizes: to time; a file of a fixed batch size is timed at that one only.
      threads: to time; by default 1 and all cores.
      rounds: timed calls of each; the two files alternate, so that both run under the same load.
      min_agreement: the smallest share of equal answers that passes.
      max_drop: the largest loss of accuracy, or of the task's metric, against JAX that passes; 0.01
        is a point.
      timeout: seconds that the file may take for everything.
      max_bytes: memory that it may take; None for 8 GiB or 64 times the files and the inputs,
        whichever is more.

    Returns:
      The numbers; ``print`` shows them, slowdowns as plainly as speed-ups.

    Raises:
      ExportError: if the file cannot be run at all: it is damaged or foreign, crashes its runtime,
        or goes beyond a limit.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> import compress_jax as cj
      >>> file, fn = Path(tempfile.mkdtemp()) / "m.stablehlo", lambda w, x: x @ w
      >>> _ = cj.export.to_stablehlo(fn, jnp.eye(2), jnp.ones((1, 2)), file)  # doctest: +SKIP
      >>> x, reference = np.eye(2, dtype=np.float32), lambda x: x
      >>> done = cj.export.verify(file, reference, x, [0, 1], batch_sizes=())  # doctest: +SKIP
      >>> done.passed, done.agreement, done.accuracy  # doctest: +SKIP
      (True, 1.0, 1.0)
    """
    path = Path(path)
    arrays = as_inputs(inputs)
    base = Path(baseline) if baseline is not None else None
    for file in filter(None, (path, base)):
        present(file)
    cores = os.cpu_count() or 1
    # A StableHLO program takes all threads whatever is asked for.
    default = (cores,) if path.suffix == ".stablehlo" else (1, cores)
    job = {
        "baseline": str(base) if base else None,
        "threads": list(dict.fromkeys(threads or default)),
        "batch_sizes": list(batch_sizes),
        "rounds": rounds,
    }
    theirs, times = measured(path, arrays, job, timeout=timeout, max_bytes=max_bytes)
    ours = scores(reference, arrays)  # float64 [examples, classes]
    if ours.shape != theirs.shape:
        raise ExportError(
            f"{path} returns {list(theirs.shape)} where JAX returns {list(ours.shape)}"
        )
    difference = float(np.sqrt(((ours - theirs) ** 2).mean()) / (np.sqrt((ours**2).mean()) or 1))
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    if task is not None and not task.logits:
        agreement = max(0.0, 1 - difference)
    metric = _ACCURACY if task is None else task.metric
    accuracy, known = (_measured(each, labels, task, split) for each in (theirs, ours))
    loss = metric.loss(accuracy, known)
    # Everything that is wrong, not only the first of it; `not >=` counts NaN as a failure.
    failures = []
    if not np.isfinite(theirs).all():
        failures.append("results are not finite")
    if not agreement >= min_agreement:
        failures.append(f"agreement {100 * agreement:.2f} % is below {100 * min_agreement:.2f} %")
    if loss > max_drop:
        by = f"{100 * loss:.2f} points" if metric.percent else f"{loss:.4g}"
        stands = "below" if metric.higher_is_better else "above"
        failures.append(f"{metric.name} is {by} {stands} JAX's")
    return Verification(
        path,
        examples=len(ours),
        agreement=agreement,
        difference=difference,
        accuracy=accuracy,
        reference=known,
        nbytes=path.stat().st_size,
        baseline_bytes=base.stat().st_size if base else 0,
        timings=tuple(_timing(each, each["batch"], each["threads"]) for each in times),
        failures=tuple(failures),
        metric=metric.name,
        percent=metric.percent,
    )


_ACCURACY = accuracy_metric()


def _measured(
    scores: np.ndarray,
    labels: Array | Sequence[int] | None,
    task: Task | None,
    split: Mapping[str, Array] | None,
) -> float:
    """Return the metric of scores ``[examples, ...]``; NaN without labels."""
    if task is not None and split is not None:
        return scored(task, scores, split)[task.metric.name]
    if labels is None:
        return float("nan")
    return float((scores.argmax(-1) == np.asarray(labels)).mean())


def _timing(times: Mapping[str, Sequence[float]], batch: int, threads: int) -> Timing:
    export = times["export"]
    plain = times.get("float")
    seconds = statistics.median(export)
    if plain is None:
        return Timing(batch, threads, seconds, *[float("nan")] * 4)
    # Ratios within a round cancel the load of the machine at that moment.
    ratios = [b / a for a, b in zip(export, plain, strict=True)]
    low, middle, high = map(float, np.quantile(ratios, [0.25, 0.5, 0.75]))
    return Timing(batch, threads, seconds, statistics.median(plain), middle, low, high)


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


def _named(path: Path, what: str, run: Callable[..., T]) -> Callable[..., T]:
    """Return a function that raises an ExportError naming the file for every error.

    The runtimes' own exceptions have no common base.
    """

    def call(*args: object) -> T:
        try:
            return run(*args)
        except Exception as error:
            # Other errors, a KeyError for one, are not clear without their type.
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

    # A flatbuffer has one batch size, which its tensors are allocated for.
    made: Model = interpreter(path, threads or os.cpu_count() or 1)
    size = int(made.get_input_details()[0]["shape"][0])
    return lambda *inputs: in_batches(lambda *batch: run(made, batch), inputs, size)


def scores(call: Callable[..., Array], arrays: Sequence[np.ndarray], size: int = 64) -> np.ndarray:
    """Return the results of a function for many examples, float64 ``[examples, ...]``.

    Args:
      call: ``(*inputs) -> result``.
      arrays: the inputs; the first axis counts examples.
      size: of a batch.

    Returns:
      The results.
    """
    return in_batches(call, arrays, size).astype(np.float64)


def in_batches(call: Callable[..., Array], arrays: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Call a function on batches of exactly one size, the last one filled up, and concatenate.

    Example:
      >>> in_batches(lambda x: 2 * x, [np.arange(5)], size=2).tolist()
      [0, 2, 4, 6, 8]
    """
    results = []
    for start in range(0, len(arrays[0]), size):
        batch = [x[start : start + size] for x in arrays]
        count = len(batch[0])
        # Its last example again, whose results are cut off.
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
        # The order alternates, so that neither always runs in the caches that the other has left.
        for name in sorted(files, reverse=bool(i % 2)):
            start = time.perf_counter()
            files[name](*batch)
            times[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in times.items()}


class Measured(NamedTuple):
    """Results and times of a file.

    Attributes:
      scores: float64, for all inputs.
      times: for each number of threads and batch size
        ``{"threads", "batch", "export": seconds, "float": seconds}``.
    """

    scores: np.ndarray
    times: list[JsonObject]


def measured(
    path: Path,
    arrays: Sequence[np.ndarray],
    job: JsonObject,
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
        # Warnings are off: -m warns of a module that its own package has imported already.
        module = "compress_jax.export._verify.verify"
        command = [sys.executable, "-W", "ignore", "-m", module, place]
        try:
            done = subprocess.run(
                command, env=_environment(), capture_output=True, check=False, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"{path} has not answered after {timeout:g} seconds; pass a larger timeout= if it "
                "may"
            ) from error
        return _answer(path, folder, done)


def _answer(path: Path, folder: Path, done: subprocess.CompletedProcess[bytes]) -> Measured:
    """Return what a child wrote, or raise its error."""
    # A crash leaves no answer; the error quotes the last line of output instead.
    file = folder / "answer.json"
    if done.returncode or not file.exists():
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        how = "failed"
        if done.returncode < 0:  # minus the number of the signal
            how = f"crashed ({signal.Signals(-done.returncode).name})"
        raise ExportError(f"{path}: its runtime {how}; its last line of output: {lines[-1][:500]}")
    answer = json.loads(file.read_text())
    if "error" in answer:
        raise ExportError(answer["error"])
    return Measured(np.load(folder / "scores.npy"), answer["times"])


def _environment() -> dict[str, str]:
    """Return the child's environment: package path, matmul precision, shared device memory."""
    root = str(Path(__file__).parents[3])  # this very package, installed or not
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
    """Run a file as `measured` asks; this is the child process.

    Args:
      folder: with ``job.json`` and the inputs; takes ``answer.json`` and ``scores.npy``.
    """
    job = json.loads((folder / "job.json").read_text())
    arrays = [np.load(folder / f"{i}.npy") for i in range(job["inputs"])]
    # Before the runtime reads the file.
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


def _times(path: Path, job: JsonObject, arrays: Sequence[np.ndarray]) -> list[JsonObject]:
    """Return the times of the file and of its baseline, by threads and batch size."""
    fixed = batch_of(path)
    found: list[JsonObject] = []
    sizes = [fixed] if fixed is not None and job["batch_sizes"] else job["batch_sizes"]
    for threads in job["threads"] if sizes else ():
        files = {"export": runner(path, threads)}
        if job["baseline"]:
            files["float"] = runner(Path(job["baseline"]), threads)
        for size in sizes:
            # The examples again and again, where a batch is larger than all of them.
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
