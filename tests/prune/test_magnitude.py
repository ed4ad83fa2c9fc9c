import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax.core import NonFiniteError, Sparse, StateError
from compress_jax.prune import cubic, magnitude

SCOPES = ("leaf", "global")


@pytest.fixture(scope="module")
def params():
    one, two = jax.random.split(jax.random.key(0))
    return {
        "a": {"kernel": jnp.round(3 * jax.random.normal(one, (16, 24))), "bias": jnp.zeros(24)},
        "b": {
            "kernel": jax.random.normal(two, (8, 16, 32)).astype(jnp.bfloat16),
            "scale": jnp.float32(0.5),
        },
    }


def pruned(state):
    return {path: int((~mask).sum()) for path, mask in state.fixed.items()}


@pytest.mark.wide(2)
@pytest.mark.parametrize("sparsity", [0, 0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.99, 1])
@pytest.mark.parametrize("n", [1, 2, 7, 100, 1001])
def test_exactly_as_many_are_pruned_as_asked(n, sparsity):
    x = {"w": jax.random.normal(jax.random.key(n), (n,))}
    c = magnitude(sparsity)
    kept = np.asarray(c.view(x, c.init(x))["w"] != 0)
    assert n - kept.sum() == int(np.floor(sparsity * n + 0.5))
    magnitudes = np.abs(np.asarray(x["w"]))
    assert magnitudes[~kept].max(initial=0) <= magnitudes[kept].min(initial=np.inf)


@pytest.mark.slow
def test_leaf_scope_gives_every_leaf_the_sparsity(params):
    state = magnitude(0.75).init(params)
    assert state.learned == {}
    assert pruned(state) == {"a/bias": 18, "a/kernel": 288, "b/kernel": 3072, "b/scale": 1}


@pytest.mark.wide(2)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.81, 1.0])
def test_global_scope_is_one_argsort_of_everything(params, sparsity):
    leaves = [np.abs(np.asarray(x, np.float64)) for x in jax.tree.leaves(params)]
    flat = np.concatenate([x.ravel() for x in leaves])
    kept = np.ones(flat.size, bool)
    kept[np.argsort(flat, kind="stable")[: int(np.floor(sparsity * flat.size + 0.5))]] = False
    masks = magnitude(sparsity, scope="global").init(params).fixed
    np.testing.assert_array_equal(np.concatenate([np.ravel(mask) for mask in masks.values()]), kept)


@pytest.mark.wide(1)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.slow
def test_view_is_the_masked_params_and_pack_ships_it(params, scope):
    c = magnitude(0.9, scope=scope)
    state = c.init(params)
    view, packed = c.view(params, state), c.pack(params, state)
    flat_view, flat_params = jax.tree.leaves(view), jax.tree.leaves(params)
    for seen, x, mask in zip(flat_view, flat_params, state.fixed.values(), strict=True):
        assert (seen.dtype, seen.shape) == (x.dtype, x.shape)
        assert seen.tobytes() == np.where(mask, x, np.zeros((), x.dtype)).tobytes()
    assert [x.tobytes() for x in jax.tree.leaves(cj.unpack(packed))] == [
        x.tobytes() for x in flat_view
    ]
    assert isinstance(packed["b"]["kernel"], Sparse)
    assert packed["b"]["kernel"].nbytes < params["b"]["kernel"].nbytes / 4


def test_pruned_negative_weights_become_positive_zeros():
    x = {"w": jnp.array([-1.0, -0.0, 2.0])}
    c = magnitude(2 / 3)
    assert not np.signbit(np.asarray(c.view(x, c.init(x))["w"])).any()


@pytest.mark.slow
def test_what_packing_would_enlarge_stays_dense(params):
    c = magnitude(0.0)
    packed = c.pack(params, c.init(params))
    assert all(
        isinstance(leaf, jax.Array)
        for leaf in jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, Sparse))
    )


@pytest.mark.slow
def test_gradient_is_masked(params):
    c = magnitude(0.6)
    state = c.init(params)
    ones = jax.grad(
        lambda p: sum(jnp.sum(3 * x.astype(jnp.float32)) for x in jax.tree.leaves(c.view(p, state)))
    )(params)
    for gradient, mask in zip(jax.tree.leaves(ones), state.fixed.values(), strict=True):
        np.testing.assert_array_equal(np.asarray(gradient, np.float32), 3.0 * np.asarray(mask))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_schedule_is_followed_in_one_compilation(params, scope):
    c = magnitude(cubic(0.9, begin=2, end=10), scope=scope)
    traces = []

    @jax.jit
    def step(params, state, count):
        traces.append(count)
        state = c.update(params, state, step=count)
        return c.view(params, state), state

    state, size = c.init(params), sum(x.size for x in jax.tree.leaves(params))
    assert sum(pruned(state).values()) == 0
    counts = []
    for i in range(14):
        _, state = step(params, state, jnp.int32(i))
        counts.append(sum(pruned(state).values()))
    assert len(traces) == 1
    wanted = [(0.9 - 0.9 * (1 - min(max(i - 2, 0) / 8, 1)) ** 3) * size for i in range(14)]
    np.testing.assert_allclose(counts, wanted, atol=0.5 + 1e-3 + (0 if scope == "global" else 1.5))


@pytest.mark.slow
def test_jit_and_eager_give_the_same_mask(params):
    for scope in SCOPES:
        c = magnitude(optax.linear_schedule(0.0, 1.0, 7), scope=scope)
        state = c.init(params)
        for step in (0, 3, 6):
            eager, jitted = (
                c.update(params, state, step=step),
                jax.jit(c.update)(params, state, step=jnp.int32(step)),
            )
            jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_a_schedule_outside_the_range_is_clipped(params):
    assert sum(pruned(magnitude(lambda step: -3.0).init(params)).values()) == 0
    everything = sum(x.size for x in jax.tree.leaves(params))
    assert sum(pruned(magnitude(lambda step: jnp.float32(1.5)).init(params)).values()) == everything


def test_pruned_weights_stay_and_can_come_back():
    c, x = magnitude(0.5), {"w": jnp.array([1.0, 2.0])}
    state = c.init(x)
    assert state.fixed["w"].tolist() == [False, True]
    gradient = jax.grad(lambda p: (c.view(p, state)["w"] ** 2).sum())(x)
    x = jax.tree.map(
        lambda w, g: w - 0.2 * g, x, gradient
    )  # the kept one shrinks by 0.8, the pruned one keeps its 1.0
    x = jax.tree.map(lambda w, g: w - 0.2 * g, x, gradient)
    assert c.update(x, state, step=1).fixed["w"].tolist() == [True, False]
    assert c.view(x, c.update(x, state, step=1))["w"].tolist() == [1.0, 0.0]


def mesh(axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


SHARDINGS = [
    ("leaf", {"x": 8}, ("x",)),
    ("leaf", {"x": 8}, (None, "x")),
    ("leaf", {"x": 8}, (None, None, "x")),
    ("global", {"x": 8}, ("x",)),
    ("global", {"x": 2, "y": 4}, ("y", None, "x")),
    ("global", {"x": 2, "y": 4}, (None, ("x", "y"))),
]


@pytest.mark.wide(1)
@pytest.mark.parametrize(("scope", "axes", "spec"), SHARDINGS)
@pytest.mark.slow
def test_sharded_is_unsharded_bit_for_bit_without_gathering(scope, axes, spec):
    x = jnp.round(
        4 * jax.random.normal(jax.random.key(3), (8, 16, 24))
    )  # many ties at every threshold
    whole = {"one": x, "two": 0.5 * x[::-1]}
    sharding = NamedSharding(mesh(axes), PartitionSpec(*spec))
    split = jax.device_put(whole, sharding)
    c = magnitude(optax.linear_schedule(0.0, 1.0, 10), scope=scope)
    state = c.init(split)
    compiled = jax.jit(c.update).lower(split, state, step=jnp.int32(3)).compile()
    unsharded = jax.jit(c.update)
    program = compiled.as_text() or ""
    assert "all-gather" not in program and "all-to-all" not in program
    assert set(re.findall(r"= (\S+) all-reduce\(", program)) == {
        "u32[]"
    }  # devices tell each other counts, nothing else
    for step in (0, 3, 9):
        sharded = compiled(split, state, step=jnp.int32(step))
        expected = unsharded(whole, state, step=step)
        jax.tree.map(np.testing.assert_array_equal, sharded, expected)
        assert sharded.fixed["one"].sharding.is_equivalent_to(sharding, 3)
        jax.tree.map(np.testing.assert_array_equal, c.view(split, sharded), c.view(whole, expected))


@pytest.mark.parametrize("scope", SCOPES)
def test_leaves_that_are_not_floats_are_left_alone_and_reported(scope):
    params = {"w": jnp.arange(1.0, 5.0), "steps": jnp.array(7), "empty": jnp.zeros((0, 3))}
    c = magnitude(0.5, scope=scope)
    state = c.init(params)
    assert set(state.fixed) == {"w"} and set(c.skipped(params)) == {"steps", "empty"}
    assert c.view(params, state)["steps"] == 7
    only = {"steps": jnp.array(7)}
    assert c.update(only, c.init(only), step=0).fixed == {}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_bad_weights_are_refused_by_name(params, scope, bad):
    c = magnitude(0.5, scope=scope)
    state = c.init(params)
    params = {**params, "a": {**params["a"], "kernel": params["a"]["kernel"].at[3, 4].set(bad)}}
    for call in (
        c.init,
        lambda p: c.update(p, state, step=0),
        lambda p: c.view(p, state),
        lambda p: c.pack(p, state),
    ):
        with pytest.raises(NonFiniteError, match="a/kernel"):
            call(params)


def test_a_foreign_state_is_refused(params):
    c = magnitude(0.5)
    with pytest.raises(StateError, match="'a/bias'"):
        c.view(params, c.init({"w": jnp.ones(3)}))


@pytest.mark.parametrize("sparsity", [-0.01, 1.01, float("nan"), float("inf"), 90])
def test_impossible_sparsities_are_refused(sparsity):
    with pytest.raises(ValueError, match="between 0 and 1"):
        magnitude(sparsity)


def test_unknown_scopes_are_refused():
    with pytest.raises(ValueError, match="'leaf' or 'global', got 'layer'"):
        magnitude(0.5, scope="layer")


@pytest.mark.slow
def test_gradual_pruning_of_chosen_leaves_starts_and_stops(params):
    c = cj.at("**/kernel", cj.between(4, 8, magnitude(cubic(0.8, 0, 10), scope="global")))
    state, update, counts = c.init(params), jax.jit(c.update), {}
    for step in range(12):
        state = update(params, state, step=jnp.int32(step))
        counts[step] = sum(int((x == 0).sum()) for x in jax.tree.leaves(c.view(params, state)))
    dense = sum(int((x == 0).sum()) for x in jax.tree.leaves(params))
    assert (
        counts[3]
        == dense
        < counts[4]
        < counts[5]
        < counts[6]
        < counts[7]
        == counts[8]
        == counts[11]
    )
    total = params["a"]["kernel"].size + params["b"]["kernel"].size
    for step, at in (
        (4, 4),
        (6, 6),
        (7, 8),
    ):  # it starts at what the schedule says there, and ends at that of step 8
        assert (
            abs(counts[step] - params["a"]["bias"].size - total * (0.8 - 0.8 * (1 - at / 10) ** 3))
            < 1
        )
