"""The best state of a run is kept and found again, whatever stops the run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.core import ArgumentError, CheckpointError
from compress_jax.train import Best, Checkpoints, Interrupted, _checkpoint_record

ACCURACY = Best("accuracy", higher_is_better=True)
LOSS = Best("loss", higher_is_better=False)


def tree(step):
    return {"w": jnp.full(3, float(step))}


def write(folder, accuracies, best=ACCURACY, keep=1):
    """Save a checkpoint of each accuracy, at the steps 1, 2, ..."""
    with Checkpoints(folder, keep=keep, best=best) as checkpoints:
        for step, accuracy in accuracies.items():
            checkpoints.save(step, tree(step), {"accuracy": accuracy, "loss": 1 - accuracy})
            checkpoints.wait()
        return checkpoints.steps()


def restored(folder, best=None):
    with Checkpoints(folder, best=best) as checkpoints:
        step, found = checkpoints.restore_best(tree(0))
        newest, _ = checkpoints.restore_latest(tree(0))
    assert found["w"].tolist() == [float(step)] * 3
    return step, newest


@pytest.mark.parametrize("best", [ACCURACY, LOSS])
def test_the_best_and_the_newest_are_kept_and_of_equal_ones_the_earliest(best, tmp_path):
    accuracies = {1: 0.5, 2: 0.75, 3: 0.75, 4: 0.25, 5: float("nan"), 6: 0.5}
    assert write(tmp_path, accuracies, best) == [2, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "6"]
    assert restored(tmp_path, best) == (2, 6)


def test_one_that_is_opened_again_knows_the_best_even_if_it_is_not_told_the_metric(tmp_path):
    write(tmp_path, {1: 0.75, 2: 0.5})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, tree(3))
        checkpoints.save(4, tree(4), {"accuracy": 0.5, "loss": 0.5})
    assert restored(tmp_path) == (1, 4)
    with Checkpoints(tmp_path, keep=1, best=ACCURACY) as checkpoints:
        assert not checkpoints.is_better({"accuracy": 0.75})
        assert not checkpoints.is_better({"accuracy": float("nan")})
        assert checkpoints.is_better({"accuracy": 0.76})
    assert write(tmp_path, {5: 0.8, 6: 0.1}) == [5, 6]


def test_without_metrics_none_is_the_best(tmp_path):
    with Checkpoints(tmp_path, best=ACCURACY) as checkpoints:
        checkpoints.save(1, tree(1))
        checkpoints.save(2, tree(2), {"accuracy": float("nan")})
        assert checkpoints.best_step() is None
        with pytest.raises(CheckpointError, match="no checkpoint in .* has a finite 'accuracy'"):
            checkpoints.restore_best(tree(0))
        with pytest.raises(ArgumentError, match="no metric 'accuracy'; it returned 'loss'"):
            checkpoints.save(3, tree(3), {"loss": 1.0})


def test_the_best_before_is_removed_only_when_the_better_one_is_on_disk(tmp_path, monkeypatch):
    there = []
    with Checkpoints(tmp_path, keep=1, best=ACCURACY) as checkpoints:
        deleter = checkpoints._manager._checkpoint_deleter
        delete = deleter.delete_steps

        def spy(steps):
            there.extend((step, sorted(path.name for path in tmp_path.iterdir())) for step in steps)
            delete(steps)

        monkeypatch.setattr(deleter, "delete_steps", spy)
        for step in (1, 2):
            checkpoints.save(step, tree(step), {"accuracy": step / 10})
    assert there == [(1, ["1", "2"])]


def test_a_kill_while_a_better_one_is_written_leaves_the_one_before(tmp_path):
    write(tmp_path, {1: 0.5})
    shutil.copytree(tmp_path / "1", tmp_path / "kept")
    write(tmp_path, {2: 0.75})
    # Before the old one is removed: both are there.
    (tmp_path / "kept").rename(tmp_path / "1")
    assert restored(tmp_path) == (2, 2)
    # Before the new one is whole.
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    assert restored(tmp_path) == (1, 1)


CHILD = """
import sys
import jax.numpy as jnp
from compress_jax.train import Best, Checkpoints

with Checkpoints(sys.argv[1], keep=1, best=Best("accuracy", True)) as checkpoints:
    for step in range(1, 10_000):
        accuracy = (step * 7919) % 1009
        checkpoints.save(step, {"w": jnp.full(3, float(step))}, {"accuracy": accuracy})
"""


@pytest.mark.slow
def test_sigkill_at_a_random_moment_loses_neither_the_best_nor_the_newest(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(cj.__file__).parents[1])}
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("1?")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(np.random.default_rng().uniform(0, 1))
        assert child.poll() is None, "it ended before it could be killed"
    finally:
        child.kill()
        child.wait()
    best, newest = restored(tmp_path)
    assert best == max(range(1, newest + 1), key=lambda step: (step * 7919) % 1009)


def altered(meta):
    meta["metrics"]["accuracy"] = 0.1


def lifted(meta):
    del meta["metrics"], meta["best"]


def of_text(meta):
    meta["metrics"]["accuracy"] = "0.9"
    meta["sha256"] = _checkpoint_record._digest(meta)


def without_leaves(meta):
    meta["leaves"] = ["w"]
    meta["sha256"] = _checkpoint_record._digest(meta)


def nameless(meta):
    meta["best"]["metric"] = ""
    meta["sha256"] = _checkpoint_record._digest(meta)


@pytest.mark.parametrize("change", [altered, lifted, of_text, without_leaves, nameless])
def test_a_record_that_was_changed_is_told_and_no_other_stands_in_silently(change, tmp_path):
    write(tmp_path, {1: 0.5, 2: 0.75, 3: 0.6}, keep=2)
    record = tmp_path / "2" / "meta" / "metadata"
    meta = json.loads(record.read_text())
    change(meta)
    record.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=f"step 2 is damaged; remove {tmp_path / '2'}"):
        restored(tmp_path)
    # What cannot be read is not pruned either: it may be the best.
    assert write(tmp_path, {4: 0.7, 5: 0.1}) == [2, 4, 5]
    shutil.rmtree(tmp_path / "2")
    assert restored(tmp_path) == (4, 5)


def test_the_rest_of_a_checkpoint_whose_removal_was_killed_is_no_checkpoint(tmp_path, caplog):
    write(tmp_path, {1: 0.5, 2: 0.75, 3: 0.6}, keep=3)
    (tmp_path / "1" / "meta" / "metadata").unlink()  # removed first, then the process was killed
    assert restored(tmp_path) == (2, 3)
    assert "has no record, so it counts as removed" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "null", '{"leaves": 1}', "[" * 100_000])
def test_what_is_no_record_at_all_is_damage(text, tmp_path):
    write(tmp_path, {1: 0.5, 2: 0.75})
    (tmp_path / "2" / "meta" / "metadata").write_text(text)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match="checkpoint 2 in .* is damaged"):
            checkpoints.restore(tree(0), 2)
        with pytest.raises(CheckpointError, match="step 2 is damaged"):
            checkpoints.best_step()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_best_one_whose_arrays_are_damaged_is_not_replaced_by_another(tmp_path):
    write(tmp_path, {1: 0.75, 2: 0.5})
    for path in (tmp_path / "1").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="checkpoint 1 in .* damaged.* others there are 2"):
        restored(tmp_path)


# A run whose accuracy rises, falls, and rises to the same again.
VALUES = {2: 0.5, 4: 0.75, 6: 0.5, 8: 0.75, 9: 0.25}


def run(directory, happens=lambda step: None, **options):
    class Feed:
        def __getitem__(self, step):
            happens(step)
            return np.ones(2, np.float32)

    def loss(params, model_state, batch, key, teacher, train=True):
        return jnp.square(params["w"] - batch).mean(), (model_state, {})

    optimizer = optax.sgd(0.1)
    variables = {"params": {"w": jnp.zeros(())}}
    state = cj.train.create(variables, cj.identity(), optimizer, jax.random.key(0))
    step = jax.jit(cj.train.make_step(loss, optimizer, cj.identity()), donate_argnums=0)
    usual = {
        "steps": 9,
        "save_every": 3,
        "evaluate": lambda state: {"accuracy": jnp.float32(VALUES[int(state.step)])},
        "eval_every": 2,
        "best": ACCURACY,
    }
    return cj.train.fit(step, state, Feed(), directory=directory, **{**usual, **options})


def best_of(directory, like):
    with Checkpoints(directory / "checkpoints") as checkpoints:
        step, state = checkpoints.restore_best(like)
        assert int(state.step) == step
        return step, state, checkpoints.steps()


def test_fit_keeps_the_best_of_its_evaluations(tmp_path):
    last = run(tmp_path)
    assert int(last.step) == 9
    step, state, steps = best_of(tmp_path, last)
    assert (step, steps) == (4, [4, 6, 9])
    # Independent: w after n steps of descent on (w - 1) ** 2 at rate 0.1.
    assert float(state.params["w"]) == pytest.approx(1 - 0.8**4)


def test_a_run_that_is_stopped_and_continued_has_the_same_best(tmp_path):
    def stop(step):
        if step == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tmp_path, stop)
    step, _, steps = best_of(tmp_path, run(tmp_path))
    assert (step, steps) == (4, [4, 6, 9])


def test_a_metric_that_evaluate_does_not_return_is_told_at_its_first_call(tmp_path):
    asked = []
    with pytest.raises(ArgumentError, match="no metric 'top5'; it returned 'accuracy'"):
        run(tmp_path, asked.append, best=Best("top5", higher_is_better=True))
    assert asked == [0, 1]
    for missing in ("evaluate", "eval_every"):
        with pytest.raises(ArgumentError, match=f"fit needs {missing}"):
            run(tmp_path, **{missing: None})
    with pytest.raises(ArgumentError, match="fit needs directory"):
        run(None)
    with pytest.raises(ArgumentError, match="best must be a Best"):
        run(tmp_path, best="accuracy")
    with pytest.raises(ArgumentError, match="higher_is_better must be True or False"):
        Best("accuracy", "max")
