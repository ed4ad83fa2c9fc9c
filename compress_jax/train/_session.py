"""What happens between two steps: metrics to disk, checkpoints, and the check that the numbers still mean something."""

import contextlib
import errno
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import CheckpointError, NonFiniteError
from compress_jax.train._progress import Report
from compress_jax.train.checkpoint import Checkpoints
from compress_jax.train.metrics import JsonLines, Recorder, TensorBoard
from compress_jax.train.state import TrainState

_log = logging.getLogger(__name__)


class Session(NamedTuple):
    """Where the results of a run go.

    Attributes:
      recorders: what metrics are written to.
      report: shows progress.
      checkpoints: where states are saved; None saves none.
      ahead: metrics of the steps that the device may not have finished.
    """

    recorders: list[Recorder]
    report: Report
    checkpoints: Checkpoints | None
    ahead: deque[Any]

    def keep_pace(self, step: int, metrics: Any, most: int = 2) -> None:
        """Wait until the device is at most so many steps behind, or stopping would mean finishing a long queue."""
        self.ahead.append(metrics)
        if len(self.ahead) > most:
            jax.block_until_ready(self.ahead.popleft())
        self.report(step, {})

    def record(self, step: int, group: str, values: Mapping[str, Any]) -> None:
        """Write and show metrics; under pmap each comes once a device, all equal."""
        numbers = {name: float(np.ravel(value)[0]) for name, value in jax.device_get(dict(values)).items()}
        with _writable(None):
            for recorder in self.recorders:
                recorder.write(step, {f"{group}/{name}": value for name, value in numbers.items()})
        self.report(step, numbers)
        self._require_finite(step, [f"{name} is {value}" for name, value in numbers.items() if not np.isfinite(value)])

    def save(self, step: int, state: TrainState) -> None:
        """Save a state, unless it is good for nothing: it must not push out a good checkpoint."""
        if self.checkpoints is None:
            return
        if not _all_finite(state.trainable):
            self._require_finite(step, ["a parameter is nan or infinite"])
        self.checkpoints.save(step, state)

    def _require_finite(self, step: int, bad: list[str]) -> None:
        if bad:
            kept = self.checkpoints.steps() if self.checkpoints else []
            good = f" (the last good checkpoint is of step {kept[-1]})" if kept else ""
            advice = "lower the learning rate, warm it up, or clip gradients"
            raise NonFiniteError(f"training diverged: {', '.join(bad)} at step {step}{good}; {advice}")


@contextlib.contextmanager
def open_recorders(directory: str | os.PathLike[str] | None, start: int) -> Iterator[list[Recorder]]:
    """Open the files for metrics in a directory, if any; only the first process of a job writes them."""
    recorders: list[Recorder] = []
    if directory is not None and jax.process_index() == 0:
        _tell_damaged(Path(directory) / "metrics.jsonl")
        with _writable(directory):
            recorders.append(JsonLines(Path(directory) / "metrics.jsonl", start))
            recorders.append(TensorBoard(Path(directory) / "tensorboard", start))
    try:
        yield recorders
    finally:
        with _writable(directory):
            for recorder in recorders:
                recorder.close()


def _tell_damaged(file: Path) -> None:
    """Warn of lines that will be dropped as they are damaged; the last may have been cut short by a kill."""
    if not file.is_file():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    bad = sum(line.endswith(b"\n") and not _is_record(line) for line in lines)
    if bad:
        _log.warning("%d lines of %s are damaged; they are dropped", bad, file)


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line).get("step"), int)
    except (ValueError, AttributeError, RecursionError):
        return False


@contextlib.contextmanager
def _writable(directory: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turn a full or unwritable disk into one sentence; nothing that was saved is lost by it."""
    try:
        yield
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        where = error.filename or directory
        raise CheckpointError(f"cannot write {where}: {why}; what was saved before is kept, so run it again then") from error


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all() if floats else jnp.array(True)
