"""Scalings do not change the function, and axes that cannot be scaled have a reason."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.paths import flatten
from compress_jax.trace._symmetry.scaling import null_space, scalings
from tests.trace.zoo import ZOO

QUICK = ("llama/nnx", "resnet/nnx", "plain/nested_scan")
slow = pytest.mark.slow


def scaled(variables, found, seed=0):
    leaves, rebuild = flatten(variables)
    rng = np.random.default_rng(seed)
    for scaling in found:
        factors = np.exp(0.7 * rng.normal(size=(*scaling.stack, scaling.size)))
        leaves |= scaling.apply(leaves, jnp.asarray(factors, jnp.float32))
    return rebuild(leaves)


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=e.name, marks=() if e.name in QUICK else (slow,)) for e in ZOO]
)
def test_scaled_models_are_the_same_function(entry):
    model, variables, inputs = entry.make()
    found, why = scalings(model, variables, *inputs)
    run = jax.jit(model)
    old, new = (
        jax.tree.leaves(run(each, *inputs)) for each in (variables, scaled(variables, found))
    )
    for a, b in zip(old, new, strict=True):
        if jnp.issubdtype(a.dtype, jnp.inexact):
            np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max() + 1))
    parts = {(part.path, axis) for scaling in found for part in scaling.parts for axis in part.axes}
    assert not parts & set(why)


def members(found):
    return [{(part.path, *part.axes): part.power for part in scaling.parts} for scaling in found]


def test_an_attention_layer_has_the_scalings_of_theory():
    p = {
        "norm": jnp.ones(6),
        "q": jnp.ones((6, 2, 3)),
        "k": jnp.ones((6, 2, 3)),
        "v": jnp.ones((6, 2, 3)),
        "o": jnp.ones((2, 3, 6)),
    }

    def fn(p, x):
        y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["norm"][None]
        q, k, v = (jnp.einsum("td,dhe->the", y, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("qhe,khe->hqk", q, k))
        return x + jnp.einsum("hqk,khe,hed->qd", weights, v, p["o"])

    found, why = scalings(fn, p, jnp.ones((5, 6)))
    assert {frozenset(each) for each in members(found)} == {
        frozenset({("norm", 0), ("q", 0), ("k", 0), ("v", 0)}),
        frozenset({("q", 1, 2), ("k", 1, 2)}),
        frozenset({("v", 1, 2), ("o", 0, 1)}),
    }
    assert all(scaling.size == 6 for scaling in found) and ("o", 2) in why


def test_layers_of_a_loop_have_factors_of_their_own_unless_the_loop_carries_them():
    def fn(p, x):
        def layer(x, w):
            return x + jax.nn.relu(x @ w["up"]) @ w["down"], None

        x, _ = jax.lax.scan(layer, x @ p["in"], p["layers"])
        return x @ p["out"]

    layers = {"up": jnp.ones((4, 3, 5)), "down": jnp.ones((4, 5, 3))}
    found, _ = scalings(
        fn, {"in": jnp.ones((2, 3)), "layers": layers, "out": jnp.ones((3, 2))}, jnp.ones((1, 2))
    )
    stacks = {frozenset(part.path for part in scaling.parts): scaling.stack for scaling in found}
    assert stacks == {
        frozenset({"layers/up", "layers/down"}): (4,),
        frozenset({"in", "layers/up", "layers/down", "out"}): (),
    }


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (jnp.tanh, "tanh"),
        (lambda x: x + 1.0, "added"),
        (lambda x: x - x.mean(-1, keepdims=True), "reduce_sum"),
    ],
)
def test_what_fixes_a_scale_is_named(act, reason):
    found, why = scalings(
        lambda p, x: act(x @ p["a"]) @ p["b"],
        {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))},
        jnp.ones((1, 2)),
    )
    assert not found and reason in why["a", 1]


numbers = st.integers(-3, 3)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=5)
    )
)
def test_null_spaces_are_exact_complete_and_reach_least_far(rows):
    n = len(rows[0])
    basis = null_space(range(n), [{i: Fraction(x) for i, x in enumerate(row) if x} for row in rows])
    vectors = np.array([[vector.get(i, 0) for i in range(n)] for vector in basis]).reshape(-1, n)
    assert not (np.array(rows) @ vectors.T).any()
    assert len(basis) == n - np.linalg.matrix_rank(np.array(rows))
    assert len(basis) == (np.linalg.matrix_rank(vectors) if len(basis) else 0)
    assert (
        len({min(vector) for vector in basis})
        == len({max(vector) for vector in basis})
        == len(basis)
    )
