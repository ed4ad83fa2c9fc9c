"""Combinators: what each sees, when it acts, and that its state may be carried by `lax.scan`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core import (
    CompressionState,
    NoMatchError,
    StateError,
    at,
    between,
    chain,
    every,
    identity,
    leafwise,
    rules,
)
from compress_jax.core.layout import Layout
from compress_jax.core.packed import Quantized, Sparse, unpack

PARAMS = {
    "a": {"kernel": jnp.array([[1.0, -2.0], [0.25, 4.0]]), "bias": jnp.array([3.0, 0.5])},
    "n": jnp.array(7),
}

# Its state is the leaf as it was when last looked at, plus 100 for every update: which shows what
# was seen, and when.
remember = leafwise(
    lambda x, learned, fixed: fixed + 0 * x,
    init=lambda x, key: (None, x),
    update=lambda x, _, fixed, **__: (None, x + 100),
)
double = leafwise(lambda x, learned, fixed: 2 * x)
add_one = leafwise(lambda x, learned, fixed: x + 1)
positive = leafwise(
    lambda x, learned, mask: jnp.where(mask, x, 0),
    init=lambda x, key: (None, x > 0),
    pack=lambda x, learned, mask: Sparse.pack(x, mask),
)
whole = leafwise(
    lambda x, learned, fixed: jnp.round(x) + 0.0,  # never -0.0
    pack=lambda x, *_: Quantized.pack(
        (jnp.round(x) + 8).astype(int),
        4,
        jnp.ones((1,) * x.ndim),
        jnp.uint8(8),
        Layout.of(x.shape, "tensor"),
        x.dtype,
    ),
)


def kernel(params):
    return params["a"]["kernel"].tolist()


def scaled(by):
    return {**PARAMS, "a": jax.tree.map(lambda x: by * x, PARAMS["a"])}


def test_chain_threads_the_view_through_init_view_and_update():
    c = chain(double, remember, add_one)
    state = c.init(PARAMS)
    assert state.fixed["1"]["a/kernel"].tolist() == kernel(scaled(2))
    assert kernel(c.view(PARAMS, state)) == (2 * PARAMS["a"]["kernel"] + 1).tolist()
    state = c.update(scaled(3.0), state, step=0)
    assert state.fixed["1"]["a/kernel"].tolist() == (6 * PARAMS["a"]["kernel"] + 100).tolist()
    both, params = chain(double, double), {"w": jnp.array(3.0)}
    assert jax.grad(lambda params: both.view(params, both.init(params))["w"])(params) == {"w": 4.0}


def test_identity_and_the_empty_chain_are_neutral():
    for c in (identity(), chain(), chain(identity(), identity())):
        state = c.init(PARAMS)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, c.view(PARAMS, state), PARAMS))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, c.pack(PARAMS, state), PARAMS))
        assert c.update(PARAMS, state, step=0) == state
        assert set(c.skipped(PARAMS)) == {"a/kernel", "a/bias", "n"}


@pytest.mark.slow
def test_chain_packs_the_smallest_form_that_is_exact():
    big = {"w": jnp.zeros((64, 64)).at[3, 4].set(2.6).at[9, 9].set(-3.0)}
    both = chain(positive, whole)
    node = both.pack(big, both.init(big))["w"]
    assert isinstance(node, Quantized) and isinstance(node.codes, Sparse)
    assert np.array_equal(node.unpack(), jnp.zeros((64, 64)).at[3, 4].set(3.0))
    assert (
        node.nbytes == 1 + node.codes.mask.nbytes + 4 + 1
    )  # one code, where it is, scale and zero point
    assert node.nbytes < whole.pack(big, whole.init(big))["w"].nbytes
    inexact = chain(whole, add_one, double)  # no stage's packed form is the final view
    assert not isinstance(inexact.pack(big, inexact.init(big))["w"], Quantized)
    assert unpack(inexact.pack(big, inexact.init(big)))["w"][9, 9] == -4.0


def test_chain_packs_the_very_bits_signed_zeros_too():
    negate = leafwise(
        lambda x, *_: -x, pack=lambda x, *_: Sparse.pack(-x, x != 0)
    )  # its zeros lose their sign
    c, params = chain(negate), {"w": jnp.array([0.0, 1.0])}
    packed = unpack(c.pack(params, c.init(params)))["w"]
    assert (
        np.signbit(np.asarray(packed)).tolist()
        == np.signbit(np.asarray(c.view(params, c.init(params))["w"])).tolist()
    )


def test_leaves_that_are_not_arrays_pass_through():
    odd = {"w": jnp.ones(2), "scale": 1.5, "key": jax.random.key(0), "none": None}
    c = chain(double, add_one)
    assert c.pack(odd, c.init(odd))["scale"] == 1.5
    assert c.view(odd, c.init(odd))["w"].tolist() == [3.0, 3.0]
    assert "float" in c.skipped(odd)["scale"]


def test_at_leaves_the_rest_alone_and_says_so():
    c = at("**/kernel", double)
    seen = c.view(PARAMS, c.init(PARAMS))
    assert (
        kernel(seen) == kernel(scaled(2))
        and seen["a"]["bias"] is PARAMS["a"]["bias"]
        and seen["n"] is PARAMS["n"]
    )
    assert c.skipped(PARAMS) == dict.fromkeys(["a/bias", "n"], "no pattern matches")
    for call in (c.init, c.skipped, lambda p: c.view(p, CompressionState({"0": {}}, {"0": {}}))):
        with pytest.raises(NoMatchError, match=r"(?s)kernel.*b/weight"):
            call({"b": {"weight": jnp.ones(1)}})


def test_nested_at_keeps_full_names():
    c = at("a/**", at("**/kernel", remember))
    assert list(c.init(PARAMS).fixed["0"]["0"]) == ["a/kernel"]
    assert set(c.skipped(PARAMS)) == {"a/bias", "n"}


def test_rules_first_match_wins_and_each_part_keeps_its_own_state():
    c = rules([("a/bias", remember), ("a/*", double), ("**", identity())])
    state = c.init(PARAMS)
    assert list(state.fixed["0"]) == ["a/bias"] and state.fixed["1"] == {}
    later = c.update(scaled(5.0), state, step=0, grads=PARAMS)
    seen = c.view(scaled(5.0), later)
    assert seen["a"]["bias"].tolist() == [115.0, 102.5] and kernel(seen) == kernel(scaled(10))
    assert c.skipped(PARAMS) == {"n": "no compression is applied"}


def test_grads_stats_and_key_reach_the_right_leaf():
    told = {}

    def listen(x, learned, fixed, *, step, grad, stats, key):
        told[x.size] = (int(step), grad.tolist(), stats, key is not None)
        return learned, fixed

    c = chain(
        identity(), at("a/*", every(1, between(-1, None, leafwise(lambda x, *_: x, update=listen))))
    )
    grads = scaled(-1.0)
    inputs = {"grads": grads, "stats": {"a/bias": "s"}, "key": jax.random.key(0)}
    c.update(PARAMS, c.init(PARAMS), step=3, **inputs)
    assert told == {4: (3, kernel(grads), None, True), 2: (3, [-3.0, -0.5], "s", True)}


def run(c, steps, jitted):
    """Return what is seen of a 1 that is multiplied by step + 1, after the update of each step;
    eagerly or in a scan."""

    def step(state, t):
        params = {"w": (t + 1) * PARAMS["a"]["kernel"].ravel()}
        state = c.update(params, state, step=t.astype(jnp.int32))
        return state, c.view(params, state)["w"][0]

    state, ts = c.init({"w": PARAMS["a"]["kernel"].ravel()}), jnp.asarray(steps, jnp.float32)
    if jitted:
        return jax.lax.scan(step, state, ts)[1].tolist()
    seen = []
    for t in ts:
        state, out = step(state, t)
        seen.append(float(out))
    return seen


BOTH = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "scan"])


@BOTH
def test_every_updates_only_at_its_steps(jitted):
    assert run(every(3, remember), range(7), jitted) == [101, 101, 101, 104, 104, 104, 107]
    assert run(every(1, remember), range(3), jitted) == [101, 102, 103]


@BOTH
def test_between_is_off_then_refits_then_follows_then_freezes(jitted):
    assert run(between(2, 5, remember), range(8), jitted) == [1, 2, 3, 104, 105, 105, 105, 105]
    assert run(between(2, None, remember), range(5), jitted) == [1, 2, 3, 104, 105]
    assert run(between(0, 2, remember), range(4), jitted) == [1, 102, 102, 102]


@BOTH
def test_between_begins_even_if_its_first_step_is_not_seen(jitted):
    assert run(between(3, 6, remember), [0, 2, 4, 5, 6, 8], jitted) == [1, 3, 5, 106, 106, 106]
    assert run(between(3, 6, remember), [0, 8, 9], jitted) == [1, 9, 9]
    assert run(every(2, between(3, None, remember)), range(8), jitted) == [
        1,
        2,
        3,
        4,
        5,
        5,
        107,
        107,
    ]


@BOTH
def test_combinators_nest(jitted):
    c = chain(between(1, None, leafwise(lambda x, *_: 10 * x)), every(2, remember))
    assert run(c, range(5), jitted) == [101, 101, 130, 130, 150]


def test_between_packs_what_it_shows():
    c = between(1, None, whole)
    state, params = c.init({"w": jnp.array([1.4])}), {"w": jnp.array([1.4])}
    assert c.pack(params, state) is params
    state = c.update(params, state, step=1)
    assert isinstance(c.pack(params, state)["w"], Quantized) and c.view(params, state)[
        "w"
    ].tolist() == [1.0]


def test_before_between_starts_its_learned_arrays_get_no_gradient():
    c = between(
        1,
        None,
        leafwise(
            lambda x, learned, _: learned * x, init=lambda x, key: (jnp.full_like(x, 3.0), None)
        ),
    )
    params = {"w": jnp.array([2.0])}

    def slopes(state):
        grad = jax.grad(
            lambda params, learned: c.view(params, state._replace(learned=learned))["w"].sum(),
            argnums=(0, 1),
        )
        return [g["w"].tolist() for g in grad(params, state.learned)]

    state = c.init(params)
    assert slopes(state) == [[1.0], [0.0]]
    assert slopes(c.update(params, state, step=1)) == [[3.0], [2.0]]


@pytest.mark.slow
def test_random_keys_may_live_in_the_state():
    noisy = leafwise(
        lambda x, _, key: x + jax.random.normal(key, x.shape),
        init=lambda x, key: (None, key),
        update=lambda x, learned, fixed, **_: (None, jax.random.split(fixed)[0]),
        key=jax.random.key(0),
    )
    for c in (every(2, noisy), between(1, 3, noisy), chain(noisy, noisy)):
        scan, eager = run(c, range(4), True), run(c, range(4), False)
        np.testing.assert_allclose(scan, eager, rtol=1e-6)
        assert len(set(scan)) > 1


@pytest.mark.parametrize(
    ("c", "state"),
    [
        (chain(remember, remember), CompressionState({"0": {}}, {"0": {}})),
        (at("**", remember), CompressionState({}, {})),
        (between(0, 1, remember), CompressionState({}, {"a/kernel": jnp.ones(2)})),
    ],
)
def test_a_state_of_something_else_is_refused(c, state):
    for call in (c.view, c.pack, lambda params, state: c.update(params, state, step=0)):
        with pytest.raises(StateError):
            call(PARAMS, state)


@pytest.mark.parametrize(
    "wrong",
    [lambda: every(0, remember), lambda: between(3, 3, remember), lambda: between(3, 1, remember)],
)
def test_impossible_times_are_refused(wrong):
    with pytest.raises(ValueError, match="period|after"):
        wrong()


def test_a_rule_that_earlier_rules_leave_nothing_to_is_an_error():
    nothing = leafwise(lambda x, learned, fixed: x)
    shadowed = rules([("**", nothing), ("**/kernel", nothing)])
    with pytest.raises(NoMatchError, match=r"'\*\*/kernel' never applies.*dense/kernel"):
        shadowed.init({"dense": {"kernel": jnp.ones(2)}})
