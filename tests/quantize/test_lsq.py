"""LSQ and LSQ+ against their papers' formulas, in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.core import ShapeError
from compress_jax.core.layout import Layout
from compress_jax.quantize import mse, uniform
from compress_jax.quantize._activations.activations import activations
from compress_jax.quantize._learned.learned_step import lsq_plus_round, lsq_round, positive
from compress_jax.quantize._learned.lsq import lsq, lsq_inputs
from compress_jax.quantize._scales.grid import Grid


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


def by_the_paper(x, s, qn, qp):
    """Values, d/ds (not scaled) and d/dx: equations 1, 2, 3 and 5 of the paper."""
    v = np.asarray(x, np.float64) / s
    value = np.clip(np.round(v), -qn, qp) * s
    slope = np.where(v <= -qn, -qn, np.where(v >= qp, qp, np.round(v) - v))
    return value, slope, ((v > -qn) & (v < qp)).astype(np.float64)


@pytest.mark.wide(1)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(40,), (6, 8), (3, 3, 4, 8)])
@pytest.mark.slow
def test_values_and_gradients_of_weights_are_the_papers(bits, shape):
    w, upstream = normal(*shape), normal(*shape, seed=1)
    c = lsq(bits)
    state = c.init({"w": w})
    qn, qp = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    s = float(state.learned["w"]["scale"].squeeze())
    np.testing.assert_allclose(
        s, 2 * np.abs(np.asarray(w, np.float64)).mean() / np.sqrt(qp), rtol=1e-5
    )

    def loss(w, learned):
        return (upstream * c.view({"w": w}, state._replace(learned=learned))["w"]).sum()

    dw, learned = jax.grad(loss, argnums=(0, 1))(w, state.learned)
    value, slope, inside = by_the_paper(w, s, qn, qp)
    np.testing.assert_allclose(c.view({"w": w}, state)["w"], value, atol=1e-5)
    np.testing.assert_allclose(dw, upstream * inside, rtol=1e-6)
    expected = (np.asarray(upstream, np.float64) * slope).sum() / np.sqrt(w.size * qp)
    np.testing.assert_allclose(
        float(learned["w"]["scale"].squeeze()), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("granularity", ["channel", 4, 5])
def test_each_channel_or_group_has_its_own_step_and_gradient(granularity):
    w, upstream = normal(12, 3), normal(12, 3, seed=1)
    c = lsq(3, granularity, pad=True)
    state = c.init({"w": w})
    layout = Layout.of(w.shape, granularity, pad=True)
    grads = jax.grad(
        lambda learned: (upstream * c.view({"w": w}, state._replace(learned=learned))["w"]).sum()
    )(state.learned)
    assert grads["w"]["scale"].shape == layout.scale_shape
    size = 12 if granularity == "channel" else granularity
    for n in range(3):
        for group, start in enumerate(range(0, 12, size)):
            part = np.asarray(w, np.float64)[start : start + size, n]
            place = (0, n) if granularity == "channel" else (group, 0, n)
            s = float(state.learned["w"]["scale"][place])
            np.testing.assert_allclose(s, 2 * np.abs(part).mean() / np.sqrt(3), rtol=1e-5)
            slope = by_the_paper(part, s, 4, 3)[1]
            expected = (
                np.asarray(upstream, np.float64)[start : start + size, n] * slope
            ).sum() / np.sqrt(len(part) * 3)
            np.testing.assert_allclose(
                float(grads["w"]["scale"][place]), expected, rtol=1e-4, atol=1e-5
            )


@pytest.mark.wide(1)
@pytest.mark.parametrize("raw", [-0.3, 0.3, 0.0, 1e-30])
@pytest.mark.slow
def test_a_step_of_any_sign_ships_what_is_seen(raw):
    params = {"w": normal(6, 8)}
    c = lsq(3)
    state = c.init(params)._replace(learned={"w": {"scale": jnp.full((1, 1), raw)}})
    seen = c.view(params, state)["w"]
    packed = c.pack(params, state)
    assert (
        np.asarray(cj.unpack(packed)["w"]).tobytes() == np.asarray(seen).tobytes()
        and np.isfinite(seen).all()
    )
    assert np.asarray(jax.jit(c.view)(params, state)["w"]).tobytes() == np.asarray(seen).tobytes()
    assert float(packed["w"].scale.squeeze()) == max(abs(np.float32(raw)), 2.0**-60)
    slope = jax.grad(
        lambda learned: (c.view(params, state._replace(learned=learned))["w"] ** 2).sum()
    )(state.learned)
    assert np.isfinite(slope["w"]["scale"]).all()


def test_a_positive_step_has_a_derivative_everywhere():
    assert [float(jax.grad(positive)(jnp.float32(x))) for x in (-2, -0.0, 0, 1e-30, 3)] == [
        -1,
        1,
        1,
        1,
        1,
    ]


@pytest.mark.slow
def test_start_and_narrow():
    params = {"w": normal(50, 4)}
    best = uniform(bits=3, granularity="channel", scale="mse")
    own = lsq(3, "channel", start=mse)
    state = own.init(params)
    np.testing.assert_array_equal(
        state.learned["w"]["scale"], best.init(params).fixed["w"]["scale"]
    )
    np.testing.assert_array_equal(
        own.view(params, state)["w"], best.view(params, best.init(params))["w"]
    )
    narrow = lsq(2, narrow=True)
    levels = narrow.view(params, narrow.init(params))["w"]
    assert len(np.unique(levels)) == 3 and np.min(levels) == -np.max(levels)
    zeros = lsq(4).init({"w": jnp.zeros((3, 3))})
    assert float(zeros.learned["w"]["scale"].squeeze()) == 1
    with pytest.raises(ShapeError, match="'w'"):
        lsq(4, 7).init(params)
    for wrong in ({"bits": 1}, {"granularity": "row"}):
        with pytest.raises(ValueError, match="must be"):
            lsq(**wrong)


@pytest.mark.slow
def test_training_the_step_finds_the_least_error():
    """On the reconstruction error alone, gradient descent on s ends near the best step there is."""
    w = normal(2000)
    c = lsq(2)
    state = c.init({"w": w})
    error = lambda learned: (
        (c.view({"w": w}, state._replace(learned=learned))["w"] - w) ** 2
    ).sum()  # noqa: E731
    learned, optimizer = state.learned, optax.adam(1e-2)
    memory = optimizer.init(learned)

    @jax.jit
    def step(learned, memory):
        with jax.numpy_dtype_promotion("standard"):  # optax's own counts
            updates, memory = optimizer.update(jax.grad(error)(learned), memory)
        return optax.apply_updates(learned, updates), memory

    for _ in range(300):
        learned, memory = step(learned, memory)
    best, _ = mse(w, Layout(w.shape), Grid(2))
    at = [
        float(error({"w": {"scale": s.reshape(1)}}))
        for s in (learned["w"]["scale"], best, state.learned["w"]["scale"])
    ]
    assert at[0] <= 1.05 * at[1] < at[2]


# Activations.


def fn(w, x):
    return x @ w["kernel"]


PARAMS = {"kernel": normal(6, 3, seed=5)}


def gradients(how, x, **changes):
    learning = activations(fn, how)
    ranges = learning.init(PARAMS, [x])
    own = {
        **ranges["kernel"]["input"],
        **{name: jnp.float32(value) for name, value in changes.items()},
    }
    loss = lambda own, x: learning.apply(PARAMS, {"kernel": {"input": own}}, x).sum()  # noqa: E731
    own_grads, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(own, x)
    upstream = np.broadcast_to(np.asarray(PARAMS["kernel"], np.float64).sum(1), x.shape)
    return (
        own,
        own_grads,
        dx,
        upstream,
        activations(fn, how).apply({"kernel": jnp.eye(6)}, {"kernel": {"input": own}}, x),
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.slow
def test_gradients_of_a_step_of_activations_are_the_papers(bits, signed):
    x = normal(20, 5, 6) if signed else jax.nn.relu(normal(20, 5, 6))
    own, grads, dx, upstream, seen = gradients(lsq_inputs(bits), x)
    qn = 2 ** (bits - 1) if signed else 0
    qp = 2**bits - 1 - qn
    assert float(own["zero_point"]) == qn and float(grads["zero_point"]) == 0
    s = float(own["scale"])
    np.testing.assert_allclose(
        s, 2 * np.abs(np.asarray(x, np.float64)).mean() / np.sqrt(qp), rtol=1e-5
    )
    value, slope, inside = by_the_paper(x, s, qn, qp)
    if not signed:  # at 0 exactly, equation 5 has v <= -Q_N: no gradient, as of the ReLU before it
        assert (inside[np.asarray(x) == 0] == 0).all()
    np.testing.assert_allclose(seen, value, atol=1e-4)
    np.testing.assert_allclose(dx, upstream * inside, rtol=1e-5, atol=1e-6)
    expected = (upstream * slope).sum() / np.sqrt(5 * 6 * qp)
    np.testing.assert_allclose(float(grads["scale"]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.wide(1)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.slow
def test_gradients_of_an_offset_are_those_of_lsq_plus(bits):
    x = jax.nn.gelu(2 * normal(20, 5, 6)) - 0.05
    s, offset = 4.0 / 2**bits, -3 * 4.0 / 2**bits
    _, grads, dx, upstream, seen = gradients(
        lsq_inputs(bits, offset=True), x, scale=s, offset=offset
    )
    p = 2**bits - 1
    v = (np.asarray(x, np.float64) - offset) / s
    inside = (v > 0) & (v < p)
    np.testing.assert_allclose(seen, np.clip(np.round(v), 0, p) * s + offset, atol=1e-5)
    np.testing.assert_allclose(dx, upstream * inside, rtol=1e-5, atol=1e-6)
    gain = 1 / np.sqrt(5 * 6 * p)
    slope = np.where(v <= 0, 0, np.where(v >= p, p, np.round(v) - v))
    np.testing.assert_allclose(
        float(grads["scale"]), gain * (upstream * slope).sum(), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        float(grads["offset"]), gain * (upstream * ~inside).sum(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_an_offset_is_used_on_the_grid_so_that_zero_is_exact():
    x = jax.nn.silu(normal(50, 6))
    how = lsq_inputs(4, offset=True)
    own = activations(fn, how).init(PARAMS, [x])["kernel"]["input"]
    assert float(own["offset"]) < 0
    for shift in (0.0, 0.3, -0.3):
        moved = {**own, "offset": own["offset"] + shift * own["scale"]}
        ranges = {"kernel": {"input": moved}}
        assert (
            not activations(fn, how).apply({"kernel": jnp.eye(6)}, ranges, jnp.zeros((1, 6))).any()
        )
    plain = lsq_inputs(4)
    errors = [
        float(
            (
                (
                    activations(fn, each).apply(
                        {"kernel": jnp.eye(6)}, activations(fn, each).init(PARAMS, [x]), x
                    )
                    - x
                )
                ** 2
            ).sum()
        )
        for each in (how, plain)
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.slow
def test_forward_and_reverse_mode_agree():
    x, s = normal(7), jnp.float32(0.4)
    one = lambda x, s: lsq_round(Grid(3), x, s, jnp.uint8(4), jnp.float32(0.5))  # noqa: E731
    other = lambda x, s: lsq_plus_round(Grid(3, False), x, s, -2 * s, jnp.float32(0.5))  # noqa: E731
    for each in (one, other):
        for argument in (0, 1):
            forward, reverse = jax.jacfwd(each, argument)(x, s), jax.jacrev(each, argument)(x, s)
            np.testing.assert_allclose(forward, reverse, rtol=1e-6)
            assert np.asarray(forward).any()
