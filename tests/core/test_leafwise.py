"""Lifting functions over one array to a tree: which leaves, which state, which key, which error."""

import jax
import jax.numpy as jnp
import pytest

from compress_jax.core import CompressionState, NonFiniteError, StateError, leafwise
from compress_jax.core._leafwise import check_finite

double = leafwise(lambda x, learned, fixed: 2 * x)
centred = leafwise(
    lambda x, learned, fixed: x - fixed,
    init=lambda x, key: (None, x.mean()),
    update=lambda x, *_, **__: (None, x.mean()),
)
noise = leafwise(
    lambda x, learned, fixed: x + learned,
    init=lambda x, key: (jax.random.normal(key, x.shape), None),
    key=jax.random.key(7),
)
BAD = {"a": {"w": jnp.array([1.0, jnp.nan, jnp.inf])}, "b": jnp.ones(2)}


def test_only_floating_leaves_with_entries_are_touched():
    params = {
        "f": jnp.ones(2),
        "h": jnp.ones(2, jnp.bfloat16),
        "i": jnp.arange(2),
        "b": jnp.array(True),
        "e": jnp.zeros(0),
    }
    seen = double.view(params, double.init(params))
    assert [seen[k].tolist() for k in "fhi"] == [[2.0, 2.0], [2.0, 2.0], [0, 1]] and seen[
        "h"
    ].dtype == jnp.bfloat16
    assert double.skipped(params) == {
        "i": "int32 is not a floating-point dtype",
        "b": "bool is not a floating-point dtype",
        "e": "it has no entries",
    }


def test_why_not_leaves_a_leaf_alone_with_its_own_reason():
    thin = leafwise(
        lambda x, *_: 0 * x, why_not=lambda path, x: f"{path} is thin" if x.ndim < 2 else None
    )
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    assert thin.skipped(params) == {"b": "b is thin"}
    assert thin.view(params, thin.init(params))["b"].tolist() == [1.0, 1.0]


def test_state_is_kept_by_path_learned_and_fixed_apart():
    both = leafwise(
        lambda x, a, b: x * a + b,
        init=lambda x, key: (jnp.ones_like(x), jnp.zeros_like(x) if x.size > 1 else None),
    )
    state = both.init({"a": {"w": jnp.ones(2)}, "s": jnp.ones(1)})
    assert set(state.learned) == {"a/w", "s"} and set(state.fixed) == {"a/w"}
    assert double.init({"w": jnp.ones(1)}) == CompressionState({}, {})


def test_randomness_of_a_leaf_does_not_depend_on_other_leaves():
    alone = noise.init({"w": jnp.ones(3)}).learned["w"]
    among = noise.init({"v": jnp.ones(3), "w": jnp.ones(3), "x": jnp.ones(3)}).learned
    assert alone.tolist() == among["w"].tolist()
    assert among["v"].tolist() != among["w"].tolist() != among["x"].tolist()


def test_keys_of_update_differ_by_leaf_and_by_key():
    drawn = leafwise(
        lambda x, *_: x, update=lambda x, *_, key, **__: (None, jax.random.normal(key))
    )
    params = {"v": jnp.ones(1), "w": jnp.ones(1)}
    draws = [
        drawn.update(params, drawn.init(params), step=0, key=jax.random.key(k)).fixed
        for k in (0, 0, 1)
    ]
    assert draws[0] == draws[1]
    assert len({float(draws[i][k]) for i in (0, 2) for k in "vw"}) == 4


@pytest.mark.parametrize("c", [double, centred, noise], ids=["double", "centred", "noise"])
def test_a_leaf_that_is_not_finite_is_named_in_every_method(c):
    state = c.init(jax.tree.map(jnp.ones_like, BAD))
    for call in (
        lambda: c.init(BAD),
        lambda: c.view(BAD, state),
        lambda: c.update(BAD, state, step=0),
        lambda: c.pack(BAD, state),
    ):
        with pytest.raises(NonFiniteError, match=r"'a/w' of shape \(3,\) has 2 NaN or infinite"):
            call()


def test_traced_leaves_are_not_checked_but_closed_over_ones_are():
    assert jnp.isnan(jax.jit(lambda p: double.view(p, double.init(p)))(BAD)["a"]["w"][1])
    with pytest.raises(NonFiniteError, match="a/w"):
        jax.jit(lambda x: x * double.view(BAD, double.init(BAD))["b"])(1.0)
    check_finite("w", jnp.ones(2))


def test_a_state_without_the_leaf_is_refused_by_name():
    state = centred.init({"v": jnp.ones(2)})
    for call in (centred.view, centred.pack, lambda p, s: centred.update(p, s, step=0)):
        with pytest.raises(StateError, match=r"(?s)'w'.*it has: v"):
            call({"w": jnp.ones(2)}, state)


def test_without_an_update_the_state_stays_and_without_a_pack_the_view_is_packed():
    params = {"w": jnp.array([1.0, 2.0])}
    state = noise.init(params)
    assert noise.update(params, state, step=3) is state
    assert noise.pack(params, state)["w"].tolist() == noise.view(params, state)["w"].tolist()
    assert (
        centred.update(
            {"w": jnp.array([5.0])}, centred.init({"w": jnp.array([1.0])}), step=0
        ).fixed["w"]
        == 5.0
    )
