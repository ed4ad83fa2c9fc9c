"""Adapters: what they compute, their training under an own label, and the shapes they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten, match
from compress_jax.distill import (
    ab,
    activation,
    conv,
    deconv,
    embedding,
    ft,
    fusion,
    gaussian,
    generator,
    hint,
    ickd,
    linear,
    mgd,
    norm,
    ofd,
    paraphraser,
    projector,
    review,
    sequential,
    translator,
    vid,
)

KEY = jax.random.key(0)
S, T = (4, 6, 6, 5), (4, 6, 6, 8)


def draw(seed, shape=S):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARTS = {
    "linear": (linear(), S, T),
    "linear of vectors": (linear(), (4, 5), (4, 8)),
    "linear of tokens": (linear(bias=False), (4, 7, 5), (4, 7, 8)),
    "conv": (conv(), S, T),
    "conv with stride": (conv(stride=2), S, (4, 3, 3, 8)),
    "conv of sequences": (conv(window=5), (4, 7, 5), (4, 7, 8)),
    "conv of vectors": (conv(), (4, 5), (4, 8)),
    "deconv": (deconv(), S, (4, 12, 12, 8)),
    "deconv of sequences": (deconv(), (4, 7, 5), (4, 14, 8)),
    "regressor with norm": (sequential(linear(), norm(), activation()), S, T),
    "deep": (sequential(conv(7, stride=2), activation(jnp.tanh), deconv()), S, T),
    "projector": (projector(), S, T),
    "projector of vectors": (projector(), (4, 5), (4, 8)),
    "generator": (generator(), S, T),
    "translator": (translator(), S, T),
}
every_part = pytest.mark.parametrize("part, student, teacher", PARTS.values(), ids=PARTS)


def start(part, student, teacher, key=KEY):
    """Return a part's params, made in one compiled program."""
    return jax.jit(lambda key: part.init(key, student, teacher))(key)


def descend(loss, params, steps=30, rate=0.02):
    """Return the loss before and after a few steps of momentum, and the params."""
    optimizer = optax.sgd(rate, momentum=0.9)

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(
        (params, optimizer.init(params))
    )
    return values[0], values[-1], params


@pytest.mark.wide(2)
@every_part
def test_parts_give_the_teachers_shape_and_learn_its_features(part, student, teacher):
    params = start(part, student, teacher)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    s, t = draw(1, student), jax.nn.relu(draw(2, teacher))
    assert part.apply(params, s).shape == teacher and part.apply(params, s[:2]).shape == (
        2,
        *teacher[1:],
    )
    before, after, _ = descend(lambda params: hint(part.apply(params, s), t).mean(), params)
    assert after < 0.9 * before


@pytest.mark.wide(3)
@every_part
def test_parts_see_each_example_alone_and_compute_in_float32(part, student, teacher):
    params = start(part, student, teacher)
    s = draw(1, student)
    np.testing.assert_allclose(
        part.apply(params, s)[1:2], part.apply(params, s[1:2]), rtol=1e-4, atol=1e-5
    )
    half = part.apply(params, s.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(
        half, part.apply(params, s.astype(jnp.bfloat16).astype(jnp.float32))
    )


@pytest.mark.wide(2)
@every_part
def test_the_key_decides_and_nothing_else(part, student, teacher):
    first, again, other = (
        start(part, student, teacher, key) for key in (KEY, KEY, jax.random.key(1))
    )
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), first, again)))
    assert not all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), first, other)))
    _, rebuild = flatten(first)
    assert jax.tree.structure(rebuild(flatten(first)[0])) == jax.tree.structure(first)


LARGE = float(np.finfo(np.float32).max)
ANY = hnp.arrays(
    np.float32,
    (2, 2, 2, 5),
    elements=st.sampled_from([np.float32(x) for x in (-LARGE, -1, 0, 1e-20, 1, 1e19)]),
)


@pytest.mark.wide(1)
@pytest.mark.parametrize("name", ["conv", "deconv", "projector", "translator"])
@given(ANY)
@settings(deadline=None, max_examples=20)
def test_parts_are_finite_with_their_gradients_at_any_finite_features(name, s):
    for leaf in jax.tree.leaves(FINITE[name](s)):
        assert jnp.isfinite(leaf).all()


def _finite(part):
    def loss(params, s):
        y = part.apply(params, s)
        return hint(y, jnp.ones_like(y)).mean()

    def run(s):
        params = part.init(KEY, (2, 2, 2, 5), (2, 4, 4, 8) if part is DECONV else (2, 2, 2, 8))
        return jax.value_and_grad(loss, argnums=(0, 1))(params, s)

    return jax.jit(run)


DECONV = deconv()
FINITE = {name: _finite(part) for name, part in zip(
    ["conv", "deconv", "projector", "translator"], [conv(), DECONV, projector(), translator()], strict=True  # noqa: E501
)}  # fmt: skip


def test_linear_is_a_matrix_product():
    params = linear().init(KEY, S, T) | {"bias": jnp.arange(8.0)}
    expected = np.asarray(draw(1), np.float64) @ np.asarray(
        params["kernel"], np.float64
    ) + np.arange(8)
    np.testing.assert_allclose(linear().apply(params, draw(1)), expected, rtol=1e-4, atol=1e-5)
    assert set(linear(bias=False).init(KEY, S, T)) == {"kernel"}


@pytest.mark.wide(2)
@pytest.mark.parametrize("window, stride", [(3, 1), (5, 1), (3, 2)])
def test_conv_is_scipys_correlation(window, stride):
    student, teacher = (1, 7, 9, 2), (1, -(-7 // stride), -(-9 // stride), 3)
    part = conv(window=window, stride=stride)
    params = start(part, student, teacher)
    x, kernel = (np.asarray(each, np.float64) for each in (draw(1, student), params["kernel"]))
    for j in range(3):
        full = sum(
            scipy.signal.correlate2d(x[0, ..., i], kernel[..., i, j], mode="same") for i in range(2)
        )
        np.testing.assert_allclose(
            part.apply(params, draw(1, student))[0, ..., j], full[::stride, ::stride], atol=1e-5
        )


def test_deconv_spreads_each_position_over_its_window():
    params = {"kernel": jnp.ones((2, 2, 1, 1)), "bias": jnp.zeros(1)}
    x = draw(1, (1, 3, 4, 1))
    np.testing.assert_allclose(
        deconv(window=2).apply(params, x), jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), rtol=1e-6
    )


@pytest.mark.slow
def test_norm_takes_mean_and_variance_over_channels():
    x = 3 + 5 * draw(1)
    y = norm().apply(norm().init(KEY, S, S), x)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(-1), 1, atol=1e-3)
    constant = jax.grad(lambda x: norm().apply(norm().init(KEY, S, S), x).sum())(jnp.ones(S))
    assert jnp.isfinite(constant).all()


@pytest.mark.slow
def test_vid_learns_mean_and_variance():
    s, t = draw(1, (512, 3)), draw(2, (512, 2)) * jnp.array([[0.1, 2.0]])
    part = gaussian(hidden=8)
    params = part.init(KEY, s.shape, t.shape)

    def loss(params):
        mean, variance = part.apply(params, s)
        return vid(mean, t, variance).mean()

    gradient = jax.grad(loss)(params)
    assert all((jnp.abs(leaf) > 0).any() for leaf in jax.tree.leaves(gradient))
    assert (jnp.abs(gradient["raw_variance"]) > 1e-3).all()
    before, after, _ = descend(loss, params, rate=0.05)
    assert after < before


@pytest.mark.slow
def test_the_likeliest_variance_is_the_mean_square_of_what_is_not_explained():
    t = draw(2, (512, 2)) * jnp.array([[0.1, 2.0]])
    part = gaussian(hidden=8)
    params = part.init(KEY, (512, 3), t.shape)
    silent = jax.tree.map(jnp.zeros_like, params["mean"])

    def loss(raw):
        mean, variance = part.apply({"mean": silent, "raw_variance": raw}, draw(1, (512, 3)))
        return vid(mean, t, variance).mean()

    _, _, raw = descend(loss, params["raw_variance"], steps=500, rate=0.5)
    _, variance = part.apply({"mean": silent, "raw_variance": raw}, draw(1, (512, 3)))
    np.testing.assert_allclose(variance, np.square(t).mean(0), rtol=1e-2)


@pytest.mark.slow
def test_the_variance_starts_where_it_is_told_to_and_stays_positive():
    for first in (0.1, 1.0, 5.0):
        params = gaussian(variance=first).init(KEY, S, T)
        np.testing.assert_allclose(
            gaussian(variance=first).apply(params, draw(1))[1], first, rtol=1e-4
        )
    params["raw_variance"] = jnp.full(8, -1e4)
    mean, variance = gaussian().apply(params, draw(1))
    assert (variance > 0).all()
    gradient = jax.grad(lambda v: vid(mean, jnp.full(T, 1e30), v).mean())(variance)
    assert jnp.isfinite(gradient).all()


@pytest.mark.slow
def test_embeddings_are_directions():
    part = embedding(16)
    params = part.init(KEY, S, S)
    np.testing.assert_allclose(jnp.linalg.norm(part.apply(params, draw(1)), axis=1), 1, rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda x: part.apply(params, x).sum())(jnp.zeros(S))).all()


@pytest.mark.slow
def test_factor_transfer_paraphrases_then_translates():
    t, s = draw(1, T), draw(2)
    teller = paraphraser(0.5)
    params = start(teller, T, T)
    before, after, params = descend(
        lambda params: hint(teller.apply(params, t)[1], t).mean(), params, steps=60
    )
    assert after < 0.9 * before
    factor, _ = jax.jit(teller.apply)(params, t)
    assert factor.shape == (4, 6, 6, 4)
    translate = start(translator(), S, factor.shape)
    before, after, _ = descend(
        lambda p: ft(translator().apply(p, s), factor).mean(), translate, steps=60, rate=0.5
    )
    assert after < 0.95 * before


def test_mgd_trains_its_generator():
    s, t, part = draw(1), jnp.tanh(draw(1, T)), generator()

    def loss(params):
        return mgd(s, t, lambda x: part.apply(params, x), jax.random.key(3)).mean()

    before, after, _ = descend(loss, start(part, S, T))
    assert after < 0.95 * before


@pytest.mark.parametrize("name", ["ab", "ofd", "ickd", "review"])
def test_a_regressor_lowers_every_loss_that_needs_one(name):
    t, s = draw(1, T), draw(2)
    loss = {
        "ab": ab,
        "ickd": ickd,
        "review": review,
        "ofd": lambda s, t: ofd(s, t, jnp.full(8, -0.5)),
    }[name]
    before, after, _ = descend(
        lambda p: loss(linear().apply(p, s), t).mean(), linear().init(KEY, S, T)
    )
    assert after < 0.95 * before


STAGES = [(4, 8, 8, 3), (4, 4, 4, 5), (4, 2, 2, 6)], [(4, 8, 8, 4), (4, 4, 4, 7), (4, 2, 2, 9)]


@pytest.mark.slow
def test_fusion_lets_earlier_stages_see_deeper_ones_and_not_the_reverse():
    features = [draw(i, shape) for i, shape in enumerate(STAGES[0])]
    params = start(fusion(), *STAGES)
    out = jax.jit(fusion().apply)(params, features)
    assert [each.shape for each in out] == STAGES[1]
    for stage in range(3):
        gradients = jax.jit(
            jax.grad(lambda f, stage=stage: jnp.square(fusion().apply(params, f)[stage]).sum())
        )(features)
        assert [bool((g != 0).any()) for g in gradients] == [deeper >= stage for deeper in range(3)]


@pytest.mark.slow
def test_review_trains_the_fusion():
    features = [draw(i, shape) for i, shape in enumerate(STAGES[0])]
    teacher = [draw(10 + i, shape) for i, shape in enumerate(STAGES[1])]

    def loss(params):
        out = fusion(8).apply(params, features)
        return sum(review(s, t).mean() for s, t in zip(out, teacher, strict=True))

    before, after, _ = descend(loss, start(fusion(8), *STAGES), rate=0.05)
    assert after < 0.95 * before


def test_fusion_to_other_grids_says_what_makes_them_fit():
    with pytest.raises(ShapeError, match="distill.resize_features on the teacher's"):
        fusion().init(KEY, STAGES[0], [(4, 4, 4, 4), *STAGES[1][1:]])


@pytest.mark.slow
def test_parts_have_an_optimizer_label_and_names_of_their_own():
    part = sequential(linear(8), norm(), activation(), linear())
    trainable = {"params": {"kernel": jnp.ones((5, 5))}, "parts": {"hint": part.init(KEY, S, T)}}
    assert "parts/hint/0/kernel" in match("parts/**", flatten(trainable)[0])
    optimizer = optax.partition(
        {"params": optax.sgd(0.0), "parts": optax.sgd(0.1)}, {"params": "params", "parts": "parts"}
    )

    def loss(trainable):
        s = draw(1) @ trainable["params"]["kernel"]
        return hint(part.apply(trainable["parts"]["hint"], s), draw(2, T)).mean()

    updates, _ = optimizer.update(jax.grad(loss)(trainable), optimizer.init(trainable), trainable)
    assert (updates["params"]["kernel"] == 0).all()
    assert (updates["parts"]["hint"]["0"]["kernel"] != 0).any()


@pytest.mark.parametrize(
    "part", [linear(), conv(), sequential(linear(6), linear()), projector(), generator()]
)
def test_a_part_that_cannot_give_the_teachers_positions_says_which_can(part):
    with pytest.raises(
        ShapeError,
        match=r"\(4, 6, 6, .\).*\(4, 3, 3, 8\).*conv\(stride=...\).*deconv\(stride=...\).*"
        "resize_features",
    ):
        part.init(KEY, S, (4, 3, 3, 8))
    with pytest.raises(ShapeError, match="up to 3 axes"):
        conv().init(KEY, (2, 2, 2, 2, 2, 3), (2, 2, 2, 2, 2, 3))
