"""How fast a run is, how long it waits for data, and a profile of some of its steps."""

import contextlib
import contextvars
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from compress_jax.core.arguments import whole
from compress_jax.core.table import units
from compress_jax.core.types import Batch, PyTree
from compress_jax.train._chips import peak_of
from compress_jax.train._flops import step_flops

_log = logging.getLogger(__name__)
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

    def __init__(self, directory: str | os.PathLike[str] | None):
        """Find out whether there is anything to do."""
        self._steps = _profiled.get() if directory is not None else 0
        self._directory = None if directory is None else Path(directory)
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


class Work(NamedTuple):
    """What one step has to do.

    Attributes:
      flops: those that the models need, see `StepFlops`; None if unknown.
      peak: operations a second of all devices; None if unknown.
    """

    flops: float | None = None
    peak: float | None = None


def work_of(step: Callable[..., Any], state: PyTree, batch: Batch, teacher: PyTree) -> Work:
    """Return the work of a step from its trace, which the step's own compilation uses again.

    Args:
      step: see `fit`; of one that ``jax.jit`` did not make (from `pmap_step`) nothing is known.
      state: its state.
      batch: its batch.
      teacher: its teacher.

    Returns:
      The work; where the step cannot be traced, a warning says so.

    Example:
      >>> work_of(lambda state, batch, teacher: (state, {}), None, {}, None)
      Work(flops=None, peak=None)
    """
    if not hasattr(step, "trace"):
        return Work()
    # The training must go on, whatever a trace holds that is not known here.
    try:
        found = step_flops(step, state, batch, teacher=teacher)
    except Exception as error:
        why = str(error).strip().split("\n")[0]
        _log.warning("the FLOPs of a step are unknown (%s: %s)", type(error).__name__, why)
        return Work()
    if found.uncounted:
        names = ", ".join(found.uncounted)
        _log.warning("the FLOPs of a step lack those of %s, so utilization is too low", names)
    return Work(found.model, peak_of(state))


class Speed:
    """The speed of a training, between two reports, and in all.

    Args:
      tokens: ``batch -> number``; None if batches are not of tokens.

    Example:
      >>> speed = Speed(tokens=lambda batch: batch["x"].size)
      >>> with speed.waiting():
      ...     batch = {"x": np.ones((8, 2))}
      >>> speed.count(batch)
      >>> sorted(speed.report())
      ['examples_per_second', 'steps_per_second', 'tokens_per_second', 'waiting']
    """

    def __init__(self, tokens: Callable[[Batch], int] | None = None) -> None:
        """Begin now."""
        self.work = Work()
        self._tokens = tokens
        self._reports = 0
        self._total = _nothing()
        self.restart()

    def restart(self) -> None:
        """Begin anew: what has run since was no training."""
        self._began = time.perf_counter()
        self._counted = _nothing()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the ``with`` block as time in which data were not there."""
        began = time.perf_counter()
        yield
        self._counted["waiting"] += time.perf_counter() - began

    def next(self, feed: Any, step: int) -> Batch:
        """Return the batch of a step; it counts, and so does the time until it is there."""
        with self.waiting():
            batch = feed[step]
        self.count(batch)
        return batch

    def count(self, batch: Batch) -> None:
        """Count a step and its examples, the rows of the batch, and its tokens."""
        self._counted["steps"] += 1
        rows = next((len(x) for x in jax.tree.leaves(batch) if np.ndim(x)), 0)
        self._counted["examples"] += rows
        if self._tokens is not None:
            self._counted["tokens"] += self._tokens(batch)

    def report(self) -> dict[str, float]:
        """Return what was done a second and the share of time without data, and begin anew."""
        self._counted["seconds"] = time.perf_counter() - self._began
        # The first report has the compilation; the total leaves it out, if there are others.
        before = self._total if self._reports > 1 else _nothing()
        self._total = {name: before[name] + number for name, number in self._counted.items()}
        self._reports += 1
        found = self._rates(self._counted)
        self.restart()
        return found

    def text(self) -> str:
        """Return the speed of the whole training, as a line."""
        rates = self._rates(self._total)
        done = [
            f"{_short(rates[f'{name}_per_second'])} {name}"
            for name in ("steps", "examples", "tokens")
            if f"{name}_per_second" in rates
        ]
        parts = [f"{', '.join(done)} a second"]
        if "model_flops_per_second" in rates:
            parts.append(f"{_short(rates['model_flops_per_second'])}FLOP/s of the models")
        if "utilization" in rates:
            parts.append(f"{rates['utilization']:.1%} of the devices' peak")
        parts.append(f"{rates['waiting']:.0%} of the time waiting for data")
        return ", ".join(parts)

    def _rates(self, counted: dict[str, float]) -> dict[str, float]:
        seconds = counted["seconds"]
        found = {
            "steps_per_second": counted["steps"] / seconds,
            "examples_per_second": counted["examples"] / seconds,
            "waiting": counted["waiting"] / seconds,
        }
        if self._tokens is not None:
            found["tokens_per_second"] = counted["tokens"] / seconds
        if self.work.flops is not None:
            found["model_flops_per_second"] = self.work.flops * found["steps_per_second"]
            if self.work.peak is not None:
                found["utilization"] = found["model_flops_per_second"] / self.work.peak
        return found


def _nothing() -> dict[str, float]:
    return dict.fromkeys(("steps", "examples", "tokens", "waiting", "seconds"), 0.0)


def _short(number: float) -> str:
    return units(float(f"{number:.3g}"))
