"""Gram matrices in which every row weighs alike, against NumPy, and what solvers make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.trace import calibrate, gram


def dense(params, x):
    return x @ params["kernel"]


def rows(seed, shape=(5, 7, 6)):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    x[0, 0] *= 1000  # a massive activation
    x[1, 2] = 0
    return x


def scaled(x):
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    size = np.sqrt((x**2).mean(-1, keepdims=True))
    return x / np.where(size == 0, 1, size)


def test_every_row_weighs_alike():
    params = {"kernel": jnp.ones((6, 3))}
    batches = [rows(0), rows(1)]
    found = calibrate(dense, gram(normalize=True), params, batches)["kernel"]["input"]
    expected = sum(scaled(x).T @ scaled(x) for x in batches)
    np.testing.assert_allclose(found.gram, expected, rtol=1e-5, atol=1e-4)
    assert int(found.count) == 70
    # The trace counts rows: each that is not zero gives the width.
    assert float(jnp.trace(found.gram)) == pytest.approx(6 * 68, rel=1e-5)


def test_the_scale_of_rows_does_not_matter_and_padding_does_not_count():
    params = {"kernel": jnp.ones((6, 3))}
    x = rows(2)
    powers = 2.0 ** np.arange(-17, 18).reshape(5, 7, 1).astype(np.float32)
    one = calibrate(dense, gram(normalize=True), params, [x])["kernel"]["input"]
    other = calibrate(dense, gram(normalize=True), params, [x * powers])["kernel"]["input"]
    np.testing.assert_allclose(one.gram, other.gram, rtol=1e-6, atol=1e-5)
    mask = np.arange(7)[None] < np.array([7, 3, 5, 1, 4])[:, None]
    bad = np.where(mask[..., None], x, np.nan)
    seen = calibrate(dense, gram(normalize=True), params, [bad], mask=[mask])["kernel"]["input"]
    kept = scaled(x[mask])
    np.testing.assert_allclose(seen.gram, kept.T @ kept, rtol=1e-5, atol=1e-4)
    assert int(seen.count) == 20


def test_convolutions_normalize_windows():
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    kernel = jnp.ones((3, 3, 3, 4))

    def conv(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "VALID", dimension_numbers=numbers
        )

    found = calibrate(conv, gram(normalize=True), {"kernel": kernel}, [x])["kernel"]["input"]
    assert float(jnp.trace(found.gram)) == pytest.approx(27 * 2 * 16, rel=1e-5)


def test_one_massive_row_does_not_rule_the_solution():
    """As the first token of a text in language models: plain Gram matrices fit it alone."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(48, 48))
    x = (rng.normal(size=(512, 48)) @ mix).astype(np.float32)
    spike = 3000 * np.abs(rng.normal(size=48)).astype(np.float32)
    seen = np.concatenate([spike[None], x])
    params = {"kernel": jnp.asarray(rng.normal(size=(48, 32)), jnp.float32)}
    int3 = cj.quantize.uniform(3, granularity="channel")
    held_out = (rng.normal(size=(512, 48)) @ mix).astype(np.float32)

    def error(normalize):
        calibration = calibrate(dense, gram(normalize=normalize), params, [seen])
        solved = cj.quantize.gptq(params, calibration, int3).params["kernel"]
        return float(jnp.square(held_out @ (solved - params["kernel"])).mean())

    assert error(True) < 0.7 * error(False)
