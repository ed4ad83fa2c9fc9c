import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress_jax.distill import cross_entropy, hard_label, hinton, kl, mse


def logits(seed, shape=(32, 10), scale=3.0):
    x = np.random.default_rng(seed).normal(size=shape)  # nothing to compile for each shape
    return jnp.asarray(scale * x, jnp.float32)


def probabilities(z, temperature=1.0):
    return scipy.special.softmax(np.asarray(z, np.float64) / temperature, axis=-1)


@pytest.mark.wide(2)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("shape", [(32, 10), (2, 3, 100), (7,)])
def test_kl_is_scipys_relative_entropy(temperature, shape):
    s, t = logits(0, shape), logits(1, shape)
    expected = temperature**2 * scipy.special.rel_entr(
        probabilities(t, temperature), probabilities(s, temperature)
    ).sum(-1)
    np.testing.assert_allclose(kl(s, t, temperature), expected, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.jit(kl)(s, t, jnp.float32(temperature)), expected, rtol=2e-5, atol=1e-5
    )


@pytest.mark.wide(2)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 1000.0])
def test_kl_gradient_is_the_temperature_times_the_difference(temperature):
    s, t = logits(0), logits(1)
    gradient = jax.grad(lambda s: kl(s, t, temperature).sum())(s)
    expected = temperature * (probabilities(s, temperature) - probabilities(t, temperature))
    np.testing.assert_allclose(gradient, expected, atol=1e-6 * temperature)


def test_kl_vanishes_only_where_the_distributions_agree():
    s = logits(0)
    np.testing.assert_array_equal(kl(s, s, 4.0), 0)
    assert (kl(s, s + jnp.eye(10)[0][None], 4.0) > 0.001).all()


@given(st.floats(-100, 100), st.floats(-100, 100))
@settings(deadline=None, max_examples=30)
@pytest.mark.slow
def test_kl_and_cross_entropy_ignore_shifts(a, b):
    s, t, labels = logits(0), logits(1), jnp.arange(32) % 10
    np.testing.assert_allclose(kl(s + a, t + b, 2.0), kl(s, t, 2.0), atol=1e-3)
    np.testing.assert_allclose(cross_entropy(s + a, labels), cross_entropy(s, labels), atol=1e-4)


def test_the_squared_temperature_keeps_gradients_comparable():
    s, t = logits(0, scale=1.0), logits(1, scale=1.0)
    s, t = s - s.mean(-1, keepdims=True), t - t.mean(-1, keepdims=True)
    at_100 = jax.grad(lambda s: kl(s, t, 100.0).sum())(s)
    at_500 = jax.grad(lambda s: kl(s, t, 500.0).sum())(s)
    half_mse = jax.grad(lambda s: 0.5 * mse(s, t).sum())(s)
    np.testing.assert_allclose(at_100, at_500, atol=0.01)
    np.testing.assert_allclose(at_500, half_mse, atol=0.002)  # Kim et al. 2021, equation 5


def test_mse_and_cross_entropy_against_float64():
    s, t, labels = logits(0), logits(1), np.arange(32) % 10
    difference = np.asarray(s, np.float64) - np.asarray(t, np.float64)
    np.testing.assert_allclose(mse(s, t), (difference**2).mean(-1), rtol=1e-6)
    log_p = scipy.special.log_softmax(np.asarray(s, np.float64), axis=-1)
    q = 0.9 * np.eye(10)[labels] + 0.1 / 10
    np.testing.assert_allclose(
        cross_entropy(s, jnp.asarray(labels)), -log_p[np.arange(32), labels], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        cross_entropy(s, jnp.asarray(labels), 0.1), -(q * log_p).sum(-1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_labels_are_the_teachers_predictions(smoothing):
    s, t = logits(0), logits(1)
    log_p = scipy.special.log_softmax(np.asarray(s, np.float64), axis=-1)
    q = (1 - smoothing) * np.eye(10)[np.asarray(t).argmax(-1)] + smoothing / 10
    np.testing.assert_allclose(
        hard_label(s, t, smoothing), -(q * log_p).sum(-1), rtol=1e-5, atol=1e-6
    )


def test_hinton_takes_schedules_inside_a_compiled_step():
    s, t, labels = logits(0), logits(1), jnp.arange(32) % 10
    scheduled = jax.jit(lambda alpha, temperature: hinton(alpha, temperature)(s, t, labels))
    np.testing.assert_allclose(scheduled(0.25, 2.0), hinton(0.25, 2.0)(s, t, labels), rtol=1e-6)


def test_hinton_mixes_labels_and_teacher():
    s, t, labels = logits(0), logits(1), jnp.arange(32) % 10
    np.testing.assert_allclose(hinton(1.0)(s, t, labels), cross_entropy(s, labels), rtol=1e-6)
    np.testing.assert_allclose(hinton(0.0, 3.0)(s, t, labels), kl(s, t, 3.0), rtol=1e-6)
    mixed = 0.25 * cross_entropy(s, labels, 0.1) + 0.75 * kl(s, t, 2.0)
    np.testing.assert_allclose(
        hinton(0.25, 2.0, label_smoothing=0.1)(s, t, labels), mixed, rtol=1e-6
    )


LARGE = float(np.finfo(np.float32).max)
EXTREMES = [-LARGE, -1e30, -1e4, -100.0, -1.0, -1e-30, 0.0, 1e-30, 1.0, 100.0, 1e4, 1e30, LARGE]
ROWS = hnp.arrays(np.float32, (2, 6), elements=st.sampled_from([np.float32(x) for x in EXTREMES]))


@pytest.mark.wide(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@given(ROWS, ROWS, st.sampled_from([0.1, 1.0, 4.0, 100.0]))
@settings(deadline=None, max_examples=60)
@pytest.mark.slow
def test_losses_and_gradients_are_finite_at_any_finite_logits(dtype, s, t, temperature):
    largest = jnp.finfo(dtype).max.astype(jnp.float32)
    s, t = (jnp.clip(jnp.asarray(x), -largest, largest).astype(dtype) for x in (s, t))
    value, gradients = EXTREME_GRADIENT(s, t, jnp.float32(temperature))
    assert value.dtype == jnp.float32 and jnp.isfinite(value)
    for gradient in gradients:
        assert gradient.dtype == dtype and jnp.isfinite(gradient).all()
    expected = temperature * (probabilities(s, temperature) - probabilities(t, temperature))
    student = jax.grad(lambda s: kl(s, t, temperature).sum())(s).astype(jnp.float32)
    np.testing.assert_allclose(
        student, expected, atol=1e-5 * temperature if dtype == jnp.float32 else temperature / 100
    )


def _extreme(s, t, temperature):
    labels = jnp.array([0, 5])
    return kl(s, t, temperature).mean() + cross_entropy(s, labels, 0.1).mean()


EXTREME_GRADIENT = jax.jit(jax.value_and_grad(_extreme, argnums=(0, 1)))


def test_half_precision_logits_are_reduced_in_float32():
    s, t = logits(0).astype(jnp.bfloat16), logits(1).astype(jnp.bfloat16)
    wide = kl(s.astype(jnp.float32), t.astype(jnp.float32), 4.0)
    assert kl(s, t, 4.0).dtype == jnp.float32
    np.testing.assert_array_equal(kl(s, t, 4.0), wide)


def test_hinton_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="alpha"):
        hinton(alpha=1.5)
    with pytest.raises(ValueError, match="temperature"):
        hinton(temperature=0.0)
