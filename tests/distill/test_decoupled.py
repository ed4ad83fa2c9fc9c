import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from compress_jax.distill import cross_entropy, dkd, kl


def logits(seed, shape=(16, 10), scale=3.0):
    x = np.random.default_rng(seed).normal(size=shape)  # nothing to compile for each shape
    return jnp.asarray(scale * x, jnp.float32)


LABELS = jnp.arange(16) * 7 % 10


def by_definition(s, t, labels, alpha, beta, temperature):
    """Equations 2 to 7 with explicit probabilities, in float64."""
    out = []
    softened = (
        scipy.special.softmax(np.asarray(z, np.float64) / temperature, axis=-1) for z in (s, t)
    )
    for p_s, p_t, y in zip(*softened, labels, strict=True):
        rest = np.arange(len(p_s)) != y
        tckd = scipy.special.rel_entr([p_t[y], p_t[rest].sum()], [p_s[y], p_s[rest].sum()]).sum()
        nckd = scipy.special.rel_entr(
            p_t[rest] / p_t[rest].sum(), p_s[rest] / p_s[rest].sum()
        ).sum()
        out.append(temperature**2 * (alpha * tckd + beta * nckd))
    return np.array(out)


@pytest.mark.wide(2)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("alpha, beta", [(1.0, 8.0), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_it_is_the_papers_formula(alpha, beta, temperature):
    s, t = logits(0), logits(1)
    expected = by_definition(s, t, np.asarray(LABELS), alpha, beta, temperature)
    np.testing.assert_allclose(
        dkd(s, t, LABELS, alpha, beta, temperature), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_decouples_the_plain_divergence(temperature):
    s, t = logits(0), logits(1)
    miss = 1 - jax.nn.softmax(t / temperature)[jnp.arange(16), LABELS]
    np.testing.assert_allclose(
        dkd(s, t, LABELS, 1.0, miss, temperature), kl(s, t, temperature), rtol=1e-5, atol=1e-6
    )
    of_others = dkd(s, t, LABELS, 0.0, 1.0, temperature)
    both = dkd(
        s, t, LABELS, 1.0, 1.0, temperature
    )  # never less than kl, which weighs the others by the teacher's doubt
    np.testing.assert_allclose(
        both - kl(s, t, temperature), (1 - miss) * of_others, rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_a_certain_teacher_still_tells_of_the_other_classes():
    t = jnp.array([[60.0, 1.0, 0.0, -1.0]])  # probability of the label rounds to 1 in float32
    s = jnp.array([[60.0, -1.0, 0.0, 1.0]])
    to_others = jax.grad(lambda s: dkd(s, t, jnp.array([0]), temperature=1.0).sum())(s)[0, 1:]
    expected = 8 * (
        scipy.special.softmax([-1.0, 0.0, 1.0]) - scipy.special.softmax([1.0, 0.0, -1.0])
    )
    np.testing.assert_allclose(to_others, expected, atol=1e-5)
    assert jnp.abs(jax.grad(lambda s: kl(s, t, 1.0).sum())(s)).max() < 1e-20


@pytest.mark.slow
def test_gradients_keep_their_size_at_high_temperatures():
    s, t = logits(0, scale=1.0), logits(1, scale=1.0)
    gradient = jax.grad(lambda s, T: dkd(s, t, LABELS, temperature=T).sum())
    np.testing.assert_allclose(gradient(s, 200.0), gradient(s, 1000.0), atol=0.02)
    assert jnp.abs(gradient(s, 1000.0)).max() > 0.1


@pytest.mark.slow
def test_two_classes_have_only_the_targets_part():
    s, t, labels = logits(0, (8, 2)), logits(1, (8, 2)), jnp.arange(8) % 2
    np.testing.assert_allclose(
        dkd(s, t, labels, 1.0, 8.0, 2.0), kl(s, t, 2.0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_it_adds_to_the_labels_loss_and_takes_any_leading_axes():
    s, t, labels = logits(0, (2, 3, 5)), logits(1, (2, 3, 5)), jnp.array([[0, 1, 2], [3, 4, 0]])
    flat = dkd(s.reshape(6, 5), t.reshape(6, 5), labels.ravel())
    np.testing.assert_allclose(dkd(s, t, labels).ravel(), flat, rtol=1e-6)
    assert (cross_entropy(s, labels) + 0.5 * dkd(s, t, labels)).shape == (2, 3)
