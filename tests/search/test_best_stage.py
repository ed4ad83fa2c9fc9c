"""A stage may end with its best state on validation data."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.core import ConfigError
from compress_jax.search import Network, Training
from compress_jax.search._stage import Stage, made_of, train


@pytest.fixture(scope="module")
def noisy(experiment):
    """An experiment and a stage whose last state is not its best: its steps are too long."""
    usual = Training(optax.sgd(1.0), 6, batch_size=16, best_every=1)

    def make(**changes):
        stage = Stage(
            "student",
            small.student.pure,
            dataclasses.replace(usual, **changes),
            compression=cj.at("**/kernel", cj.quantize.uniform(3)),
        )
        return stage

    small = experiment(student=Network(cj.models.LeNet300100(3, (8,)), usual))
    return small, make


@pytest.mark.slow
def test_it_ends_with_the_state_that_validation_data_find_best(noisy, tmp_path):
    experiment, make = noisy
    best = train(experiment, make(), tmp_path / "best")
    lines = (tmp_path / "best" / "metrics.jsonl").read_text().splitlines()
    recorded = {line["step"]: line for line in map(json.loads, lines)}
    accuracies = {step: line["eval/accuracy"] for step, line in recorded.items()}
    wanted = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert sorted(accuracies) == [1, 2, 3, 4, 5, 6] and wanted < 6
    # The same stage, trained for so many steps and no more, ends with the same network.
    short = train(experiment, make(steps=wanted, best_every=None), tmp_path / "short")
    assert int(best.step) == int(short.step) == wanted
    for ours, theirs in zip(
        jax.tree.leaves((best.params, best.compression)),
        jax.tree.leaves((short.params, short.compression)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    shown = best.variables(make().compression)
    measured = cj.tasks.measure(
        experiment.task, experiment.student.pure.apply, shown, experiment.data.validation
    )
    assert measured.values["accuracy"] == accuracies[wanted]
    # Started again, it finds the same one.
    again = train(experiment, make(), tmp_path / "best")
    assert int(again.step) == wanted


def test_it_is_part_of_what_a_stage_is_made_of_only_where_it_is_asked_for(noisy, tmp_path):
    experiment, make = noisy
    last = made_of(experiment, make(best_every=None))
    best = made_of(experiment, make())
    assert not any("best_every" in name or "validation" in name for name in last)
    assert any("best_every" in name for name in best)
    # Which state is the best depends on the data that tell.
    changed = {**experiment.data.validation, "label": experiment.data.validation["label"][::-1]}
    data = dataclasses.replace(experiment.data, validation=changed)
    other = dataclasses.replace(experiment, data=data)
    assert made_of(other, make(best_every=None)) == last
    assert made_of(other, make()) != best
    with pytest.raises(ConfigError, match="Training: best_every must be a whole number"):
        make(best_every=0)
