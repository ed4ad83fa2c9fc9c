"""PACT against its paper's formulas, in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress_jax.quantize._activations.activations import activations
from compress_jax.quantize._learned.pact import pact, pact_decay


def fn(w, x):
    return x @ w["kernel"]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"kernel": normal(6, 3, seed=5)}


def given(**own):
    return {"kernel": {"input": {name: jnp.float32(value) for name, value in own.items()}}}


@pytest.mark.wide(1)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("alpha", [0.7, 1.9])
@pytest.mark.slow
def test_values_and_gradients_are_the_papers(bits, alpha):
    x = normal(30, 6)
    clipping = activations(fn, pact(bits))
    loss = lambda ranges, x: clipping.apply(PARAMS, ranges, x).sum()  # noqa: E731
    grads, dx = jax.grad(loss, argnums=(0, 1))(given(alpha=alpha, zero_point=0), x)
    wide, alpha = np.asarray(x, np.float64), np.float64(np.float32(alpha))
    clipped = 0.5 * (np.abs(wide) - np.abs(wide - alpha) + alpha)  # equation 1
    levels = (2**bits - 1) / alpha
    expected = np.round(clipped * levels) / levels  # equation 2
    seen = clipping.apply({"kernel": jnp.eye(6)}, given(alpha=alpha, zero_point=0), x)
    np.testing.assert_allclose(seen, expected, atol=1e-6)
    upstream = np.broadcast_to(np.asarray(PARAMS["kernel"], np.float64).sum(1), x.shape)
    np.testing.assert_allclose(dx, upstream * ((wide >= 0) & (wide < alpha)), rtol=1e-5, atol=1e-6)
    own = grads["kernel"]["input"]
    np.testing.assert_allclose(
        float(own["alpha"]), (upstream * (wide >= alpha)).sum(), rtol=1e-4
    )  # equation 3
    assert float(own["zero_point"]) == 0


def test_with_negative_activations_the_lower_end_follows_alpha():
    """Its derivative is the finite difference of the clipped value."""
    x = jnp.full((1, 6), -9.0)
    clipping = activations(fn, pact(3))
    out = lambda alpha: clipping.apply(
        {"kernel": jnp.eye(6)}, given(alpha=alpha, zero_point=4), x
    ).sum()  # noqa: E731
    slope = jax.grad(
        lambda a: clipping.apply({"kernel": jnp.eye(6)}, {"kernel": {"input": a}}, x).sum()
    )
    np.testing.assert_allclose(float(out(1.5)), -6 * 1.5 * 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(
        float(slope(given(alpha=1.5, zero_point=4)["kernel"]["input"])["alpha"]),
        float(out(2.0) - out(1.0)),
        rtol=1e-5,
    )


def test_where_it_starts():
    x = normal(30, 6)
    signed = activations(fn, pact(4)).init(PARAMS, [x])["kernel"]["input"]
    assert (
        float(signed["alpha"]) == np.abs(np.asarray(x)).max() and float(signed["zero_point"]) == 8
    )
    paper = activations(fn, pact(4, alpha=10.0)).init(PARAMS, [jax.nn.relu(x)])["kernel"]["input"]
    assert float(paper["alpha"]) == 10 and float(paper["zero_point"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["loss", "optimizer"])
def test_decay_pulls_alpha_down_until_clipping_costs_more(way):
    """Figure 3 in small: the loss alone keeps alpha at 10, decay brings it down to the values."""
    x = jax.nn.relu(normal(200, 6))
    clipping = activations(fn, pact(2, alpha=10.0))
    ranges = clipping.init({"kernel": jnp.eye(6)}, [x])

    def loss(ranges):
        error = ((clipping.apply({"kernel": jnp.eye(6)}, ranges, x) - x) ** 2).mean()
        return error + (pact_decay(ranges, 0.05) if way == "loss" else 0)

    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "alpha", ranges)
    decay = optax.add_decayed_weights(0.05, mask) if way == "optimizer" else optax.identity()
    optimizer = optax.chain(decay, optax.sgd(0.5))
    state = optimizer.init(ranges)

    @jax.jit
    def step(ranges, state):
        updates, state = optimizer.update(jax.grad(loss)(ranges), state, ranges)
        return optax.apply_updates(ranges, updates), state

    for _ in range(300):
        ranges, state = step(ranges, state)
    assert 1 < float(ranges["kernel"]["input"]["alpha"]) < 3
    still = activations(fn, pact(2, alpha=10.0)).init({"kernel": jnp.eye(6)}, [x])
    assert (
        float(
            jax.grad(lambda r: ((clipping.apply({"kernel": jnp.eye(6)}, r, x) - x) ** 2).mean())(
                still
            )["kernel"]["input"]["alpha"]
        )
        == 0
    )


def test_neither_training_nor_decay_moves_the_zero_point():
    x = normal(30, 6)
    signed = activations(fn, pact(2))
    ranges = signed.init(PARAMS, [x])
    slopes = jax.grad(lambda r: signed.apply(PARAMS, r, x).sum() + pact_decay(r, 0.1))(ranges)[
        "kernel"
    ]["input"]
    assert float(ranges["kernel"]["input"]["zero_point"]) == 2
    assert float(slopes["zero_point"]) == 0 and float(slopes["alpha"]) != 0


def test_decay_is_half_the_sum_of_squares():
    tree = {
        "a": {"input": {"alpha": jnp.array([3.0, 4.0]), "zero_point": jnp.array([9.0, 9.0])}},
        "scale": jnp.ones(3),
    }
    assert float(pact_decay(tree, 0.2)) == pytest.approx(2.5)
    assert float(pact_decay({"w": jnp.ones(3)}, 0.2)) == 0
    assert jax.grad(lambda tree: pact_decay(tree, 0.2))(tree)["a"]["input"][
        "alpha"
    ].tolist() == pytest.approx([0.6, 0.8])
