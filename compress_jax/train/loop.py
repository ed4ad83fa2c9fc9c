"""The training loop: feed batches to a step, record, save, and continue where it stopped."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from compress_jax.core.errors import CheckpointError
from compress_jax.train._progress import progress
from compress_jax.train._session import Session, open_recorders
from compress_jax.train.checkpoint import Checkpoints
from compress_jax.train.interrupt import Interrupted, watch_signals
from compress_jax.train.state import TrainState


class Feed(Protocol):
    """Batches by step: ``feed[step]`` is always the same batch, so a resumed run sees what an uninterrupted one does."""

    def __getitem__(self, step: int, /) -> Any:
        """Return the batch of a step, counted from 0."""
        ...


def fit(
    step: Callable[..., tuple[TrainState, Any]],
    state: TrainState,
    feed: Feed,
    *,
    steps: int,
    directory: str | os.PathLike[str] | None = None,
    log_every: int = 50,
    save_every: int = 500,
    evaluate: Callable[[TrainState], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    title: str = "training",
    teacher: Any = None,
) -> TrainState:
    """Train until ``steps`` steps have been taken, in this process or in earlier ones.

    The directory gets ``checkpoints/``, ``metrics.jsonl`` and ``tensorboard/``. If it holds a checkpoint the run continues
    from it, bit for bit, and at once returns it if it is the last. The host runs at most two steps ahead of the device.

    Args:
      step: compiled, ``(state, batch, teacher=...) -> (state, metrics)``: ``jax.jit(step, donate_argnums=0)``, or from
        `jit_step` or `pmap_step`. It may donate the state: do not use the one given here afterwards.
      state: where to begin, and what a checkpoint must look like, shardings included.
      feed: batches by step.
      steps: number of steps in all.
      directory: where the run is kept; None keeps nothing.
      log_every: metrics are recorded, and seen to be finite, at multiples of this.
      save_every: a checkpoint is written at multiples of this, and at the end.
      evaluate: ``(state) -> {name: value}``, run at multiples of eval_every and at the end.
      eval_every: None evaluates at the end only.
      title: shown beside the progress.
      teacher: given to the step; never donated.

    Returns:
      The state after the last step.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM, once the current step is finished and saved.
      NonFiniteError: if the loss or the parameters are NaN or infinite; the last good checkpoint stays.
      CheckpointError: if the directory holds a checkpoint of another model, or of a longer run.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from compress_jax.core.compression import identity
      >>> from compress_jax.train import create, make_step
      >>> def loss(params, model_state, batch, key, teacher, train=True):
      ...     return jnp.square(params["w"] - batch).mean(), (model_state, {})
      >>> state = create({"params": {"w": jnp.zeros(())}}, identity(), optax.sgd(0.5), jax.random.key(0))
      >>> step = jax.jit(make_step(loss, optax.sgd(0.5), identity()), donate_argnums=0)
      >>> state = fit(step, state, [np.ones(4, np.float32)] * 3, steps=3)
      >>> int(state.step), float(state.params["w"])
      (3, 1.0)
    """
    with contextlib.ExitStack() as stack:
        checkpoints = None if directory is None else stack.enter_context(Checkpoints(Path(directory) / "checkpoints"))
        start, state = _resume(state, checkpoints, steps)
        if start == steps:
            return state
        stop = stack.enter_context(watch_signals())
        recorders = stack.enter_context(open_recorders(directory, start))
        report = stack.enter_context(progress(title, steps, start))
        session = Session(recorders, report, checkpoints, deque())
        for done in range(start + 1, steps + 1):
            state, metrics = step(state, feed[done - 1], teacher=teacher)
            session.keep_pace(done, metrics)
            last, signum = done == steps, stop()
            if last or done % log_every == 0:
                session.record(done, "train", metrics)
            if evaluate is not None and (last or (eval_every and done % eval_every == 0)):
                session.record(done, "eval", evaluate(state))
            if last or signum or done % save_every == 0:
                session.save(done, state)
            if signum:
                raise Interrupted(signum, done)
        if signum := stop():  # it came while the last step was being saved
            raise Interrupted(signum, steps)
    return state


def _resume(state: TrainState, checkpoints: Checkpoints | None, steps: int) -> tuple[int, TrainState]:
    """Return where to begin: at the newest checkpoint if there is one, else at the state given."""
    found = checkpoints.restore_latest(state) if checkpoints else None
    start, state = found or (int(np.ravel(jax.device_get(state.step))[0]), state)
    if start > steps:
        where = checkpoints.directory if checkpoints else "the state given"
        raise CheckpointError(f"{where} has {start} steps of training, more than steps={steps}; use another directory")
    return start, state
