"""A wrong channel never passes for rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core import ExportError
from compress_jax.export._verify.agreement import agree


def results(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 20),
    width=st.integers(1, 40),
    channel=st.integers(0, 39),
)
def test_a_channel_that_is_constant_or_shifted_is_refused_however_many_are_right(
    seed, rows, width, channel
):
    right, channel = results(seed, rows, width), channel % width
    wrong = right.copy()
    wrong[:, channel] += 0.1 * np.sqrt((right**2).mean())
    assert agree(right, right, 0.02, "a against b") == 0
    with pytest.raises(ExportError, match="differ"):
        agree(right, wrong, 0.02, "a against b")


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_channels_are_looked_for_on_every_axis_but_the_examples(axis):
    right = results(0, 4, 8, 9, 10)
    wrong = right.copy()
    np.moveaxis(wrong, axis, 0)[3] += 0.1
    with pytest.raises(ExportError, match=f"index 3 of axis {axis}"):
        agree(right, wrong, 0.04, "a against b")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(1e-3, 0.03))
def test_rounding_of_the_size_that_the_simulation_has_passes(seed, noise):
    floats = results(seed, 64, 16)
    ours, theirs = (
        floats + noise * results(seed + 1, 64, 16),
        floats + noise * results(seed + 2, 64, 16),
    )
    difference = agree(ours, theirs, 1e-3, "a against b", floats)
    np.testing.assert_allclose(
        difference, np.sqrt(((ours - theirs) ** 2).mean() / (ours**2).mean()), rtol=1e-9
    )


def test_a_simulation_that_is_nothing_but_rounding_does_not_excuse_everything():
    floats = results(0, 64, 16)
    ours = floats + results(1, 64, 16)
    with pytest.raises(ExportError, match="differ by"):
        agree(ours, floats, 0.02, "a against b", floats)


def test_every_result_counts_by_its_own_size():
    large, small = 100 * results(0, 4, 3), results(1, 4, 3)
    with pytest.raises(ExportError, match="result 1: results differ by 1 of their size"):
        agree((large, small), (large, 0 * small), 1e-3, "a against b")
    with pytest.raises(ExportError, match="there are 1 results instead of 2"):
        agree((large, small), (large,), 1e-3, "a against b")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_must_be_so_in_both(value):
    right = results(0, 4, 3)
    broken = right.copy()
    broken[1, 2] = value
    assert agree(broken, broken, 1e-3, "a against b") == 0
    for pair in ((right, broken), (broken, right)):
        with pytest.raises(ExportError, match="NaN or inf"):
            agree(*pair, 1e-3, "a against b")
