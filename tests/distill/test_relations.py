"""Relation losses against float64 NumPy written from the papers, and under their invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress_jax.core.errors import ShapeError
from compress_jax.distill import (
    cc,
    cka_loss,
    ickd,
    pkt,
    rkd,
    rkd_angle,
    rkd_distance,
    similarity,
)
from compress_jax.distill._teachers.fidelity import cka

B = 6


def draw(seed, shape=(B, 7)):
    """Draw in NumPy, which compiles nothing for each shape; float32 holds it exactly."""
    return np.float64(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def single(x):
    return jnp.asarray(x, jnp.float32)


def huber(x):
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def normal(x, axis=-1):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def distances(x):
    d = np.array([[np.linalg.norm(a - b) for a in x] for b in x])
    return d / d[d > 0].mean()


def cosine(x, j, i, k):
    u, v = x[j] - x[i], x[k] - x[i]
    return u @ v / np.linalg.norm(u) / np.linalg.norm(v) if i not in (j, k) else 0.0


def angles(x):
    n = len(x)
    return np.array([[[cosine(x, j, i, k) for k in range(n)] for j in range(n)] for i in range(n)])


def neighbours(x):
    kernel = (1 + normal(x) @ normal(x).T) / 2
    return kernel / kernel.sum(1, keepdims=True)


def divergence(s, t):
    p, q = neighbours(t), neighbours(s)
    return (p * np.log((p + 1e-7) / (q + 1e-7))).mean(1)


def kernel(x, gamma=0.4):
    c = normal(x) @ normal(x).T
    return np.exp(-2 * gamma) * (1 + 2 * gamma * c + (2 * gamma * c) ** 2 / 2)


def alignment(s, t):
    centre = np.eye(len(s)) - 1 / len(s)
    s, t = (centre @ x @ x.T @ centre for x in (s, t))
    return 1 - (s * t).sum() / np.sqrt((s**2).sum() * (t**2).sum())


def channels(f):
    return normal(f.T @ f)


def inter_channel(s, t):
    s, t = (x.reshape(B, -1, x.shape[-1]) for x in (s, t))
    return np.array(
        [((channels(a) - channels(b)) ** 2).sum() / a.shape[-1] for a, b in zip(s, t, strict=True)]
    )


PAIR, MAPS = ((B, 7), (B, 4)), ((B, 3, 3, 4), (B, 2, 2, 4))
LOSSES = {
    "rkd_distance": (rkd_distance, lambda s, t: huber(distances(s) - distances(t)).mean(1), PAIR),
    "rkd_angle": (rkd_angle, lambda s, t: huber(angles(s) - angles(t)).mean((1, 2)), PAIR),
    "rkd": (
        rkd,
        lambda s, t: (
            25 * huber(distances(s) - distances(t)).mean(1)
            + 50 * huber(angles(s) - angles(t)).mean((1, 2))
        ),
        PAIR,
    ),
    "similarity": (
        similarity,
        lambda s, t: ((normal(s @ s.T) - normal(t @ t.T)) ** 2).sum(1) / B,
        PAIR,
    ),
    "pkt": (pkt, divergence, PAIR),
    "cc": (cc, lambda s, t: ((kernel(s) - kernel(t)) ** 2).mean(1), PAIR),
    "cka": (cka_loss, alignment, PAIR),
    "ickd": (ickd, inter_channel, MAPS),
}
every_loss = pytest.mark.parametrize("ours, reference, shapes", LOSSES.values(), ids=LOSSES)


@pytest.mark.wide(2)
@every_loss
def test_values_are_the_references(ours, reference, shapes):
    s, t = draw(0, shapes[0]), draw(1, shapes[1])
    value = jax.jit(ours)(single(s), single(t))
    assert value.dtype == jnp.float32 and value.shape == (() if ours is cka_loss else (B,))
    np.testing.assert_allclose(value, reference(s, t), rtol=1e-4, atol=1e-6)


@pytest.mark.wide(3)
@every_loss
def test_gradients_are_finite_differences_of_the_float64_reference(ours, reference, shapes):
    s, t = draw(0, shapes[0]), draw(1, shapes[1])
    gradient = np.asarray(
        jax.jit(jax.grad(lambda s: ours(s, single(t)).sum()))(single(s)), np.float64
    )
    for seed in range(3):
        direction = draw(10 + seed, shapes[0])
        slope = (
            reference(s + 1e-6 * direction, t).sum() - reference(s - 1e-6 * direction, t).sum()
        ) / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=5e-4, atol=1e-5)


@pytest.mark.wide(1)
@every_loss
@pytest.mark.slow
def test_the_teacher_gets_no_gradient_and_half_precision_is_reduced_in_float32(
    ours, reference, shapes
):
    s, t = single(draw(0, shapes[0])), single(draw(1, shapes[1]))
    np.testing.assert_array_equal(jax.grad(lambda t: ours(s, t).sum())(t), 0)
    s, t = s.astype(jnp.bfloat16), t.astype(jnp.bfloat16)
    value = ours(s, t)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
        value, reference(np.asarray(s, np.float64), np.asarray(t, np.float64)), rtol=1e-3, atol=1e-6
    )


@pytest.mark.wide(4)
@every_loss
def test_equal_features_cost_nothing_and_others_something(ours, reference, shapes):
    s, t = single(draw(0, shapes[0])), single(draw(1, shapes[1]))
    np.testing.assert_allclose(ours(s, s), 0, atol=1e-6)
    assert (ours(s, t) > 1e-5).all()


JITTED = {loss: jax.jit(loss) for loss, *_ in LOSSES.values()}


def rotation(seed, n=7):
    return np.linalg.qr(draw(seed, (n, n)))[0]


@given(st.integers(0, 99), st.floats(1e-2, 1e2))
@settings(deadline=None, max_examples=15)
def test_what_each_relation_does_not_see(seed, scale):
    s, t = draw(0), draw(1, (B, 4))
    turned, moved = s @ rotation(seed), s + draw(seed, (1, 7))
    each = np.abs(draw(seed, (B, 1))) + 0.1
    blind = {
        rkd_distance: [turned, moved, scale * s],
        rkd_angle: [turned, moved, scale * s],
        similarity: [turned, scale * s],
        pkt: [turned, each * s],
        cc: [turned, each * s],
        cka_loss: [turned, moved, scale * s],
    }
    for loss, variants in blind.items():
        for variant in variants:
            got, expected = (
                JITTED[loss](single(variant), single(t)),
                JITTED[loss](single(s), single(t)),
            )
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.slow
def test_ickd_sees_neither_the_order_of_positions_nor_scale():
    s, t = single(draw(0, MAPS[0])), single(draw(1, MAPS[1]))
    np.testing.assert_allclose(ickd(7 * s[:, ::-1], t), ickd(s, t), rtol=1e-5)
    np.testing.assert_allclose(ickd(s, t)[2:3], ickd(s[2:3], t[2:3]), rtol=1e-5)


@pytest.mark.slow
def test_positions_count_as_features():
    s, t = single(draw(0, (B, 2, 2, 3))), single(draw(1, (B, 5)))
    for loss in (rkd_distance, rkd_angle, similarity, pkt, cc, cka_loss):
        np.testing.assert_array_equal(loss(s, t), loss(s.reshape(B, -1), t))


def test_cka_loss_is_one_minus_the_metric():
    s, t = single(draw(0)), single(draw(1, (B, 4)))
    np.testing.assert_allclose(cka_loss(s, t), 1 - cka(s, t), atol=1e-6)


@pytest.mark.slow
def test_examples_that_coincide_leave_the_other_gradients_alone():
    s, t = single(draw(0)), single(draw(1, (B, 4)))
    s = s.at[1].set(s[0])
    for loss in (rkd_distance, rkd_angle, similarity, pkt, cc, cka_loss):
        slope = jax.jit(jax.grad(lambda s, loss=loss: loss(s, t).mean()))
        gradient, near = slope(s), slope(s.at[1, 0].add(1e-3))
        assert jnp.abs(gradient).max() < 10 and (gradient != 0).any()
        np.testing.assert_allclose(gradient[2:], near[2:], atol=2e-2)


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
ANY = hnp.arrays(np.float32, (3, 2, 4), elements=st.sampled_from([np.float32(x) for x in EXTREMES]))


def value_and_gradient(ours):
    return jax.jit(jax.value_and_grad(lambda s, t: ours(s, t).mean()))


FINITE = {name: value_and_gradient(ours) for name, (ours, *_) in LOSSES.items()}


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", FINITE)
@given(ANY, ANY)
@settings(deadline=None, max_examples=40)
def test_values_and_gradients_are_finite_at_any_finite_features(name, s, t):
    value, gradient = FINITE[name](s, t)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", FINITE)
def test_values_and_gradients_are_finite_where_there_is_nothing_or_all_is_equal(name):
    zero, one = jnp.zeros((3, 2, 4)), jnp.ones((3, 2, 4))
    for s, t in [(zero, zero), (zero, one), (one, zero), (one, one)]:
        value, gradient = FINITE[name](s, t)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@every_loss
def test_another_batch_is_an_error(ours, reference, shapes):
    with pytest.raises(ShapeError, match="different numbers of examples"):
        ours(jnp.ones(shapes[0]), jnp.ones(shapes[1])[1:])


def test_ickd_needs_equal_channels():
    with pytest.raises(ShapeError, match=r"\(2, 3, 4\).*\(2, 3, 5\).*channels.*adapter"):
        ickd(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 5)))


@pytest.mark.slow
def test_a_batch_spread_over_devices_has_the_same_relations():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    s, t = single(draw(0, (16, 7))), single(draw(1, (16, 4)))
    for loss in (rkd, similarity, pkt, cc, cka_loss):
        step = jax.jit(jax.value_and_grad(lambda s, t, loss=loss: loss(s, t).mean()))
        for got, expected in zip(step(*jax.device_put((s, t), spread)), step(s, t), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
