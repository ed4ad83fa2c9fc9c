"""Feature losses against float64 NumPy from the papers, at extremes, and their invariances."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress_jax.core.errors import ShapeError
from compress_jax.distill import (
    ab,
    attention,
    cka_loss,
    fsp,
    ft,
    hint,
    mgd,
    nst,
    ofd,
    ofd_margin,
    resize_features,
    review,
    vid,
)

B, H, W, C = 3, 6, 6, 5
SHAPE = (B, H, W, C)
VARIANCE = np.array([0.3, 1.0, 2.0, 5.0, 0.01])
MARGIN = np.array([-0.1, -0.5, -0.8, -1.0, -2.0])


def draw(seed, shape=SHAPE):
    """Draw in NumPy, which compiles nothing for each shape; float32 holds it exactly."""
    return np.float64(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def per_example(fn):
    return lambda s, t, *rest: np.array([fn(a, b, *rest) for a, b in zip(s, t, strict=True)])


def attention_map(f, p):
    q = (np.abs(f) ** p).mean(-1).ravel()
    return q / np.sqrt((q**2).sum())


def selectivity(s, t):
    s, t = (f.reshape(-1, f.shape[-1]) for f in (s, t))
    s, t = (f / np.linalg.norm(f, axis=0) for f in (s, t))
    return ((s.T @ s) ** 2).mean() + ((t.T @ t) ** 2).mean() - 2 * ((s.T @ t) ** 2).mean()


def flow(f, g):
    total = sum(np.outer(f[i, j], g[i, j]) for i in range(f.shape[0]) for j in range(f.shape[1]))
    return total / (f.shape[0] * f.shape[1])


def activation_boundary(s, t, margin=1.0):
    on = (t > 0).astype(float)  # as the paper writes it, indicator by indicator
    return (on * np.maximum(margin - s, 0) ** 2 + (1 - on) * np.maximum(margin + s, 0) ** 2).mean()


def overhaul(s, t):
    target = np.where(t > MARGIN, t, MARGIN)
    return np.where((s <= target) & (target <= 0), 0.0, (target - s) ** 2).mean()


def pooled(f, size):
    rows, columns = f.shape[0] // size, f.shape[1] // size
    return f.reshape(size, rows, size, columns, -1).mean((1, 3))


def pyramid(s, t):
    losses = [((s - t) ** 2).mean()] + [
        ((pooled(s, k) - pooled(t, k)) ** 2).mean() for k in (3, 2, 1)
    ]
    return np.average(losses, weights=[1, 1 / 2, 1 / 4, 1 / 8])


def pair_flow(s, t):
    second = per_example(lambda a, b: ((flow(a, a[..., :2]) - flow(b, b[..., :2])) ** 2).mean())
    return second(s, t)


def our_flow(s, t):
    return fsp((s, s[..., :2]), (t, t[..., :2]))


LOSSES = {
    "hint": (hint, per_example(lambda s, t: ((s - t) ** 2).mean())),
    "attention": (
        attention,
        per_example(lambda s, t: ((attention_map(s, 2) - attention_map(t, 2)) ** 2).mean()),
    ),
    "attention of power 3": (
        partial(attention, p=3),
        per_example(lambda s, t: ((attention_map(s, 3) - attention_map(t, 3)) ** 2).mean()),
    ),
    "ft": (
        ft,
        per_example(lambda s, t: np.abs(s / np.linalg.norm(s) - t / np.linalg.norm(t)).mean()),
    ),
    "ft, squared": (
        partial(ft, p=2),
        per_example(lambda s, t: ((s / np.linalg.norm(s) - t / np.linalg.norm(t)) ** 2).mean()),
    ),
    "fsp": (our_flow, pair_flow),
    "nst": (nst, per_example(selectivity)),
    "vid": (
        lambda s, t: vid(s, t, jnp.asarray(VARIANCE, jnp.float32)),
        per_example(
            lambda s, t: (
                -scipy.stats.norm.logpdf(t, s, np.sqrt(VARIANCE)).mean() - np.log(2 * np.pi) / 2
            )
        ),
    ),
    "ab": (ab, per_example(activation_boundary)),
    "ofd": (lambda s, t: ofd(s, t, jnp.asarray(MARGIN, jnp.float32)), per_example(overhaul)),
    "review": (partial(review, levels=(3, 2, 1)), per_example(pyramid)),
    "mgd, nothing hidden": (
        lambda s, t: mgd(s, t, lambda x: 2 * x, jax.random.key(0), 0.0),
        per_example(lambda s, t: ((2 * s - t) ** 2).mean()),
    ),
}
every_loss = pytest.mark.parametrize("ours, reference", LOSSES.values(), ids=LOSSES)


def single(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.wide(4)
@every_loss
def test_values_are_the_references(ours, reference):
    s, t = draw(0), draw(1)
    value = jax.jit(ours)(single(s), single(t))
    assert value.dtype == jnp.float32 and value.shape == (B,)
    np.testing.assert_allclose(value, reference(s, t), rtol=2e-5, atol=1e-7)


@pytest.mark.wide(5)
@every_loss
def test_gradients_are_finite_differences_of_the_float64_reference(ours, reference):
    s, t = draw(0), draw(1)
    gradient = np.asarray(
        jax.jit(jax.grad(lambda s: ours(s, single(t)).sum()))(single(s)), np.float64
    )
    for seed in range(3):
        direction = draw(10 + seed)
        slope = (
            reference(s + 1e-6 * direction, t) - reference(s - 1e-6 * direction, t)
        ).sum() / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-4, atol=1e-6)


@pytest.mark.wide(1)
@every_loss
@pytest.mark.slow
def test_each_example_has_its_own_loss_and_the_teacher_no_gradient(ours, reference):
    s, t = single(draw(0)), single(draw(1))
    whole = ours(s, t)
    np.testing.assert_allclose(whole[1:2], ours(s[1:2], t[1:2]), rtol=1e-5)
    np.testing.assert_array_equal(jax.grad(lambda t: ours(s, t).sum())(t), 0)
    others = jax.grad(lambda s: ours(s, t)[1])(s)
    assert (others[0] == 0).all() and (others[1] != 0).any()


@pytest.mark.wide(5)
@every_loss
def test_half_precision_features_are_reduced_in_float32(ours, reference):
    s, t = (single(draw(seed)).astype(jnp.bfloat16) for seed in (0, 1))
    value = ours(s, t)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
        value, reference(np.asarray(s, np.float64), np.asarray(t, np.float64)), rtol=1e-4
    )


@pytest.mark.parametrize("name", ["hint", "attention", "ft", "fsp", "nst", "review"])
def test_equal_features_cost_nothing(name):
    x = single(draw(0))
    np.testing.assert_allclose(LOSSES[name][0](x, x), 0, atol=1e-6)
    assert (LOSSES[name][0](x, single(draw(1))) > 1e-4).all()


LARGE, HUGE = float(np.finfo(np.float32).max), float(np.float32(1e37))
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
ANY = hnp.arrays(
    np.float32, (2, 2, 2, 5), elements=st.sampled_from([np.float32(x) for x in EXTREMES])
)


def value_and_gradient(ours):
    return jax.jit(jax.value_and_grad(lambda s, t: ours(s, t).mean()))


FINITE = {name: value_and_gradient(ours) for name, (ours, _) in LOSSES.items()} | {
    "cka": value_and_gradient(cka_loss)
}


@pytest.mark.wide(3)
@pytest.mark.parametrize("name", FINITE)
@given(ANY, ANY)
@settings(deadline=None, max_examples=40)
def test_values_and_gradients_are_finite_at_any_finite_features(name, s, t):
    value, gradient = FINITE[name](s, t)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", FINITE)
def test_values_and_gradients_are_finite_where_there_is_nothing_or_all_is_equal(name):
    zero, one = jnp.zeros((2, 2, 2, 5)), jnp.ones((2, 2, 2, 5))
    for s, t in [(zero, zero), (zero, one), (one, zero), (one, one)]:
        value, gradient = FINITE[name](s, t)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.wide(3)
@pytest.mark.parametrize("name", ["hint", "review", "ab", "ofd", "fsp", "vid"])
def test_a_student_far_away_still_has_a_gradient_that_brings_it_back(name):
    s, t = jnp.full((2, 2, 2, 5), 1e30), -jnp.ones((2, 2, 2, 5))
    assert (FINITE[name](s, t)[1] > 0).all()


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=20)
def test_scale_does_not_matter_to_maps_and_factors(a, b):
    s, t = single(draw(0)), single(draw(1))
    for loss in map(jax.jit, (attention, ft, nst)):
        np.testing.assert_allclose(loss(a * s, b * t), loss(s, t), rtol=1e-4)


@pytest.mark.slow
def test_channels_can_be_exchanged_or_be_more_where_they_are_summed_out():
    s, t = single(draw(0)), single(draw(1))
    for loss in (attention, nst):
        np.testing.assert_allclose(loss(s[..., ::-1], t), loss(s, t), rtol=1e-5)
        np.testing.assert_allclose(loss(s, jnp.concatenate([t, t], -1)), loss(s, t), rtol=1e-5)


def test_fsp_takes_features_of_another_size():
    s, t = single(draw(0)), single(draw(1))
    big = jnp.repeat(jnp.repeat(s, 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(fsp((big, big), (t, t)), fsp((s, s), (t, t)), rtol=1e-5)


def test_the_activation_boundary_loss_ends_at_the_margin():
    t = single(draw(1))
    side = jnp.sign(t)
    np.testing.assert_array_equal(ab(1.0 * side, t), 0)
    np.testing.assert_allclose(ab(0.5 * side, t, margin=1.0), 0.25, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda s: ab(s, t).sum())(2.0 * side), 0)


@pytest.mark.slow
def test_the_margin_is_the_mean_of_the_negative_half_of_a_normal():
    scale, bias = (
        np.array([1.0, -2.0, 0.5, 1.0, 1.0, 1.0]),
        np.array([0.0, 1.0, -3.0, 4.0, 8.5, -40.0]),
    )
    for got, s, b in zip(ofd_margin(single(scale), single(bias)), np.abs(scale), bias, strict=True):
        low = (
            max(-40 * s, -s * s / max(b, s) * 40) if b > 0 else b - 10 * s
        )  # beyond is less than 1e-16 of the mass
        density = partial(scipy.stats.norm.pdf, loc=b, scale=s)
        mass, _ = scipy.integrate.quad(density, low, 0, epsabs=0)
        first, _ = scipy.integrate.quad(lambda x, density=density: x * density(x), low, 0, epsabs=0)
        np.testing.assert_allclose(got, first / mass, rtol=1e-3)


@given(st.floats(-HUGE, HUGE, width=32), st.floats(-HUGE, HUGE, width=32))
@settings(deadline=None, max_examples=60)
@pytest.mark.slow
def test_the_margin_is_finite_and_not_above_zero(scale, bias):
    margin = ofd_margin(jnp.array([scale], jnp.float32), jnp.array([bias], jnp.float32))
    assert jnp.isfinite(margin).all() and (margin <= 0).all()


def test_mgd_hides_whole_positions_and_as_many_as_it_should():
    seen = []
    x = jnp.ones((8, 32, 32, 3))
    mgd(x, x, lambda shown: seen.append(shown) or shown, jax.random.key(0))
    np.testing.assert_array_equal(seen[0].min(-1), seen[0].max(-1))
    assert abs(float(seen[0].mean()) - 0.35) < 5 * np.sqrt(0.35 * 0.65 / (8 * 32 * 32))
    other = mgd(x, x, lambda shown: shown, jax.random.key(1))
    assert (other != mgd(x, x, lambda shown: shown, jax.random.key(0))).any()
    np.testing.assert_array_equal(mgd(x, x, lambda shown: shown, jax.random.key(0), ratio=1.0), 1.0)


@pytest.mark.wide(2)
@pytest.mark.parametrize(
    "old, other, new", [(8, 4, 4), (7, 5, 3), (3, 1, 7), (4, 2, 8), (9, 6, 1), (5, 3, 4)]
)
def test_resize_takes_the_mean_of_what_each_position_covers(old, other, new):
    x = draw(0, (2, old, other, 3))
    expected = np.zeros((2, new, 2, 3))
    for i in range(new):
        for j in range(2):
            rows = slice(int(np.floor(i * old / new)), int(np.ceil((i + 1) * old / new)))
            columns = slice(int(np.floor(j * other / 2)), int(np.ceil((j + 1) * other / 2)))
            expected[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(resize_features(single(x), (new, 2)), expected, atol=1e-5)


def test_resize_keeps_what_has_the_size_and_pools_sequences():
    x = single(draw(0))
    assert resize_features(x, (H, W)) is x
    np.testing.assert_allclose(
        resize_features(x[:, 0], (2,)), x[:, 0].reshape(B, 2, 3, C).mean(2), rtol=1e-5, atol=1e-6
    )
    assert resize_features(x.astype(jnp.bfloat16), (2, 2)).dtype == jnp.bfloat16
    with pytest.raises(ShapeError, match="2 axes of positions"):
        resize_features(x, (2,))


def test_review_leaves_out_grids_that_are_not_smaller_and_takes_vectors():
    s, t = single(draw(0, (B, 2, 2, C))), single(draw(1, (B, 2, 2, C)))
    coarse = jnp.square(s.mean((1, 2)) - t.mean((1, 2))).mean(-1)
    np.testing.assert_allclose(review(s, t), (hint(s, t) + 0.5 * coarse) / 1.5, rtol=1e-5)
    np.testing.assert_array_equal(review(s[:, 0, 0], t[:, 0, 0]), hint(s[:, 0, 0], t[:, 0, 0]))


@pytest.mark.parametrize("name", ["hint", "ft", "vid", "ab", "ofd", "review"])
def test_other_channels_are_an_error_that_says_what_to_do(name):
    with pytest.raises(ShapeError, match=r"\(3, 6, 6, 4\).*\(3, 6, 6, 5\).*adapter"):
        LOSSES[name][0](jnp.ones((3, 6, 6, 4)), jnp.ones(SHAPE))


@pytest.mark.parametrize("name", ["hint", "attention", "ft", "nst", "vid", "ab", "ofd", "review"])
def test_other_positions_are_an_error_that_says_what_to_do(name):
    with pytest.raises(
        ShapeError, match=r"\(3, 3, 3, 5\).*\(3, 6, 6, 5\).*distill.resize_features"
    ):
        LOSSES[name][0](jnp.ones((3, 3, 3, 5)), jnp.ones(SHAPE))
    with pytest.raises(ShapeError, match="different numbers of examples"):
        LOSSES[name][0](jnp.ones((2, 6, 6, 5)), jnp.ones(SHAPE))


def test_fsp_says_which_shapes_it_cannot_take():
    x = jnp.ones(SHAPE)
    with pytest.raises(ShapeError, match="pairs features of equal positions"):
        fsp((x, x[:, :3, :3]), (x, x))
    with pytest.raises(ShapeError, match="differ in channels"):
        fsp((x[..., :2], x), (x, x))
    with pytest.raises(ShapeError, match="axis of its own"):
        hint(x[0, 0, 0], x[0, 0, 0])
