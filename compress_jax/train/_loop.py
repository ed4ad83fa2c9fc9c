"""The training loop: feed batches to a step, record, save, and continue where it stopped."""

import contextlib
import errno
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.errors import ArgumentError, CheckpointError, NonFiniteError
from compress_jax.core.types import Batch, PyTree, Scalar
from compress_jax.train._best import Best
from compress_jax.train._checkpoint import Checkpoints
from compress_jax.train._interrupt import Interrupted, watch_signals
from compress_jax.train._metrics import JsonLines, Recorder, TensorBoard
from compress_jax.train._processes import Votes, is_first, once, settle
from compress_jax.train._progress import Report, progress, say
from compress_jax.train._speed import Profile, Speed, work_of
from compress_jax.train._state import TrainState
from compress_jax.train._step import Metrics

_log = logging.getLogger(__name__)


class Session(NamedTuple):
    """Where the results of a run go.

    Attributes:
      recorders: what metrics are written to.
      speed_recorders: what the speed is written to: another file, as it is never the same twice.
      report: shows progress.
      checkpoints: where states are saved; None saves none.
      ahead: metrics of the steps that the device may not have finished.
    """

    recorders: list[Recorder]
    speed_recorders: list[Recorder]
    report: Report
    checkpoints: Checkpoints | None
    ahead: deque[Metrics]

    def keep_pace(self, step: int, metrics: Metrics, max_ahead: int = 2) -> None:
        """Wait until the device is few steps behind: stopping must not wait for a long queue."""
        self.ahead.append(metrics)
        if len(self.ahead) > max_ahead:
            jax.block_until_ready(self.ahead.popleft())
        self.report(step, {})

    def record(self, step: int, group: str, values: Mapping[str, Scalar]) -> None:
        """Write and show metrics; under pmap each comes once a device, all equal."""
        numbers = _numbers(values)
        with _writable(None):
            for recorder in self.recorders:
                recorder.write(step, {f"{group}/{name}": value for name, value in numbers.items()})
        self.report(step, numbers)
        # Written first, so that the file shows the step at which the run diverged.
        self._require_finite(
            step,
            [f"{name} is {value}" for name, value in numbers.items() if not np.isfinite(value)],
        )

    def record_evaluation(self, step: int, values: Mapping[str, Scalar]) -> dict[str, float]:
        """Record metrics and return them, as the first process has them: all decide by the same."""
        own = _numbers(values)  # fetched before the processes speak to each other
        numbers = once(lambda: own)
        self.record(step, "eval", numbers)
        return numbers

    def is_best(self, metrics: Mapping[str, float] | None) -> bool:
        """Tell whether a state with these metrics is the best so far, if the best is kept."""
        return bool(
            metrics is not None and self.checkpoints and self.checkpoints.is_better(metrics)
        )

    def record_speed(self, step: int, values: Mapping[str, float]) -> None:
        """Write how fast the steps since the last time were."""
        with _writable(None):
            for recorder in self.speed_recorders:
                recorder.write(step, {f"speed/{name}": value for name, value in values.items()})

    def save(
        self, step: int, state: TrainState, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Save a state if it is finite: another must not replace a good checkpoint."""
        if self.checkpoints is None:
            return
        if not _all_finite(state.trainable):
            self._require_finite(step, ["a parameter is nan or infinite"])
        self.checkpoints.save(step, state, metrics)

    def _require_finite(self, step: int, bad: list[str]) -> None:
        if bad:
            kept = self.checkpoints.steps() if self.checkpoints else []
            good = f" (the last good checkpoint is of step {kept[-1]})" if kept else ""
            advice = "lower the learning rate, warm it up, or clip gradients"
            raise NonFiniteError(
                f"training diverged: {', '.join(bad)} at step {step}{good}; {advice}"
            )


def _numbers(values: Mapping[str, Scalar]) -> dict[str, float]:
    arrays = jax.device_get(dict(values))
    return {name: float(np.ravel(value)[0]) for name, value in arrays.items()}


@contextlib.contextmanager
def open_recorders(
    directory: str | os.PathLike[str] | None, start: int
) -> Iterator[tuple[list[Recorder], list[Recorder]]]:
    """Open the files of metrics and speed in a directory, if any; the first process writes them."""
    metrics: list[Recorder] = []
    speed: list[Recorder] = []
    if directory is not None and is_first():
        _tell_damaged(Path(directory) / "metrics.jsonl")
        with _writable(directory):
            board = TensorBoard(Path(directory) / "tensorboard", start)
            metrics += [JsonLines(Path(directory) / "metrics.jsonl", start), board]
            speed += [JsonLines(Path(directory) / "speed.jsonl", start), board]
    try:
        yield metrics, speed
    finally:
        with _writable(directory):
            for recorder in {id(each): each for each in (*metrics, *speed)}.values():
                recorder.close()


def _tell_damaged(file: Path) -> None:
    """Warn of damaged lines, which will be dropped; a kill may have cut the last one short."""
    if not file.is_file():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    # The last line may lack its end: a kill does that, and it is no damage.
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
        why = (
            "the disk is full"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else error.strerror or str(error)
        )
        where = error.filename or directory
        raise CheckpointError(
            f"cannot write {where}: {why}; what was saved before is kept, so run it again then"
        ) from error


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return (
        jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()
        if floats
        else jnp.array(True)
    )


class Feed(Protocol):
    """Batches by step: ``feed[step]`` is always the same batch, so that a run can be resumed.

    Example:
      >>> import compress_jax as cj
      >>> split = {"x": np.arange(6.0), "label": np.arange(6)}
      >>> feed: cj.train.Feed = cj.data.batches(split, 2, seed=0)
      >>> feed[3]["x"].tolist() == feed[3]["x"].tolist()
      True
    """

    def __getitem__(self, step: int, /) -> Batch:
        """Return the batch of a step, counted from 0."""
        ...


def fit(
    step: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    feed: Feed,
    *,
    steps: int,
    directory: str | os.PathLike[str] | None = None,
    log_every: int = 50,
    save_every: int = 500,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    best: Best | None = None,
    title: str = "training",
    teacher: PyTree = None,
    tokens: Callable[[Batch], int] | None = None,
) -> TrainState:
    """Train until ``steps`` steps have been taken, in this process or in earlier ones.

    The directory gets ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/`` and ``speed.jsonl``:
    steps, examples and tokens a second, the share of the time that the run waits for data (see also
    `profiling`), the FLOPs a second that the models need (see `StepFlops`), and their share of the
    devices' peak where that is known (see `peak_flops`). If it holds a checkpoint the run continues
    from it, bit for bit, and at once returns it if it is the last. The host runs at most two steps
    ahead of the device.

    Args:
      step: compiled, ``(state, batch, teacher=...) -> (state, metrics)``:
        ``jax.jit(step, donate_argnums=0)``, or from `jit_step` or `pmap_step`. It may donate the
        state: do not use the one given here afterwards.
      state: where to begin, and what a checkpoint must look like, shardings included.
      feed: batches by step.
      steps: number of steps in all.
      directory: where the run is kept; None keeps nothing.
      log_every: metrics are recorded, and seen to be finite, at multiples of this.
      save_every: a checkpoint is written at multiples of this, and at the end.
      evaluate: ``(state) -> {name: value}``, run at multiples of eval_every and at the end.
      eval_every: None evaluates at the end only.
      best: keeps the checkpoint of the evaluation whose metric is best, such as
        ``Best("accuracy", higher_is_better=True)``, beside the last ones; of equal ones the
        earliest. `Checkpoints.restore_best` restores it; what is returned here is the last state.
      title: shown with the progress.
      teacher: given to the step; never donated.
      tokens: ``batch -> number`` of its tokens, those of padding included; None if batches are not
        of tokens.

    Returns:
      The state after the last step.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM, once the current step is finished and saved; of several
        processes all stop, at one step, whichever the signal came to.
      NonFiniteError: if the loss or the parameters are NaN or infinite; the last good checkpoint
        stays.
      CheckpointError: if the directory holds a checkpoint of another model, or of a longer run.
      ArgumentError: if ``evaluate`` does not return the metric of ``best``, or is not called.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import compress_jax as cj
      >>> def loss(params, model_state, batch, key, teacher, train=True):
      ...     return jnp.square(params["w"] - batch).mean(), (model_state, {})
      >>> variables = {"params": {"w": jnp.zeros(())}}
      >>> state = cj.train.create(variables, cj.identity(), optax.sgd(0.5), jax.random.key(0))
      >>> step = jax.jit(cj.train.make_step(loss, optax.sgd(0.5), cj.identity()), donate_argnums=0)
      >>> state = cj.train.fit(step, state, [np.ones(4, np.float32)] * 3, steps=3)
      >>> int(state.step), float(state.params["w"])
      (3, 1.0)
    """
    _require_evaluations(best, directory, evaluate, eval_every)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(_checkpoints(directory, best))
        start, state = _resume(state, checkpoints, steps)
        # A finished run is returned as it is: opening its metric files would add to them.
        if start == steps:
            return state
        stop = stack.enter_context(watch_signals())
        recorders = stack.enter_context(open_recorders(directory, start))
        report = stack.enter_context(_shown(title, steps, start))
        session = Session(*recorders, report, checkpoints, deque())
        votes = Votes()
        profile = stack.enter_context(contextlib.closing(Profile(directory)))
        speed = Speed(tokens)
        for done in range(start + 1, steps + 1):
            batch = speed.next(feed, done - 1)
            if done == start + 1:
                speed.work = work_of(step, state, batch, teacher)
            profile.before()
            state, metrics = settle(step(state, batch, teacher=teacher))
            profile.after(metrics)
            session.keep_pace(done, metrics)
            last = done == steps
            # Asked once a step: a signal after this is seen in the next one, or below. Several
            # processes stop at one step, as each has a part of the state to save.
            signum = votes.cast(stop() or 0)
            if last or done % log_every == 0:
                session.record(done, "train", metrics)
                session.record_speed(done, speed.report())
            found = None
            if evaluate is not None and (last or (eval_every and done % eval_every == 0)):
                found = session.record_evaluation(done, evaluate(state))
                speed.restart()
            # After the metrics of its step: a run resumed from here does not write those again.
            if session.is_best(found) or last or signum or done % save_every == 0:
                session.save(done, state, found)
                speed.restart()
            if signum:
                raise Interrupted(signum, done)
        if signum := votes.last(stop() or 0):  # it came while the last step was being saved
            raise Interrupted(signum, steps)
    if is_first():
        say(title, speed.text())
    return state


def _require_evaluations(
    best: Best | None,
    directory: str | os.PathLike[str] | None,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None,
    eval_every: int | None,
) -> None:
    """Refuse to keep the best of what is not evaluated more than once, or not kept."""
    given = {"directory": directory, "evaluate": evaluate, "eval_every": eval_every}
    missing = [name for name, value in given.items() if value is None]
    if best is not None and missing:
        raise ArgumentError(
            f"best keeps the best of several evaluated states, so fit needs {', '.join(missing)}"
        )


def _checkpoints(
    directory: str | os.PathLike[str] | None, best: Best | None
) -> contextlib.AbstractContextManager[Checkpoints | None]:
    """Return the checkpoints in a directory; None without one."""
    if directory is None:
        return contextlib.nullcontext()
    return Checkpoints(Path(directory) / "checkpoints", best=best)


def _shown(title: str, steps: int, start: int) -> contextlib.AbstractContextManager[Report]:
    """Return the progress, which the first process shows."""
    return progress(title, steps, start) if is_first() else contextlib.nullcontext(_say_nothing)


def _say_nothing(step: int, values: Mapping[str, Scalar]) -> None:
    """Report nothing: the first process does."""


def _resume(
    state: TrainState, checkpoints: Checkpoints | None, steps: int
) -> tuple[int, TrainState]:
    """Return where to begin: at the newest checkpoint if there is one, else at the state given."""
    found = checkpoints.restore_latest(state) if checkpoints else None
    # Under pmap each device has a step of its own, all equal.
    start, state = found or (int(np.ravel(jax.device_get(state.step))[0]), state)
    if start > steps:
        where = checkpoints.directory if checkpoints else "the state given"
        raise CheckpointError(
            f"{where} has {start} steps of training, more than steps={steps}; use another directory"
        )
    return start, state
