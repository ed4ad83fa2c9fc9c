"""A stage with an average evaluates, packs and writes the average."""

import dataclasses

import jax
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core import ConfigError
from compress_jax.core.paths import flatten
from compress_jax.export import load
from compress_jax.search import Candidate, Training, compress
from compress_jax.search._loop import ARTIFACT
from compress_jax.search._stage import Stage, made_of
from compress_jax.train import Checkpoints, average_of, create


def test_what_is_packed_is_the_average(experiment, model, training, tmp_path):
    averaging = dataclasses.replace(training(8), average=0.7)
    method = cj.at("**/kernel", cj.prune.magnitude(0.5))
    candidate = Candidate("half", method, averaging)
    case = experiment(candidates=(candidate,))
    compress(case, tmp_path, log_fn=lambda line: None)
    (file,) = tmp_path.glob("candidates/*/" + ARTIFACT)
    packed = flatten(cj.unpack(load(file)[0])["params"])[0]
    # The truth: what the checkpoint of the last step holds, averaged and masked.
    variables = model.init(jax.random.key(0), case.data.train["image"][:1])
    state = create(variables, method, averaging.transformation(), jax.random.key(0))
    with Checkpoints(next(file.parent.rglob("checkpoints"))) as checkpoints:
        _, state = checkpoints.restore_latest(state)
    wanted = flatten(average_of(state).variables(method)["params"])[0]
    raw = flatten(state.variables(method)["params"])[0]
    for path, x in packed.items():
        np.testing.assert_array_equal(x, wanted[path], err_msg=path)
    assert any(np.any(np.asarray(packed[path]) != np.asarray(raw[path])) for path in raw)


def test_only_a_training_with_an_average_has_it_in_its_record(experiment, training):
    case = experiment()
    stage = Stage("student", case.student.pure, training(2))
    plain = made_of(case, stage)
    assert not any("average" in name for name in plain)
    averaging = stage._replace(training=dataclasses.replace(stage.training, average=0.9))
    found = made_of(case, averaging)
    assert {name: found[name] for name in found.keys() - plain.keys()} == {
        "training['average']": "0.9"
    }


def test_a_wrong_average_is_refused_where_it_is_written(training):
    with pytest.raises(ConfigError, match="average must be a number from 0 to below 1"):
        dataclasses.replace(training(1), average=1.0)
    assert isinstance(dataclasses.replace(training(1), average=0.0), Training)
