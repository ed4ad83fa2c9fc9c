"""Scalings do not change the function, and axes that cannot be scaled have a reason."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compress_jax.core.paths import flatten
from compress_jax.trace._symmetry.scaling import null_space, scalings
from tests.trace.zoo import ZOO
from tests.trace.zoo_entry import randomise

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


TWICE = {
    name: np.empty(shape)
    for name, shape in {"in": (4, 2, 3), "w": (2, 3, 2, 3), "out": (2, 3, 5)}.items()
}


def twice(p, x):
    y = jax.nn.relu(jnp.einsum("bi,ihf->bhf", x, p["in"]))
    for _ in range(2):
        y = jax.nn.relu(jnp.einsum("bhf,hfkg->bkg", y, p["w"]))
    return jnp.einsum("bhf,hfo->bo", y, p["out"])


def product_of_sums(p, x):
    """Cancel factors of h, and factors of f against those of g, but not a factor of each (h, f)."""
    made = jnp.einsum("hf,hg->fg", jax.nn.relu(p["a"]), p["b"])
    return made * made.T * x


def test_solutions_are_joined_only_where_every_value_has_an_axis_of_each():
    p, x = randomise({"a": np.empty((2, 3)), "b": np.empty((2, 3))}), jnp.ones((1, 1))
    found, _ = scalings(product_of_sums, p, x)
    assert members(found) == [{("a", 0): 1, ("b", 0): -1}, {("a", 1): 1, ("b", 1): -1}]
    expected = product_of_sums(p, x)
    np.testing.assert_allclose(product_of_sums(scaled(p, found), x), expected, rtol=1e-4, atol=1e-5)


KERNELS = {  # of activations [b, h, f]
    "bhf,hfkg->bkg": (2, 3, 2, 3),
    "bhf,hfg->bhg": (2, 3, 3),
    "bhf,hk->bkf": (2, 2),
    "bhf,fg->bhg": (3, 3),
    "bhf,hf->bhf": (2, 3),
}


@st.composite
def repeated(draw):
    """Draw a network of heads and features that may use a kernel several times, stored anyhow."""
    steps = draw(st.lists(st.sampled_from(list(KERNELS)), min_size=1, max_size=4))
    order = {step: draw(st.permutations(range(len(KERNELS[step])))) for step in KERNELS}
    shapes = {"in": (4, 2, 3), "out": (2, 3, 5)}
    for step in steps:
        shapes[step] = tuple(KERNELS[step][i] for i in order[step])

    def fn(p, x):
        y = jax.nn.relu(jnp.einsum("bi,ihf->bhf", x, p["in"]))
        for step in steps:
            y = jax.nn.relu(jnp.einsum(step, y, p[step].transpose(np.argsort(order[step]))))
        return jnp.einsum("bhf,hfo->bo", y, p["out"])

    return fn, {name: np.empty(shape) for name, shape in shapes.items()}


@settings(max_examples=8, deadline=None)
@given(repeated(), st.integers(0, 99))
@example((twice, TWICE), 0)
@pytest.mark.slow
def test_a_kernel_may_be_used_several_times(network, seed):
    fn, shapes = network
    p, x = randomise(shapes, seed), randomise({"x": np.empty((2, 4))}, seed + 1)["x"]
    found, _ = scalings(fn, p, x)
    for scaling in found:
        # One part for each path and axes: none is left out, none is multiplied twice.
        assert len({(part.path, part.axes) for part in scaling.parts}) == len(scaling.parts)
        new = fn(scaled(p, [scaling], seed), x)
        expected = fn(p, x)
        np.testing.assert_allclose(new, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


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
