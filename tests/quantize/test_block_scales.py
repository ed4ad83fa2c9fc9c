"""MXFP and NVFP4 scales against the specification written out in NumPy, and against brute force."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.layout import Layout
from compress_jax.quantize import mxfp4, mxfp8, nvfp4
from compress_jax.quantize._weights.blocks import best_power, best_two_level, ceil, floor, two_level
from compress_jax.quantize._weights.floats import E2M1, E4M3, E5M2

DTYPE = {E2M1: ml_dtypes.float4_e2m1fn, E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
EMAX = {E2M1: 2, E4M3: 8, E5M2: 15}  # of the specification, tables 2 to 5
each = pytest.mark.parametrize("levels", [E2M1, E4M3, E5M2], ids=["e2m1", "e4m3", "e5m2"])


def blocks(seed: int, size: int, octaves: int = 20) -> np.ndarray:
    """Blocks of very different magnitudes, ``[40 * size, 3]``."""
    rng = np.random.default_rng(seed)
    return (
        (rng.normal(size=(40, size, 3)) * 2.0 ** rng.uniform(-octaves, octaves, (40, 1, 3)))
        .reshape(-1, 3)
        .astype(np.float32)
    )


def arranged(w: np.ndarray, size: int):
    layout = Layout.of(w.shape, size)
    return layout.arrange(jnp.asarray(w)), layout


def rounded(x: np.ndarray, levels) -> np.ndarray:
    return np.clip(x, -levels.largest, levels.largest).astype(DTYPE[levels]).astype(np.float64)


def error(w: Any, scale: Any, levels) -> np.ndarray:
    w = np.asarray(w, np.float64)
    return ((w - scale * rounded(w / scale, levels)) ** 2).sum(1, keepdims=True)


@pytest.mark.wide(2)
@each
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_floor_and_ceil_are_the_powers_of_two_of_the_specification(levels, seed):
    x, layout = arranged(blocks(seed, 32), 32)
    peak = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True)
    expected = 2.0 ** (np.floor(np.log2(peak)) - EMAX[levels])
    np.testing.assert_array_equal(floor(x, layout, levels)["scale"], expected)
    up = np.asarray(ceil(x, layout, levels)["scale"], np.float64)
    assert (peak / up <= levels.largest).all() and (peak / (up / 2) > levels.largest).all()
    assert np.isin(np.log2(up), np.arange(-126, 128)).all()


@each
def test_the_best_power_has_the_least_error_of_all_powers(levels):
    x, layout = arranged(blocks(0, 32), 32)
    peak = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True)
    powers = [2.0 ** (np.floor(np.log2(peak)) - EMAX[levels] + k) for k in range(-8, 4)]
    least = np.min([error(x, scale, levels) for scale in powers], axis=0)
    chosen = np.asarray(best_power(x, layout, levels)["scale"], np.float64)
    assert (np.log2(chosen) % 1 == 0).all()
    np.testing.assert_allclose(error(x, chosen, levels), least, rtol=1e-4)


@pytest.mark.wide(2)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1.2e-38, 1e-30, 1e38, 3.4e38])
@pytest.mark.parametrize("scale", ["floor", "ceil", "mse"])
def test_blocks_at_the_ends_of_the_range(size, scale):
    params, c = {"w": jnp.full((32, 1), size, jnp.float32)}, mxfp4(scale)
    state = c.init(params)
    power = np.log2(float(state.fixed["w"]["scale"][0, 0, 0]))
    assert power % 1 == 0 and -126 <= power <= 126 and (size or power == 0)
    np.testing.assert_allclose(c.view(params, state)["w"], params["w"], rtol=0.26, atol=1e-38)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99))
def test_two_level_scales_are_those_of_numpy(seed):
    x, layout = arranged(blocks(seed, 16, octaves=4), 16)
    fixed = two_level(x, layout, E2M1)
    peak = np.abs(np.asarray(x)).max(1, keepdims=True)
    tensor = peak.max() * np.float32(1 / (448 * 6))
    assert fixed["tensor_scale"] == tensor
    expected = np.maximum(
        (peak * np.float32(1 / 6) * (1 / tensor))
        .astype(ml_dtypes.float8_e4m3fn)
        .astype(np.float32),
        2.0**-9,
    )
    np.testing.assert_array_equal(fixed["scale"], expected)
    assert float(fixed["scale"].max()) == 448


def test_the_best_two_level_scales_have_the_least_error_of_all_e4m3_numbers():
    x, layout = arranged(blocks(1, 16, octaves=2), 16)
    fixed = best_two_level(x, layout, E2M1)
    tensor = float(fixed["tensor_scale"])
    numbers = np.unique(np.array([v for v in E4M3.values if v > 0]))
    least = np.min([error(x, np.float64(number * tensor), E2M1) for number in numbers], axis=0)
    chosen = np.asarray(fixed["scale"], np.float64)
    assert np.isin(chosen, numbers).all()
    np.testing.assert_allclose(error(x, chosen * tensor, E2M1), least, rtol=1e-4)


def test_an_error_of_choice_is_never_above_that_of_a_rule():
    x, layout = arranged(blocks(2, 32, octaves=2), 32)
    best = error(x, np.asarray(best_power(x, layout, E2M1)["scale"], np.float64), E2M1)
    for rule in (floor, ceil):
        assert (
            best
            <= error(x, np.asarray(rule(x, layout, E2M1)["scale"], np.float64), E2M1) * (1 + 1e-5)
        ).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "c", [mxfp8(), mxfp8("e5m2", "ceil"), mxfp4(), mxfp4("mse"), nvfp4(), nvfp4("mse")]
)
def test_stored_scales_are_the_very_numbers_that_were_trained_with(c):
    w = jnp.asarray(blocks(3, 32, octaves=3))
    state = c.init({"w": w})
    node = c.pack({"w": w}, state)["w"]
    assert node.scale.dtype.itemsize == 1
    np.testing.assert_array_equal(node.scale.astype(jnp.float32), state.fixed["w"]["scale"])
