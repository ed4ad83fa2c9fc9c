import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from compress_jax.core import ShapeError
from compress_jax.distill import agreement, calibration, calibration_error, cka


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_agreement_counts_equal_predictions():
    s = jnp.array([[1.0, 2.0], [2.0, 1.0], [0.0, 5.0]])
    t = jnp.array([[9.0, 2.0], [9.0, 1.0], [0.0, 1.0]])
    np.testing.assert_array_equal(agreement(s, t), [0, 1, 1])


def kornblith(x, y):
    """The definition by feature covariances, in float64; ours goes by Gram matrices."""
    x, y = (np.asarray(z, np.float64).reshape(len(z), -1) for z in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


@pytest.mark.wide(1)
@pytest.mark.parametrize("shapes", [((20, 5), (20, 9)), ((6, 30), (6, 8)), ((12, 3, 2), (12, 4))])
@pytest.mark.slow
def test_cka_is_the_definition_by_features(shapes):
    x = normal(0, shapes[0])
    y = normal(1, shapes[1]).at[:, 0].add(x.reshape(len(x), -1)[:, 0] * 3)
    np.testing.assert_allclose(cka(x, y), kornblith(x, y), rtol=1e-5)


def test_cka_ignores_rotation_scale_and_shift_but_not_stretching():
    x = normal(0, (20, 5))
    rotation = jnp.linalg.qr(normal(1, (5, 5)))[0]
    np.testing.assert_allclose(cka(x, 1e-3 * x @ rotation + 4), 1, rtol=1e-4)
    np.testing.assert_allclose(cka(1e30 * x, x), 1, rtol=1e-5)
    assert cka(x, x * jnp.array([[100.0, 1.0, 1.0, 1.0, 1.0]])) < 0.9


@pytest.mark.wide(1)
@pytest.mark.parametrize("x", [jnp.zeros((4, 3)), jnp.full((4, 3), 7.3), jnp.full((4, 3), 1e30)])
@pytest.mark.slow
def test_cka_of_what_does_not_vary_is_zero_with_finite_gradient(x):
    value, gradient = jax.value_and_grad(cka)(x, normal(0, (4, 2)))
    assert abs(value) <= 1 and jnp.isfinite(gradient).all()
    assert (value == 0) == bool((x == 0).all()) or value < 1e-3


def test_cka_needs_the_same_examples():
    with pytest.raises(ShapeError, match="4 and 5"):
        cka(jnp.ones((4, 2)), jnp.ones((5, 2)))


def guo(logits, labels, bins):
    """Equation 3, bin by bin, in float64."""
    p = scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)
    confidence, right = p.max(-1), p.argmax(-1) == labels
    error = 0.0
    for low, high in zip(np.arange(bins) / bins, (np.arange(bins) + 1) / bins, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.wide(1)
@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.slow
def test_calibration_error_is_guos(bins):
    logits, labels = 2 * normal(0, (500, 5)), np.arange(500) % 5
    sums = calibration(logits, jnp.asarray(labels), bins)
    assert sums.count.shape == (bins,)
    np.testing.assert_allclose(calibration_error(sums), guo(logits, labels, bins), rtol=1e-4)


@pytest.mark.slow
def test_sums_of_batches_add_up_and_padding_does_not_count():
    logits, labels = 2 * normal(0, (100, 5)), jnp.arange(100) % 5
    whole = calibration(logits, labels)
    parts = [calibration(logits[:30], labels[:30]), calibration(logits[30:], labels[30:])]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        jax.tree.map(jnp.add, *parts),
        whole,
    )
    padded = calibration(
        jnp.concatenate([logits, jnp.zeros((28, 5))]), jnp.concatenate([labels, jnp.full(28, -1)])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), padded, whole)


@pytest.mark.slow
def test_certainty_falls_into_the_last_bin_and_nothing_is_no_error():
    sums = calibration(jnp.array([[1e4, 0.0], [1e4, 0.0]]), jnp.array([0, 1]), bins=10)
    np.testing.assert_array_equal(sums.count, [0] * 9 + [2])
    assert calibration_error(sums) == 0.5
    assert calibration_error(calibration(jnp.zeros((2, 3)), jnp.array([-1, -1]))) == 0
