"""How fast a run is, how long it waits for data, and a profile of some of its steps."""

import contextlib
import contextvars
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from compress_jax.core.arguments import whole
from compress_jax.core.types import Batch, PyTree

WARM = 3  # steps of a process before it is profiled: the first compile
_profiled: contextvars.ContextVar[int] = contextvars.ContextVar("profiled", default=0)


@contextlib.contextmanager
def profiling(steps: int) -> Iterator[None]:
    """Profile some steps of every training within the ``with`` block.

    `fit` then writes what `jax.profiler.trace` records, for TensorBoard and Perfetto, into
    ``profile/`` of its directory: the fourth step of the process and those after it.

    Args:
      steps: how many; 0 for none.

    Raises:
      ArgumentError: if that is no whole number from 0.

    Example:
      >>> import compress_jax as cj
      >>> with cj.train.profiling(5):
      ...     pass  # cj.search.compress(experiment, folder), or cj.train.fit(...)
    """
    token = _profiled.set(whole("steps", steps, 0))
    try:
        yield
    finally:
        _profiled.reset(token)


class Profile:
    """The profile of a few steps of one training; nothing where nobody asked for it.

    Args:
      directory: of the training; None for nowhere.

    Example:
      >>> profile = Profile(None)
      >>> profile.before(), profile.after(None), profile.close()
      (None, None, None)
    """

    def __init__(self, directory: Path | None):
        """Find out whether there is anything to do."""
        self._steps = _profiled.get() if directory is not None else 0
        self._directory = directory
        self._seen = 0
        self._running = False

    def before(self) -> None:
        """Begin, if this step is the first to be profiled."""
        if self._steps and self._seen == WARM:
            jax.profiler.start_trace(str(self._directory / "profile"))  # pyright: ignore
            self._running = True
        self._seen += 1

    def after(self, results: PyTree) -> None:
        """End, if this step was the last to be profiled."""
        if self._running and self._seen == WARM + self._steps:
            jax.block_until_ready(results)  # else its end would be missing
            self.close()

    def close(self) -> None:
        """End in any case."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class Speed:
    """The speed of a training, between two reports.

    Example:
      >>> speed = Speed()
      >>> with speed.waiting():
      ...     batch = {"x": np.ones((8, 2))}
      >>> speed.count(batch)
      >>> sorted(speed.report())
      ['examples_per_second', 'steps_per_second', 'waiting']
    """

    def __init__(self) -> None:
        """Begin now."""
        self.restart()

    def restart(self) -> None:
        """Begin anew: what has run since was no training."""
        self._began = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._examples = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the ``with`` block as time in which data were not there."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def count(self, batch: Batch) -> None:
        """Count a step and its examples: the rows of the batch."""
        self._steps += 1
        self._examples += next((len(x) for x in jax.tree.leaves(batch) if np.ndim(x)), 0)

    def report(self) -> dict[str, float]:
        """Return steps and examples a second and the share of time without data, and begin anew."""
        seconds = time.perf_counter() - self._began
        found = {
            "steps_per_second": self._steps / seconds,
            "examples_per_second": self._examples / seconds,
            "waiting": self._waited / seconds,
        }
        self.restart()
        return found
