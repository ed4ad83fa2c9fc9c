"""Iterative pruning with rewinding: masks are nested, and what goes back goes back exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.core import ConfigError, StateError
from compress_jax.prune import magnitude, nested, rewind, rewinding, rounds
from compress_jax.train import create, label_optimizer, make_step

EVERY, TO, ROUNDS = 10, 3, 3
X = jax.random.normal(jax.random.key(0), (64, 12))
Y = X @ jax.random.normal(jax.random.key(1), (12, 3))


def loss(params, model_state, batch, key, teacher, train=True):
    return jnp.square(X @ params["w"] + params["b"][None] - Y).mean(), (model_state, {})


def variables(seed=2):
    return {"params": {"w": jax.random.normal(jax.random.key(seed), (12, 3)), "b": jnp.ones(3)}}


def trajectory(optimizer, compression, steps, start=None):
    """Return the states after each step."""
    optimizer = label_optimizer(optimizer, optimizer)
    state = create(start or variables(), compression, optimizer, jax.random.key(0))
    step = jax.jit(make_step(loss, optimizer, compression))
    states = [state]
    for _ in range(steps):
        states.append(step(states[-1], None)[0])
    return states


def schedule(step):
    return 0.05 / (1 + jnp.asarray(step, jnp.float32))


TICKET = cj.at("w", cj.every(EVERY, nested(magnitude(rounds(0.5, EVERY)))))


def same(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.slow
def test_one_loop_goes_through_all_rounds(weights):
    optimizer = rewinding(optax.adam(schedule), EVERY, TO, weights=weights)
    states = trajectory(optimizer, TICKET, EVERY * (ROUNDS + 1))
    masks = [np.asarray(s.fixed["0"]["w"]) for s in states]
    for k in range(1, ROUNDS + 1):
        end = k * EVERY + 1  # states[i] is what i steps made; the step numbered k * EVERY prunes
        kept = 36 - round((1 - 0.5**k) * 36)
        assert (
            masks[end].sum() == kept
            and (masks[end] <= masks[end - 1]).all()
            and masks[end - 1].sum() > kept
        )
        back = states[end + 2]
        assert same(back.params, states[TO].params if weights else states[end].params)
        inner = lambda s: s.opt_state.inner_states["params"].inner_state.inner  # noqa: E731
        assert same(inner(back), inner(states[TO]))
        survivors = np.abs(states[end].params["w"])[masks[end - 1]]  # the smallest of them are gone
        assert (
            np.abs(states[end].params["w"])[masks[end]].min()
            >= np.sort(survivors)[len(survivors) - kept]
        )


@pytest.mark.slow
def test_the_wrapper_is_the_pure_transition():
    """One loop with a rewinding optimizer ends where train, prune, `rewind`, train end."""
    inner, c = optax.adam(schedule), cj.at("w", nested(magnitude(rounds(0.5))))
    optimizer = label_optimizer(inner, inner)
    still = c._replace(update=lambda params, state, **_: state)  # masks change between rounds alone
    step = jax.jit(make_step(loss, optimizer, still))
    state = create(variables(), c, optimizer, jax.random.key(0))
    saved = state
    for index in range(EVERY + 1):
        saved = state if index == TO else saved
        state, _ = step(state, None)
    masks = c.update(state.params, state.compression, step=1)
    state = rewind(state, saved, masks)
    assert int(state.step) == TO and same(state.params, saved.params)
    for _ in range(EVERY - 2):
        state, _ = step(state, None)
    *_, before, other = trajectory(
        rewinding(inner, EVERY, TO), TICKET, 2 * EVERY + 1
    )  # the last step prunes again
    assert same(state.fixed, before.fixed)
    other = other._replace(fixed=before.fixed)
    for a, b in zip(
        *map(jax.tree.leaves, (state.variables(c), other.variables(TICKET))), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # two programs round alike but for the last bit


def test_only_the_learning_rate_goes_back():
    optimizer = optax.adam(0.1)
    saved = create(variables(), TICKET, optimizer, jax.random.key(0))
    state = saved._replace(step=jnp.int32(7), params=variables(5)["params"])
    after = rewind(state, saved, state.compression, weights=False)
    assert (
        int(after.step) == 0 and after.params is state.params and after.opt_state is saved.opt_state
    )


def test_it_starts_from_given_weights_exactly():
    start, far = variables(7)["params"], jax.tree.map(lambda w: 1e3 * w, variables())
    start["w"] = start["w"] * 10.0 ** jnp.arange(-12, 0)[:, None].astype(jnp.float32)
    states = trajectory(rewinding(optax.sgd(0.01), start=start), cj.identity(), 3, far)
    assert same(states[2].params, start) and not same(states[3].params, start)


def test_a_start_is_told_apart_by_its_whole_name():
    """A name that another one ends in is not taken for it."""
    start = {"w": jnp.ones(2), "x": {"w": jnp.full(2, 5.0)}}
    params = {"params": jax.tree.map(jnp.zeros_like, start)}
    optimizer = rewinding(optax.sgd(0.1), start=start)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert same(updates["params"], start)


def test_what_cannot_work_is_said():
    with pytest.raises(ValueError, match="too short"):
        rewinding(optax.sgd(0.1), every=4, to=2)
    with pytest.raises(ConfigError, match="'params/w'"):
        rewinding(optax.sgd(0.1), start={"b": jnp.ones(3)}).init({"params": variables()["params"]})
    with pytest.raises(StateError, match="lacks"):
        rewind({"params": 1}, {"params": 1}, cj.CompressionState({}, {}))
    for arguments in ((0.0, 1), (1.0, 1), (0.5, 0)):
        with pytest.raises(ValueError, match="share"):
            rounds(*arguments)
