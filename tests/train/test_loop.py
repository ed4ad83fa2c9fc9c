"""A run that is stopped in any way and started again is the run that was not."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress_jax.core import CheckpointError, NonFiniteError, at, leafwise, straight_through
from compress_jax.models import LeNet300100
from compress_jax.train import (
    Interrupted,
    create,
    fit,
    label_optimizer,
    make_step,
    supervised,
    watch_signals,
)

STEPS = 12


class Feed:
    """Batches made from their number, and something that happens when one is asked for."""

    def __init__(self, happens=lambda step: None):
        self.happens, self.asked = happens, []

    def __getitem__(self, step):
        self.asked.append(step)
        scale = self.happens(step)
        rng = np.random.default_rng(step)
        image = rng.normal(size=(8, 5)).astype(np.float32) * np.float32(
            1 if scale is None else scale
        )
        return {"image": image, "label": rng.integers(0, 3, 8)}


def make(traces=None):
    """Return a compiled step and its first state: noise, learned scales, Adam, a changing mask."""
    model = LeNet300100(classes=3, hidden=(6,))
    rounded = straight_through(lambda x: jnp.round(x * 8) / 8)
    compression = at(
        "**/kernel",
        leafwise(
            lambda x, scale, mask: scale * mask * rounded(x),
            init=lambda x, key: (jnp.float32(1), jnp.ones_like(x)),
            update=lambda x, scale, mask, *, step, grad, stats, key: (
                scale,
                jax.random.bernoulli(key, 0.9, x.shape).astype(x.dtype),
            ),
        ),
    )

    def augment(key, batch):
        if traces is not None:
            traces.append(1)
        return {
            **batch,
            "image": batch["image"] + 0.1 * jax.random.normal(key, batch["image"].shape),
        }

    optimizer = label_optimizer(optax.adam(1e-2), optax.sgd(1e-3))
    step = make_step(supervised(model, augment=augment), optimizer, compression)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 5)))
    return jax.jit(step, donate_argnums=0), lambda: create(
        variables, compression, optimizer, jax.random.key(1)
    )


made_once = functools.cache(make)  # a resumed run need not compile again for these tests


def run(directory, feed=None, steps=STEPS, traces=None, **kwargs):
    step, first = made_once() if traces is None else make(traces)
    options = {"log_every": 2, "save_every": 3, **kwargs}
    return fit(step, first(), feed or Feed(), steps=steps, directory=directory, **options)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return run(directory), (directory / "metrics.jsonl").read_text()


def assert_like_uninterrupted(state, directory, uninterrupted):
    assert_same(state, uninterrupted[0])
    assert (directory / "metrics.jsonl").read_text() == uninterrupted[1]


@pytest.mark.slow
def test_without_a_directory_the_result_is_the_same_and_it_compiles_once(uninterrupted):
    traces = []
    assert_same(run(None, traces=traces), uninterrupted[0])
    assert len(traces) == 2  # once to find the loops it has, once to differentiate it


@pytest.mark.slow
def test_a_shorter_run_continued_is_the_longer_run(uninterrupted, tmp_path):
    feed = Feed()
    run(tmp_path, steps=4)
    state = run(tmp_path, feed)
    assert feed.asked == list(range(4, STEPS))
    recorded = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert recorded == [2, 4, 6, 8, 10, 12]
    assert_like_uninterrupted(state, tmp_path, uninterrupted)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_can_be_continued(
    signum, code, uninterrupted, tmp_path
):
    handler = signal.getsignal(signum)
    feed = Feed(lambda step: signal.raise_signal(signum) if step == 6 else None)
    with pytest.raises(Interrupted, match="after step 7") as stopped:
        run(tmp_path, feed)
    assert (stopped.value.signum, stopped.value.step, stopped.value.exit_code) == (signum, 7, code)
    assert feed.asked[-1] == 6
    assert signal.getsignal(signum) == handler
    resumed = Feed()
    assert_like_uninterrupted(run(tmp_path, resumed), tmp_path, uninterrupted)
    assert resumed.asked[0] == 7


def test_a_signal_at_the_last_step_stops_what_would_come_next_and_loses_nothing(
    uninterrupted, tmp_path
):
    feed = Feed(lambda step: signal.raise_signal(signal.SIGINT) if step == STEPS - 1 else None)
    with pytest.raises(Interrupted, match=f"SIGINT after step {STEPS}"):
        run(tmp_path, feed)
    resumed = Feed()
    assert_like_uninterrupted(run(tmp_path, resumed), tmp_path, uninterrupted)
    assert resumed.asked == []


def test_an_error_in_the_middle_loses_only_what_came_after_the_last_checkpoint(
    uninterrupted, tmp_path
):
    def fail(step):
        if step == 10:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        run(tmp_path, Feed(fail))
    resumed = Feed()
    assert_like_uninterrupted(run(tmp_path, resumed), tmp_path, uninterrupted)
    assert resumed.asked == [9, 10, 11]


def test_a_finished_run_returns_at_once_without_compiling(uninterrupted, tmp_path):
    run(tmp_path)
    feed, traces, evaluated = Feed(), [], []
    state = run(tmp_path, feed, traces=traces, evaluate=lambda state: evaluated.append(1) or {})
    assert (feed.asked, traces, evaluated) == ([], [], [])
    assert_like_uninterrupted(state, tmp_path, uninterrupted)


def test_a_longer_run_in_the_directory_is_an_error(tmp_path):
    run(tmp_path, steps=4)
    with pytest.raises(CheckpointError, match="4 steps of training, more than steps=3"):
        run(tmp_path, steps=3)


@pytest.mark.parametrize(("log_every", "save_every"), [(2, 100), (100, 2)])
def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(
    log_every, save_every, uninterrupted, tmp_path
):
    run(tmp_path, steps=4)
    with pytest.raises(
        NonFiniteError,
        match=r"nan.* at step 8 .*last good checkpoint is of step (4|6)\).*learning rate",
    ):
        feed = Feed(lambda step: float("nan") if step >= 6 else None)
        run(tmp_path, feed, log_every=log_every, save_every=save_every)
    assert_like_uninterrupted(run(tmp_path), tmp_path, uninterrupted) if log_every == 2 else run(
        tmp_path
    )


def test_evaluation_runs_when_asked_and_at_the_end(tmp_path):
    steps = []

    def evaluate(state):
        steps.append(int(state.step))
        return {"accuracy": len(steps) / 10}

    run(tmp_path, evaluate=evaluate, eval_every=5)
    assert steps == [5, 10, 12]
    recorded = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["eval/accuracy"] for line in recorded if "eval/accuracy" in line}
    assert values == {5: 0.1, 10: 0.2, 12: 0.3}


def test_off_the_main_thread_it_trains_and_touches_no_handler(uninterrupted, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert_like_uninterrupted(results[0], tmp_path, uninterrupted)


def test_the_second_signal_acts_as_it_always_did(request):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a process of pytest-xdist ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with watch_signals() as received, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert received() == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


CHILD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("loop", sys.argv[1])
loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loop)
loop.jax.config.update("jax_numpy_rank_promotion", "raise")
loop.run(sys.argv[2], loop.Feed(lambda step: time.sleep(0.02)), steps=400, save_every=20)
"""


@pytest.mark.slow
def test_sigkill_at_a_random_moment_changes_nothing(tmp_path):
    rng = np.random.default_rng()
    moment = float(rng.uniform(0.0, 2.0))
    killed = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, __file__, str(killed)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    try:
        deadline = time.monotonic() + 60
        while (
            not (killed / "checkpoints" / "20").exists()
            and time.monotonic() < deadline
            and child.poll() is None
        ):
            time.sleep(0.01)
        time.sleep(moment)
        assert child.poll() is None, "it ended before it could be killed"
    finally:
        child.kill()
        child.wait()
    feed = Feed()
    resumed = run(killed, feed, steps=400, save_every=200)
    assert 0 < feed.asked[0] < 400, f"killed {moment} s after the first checkpoint"
    whole = run(tmp_path / "whole", steps=400, save_every=1000)
    assert_like_uninterrupted(
        resumed, killed, (whole, (tmp_path / "whole" / "metrics.jsonl").read_text())
    )
