import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from compress_jax.core import ShapeError
from compress_jax.distill import TopK, buckets, jsd, kl, reverse_kl, top_k, top_k_kl


def logits(seed, shape=(4, 5, 12), scale=2.0):
    x = np.random.default_rng(seed).normal(size=shape)  # nothing to compile for each shape
    return jnp.asarray(scale * x, jnp.float32)


def probabilities(z, temperature):
    return scipy.special.softmax(np.asarray(z, np.float64) / temperature, axis=-1)


def coarse(p, ids):
    """Probabilities of some classes, and of all the others together."""
    kept = np.take_along_axis(p, np.asarray(ids), axis=-1)
    return np.concatenate([kept, p.sum(-1, keepdims=True) - kept.sum(-1, keepdims=True)], axis=-1)


@pytest.mark.wide(1)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.slow
def test_it_is_kl_over_k_plus_one_buckets(k, temperature):
    s, t = logits(0), logits(1)
    top = top_k(t, k, temperature)
    assert top.ids.dtype == jnp.int32 and top.ids.shape == (4, 5, k) and top.tail.shape == (4, 5)
    np.testing.assert_array_equal(top.ids, np.argsort(-np.asarray(t), axis=-1)[..., :k])
    p, q = (
        coarse(probabilities(t, temperature), top.ids),
        coarse(probabilities(s, temperature), top.ids),
    )
    np.testing.assert_allclose(jnp.exp(top.log_probs), p[..., :k], rtol=1e-5)
    np.testing.assert_allclose(top.tail, p[..., k], rtol=1e-4)
    expected = temperature**2 * scipy.special.rel_entr(p, q).sum(-1)
    np.testing.assert_allclose(top_k_kl(s, top), expected, rtol=1e-4, atol=1e-5)
    assert (top_k_kl(s, top) <= kl(s, t, temperature) + 1e-5).all()


@pytest.mark.wide(1)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.slow
def test_all_classes_are_the_full_divergence_with_its_gradient(temperature):
    s, t = logits(0), logits(1)
    top = top_k(t, 12, temperature)
    np.testing.assert_array_equal(top.tail, 0)
    (value, gradient), (full, full_gradient) = (
        jax.value_and_grad(lambda s, loss=loss: loss(s).sum())(s)
        for loss in (lambda s: top_k_kl(s, top), lambda s: kl(s, t, temperature))
    )
    np.testing.assert_allclose(value, full, rtol=1e-5)
    np.testing.assert_allclose(gradient, full_gradient, atol=1e-5)


@pytest.mark.slow
def test_the_tail_pulls_on_every_class_in_it():
    s, t, temperature = logits(0), logits(1), 2.0
    top = top_k(t, 3, temperature)
    gradient = jax.grad(lambda s: top_k_kl(s, top).sum())(s)
    p, q = probabilities(t, temperature), probabilities(s, temperature)
    tail_p, tail_q = (coarse(x, top.ids)[..., 3:] for x in (p, q))
    in_tail = np.ones(p.shape, bool)
    np.put_along_axis(in_tail, np.asarray(top.ids), False, axis=-1)
    expected = temperature * np.where(in_tail, q * (1 - tail_p / tail_q), q - p)
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


@pytest.mark.slow
def test_other_divergences_take_the_buckets_too():
    s, t = logits(0), logits(1)
    top = top_k(t, 12)
    for divergence in (reverse_kl, jsd):
        np.testing.assert_allclose(
            divergence(*buckets(s, top)), divergence(s, t), rtol=1e-4, atol=1e-5
        )
    assert (jsd(*buckets(s, top_k(t, 3))) <= jsd(s, t) + 1e-6).all()


@pytest.mark.slow
def test_a_tail_too_small_for_a_difference_is_kept():
    t = jnp.array([0.0, -40.0, -40.0])
    top = top_k(t, 1)
    np.testing.assert_allclose(
        top.tail, 2 * np.exp(-40.0), rtol=1e-5
    )  # 1 minus the rest is 0 in float32
    student = jnp.array([0.0, -41.0, -41.0])
    gradient = jax.grad(lambda s: top_k_kl(s, top))(student)
    np.testing.assert_allclose(gradient[1:], np.exp(-41.0) - np.exp(-40.0), rtol=1e-4)


def test_a_cache_in_bfloat16_changes_little():
    s, t = logits(0), logits(1)
    top = top_k(t, 4)
    stored = TopK(top.ids, top.log_probs.astype(jnp.bfloat16), top.tail.astype(jnp.bfloat16))
    assert top_k_kl(s, stored).dtype == jnp.float32
    np.testing.assert_allclose(top_k_kl(s, stored), top_k_kl(s, top), rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_it_goes_through_jit_and_indexing_with_its_temperature():
    s, t = logits(0), logits(1)
    top = jax.jit(lambda t: top_k(t, 4, 3.0))(t)
    assert top.temperature == 3.0
    one = jax.tree.map(lambda x: x[1], top)
    np.testing.assert_allclose(top_k_kl(s[1], one), top_k_kl(s, top)[1], rtol=1e-6)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="1 to 12"):
        top_k(logits(0), 13)
    with pytest.raises(ShapeError, match="leading axes"):
        top_k_kl(logits(0)[:2], top_k(logits(1), 3))
