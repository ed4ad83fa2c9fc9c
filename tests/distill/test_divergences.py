import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special

from compress_jax.distill import jsd, kl, reverse_kl, total_variation


def logits(seed, shape=(16, 10), scale=3.0):
    x = np.random.default_rng(seed).normal(size=shape)  # nothing to compile for each shape
    return jnp.asarray(scale * x, jnp.float32)


def probabilities(z, temperature=1.0):
    return scipy.special.softmax(np.asarray(z, np.float64) / temperature, axis=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_reverse_kl_is_kl_with_roles_swapped(temperature):
    s, t = logits(0), logits(1)
    p, q = probabilities(t, temperature), probabilities(s, temperature)
    expected = temperature**2 * scipy.special.rel_entr(q, p).sum(-1)
    np.testing.assert_allclose(reverse_kl(s, t, temperature), expected, rtol=2e-5, atol=1e-5)
    gradient = jax.grad(lambda s: reverse_kl(s, t, temperature).sum())(s)
    pull = np.log(q / p) - scipy.special.rel_entr(q, p).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, temperature * q * pull, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_the_two_divergences_from_the_mixture(beta, temperature):
    s, t = logits(0), logits(1)
    p, q = probabilities(t, temperature), probabilities(s, temperature)
    m = beta * p + (1 - beta) * q
    parts = beta * scipy.special.rel_entr(p, m).sum(-1) + (1 - beta) * scipy.special.rel_entr(
        q, m
    ).sum(-1)
    np.testing.assert_allclose(
        jsd(s, t, temperature, beta), temperature**2 * parts, rtol=2e-5, atol=1e-6
    )


def test_half_is_scipys_jensen_shannon():
    s, t = logits(0), logits(1)
    expected = (
        scipy.spatial.distance.jensenshannon(probabilities(s), probabilities(t), axis=-1) ** 2
    )
    np.testing.assert_allclose(jsd(s, t), expected, rtol=1e-5)
    np.testing.assert_allclose(jsd(s, t), jsd(t, s), rtol=1e-5)


def test_the_ends_are_forward_and_reverse_exactly():
    s, t = logits(0), logits(1)
    np.testing.assert_array_equal(jsd(s, t, 2.0, 0.0), kl(s, t, 2.0))
    np.testing.assert_array_equal(jsd(s, t, 2.0, 1.0), reverse_kl(s, t, 2.0))


@pytest.mark.slow
def test_towards_the_ends_it_tends_to_them_after_division_and_never_exceeds_log_2():
    with jax.enable_x64(True):
        s, t = (2 * jax.random.normal(jax.random.key(i), (16, 10), jnp.float64) for i in range(2))
        distance = [
            float(abs(jsd(s, t, 2.0, beta) / beta - kl(s, t, 2.0)).max())
            for beta in (1e-3, 1e-5, 1e-7)
        ]
        assert distance[0] > 30 * distance[1] > 900 * distance[2] and distance[2] < 1e-4
        np.testing.assert_allclose(
            jsd(s, t, 2.0, 1 - 1e-7) / 1e-7, reverse_kl(s, t, 2.0), rtol=1e-4
        )
    apart = jnp.array([[1e4, 0.0]]), jnp.array([[0.0, 1e4]])
    np.testing.assert_allclose(jsd(*apart), np.log(2), rtol=1e-6)


@pytest.mark.parametrize("divergence", [reverse_kl, jsd])
def test_gradients_keep_their_size_at_high_temperatures(divergence):
    s, t = logits(0, scale=1.0), logits(1, scale=1.0)
    gradient = jax.grad(lambda s, T: divergence(s, t, T).sum())
    np.testing.assert_allclose(gradient(s, 100.0), gradient(s, 300.0), atol=0.01)
    share = (
        1.0 if divergence is reverse_kl else 0.25
    )  # to second order all are a multiple of the squared difference
    centred = (s - t) - (s - t).mean(-1, keepdims=True)
    np.testing.assert_allclose(gradient(s, 300.0), share * centred / 10, atol=0.005)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match="beta"):
        jsd(logits(0), logits(1), 1.0, beta)


def test_total_variation_is_half_the_sum_and_bounds_by_pinsker():
    s, t = logits(0), logits(1)
    p, q = probabilities(t), probabilities(s)
    expected = np.maximum(p - q, 0).sum(-1)  # the other way to write it
    np.testing.assert_allclose(total_variation(s, t), expected, rtol=1e-5)
    assert (2 * total_variation(s, t) ** 2 <= kl(s, t) + 1e-6).all()
    gradient = jax.grad(lambda s: total_variation(s, t).sum())(s)
    sign = np.where(q > p, 0.5, -0.5)
    np.testing.assert_allclose(gradient, q * (sign - (q * sign).sum(-1, keepdims=True)), atol=1e-6)
