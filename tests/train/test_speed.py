"""A training tells its speed, and profiles a few steps when asked."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax import train
from compress_jax.core.errors import ArgumentError
from compress_jax.train import _speed


def run(folder, steps):
    def loss(params, model_state, batch, key, teacher, train=True):
        return jnp.square(params["w"] - batch["x"]).mean(), (model_state, {})

    optimizer = optax.sgd(0.1)
    variables = {"params": {"w": jnp.zeros(())}}
    state = train.create(variables, cj.identity(), optimizer, jax.random.key(0))
    step = jax.jit(train.make_step(loss, optimizer, cj.identity()))
    feed = [{"x": np.ones(4, np.float32)}] * steps
    return train.fit(step, state, feed, steps=steps, directory=folder, log_every=2)


def test_rates_and_waiting_are_shares_of_the_clock(monkeypatch):
    # Each look at the clock is a second later: two looks while waiting, then one at the end.
    seconds = itertools.count()
    monkeypatch.setattr(_speed.time, "perf_counter", lambda: float(next(seconds)))
    speed = _speed.Speed()  # begun at 0
    for _ in range(2):  # waits from 1 to 2, and from 3 to 4
        with speed.waiting():
            batch = {"image": np.ones((8, 2)), "label": np.ones(8)}
        speed.count(batch)
    assert speed.report() == {  # at 5
        "steps_per_second": 2 / 5,
        "examples_per_second": 16 / 5,
        "waiting": 2 / 5,
    }


def test_a_training_writes_its_speed_beside_its_metrics(tmp_path):
    run(tmp_path, 4)
    lines = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert 0 <= line["speed/waiting"] <= 1
        ratio = line["speed/examples_per_second"] / line["speed/steps_per_second"]
        assert ratio == pytest.approx(4)
    # What is never the same twice is in no file that a resumed run must leave the same.
    assert "speed" not in (tmp_path / "metrics.jsonl").read_text()


def test_profiles_are_recorded_of_warm_steps_where_they_are_asked_for(tmp_path):
    run(tmp_path / "without", 6)
    assert not (tmp_path / "without" / "profile").exists()
    with train.profiling(2):
        run(tmp_path / "with", 6)
        run(tmp_path / "short", 4)  # ends before its two steps are over
    for name in ("with", "short"):
        assert list((tmp_path / name / "profile").rglob("*.xplane.pb"))
    run(tmp_path / "after", 6)
    assert not (tmp_path / "after" / "profile").exists()


def test_a_wrong_number_of_steps_is_refused():
    with pytest.raises(ArgumentError), train.profiling(-1):
        pass
