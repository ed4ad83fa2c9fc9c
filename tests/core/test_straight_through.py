"""The straight-through estimator: the value of the function to the bit, the derivative of the
identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core._straight_through import straight_through


def clipped(x, low, high):
    return jnp.round(jnp.clip(x, low, high) * 7) / 7


soft = straight_through(clipped)
X = jnp.concatenate([jax.random.normal(jax.random.key(0), (61,)), jnp.array([-0.0, 1e-30, 3e7])])


def bits(x):
    return np.asarray(x).view(np.uint32).tolist()


def test_the_value_is_that_of_the_function_bit_for_bit_where_the_common_trick_is_not():
    exact = clipped(X, -0.9, 0.9)
    trick = X + jax.lax.stop_gradient(exact - X)
    assert bits(soft(X, -0.9, 0.9)) == bits(exact)
    assert bits(trick) != bits(exact)  # so this test can tell the two apart
    out, _ = jax.value_and_grad(lambda x: soft(x, -0.9, 0.9).sum())(X)
    assert bits(jax.vjp(soft, X, -0.9, 0.9)[0]) == bits(exact) and out == exact.sum()


def test_tangents_and_cotangents_pass_unchanged_and_stop_at_the_rest():
    t = jax.random.normal(jax.random.key(1), X.shape)
    low, high = jnp.float32(-0.9), jnp.float32(0.9)
    value, tangent = jax.jvp(soft, (X, low, high), (t, jnp.float32(5.0), jnp.float32(7.0)))
    assert bits(value) == bits(clipped(X, low, high)) and bits(tangent) == bits(t)
    dx, dlow, dhigh = jax.vjp(soft, X, low, high)[1](t)
    assert bits(dx) == bits(t) and dlow == dhigh == 0.0


def test_second_derivatives_are_those_of_the_identity():
    square = jax.grad(jax.grad(lambda x: soft(x, -9.0, 9.0) ** 2))
    assert square(1.234) == 2.0


@pytest.mark.parametrize("wrap", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_under_jit_and_vmap(wrap):
    def one(x):
        return soft(x, -0.9, 0.9)

    assert bits(wrap(one)(X)) == bits(one(X))
    assert wrap(jax.grad(lambda x: soft(x, -0.9, 0.9).sum()))(X).tolist() == [1.0] * X.size


def test_under_scan():
    def total(x):
        return jax.lax.scan(
            lambda carry, _: (soft(carry, -0.9, 0.9) * 2.0, carry.sum()), x, None, length=3
        )[0].sum()

    assert jax.grad(total)(X).tolist() == [8.0] * X.size


def test_integer_and_boolean_arguments_and_none():
    def chosen(x, index, keep, nothing):
        assert nothing is None
        return jnp.where(keep, jnp.round(x[index]), 0.0)

    fn = straight_through(chosen)
    x, index, keep = (
        jnp.array([0.6, 1.6, 2.6]),
        jnp.array([2, 0, 1]),
        jnp.array([True, False, True]),
    )
    assert fn(x, index, keep, None).tolist() == [3.0, 0.0, 2.0]
    assert jax.jit(jax.grad(lambda x: (fn(x, index, keep, None) * jnp.arange(3.0)).sum()))(
        x
    ).tolist() == [0.0, 1.0, 2.0]
    grads = jax.grad(lambda *a: fn(*a, None).sum(), argnums=(0, 1, 2), allow_int=True)(
        x, index, keep
    )
    assert grads[0].tolist() == [1.0, 1.0, 1.0]
    assert grads[1].dtype == grads[2].dtype == jax.dtypes.float0
    batch = jax.vmap(fn, in_axes=(0, None, None, None))(jnp.stack([x, 2 * x]), index, keep, None)
    assert batch.tolist() == [[3.0, 0.0, 2.0], [5.0, 0.0, 3.0]]


def test_bfloat16_stays_bfloat16():
    x = X.astype(jnp.bfloat16)
    grad = jax.grad(lambda x: straight_through(jnp.round)(x).astype(jnp.float32).sum())(x)
    assert straight_through(jnp.round)(x).dtype == grad.dtype == jnp.bfloat16
    assert (grad == 1).all()
