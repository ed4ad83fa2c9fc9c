"""A batch in several parts: the same weights in the end, and records of old runs still fit."""

import dataclasses

import jax
import numpy as np
import pytest

from compress_jax.core.errors import ConfigError
from compress_jax.search import Network
from compress_jax.search._stage import Stage, made_of, train


def test_two_microbatches_train_to_the_same_weights(experiment, model, training, tmp_path):
    weights = {}
    for parts in (1, 2):
        own = dataclasses.replace(training(6), microbatches=parts)
        made = experiment(student=Network(model, own))
        stage = Stage("student", made.student.pure, own)
        weights[parts] = train(made, stage, tmp_path / str(parts)).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), weights[1], weights[2])
    assert not any(
        "microbatches" in key for key in made_of(made, stage._replace(training=training(6)))
    )
    assert any("microbatches" in key for key in made_of(made, stage))


def test_parts_that_cannot_be_are_refused(training):
    with pytest.raises(ConfigError, match="microbatches must be a divisor of batch_size=32, got 5"):
        dataclasses.replace(training(1), microbatches=5)
