"""Stochastic rounding and backward passes in integers: unbiased, against the exact gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.errors import NoMatchError
from compress_jax.quantize import quantized_backward, stochastic_round


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_rounding_is_to_a_neighbour_and_right_on_average():
    x = jnp.asarray([-2.75, -1.0, -0.1, 0.0, 0.3, 7.0, 1e6 + 0.5], jnp.float32)
    many = jax.vmap(lambda key: stochastic_round(x, key))(jax.random.split(jax.random.key(0), 4000))
    wide = np.asarray(x, np.float64)
    assert set(np.unique(np.abs(np.asarray(many, np.float64) - wide) < 1)) == {True}
    assert (np.asarray(many) == np.round(np.asarray(many))).all()
    share = wide - np.floor(wide)
    np.testing.assert_allclose(
        np.asarray(many, np.float64).mean(0),
        wide,
        atol=5 * np.sqrt((share * (1 - share)).max() / 4000),
    )
    assert (np.asarray(many)[:, share == 0] == np.asarray(x)[share == 0]).all()


def two(w, x):
    return jnp.tanh(x @ w["a"]) @ w["b"]


PARAMS, X = {"a": normal(6, 8), "b": normal(8, 3, seed=1)}, normal(5, 6, seed=2)


def loss(key, params, x, bits=8):
    fn = two if key is None else quantized_backward(two, key, bits)
    return (fn(params, x) ** 2).sum()


def test_forward_is_untouched_and_backward_is_right_on_average_in_integers():
    assert float(loss(jax.random.key(0), PARAMS, X)) == float(loss(None, PARAMS, X))
    gradient = jax.jit(jax.vmap(jax.grad(loss, argnums=1), in_axes=(0, None, None)))
    many = gradient(jax.random.split(jax.random.key(1), 512), PARAMS, X)
    exact = jax.grad(loss, argnums=1)(None, PARAMS, X)
    for name in PARAMS:
        draws, true = np.asarray(many[name], np.float64), np.asarray(exact[name], np.float64)
        error = np.abs(draws.mean(0) - true)
        assert draws.std(0).min() > 0 and (error < 5 * draws.std(0) / np.sqrt(512) + 1e-5).all()
        assert np.linalg.norm(draws[0] - true) < 0.05 * np.linalg.norm(true)
    program = str(
        jax.make_jaxpr(jax.grad(loss, argnums=1), static_argnums=())(jax.random.key(0), PARAMS, X)
    )
    assert "preferred_element_type=int32" in program and "i8[5,8]" in program


def test_a_scan_draws_anew_in_every_turn_and_unknown_sites_are_named():
    def fn(w, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    w = jnp.stack([jnp.eye(4)] * 3) + 0.1
    gradient = jax.grad(
        lambda w: quantized_backward(fn, jax.random.key(0), bits=3)(w, normal(2, 4)).sum()
    )(w)
    assert np.isfinite(gradient).all() and (gradient[0] != gradient[1]).any()
    with pytest.raises(NoMatchError):
        quantized_backward(two, jax.random.key(0), where="nothing")(PARAMS, X)
    with pytest.raises(ValueError, match="bits must be"):
        quantized_backward(two, jax.random.key(0), bits=1)
