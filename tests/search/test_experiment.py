"""What cannot work is refused before anything is trained."""

import dataclasses
import re

import pytest

from compress_jax.core import ConfigError
from compress_jax.search import Network


@pytest.mark.parametrize("both", [True, False])
def test_a_network_is_trained_or_restored(both, model, training):
    with pytest.raises(ConfigError, match="training=.* artifact="):
        Network(model, training(1), "file") if both else Network(model)


def test_candidates_are_needed_and_their_names_differ(experiment, quantized):
    for candidates in ((), (quantized(4), quantized(8), quantized(4))):
        with pytest.raises(ConfigError, match="names that differ"):
            experiment(candidates=candidates)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "a\0", "teacher", "student"])
def test_a_candidate_is_called_as_a_folder_and_as_no_other_row(name, quantized):
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        dataclasses.replace(quantized(4), name=name)


def test_the_order_is_one_of_three(experiment):
    with pytest.raises(ConfigError, match="'mild_first', 'strong_first' or 'all', got 'mild'"):
        experiment(order="mild")


def test_a_loss_against_a_teacher_needs_one(experiment):
    with pytest.raises(ConfigError, match="no teacher"):
        experiment(loss=lambda student, teacher, labels: student[:, 0])


def test_the_only_teacher_with_a_name_is_the_student(experiment):
    with pytest.raises(ConfigError, match="'student' or None, got 'studnet'"):
        experiment(teacher="studnet")
    with pytest.raises(ConfigError, match="'teacher' or 'labels', got 'label'"):
        experiment(float32_student="label")
