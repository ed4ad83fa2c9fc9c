import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from compress_jax.distill import (
    averaged,
    cross_entropy,
    dkd,
    ensemble,
    kl,
    reverse_kl,
    standardize,
    virtual_teacher,
)


def logits(seed, shape=(16, 10), scale=3.0):
    x = np.random.default_rng(seed).normal(size=shape)  # nothing to compile for each shape
    return jnp.asarray(scale * x, jnp.float32)


def probabilities(z, temperature=1.0):
    return scipy.special.softmax(np.asarray(z, np.float64) / temperature, axis=-1)


def test_standardised_logits_are_z_scores():
    z = logits(0) + 7
    np.testing.assert_allclose(
        standardize(z), scipy.stats.zscore(np.asarray(z, np.float64), axis=-1), atol=1e-5
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("scale, shift", [(1e-2, 0.0), (1e4, 1e4), (1e30, 0.0), (3.0, -50.0)])
@pytest.mark.slow
def test_scale_and_shift_are_free(scale, shift):
    z = logits(0, scale=1.0)
    np.testing.assert_allclose(standardize(scale * z + shift), standardize(z), atol=2e-4)
    direction = jax.grad(lambda s: kl(standardize(s), standardize(logits(1)), 2.0).sum())(z)
    np.testing.assert_allclose(
        (direction * z).sum(-1), 0, atol=1e-4
    )  # no pull on the range of the student's logits
    np.testing.assert_allclose(direction.sum(-1), 0, atol=1e-5)


@pytest.mark.slow
def test_equal_logits_are_zeros_and_still_learn():
    gradient = jax.grad(lambda s: kl(standardize(s), standardize(logits(1)), 2.0).sum())(
        jnp.full((16, 10), 3333.3)
    )
    np.testing.assert_array_equal(standardize(jnp.full((2, 10), 3333.3)), 0)
    assert jnp.isfinite(gradient).all() and 1 < jnp.abs(gradient).max() < 2e3


def test_a_virtual_teacher_is_a_smoothed_label():
    labels = jnp.arange(16) % 10
    q = probabilities(virtual_teacher(labels, 10, 0.8))
    np.testing.assert_allclose(
        q, 0.8 * np.eye(10)[labels] + (0.2 / 9) * (1 - np.eye(10)[labels]), rtol=1e-6
    )
    s, smoothing = logits(0), 0.2 * 10 / 9  # the same distribution, as label smoothing writes it
    entropy = -(q * np.log(q)).sum(-1)
    np.testing.assert_allclose(
        kl(s, virtual_teacher(labels, 10, 0.8)) + entropy,
        cross_entropy(s, labels, smoothing),
        rtol=1e-5,
    )
    soft = probabilities(np.log(q), 20.0)
    expected = 400 * scipy.special.rel_entr(soft, probabilities(s, 20.0)).sum(-1)
    np.testing.assert_allclose(
        kl(s, virtual_teacher(labels, 10, 0.8), 20.0), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("classes, probability", [(1, 0.9), (10, 0.05), (10, 1.0)])
def test_a_virtual_teacher_knows_better_than_chance(classes, probability):
    with pytest.raises(ValueError, match="probability"):
        virtual_teacher(jnp.array([0]), classes, probability)


@pytest.mark.wide(2)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [1.0, 0.0, 1.0]])
def test_an_ensemble_is_the_mean_of_probabilities(weights, temperature):
    teachers = [logits(i) for i in range(1, 4)]
    shares = np.asarray(weights or [1.0, 1.0, 1.0]) / np.sum(weights or [1.0, 1.0, 1.0])
    mean = sum(
        share * probabilities(t, temperature) for share, t in zip(shares, teachers, strict=True)
    )
    together = ensemble(teachers, weights, temperature)
    np.testing.assert_allclose(jax.nn.softmax(together / temperature), mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(ensemble(jnp.stack(teachers), weights, temperature), together)


def test_forward_kl_pulls_alike_to_mean_probabilities_and_mean_losses_and_reverse_does_not():
    s, teachers = logits(0), [logits(i) for i in range(1, 4)]
    weights = [1.0, 2.0, 5.0]

    def pulls(loss):
        to_mean = jax.grad(lambda s: loss(s, ensemble(teachers, weights)).sum())(s)
        return to_mean, jax.grad(lambda s: averaged(loss, weights)(s, teachers).sum())(s)

    np.testing.assert_allclose(*pulls(kl), atol=1e-5)
    to_mean, of_losses = pulls(reverse_kl)
    assert jnp.abs(to_mean - of_losses).max() > 0.1


def test_averaged_weighs_losses_and_hands_on_labels():
    s, teachers, labels = logits(0), [logits(1), logits(2)], jnp.arange(16) % 10
    expected = 0.25 * dkd(s, teachers[0], labels) + 0.75 * dkd(s, teachers[1], labels)
    np.testing.assert_allclose(averaged(dkd, [1, 3])(s, teachers, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(
        averaged(dkd)(s, jnp.stack([teachers[0]] * 3), labels),
        dkd(s, teachers[0], labels),
        rtol=1e-6,
    )


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_weights_that_make_no_sense(weights):
    teachers = [logits(1), logits(2)]
    with pytest.raises(ValueError, match="2 teachers need"):
        ensemble(teachers, weights)
    with pytest.raises(ValueError, match="2 teachers need"):
        averaged(kl, weights)(logits(0), teachers)


def test_schedules_of_weight_and_temperature_are_arrays_inside_one_compiled_step():
    warmup, cooling = optax.linear_schedule(0.0, 1.0, 10), optax.linear_schedule(4.0, 1.0, 10)
    s, t, labels, traces = logits(0), logits(1), jnp.arange(16) % 10, []

    @jax.jit
    def loss(step):
        traces.append(None)
        return (
            cross_entropy(s, labels) + warmup(step) * dkd(s, t, labels, temperature=cooling(step))
        ).mean()

    values = [float(loss(step)) for step in (0, 5, 10)]
    schedule = [(0.0, 4.0), (0.5, 2.5), (1.0, 1.0)]
    expected = [
        (cross_entropy(s, labels) + w * dkd(s, t, labels, temperature=T)).mean()
        for w, T in schedule
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert len(traces) == 1
