"""Biases in int32 steps: the written bias is the bias, whatever its channel's weights."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.export._scales import floor, representable

magnitudes = st.floats(1e-25, 1e5)
biases = st.one_of(st.just(0.0), st.floats(1e-6, 1e4), st.floats(-1e4, -1e-6))


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=magnitudes,
    bias=biases,
    step=st.floats(1e-5, 1e3),
    dead=st.booleans(),
)
def test_no_bias_is_clipped_and_none_is_further_off_than_rounding_allows(
    seed, size, bias, step, dead
):
    rng = np.random.default_rng(seed)
    kernel = np.zeros((8, 1)) if dead else size * rng.normal(size=(8, 1))
    scale = np.float32(np.abs(kernel).max(0) / 127) if not dead else np.ones(1, np.float32)
    levels = np.round(kernel / scale).astype(np.int8)
    new, larger, _ = representable(levels, scale, levels * scale, 1, np.array([bias]), step)
    steps = float(larger[0]) * step
    whole = np.round(bias / steps)
    assert abs(whole) <= 2**30 + 1
    if dead:
        assert abs(whole * steps - bias) <= 1e-6 * abs(bias) and not new.any()
        return
    # the products change by less than 2e-5 of the bias for each weight, even at the largest
    # activation
    error = np.abs(new * larger.astype(np.float64) - levels * scale.astype(np.float64)) * 255 * step
    assert (error <= 255 * step * larger / 2 * 1.001).all() and (
        error <= 1.3e-7 * abs(bias) + 1e-12 * size * step
    ).all()
    assert abs(whole * steps - bias) <= steps / 2 * 1.001


def test_scales_that_are_large_enough_stay_bit_for_bit():
    rng = np.random.default_rng(0)
    levels, scale = (
        rng.integers(-127, 128, (3, 3, 4, 8)).astype(np.int8),
        rng.uniform(0.01, 0.1, 8).astype(np.float32),
    )
    new, same, changed = representable(levels, scale, levels * scale, 3, rng.normal(size=8), 0.02)
    np.testing.assert_array_equal(new, levels)
    np.testing.assert_array_equal(same, scale)
    assert changed == 0


def test_the_floor_is_where_int32_is_half_full():
    assert floor(np.array([2.0**30, -(2.0**29)]), 0.5).tolist() == [2.0, 1.0]
