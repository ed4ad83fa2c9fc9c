"""Verify an export: agreement with JAX, accuracy, size and speed in its own runtime."""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress_jax.core.errors import ExportError
from compress_jax.core.table import aligned
from compress_jax.core.types import PyTree
from compress_jax.export._exported import as_inputs
from compress_jax.export._verify.running import interleaved, measured, present, scores

__all__ = ["Timing", "Verification", "interleaved", "verify"]


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
      accuracy: in the target's runtime; NaN without labels.
      reference: accuracy in JAX.
      nbytes: of the file.
      baseline_bytes: of the float export; 0 without one.
      timings: one for each batch size and number of threads.
      failures: what is wrong, in words; empty if the export passes.

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
            accuracies = f"{100 * self.accuracy:.2f} %, in JAX {100 * self.reference:.2f} %"
            rows.append(("accuracy", accuracies))
        size = f"{self.nbytes:,} bytes"
        if self.baseline_bytes:
            ratio = self.baseline_bytes / self.nbytes
            size += f", {ratio:.2f}x smaller than the float export's {self.baseline_bytes:,}"
        rows.append(("size", size))
        for each in self.timings:
            name = f"batch {each.batch}, {each.threads} thread{'s' * (each.threads > 1)}"
            rows.append((name, f"{1e3 * each.seconds:.3f} ms, {each}"))
        return [*rows, *(("FAILED", each) for each in self.failures)]

    def __str__(self) -> str:
        """Return the table as lines."""
        return f"{self.path}\n{aligned(self.rows(), left=2)}"

    def record(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        fields = {
            **self._asdict(),
            "path": self.path.name,
            "timings": [each._asdict() for each in self.timings],
        }
        return {**fields, "passed": self.passed, "failures": list(self.failures)}


def verify(
    path: str | os.PathLike[str],
    reference: Callable[..., Any],
    inputs: PyTree,
    labels: Any = None,
    *,
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
      baseline: the float export for the same runtime; sizes and times are compared with its.
      batch_sizes: to time; a file of a fixed batch size is timed at that one only.
      threads: to time; by default 1 and all cores.
      rounds: timed calls of each; the two files alternate, so that both run under the same load.
      min_agreement: the smallest share of equal answers that passes.
      max_drop: the largest loss of accuracy against JAX that passes, 0.01 for a point.
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
    default = (cores,) if path.suffix == ".stablehlo" else (1, cores)
    job = {
        "baseline": str(base) if base else None,
        "threads": list(dict.fromkeys(threads or default)),
        "batch_sizes": list(batch_sizes),
        "rounds": rounds,
    }
    theirs, times = measured(path, arrays, job, timeout=timeout, max_bytes=max_bytes)
    ours = scores(reference, arrays)
    if ours.shape != theirs.shape:
        raise ExportError(
            f"{path} returns {list(theirs.shape)} where JAX returns {list(ours.shape)}"
        )
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    difference = float(np.sqrt(((ours - theirs) ** 2).mean()) / (np.sqrt((ours**2).mean()) or 1))
    accuracy = _accuracy(theirs, labels)
    known = _accuracy(ours, labels)
    failures = []
    if not np.isfinite(theirs).all():
        failures.append("results are not finite")
    if not agreement >= min_agreement:
        failures.append(f"agreement {100 * agreement:.2f} % is below {100 * min_agreement:.2f} %")
    if known - accuracy > max_drop:
        failures.append(f"accuracy is {100 * (known - accuracy):.2f} points below JAX's")
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
    )


def _accuracy(scores: np.ndarray, labels: Any) -> float:
    """Return the accuracy of scores ``[examples, classes]``; NaN without labels."""
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
