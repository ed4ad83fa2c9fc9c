"""Training on quantized activations: start, frozen ranges and norms, and what ships."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.core.errors import ConfigError, NonFiniteError, StateError
from compress_jax.quantize import activations, integer, lsq_inputs, static, uniform
from compress_jax.train import create, label_optimizer, make_step, quantized, supervised


class Net(nn.Module):
    norm: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x) if self.norm else x
        return nn.Dense(3)(nn.relu(x))


RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)
BATCH = {"image": X, "label": jnp.asarray(RNG.integers(0, 3, 16))}


def run(model, steps, compression=None):
    """Return the state after each step; what compiles, compiles once."""
    compression = compression or cj.identity()
    optimizer = label_optimizer(optax.sgd(0.05), optax.sgd(0.05))
    state = create(model.init(jax.random.key(0), X), compression, optimizer, jax.random.key(1))
    traces = []

    def once(state, batch):
        traces.append(1)
        return make_step(supervised(model), optimizer, compression)(state, batch)

    step, states = jax.jit(once), [state]
    for index in range(steps):
        state, _ = step(state, {**BATCH, "image": X * (index + 1)})
        states.append(state)
    assert len(traces) == 1
    return states


def same(a, b):
    return all(
        bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.slow
def test_it_starts_when_it_should_and_ranges_and_norms_freeze():
    how = static(bits=3, range="ema", momentum=0.5)
    plain = run(Net(), 4)
    states = run(quantized(Net(), how, start=2, freeze=3, freeze_batch_norm=3), 4)
    for step in (1, 2):  # not before its time: the very training without it
        np.testing.assert_allclose(
            states[step].params["Dense_0"]["kernel"],
            plain[step].params["Dense_0"]["kernel"],
            rtol=1e-6,
        )
    assert not np.allclose(
        states[3].params["Dense_1"]["kernel"], plain[3].params["Dense_1"]["kernel"], rtol=1e-6
    )
    ranges = [state.model_state["quantization"]["ranges"] for state in states]
    norms = [state.model_state["batch_stats"] for state in states]
    assert np.isnan(jax.tree.leaves(ranges[0])[0]).all()
    assert (
        not same(ranges[1], ranges[2])
        and not same(ranges[2], ranges[3])
        and same(ranges[3], ranges[4])
    )
    assert not same(norms[2], norms[3]) and same(norms[3], norms[4])
    assert [int(state.model_state["quantization"]["steps"]) for state in states] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_what_is_learned_is_trained_and_ships_in_integers():
    model = quantized(Net(norm=False), lsq_inputs(bits=4), example=X)
    weights = cj.at("**/kernel", uniform(bits=8, granularity="channel"))
    states = run(model, 3, weights)
    first, last = (state.params["quantization"] for state in (states[0], states[-1]))
    assert jax.tree.leaves(first) and not same(first, last)
    seen = states[-1].variables(weights)
    variables, ranges = model.parts(seen)
    plain = weights.pack(variables, weights.init(variables))
    ours = integer(model.model.apply, plain, X, how=model.how, ranges=ranges)
    assert ours.table.integer == 1
    np.testing.assert_allclose(
        ours.apply(ours.params, X), model.apply(seen, X), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_calibrating_a_trained_model_is_quantization_after_training():
    variables = Net().init(jax.random.key(0), X)
    model = quantized(Net(), static(symmetric=False))
    ready = model.calibrate(variables, [X[:8], X[8:]])
    by_hand = activations(Net().apply, static(symmetric=False))
    expected = by_hand.apply(variables, by_hand.init(variables, [X]), X)
    np.testing.assert_allclose(model.apply(ready, X), expected, rtol=1e-5, atol=1e-6)
    assert not same(model.apply(ready, X), Net().apply(variables, X))


def test_errors_say_what_to_do():
    with pytest.raises(ConfigError, match="starts from data"):
        quantized(Net(), lsq_inputs()).init(jax.random.key(0), X)
    with pytest.raises(StateError, match="calibrate"):
        quantized(Net(), static()).apply(Net().init(jax.random.key(0), X), X)


@pytest.mark.slow
def test_steps_that_overflow_leave_ranges_alone_and_are_reported():
    model = quantized(Net(norm=False), static(symmetric=False))
    variables, x = model.init(jax.random.key(0), X), X
    step = jax.jit(lambda v, x: {**v, **model.apply(v, x, train=True, mutable=["quantization"])[1]})
    with pytest.raises(NonFiniteError, match="Dense_0/kernel"):
        model.parts(variables)  # not trained yet: no range to ship
    for i in range(5):
        variables = step(variables, x.at[0, 0].set(jnp.inf) if i == 2 else x)
    assert model.broken(variables) == {
        "params/Dense_0/kernel": 1
    }  # on its grid what is infinite saturates
    plain, ranges = model.parts(variables)
    assert all(jnp.isfinite(v).all() for v in jax.tree.leaves(ranges))
    assert not same(model.apply(variables, x), Net(norm=False).apply(plain, x))
    unknown = jax.tree.map(lambda v: jnp.full_like(v, jnp.nan), variables["quantization"]["ranges"])
    lost = {**variables, "quantization": {**variables["quantization"], "ranges": unknown}}
    with pytest.raises(NonFiniteError, match="kernel"):
        model.apply(lost, x)
