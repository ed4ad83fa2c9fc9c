"""Contrastive distillation: the paper's loss in float64, its memory bank, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress_jax.core.errors import ShapeError
from compress_jax.distill import Bank, crd, crd_bank, crd_negatives, crd_update, embedding

B = 6


def draw(seed, shape):
    """Draw in NumPy, which compiles nothing for each shape; float32 holds it exactly."""
    return np.float64(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def single(x):
    return jnp.asarray(x, jnp.float32)


def normal(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


LARGE = float(np.finfo(np.float32).max)
EXTREMES = [
    -LARGE,
    -1e19,
    -1e4,
    -1.0,
    -1e-8,
    -1e-13,
    -1e-30,
    0.0,
    1e-40,
    1e-20,
    1e-10,
    1.0,
    1e4,
    1e30,
    LARGE,
]

N, DIM, K = 40, 16, 12


def noise_contrast(anchor, bank, index, negatives, temperature):
    """Return the paper's loss, with h = e / (e + K / N) and the expected Z of a new bank."""
    z = N * np.exp(1 / (2 * DIM * temperature**2))
    losses = []
    for a, i, others in zip(anchor, index, negatives, strict=True):
        e = np.exp(np.concatenate([bank[[i]], bank[others]]) @ a / temperature) / z
        h = e / (e + len(others) / N)
        losses.append(-np.log(h[0]) - np.log(1 - h[1:]).sum())
    return np.array(losses)


def contrast_case():
    s, t = normal(draw(0, (B, DIM))), normal(draw(1, (B, DIM)))
    bank = Bank(single(draw(2, (N, DIM)) / 4), single(draw(3, (N, DIM)) / 4))
    index = jnp.array([3, 17, 0, 39, 8, 9])
    return s, t, bank, index, jax.random.randint(jax.random.key(4), (B, K), 0, N)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_crd_is_the_papers_loss(temperature):
    s, t, bank, index, negatives = contrast_case()
    rows = [np.asarray(each, np.float64) for each in bank]
    forward = noise_contrast(s, rows[1], np.asarray(index), np.asarray(negatives), temperature)
    backward = noise_contrast(t, rows[0], np.asarray(index), np.asarray(negatives), temperature)
    value = jax.jit(crd)(single(s), single(t), bank, index, negatives, temperature)
    np.testing.assert_allclose(value, forward + backward, rtol=1e-5)


@pytest.mark.slow
def test_crd_gradients_reach_both_embeddings_and_not_the_bank():
    s, t, bank, index, negatives = contrast_case()

    def loss(s, t, bank):
        return crd(s, t, bank, index, negatives, 0.5).sum()

    to_student, to_teacher, to_bank = jax.grad(loss, argnums=(0, 1, 2))(single(s), single(t), bank)
    rows = [np.asarray(each, np.float64) for each in bank]
    for own, gradient, other in [(s, to_student, rows[1]), (t, to_teacher, rows[0])]:
        direction = draw(9, (B, DIM))
        ends = [
            noise_contrast(
                own + h * direction, other, np.asarray(index), np.asarray(negatives), 0.5
            )
            for h in (1e-6, -1e-6)
        ]
        slope = (ends[0] - ends[1]).sum() / 2e-6
        np.testing.assert_allclose(
            (np.asarray(gradient, np.float64) * direction).sum(), slope, rtol=1e-4
        )
    np.testing.assert_array_equal(np.concatenate(to_bank), 0)


def test_shared_negatives_are_the_same_for_all_anchors():
    s, t, bank, index, negatives = contrast_case()
    each = jnp.tile(negatives[:1], (B, 1))
    np.testing.assert_allclose(
        crd(single(s), single(t), bank, index, negatives[0]),
        crd(single(s), single(t), bank, index, each),
        rtol=1e-5,
    )


def test_the_constant_is_what_the_first_batch_would_estimate():
    bank, temperature = crd_bank(jax.random.key(0), 20000, 128), 0.07
    anchors = normal(draw(0, (16, 128)))
    estimate = np.log(np.exp(np.asarray(bank.teacher, np.float64) @ anchors.T / temperature).mean())
    np.testing.assert_allclose(estimate, 1 / (2 * 128 * temperature**2), atol=0.02)


@given(
    hnp.arrays(np.float32, (2, DIM), elements=st.sampled_from([np.float32(x) for x in EXTREMES]))
)
@settings(deadline=None, max_examples=30)
def test_crd_is_finite_at_any_finite_features(features):
    value, gradient = CONTRAST(features)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def _contrast(features):
    part, bank = embedding(8), crd_bank(jax.random.key(1), N, 8)
    params = part.init(jax.random.key(0), features.shape, features.shape)
    out = part.apply(params, features)
    return crd(out, out, bank, jnp.array([0, 1]), jnp.array([2, 3, 4])).mean()


CONTRAST = jax.jit(jax.value_and_grad(_contrast))


@pytest.mark.slow
def test_the_bank_moves_the_rows_of_the_batch_and_no_others():
    s, t, bank, index, _ = contrast_case()
    after = jax.jit(crd_update)(bank, single(s), single(t), index)
    for old, new, own in zip(bank, after, (s, t), strict=True):
        expected = np.asarray(old, np.float64)
        expected[np.asarray(index)] = normal(0.5 * expected[np.asarray(index)] + 0.5 * own)
        np.testing.assert_allclose(new, expected, atol=1e-6)
        rest = np.setdiff1d(np.arange(N), index)
        np.testing.assert_array_equal(new[rest], old[rest])
    assert jax.tree.structure(after) == jax.tree.structure(bank)
    kept = crd_update(bank, single(s), single(t), index, momentum=1.0)
    np.testing.assert_allclose(kept.student[3], normal(np.asarray(bank.student[3])), rtol=1e-6)


def test_a_row_that_cancels_its_embedding_becomes_zero_and_not_nan():
    bank = Bank(jnp.eye(2), jnp.eye(2))
    after = crd_update(bank, -jnp.eye(2), -jnp.eye(2), jnp.arange(2))
    np.testing.assert_array_equal(after.student, 0)


@pytest.mark.slow
def test_negatives_are_of_other_classes_and_all_equally_likely():
    labels = jnp.array([2, 0, 1, 0, 2, 2, 1])
    drawn = np.asarray(crd_negatives(jax.random.key(0), jnp.arange(7), labels, 30000))
    for anchor, row in enumerate(drawn):
        allowed = np.flatnonzero(labels != labels[anchor])
        counts = np.bincount(row, minlength=7)
        np.testing.assert_array_equal(np.flatnonzero(counts), allowed)
        share = 1 / len(allowed)
        np.testing.assert_allclose(
            counts[allowed] / 30000, share, atol=5 * np.sqrt(share * (1 - share) / 30000)
        )


@pytest.mark.slow
def test_contrast_brings_the_embeddings_of_one_example_together():
    features = single(draw(0, (N, 10))), single(draw(0, (N, 10)) @ draw(1, (10, 12)))
    part, bank = embedding(DIM), crd_bank(jax.random.key(1), N, DIM)
    keys = jax.random.split(jax.random.key(2))
    params = [
        part.init(key, each.shape, each.shape) for key, each in zip(keys, features, strict=True)
    ]
    optimizer = optax.sgd(0.1, momentum=0.9)
    index = jnp.arange(N)

    def embed(params):
        return [part.apply(own, each) for own, each in zip(params, features, strict=True)]

    def contrast(params, bank, key):
        s, t = embed(params)
        return crd(s, t, bank, index, crd_negatives(key, index, index, K), 0.2).mean()

    @jax.jit
    def step(params, state, bank, key):
        gradient = jax.grad(lambda p: contrast(p, bank, key))(params)
        updates, state = optimizer.update(gradient, state)
        s, t = embed(params)
        return optax.apply_updates(params, updates), state, crd_update(bank, s, t, index)

    before, state = jnp.sum(embed(params)[0] * embed(params)[1], -1).mean(), optimizer.init(params)
    for i in range(60):
        params, state, bank = step(params, state, bank, jax.random.key(i))
    s, t = embed(params)
    assert jnp.sum(s * t, -1).mean() > before + 0.5
    assert ((s @ t.T).argmax(1) == jnp.arange(N)).mean() > 0.8


def test_a_bank_spread_over_devices_is_updated_alike():
    s, t, bank, index, negatives = contrast_case()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(
        bank, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    s, t = single(s), single(t)
    moved = jax.jit(crd_update)
    for got, expected in zip(moved(spread, s, t, index), moved(bank, s, t, index), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    loss = jax.jit(crd)
    np.testing.assert_allclose(
        loss(s, t, spread, index, negatives), loss(s, t, bank, index, negatives), rtol=1e-5
    )


def test_embeddings_of_two_sizes_are_an_error():
    _, _, bank, index, negatives = contrast_case()
    with pytest.raises(ShapeError, match=r"\(6, 16\).*\(6, 8\)"):
        crd(jnp.ones((6, 16)), jnp.ones((6, 8)), bank, index, negatives)
