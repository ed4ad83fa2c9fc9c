"""Ternary and binary weights against their papers' formulas in NumPy float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.layout import Layout
from compress_jax.quantize import binary, ternary
from compress_jax.quantize._weights.ternary import TERNARY, best_ternary

W = np.random.default_rng(0).laplace(size=(50, 4)).astype(np.float32)
each = pytest.mark.parametrize("granularity", ["tensor", "channel", 20])


def sets(x: Any, granularity: Any) -> list[np.ndarray]:
    """Return what shares a scale, the groups without their padding."""
    whole = np.asarray(x, np.float64)
    if granularity == 20:
        return [
            whole[rows, j]
            for j in range(4)
            for rows in (slice(0, 20), slice(20, 40), slice(40, 50))
        ]
    return [whole] if granularity == "tensor" else np.split(whole, 4, axis=1)


def view(c, w=W) -> jax.Array:
    return c.view({"w": jnp.asarray(w)}, c.init({"w": jnp.asarray(w)}))["w"]


@pytest.mark.wide(1)
@each
def test_twn_is_the_paper_s_threshold_and_scale_and_padding_does_not_count(granularity):
    got = view(ternary(granularity, pad=True))
    for seen, w in zip(sets(got, granularity), sets(W, granularity), strict=True):
        kept = np.abs(w) > 0.7 * np.abs(w).mean()
        np.testing.assert_allclose(seen, np.sign(w) * kept * np.abs(w)[kept].mean(), rtol=1e-5)


@each
def test_mse_is_the_best_of_all_thresholds(granularity):
    got = view(ternary(granularity, "mse", pad=True))
    for seen, w in zip(sets(got, granularity), sets(W, granularity), strict=True):
        descending = np.sort(np.abs(w).ravel())[::-1]
        gain = (np.cumsum(descending) ** 2 / np.arange(1, w.size + 1)).max()
        np.testing.assert_allclose(((seen - w) ** 2).sum(), (w**2).sum() - gain, rtol=1e-4)


def test_the_best_ternary_scale_is_that_of_brute_force():
    w = W[:, 0].astype(np.float64)
    scales = np.linspace(0.01, np.abs(w).max(), 20_000)[:, None]
    errors = (np.minimum(np.abs(w), np.abs(np.abs(w) - scales)) ** 2).sum(1)
    got = float(best_ternary(jnp.asarray(W[:, 0]), Layout((50,)), TERNARY)["scale"][0])
    np.testing.assert_allclose(got, scales[errors.argmin()], rtol=1e-3)


@each
def test_xnor_is_sign_times_mean_magnitude_and_padding_does_not_count(granularity):
    got = view(binary(granularity, pad=True))
    for seen, w in zip(sets(got, granularity), sets(W, granularity), strict=True):
        np.testing.assert_allclose(seen, np.where(w >= 0, 1, -1) * np.abs(w).mean(), rtol=1e-5)


def test_the_sign_of_zero_is_plus():
    np.testing.assert_array_equal(
        view(binary(scale=1.0), np.array([0.0, -0.0, 1e-30, -1e-30], np.float32)), [1, 1, 1, -1]
    )


@pytest.mark.parametrize("make", [ternary, binary])
def test_a_clipped_gradient_ends_where_magnitudes_exceed_the_bound(make):
    w = jnp.array([0.3, -1.0, 1.0001, -5.0])
    for clip, expected in ((1.0, [2.0, 2.0, 0.0, 0.0]), (None, [2.0] * 4)):
        c = make(clip=clip)
        state = c.init({"w": w})
        np.testing.assert_array_equal(
            jax.grad(lambda w, c=c, state=state: 2 * c.view({"w": w}, state)["w"].sum())(w),
            expected,
        )
        np.testing.assert_array_equal(
            c.view({"w": w}, state)["w"], make().view({"w": w}, make().init({"w": w}))["w"]
        )


@pytest.mark.wide(5)
@pytest.mark.parametrize("scale", ["twn", "mse"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e37])
def test_any_size_of_weights(scale, size):
    got, unit = view(ternary(scale=scale), W * np.float32(size)), view(ternary(scale=scale))
    np.testing.assert_allclose(got, np.asarray(unit) * np.float32(size), rtol=1e-5)
