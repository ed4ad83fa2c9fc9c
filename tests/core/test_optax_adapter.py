"""The optax adapter: projected descent, for loops that only know optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compress_jax.core import as_optax, chain, every, identity, leafwise

PARAMS = {"w": jnp.array([0.3, -1.2, 2.6]), "n": jnp.array([1.0])}
GRADS = {"w": jnp.array([-1.0, 1.0, 0.5]), "n": jnp.array([0.1])}
masked = leafwise(
    lambda x, _, keep: jnp.where(keep, x, 0),
    init=lambda x, key: (None, x > 0),
    update=lambda x, *_, **__: (None, x > 0),
)


def descend(tx, steps=5, params=PARAMS):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(GRADS, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[0]


def test_with_the_identity_it_is_the_optimizer_itself():
    wrapped, plain = (
        descend(as_optax(optax.sgd(0.1, momentum=0.9), identity()))[0],
        descend(optax.sgd(0.1, momentum=0.9))[0],
    )
    for key in PARAMS:
        np.testing.assert_allclose(wrapped[key], plain[key], rtol=1e-6)


def test_params_are_their_own_view_and_zeros_are_exact():
    params, state = descend(as_optax(optax.sgd(0.1), chain(masked, every(2, masked))))
    seen = chain(masked, every(2, masked)).view(params, state.compression)
    np.testing.assert_allclose(params["w"], seen["w"], rtol=1e-6)
    assert params["w"][1] == 0.0 and params["w"][2] > 0
    assert state.step == 5


def test_the_compression_sees_moved_params_gradients_and_steps():
    told = []

    def listen(x, learned, fixed, *, step, grad, **_):
        told.append((int(step), x.tolist(), grad.tolist()))
        return learned, fixed

    tx = as_optax(optax.sgd(1.0), leafwise(lambda x, *_: x, update=listen))
    params, state = {"w": jnp.array([4.0])}, tx.init({"w": jnp.array([4.0])})
    for _ in range(2):
        updates, state = tx.update({"w": jnp.array([1.0])}, state, params)
        params = optax.apply_updates(params, updates)
    assert told == [(0, [3.0], [1.0]), (1, [2.0], [1.0])]


def test_it_needs_the_params():
    tx = as_optax(optax.sgd(0.1), identity())
    with pytest.raises(ValueError, match="pass them"):
        tx.update(GRADS, tx.init(PARAMS))
