"""Dynamic sparse training against NumPy: what is dropped and grown, when, and what restarts."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax.core import NoMatchError
from compress_jax.prune import (
    cubic,
    erk,
    magnitude,
    reset_moments,
    restart,
    rigl,
    straight_through,
    top_kast,
)
from compress_jax.prune._dynamic import turnover
from compress_jax.train import create, make_step

WHOLE = hnp.arrays(np.int8, (5, 8), elements=st.integers(-3, 3))
TURN = jax.jit(turnover)


def largest(keys, count):
    """Flat indices of the largest keys, the later one among equals."""
    return np.argsort(np.asarray(keys, np.float64).ravel(), kind="stable")[
        len(np.ravel(keys)) - count :
    ]


@settings(max_examples=60, deadline=None)
@given(WHOLE, WHOLE, hnp.arrays(bool, (5, 8)), st.integers(0, 8), st.integers(0, 8))
@pytest.mark.slow
def test_turnover_is_a_sort_of_the_kept_and_a_sort_of_the_others(x, growth, live, eighths, drop):
    count = 40 - 5 * eighths
    survive = min(count, 40 - math.floor((1 - (1 - eighths / 8) * (1 - drop / 8)) * 40 + 0.5))
    keys = np.where(live, abs(x.astype(int)) + 1, 0)
    expected = np.zeros(40, bool)
    expected[largest(keys, survive)] = True
    expected &= live.ravel()
    scores = np.where(expected, 1000, abs(growth.astype(int)).ravel())
    expected = np.zeros(40, bool)
    expected[largest(scores, count)] = True
    found = TURN(
        *(jnp.asarray(a, jnp.float32) for a in (x, growth)),
        live,
        jnp.float32(eighths / 8),
        jnp.float32(drop / 8),
    )
    np.testing.assert_array_equal(found, expected.reshape(5, 8))
    assert found.sum() == count


KEY, PARAMS = (
    jax.random.key(0),
    {"a": {"kernel": jax.random.normal(jax.random.key(1), (20, 30))}, "bias": jnp.ones(3)},
)
GRADS = {"a": {"kernel": jax.random.normal(jax.random.key(2), (20, 30))}, "bias": jnp.ones(3)}
RULES = {"**/kernel": 0.9}


@pytest.mark.parametrize("make", [cj.prune.sparse_evolution, rigl])
def test_masks_change_when_they_should_and_never_in_size(make):
    c = make(RULES, 20, KEY, every=5)
    state, update, changed, grown = c.init(PARAMS), jax.jit(c.update), {}, {}
    assert c.skipped(PARAMS) == {"bias": "no sparsity is given for it"}
    for step in range(21):
        new = update(PARAMS, state, step=jnp.int32(step), grads=GRADS)
        before, after = (s.fixed["a/kernel"]["mask"] for s in (state, new))
        assert after.sum() == 60
        np.testing.assert_array_equal(new.fixed["a/kernel"]["grown"], after & ~before)
        changed[step], state = bool((before != after).any()), new
        grown[step] = int((after & ~before).sum())
    assert [step for step, flag in changed.items() if flag] == [
        5,
        10,
    ]  # at 15 the drop fraction has come to 0
    for step, count in grown.items():  # some of the dropped ones come back at once
        assert count <= math.ceil(60 * 0.15 * (1 + math.cos(math.pi * step / 15)))


def test_rigl_grows_where_the_gradient_is_largest():
    c = rigl(RULES, 100, KEY, every=1, drop=lambda step: 0.5)
    old = c.init(PARAMS)
    live = np.asarray(old.fixed["a/kernel"]["mask"])
    new = np.asarray(c.update(PARAMS, old, step=1, grads=GRADS).fixed["a/kernel"]["mask"])
    w, g = (np.abs(np.asarray(tree["a"]["kernel"], np.float64)) for tree in (PARAMS, GRADS))
    survivors = live & (w >= np.sort(w[live])[30])
    expected = survivors | (g >= np.sort(g[~survivors])[-30]) & ~survivors
    np.testing.assert_array_equal(new, expected)
    with pytest.raises(ValueError, match="there is none for a/kernel"):
        c.update(PARAMS, old, step=1)


def test_without_drop_training_is_static():
    c = cj.prune.sparse_evolution(0.5, 10, KEY, drop=0.0, every=1)
    state = c.init(PARAMS)
    later = c.update(PARAMS, state, step=3)
    np.testing.assert_array_equal(state.fixed["a/kernel"]["mask"], later.fixed["a/kernel"]["mask"])


@pytest.mark.slow
def test_a_rising_sparsity_is_reached_exactly_while_weights_come_back():
    c = rigl({"**/kernel": cubic(0.9, 0, 10)}, 20, KEY, every=1)
    state, update, back = c.init(PARAMS), jax.jit(c.update), 0
    for step in range(1, 16):
        grads = jax.tree.map(lambda g, step=step: jnp.roll(g, 7 * step), GRADS)
        old, state = state, update(PARAMS, state, step=jnp.int32(step), grads=grads)
        pruned = 600 - int(state.fixed["a/kernel"]["mask"].sum())
        assert abs(pruned - 600 * (0.9 - 0.9 * (1 - min(step / 10, 1)) ** 3)) <= 0.5 + 1e-3
        back += int((state.fixed["a/kernel"]["mask"] & ~old.fixed["a/kernel"]["mask"]).sum())
    assert pruned == 540 and back > 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [cj.prune.sparse_evolution, rigl])
def test_sharded_masks_are_the_unsharded_ones(make):
    x = {"w": jax.random.normal(jax.random.key(3), (8, 16))}
    c = make(0.75, 100, KEY, every=1)

    @jax.jit
    def run(x):
        return c.update(x, c.init(x), step=jnp.int32(1), grads=jax.tree.map(jnp.sin, x))

    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
    jax.tree.map(np.testing.assert_array_equal, run(split), run(x))


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw, clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "lion, averaged": optax.chain(optax.lion(0.1), optax.ema(0.9)),
    "by parts": optax.partition(
        {"x": optax.adam(0.1), "y": optax.rmsprop(0.1)}, {"params": "x", "learned": "y"}
    ),
    "masked": optax.masked(optax.adam(0.1), {"params": True, "learned": False}),
    "many steps": optax.MultiSteps(optax.adam(0.1), 3),
    "factored": optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
}


@pytest.mark.wide(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_restart_whatever_the_optimizer(name):
    """What is left of the gradient of a grown weight is nothing, and of all others everything."""
    params = {"a": {"w": jnp.ones((4, 6))}, "b": {"a": {"w": jnp.ones((4, 6))}}}
    trainable = {"params": params, "learned": {}}
    optimizer = OPTIMIZERS[name]
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(trainable, optimizer.init(trainable), trainable)
    flags = jnp.zeros((4, 6), bool).at[1, 2].set(True)
    reset = reset_moments(state, params, {"a/w": flags})
    touched = 0
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(reset), strict=True
    ):
        mine = jnp.shape(old) == (4, 6) and "['b']" not in jax.tree_util.keystr(path)
        np.testing.assert_array_equal(new, jnp.where(flags, 0, old) if mine else old)
        touched += mine
    assert touched >= 1
    with pytest.raises(NoMatchError, match="no param is named 'c'"):
        reset_moments(state, params, {"c": flags})


@pytest.mark.slow
def test_restart_finds_growth_inside_combinators():
    params = {"a": {"kernel": jnp.ones((10, 10))}, "bias": jnp.ones(3)}
    inner = rigl(0.5, 100, KEY, every=1, drop=lambda step: 0.5)
    c = cj.at(
        "**/kernel", cj.chain(cj.between(0, None, cj.every(2, inner)), cj.quantize.uniform(bits=8))
    )
    state = c.init(params)
    grads = {"a": {"kernel": jnp.arange(100.0).reshape(10, 10)}, "bias": jnp.ones(3)}
    for step, expected in [(2, True), (3, False)]:
        new = c.update(params, state, step=step, grads=grads)
        zeroed, _ = restart(params, (), state.fixed, new.fixed)
        assert bool((zeroed["a"]["kernel"] == 0).any()) == expected
        np.testing.assert_array_equal(zeroed["bias"], params["bias"])
        state = new
    still = magnitude(0.5).init(params)
    assert restart(params, (), still.fixed, still.fixed) == (params, ())


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


@pytest.mark.slow
def test_in_the_training_step_grown_weights_start_from_zero():
    model, x = Two(), jax.random.normal(jax.random.key(0), (32, 8))
    y = x[:, :3] * x[:, 3:6]

    def loss(params, model_state, batch, key, teacher, train=True):
        return jnp.square(model.apply({"params": params}, batch[0]) - batch[1]).mean(), (
            model_state,
            {},
        )

    variables = model.init(jax.random.key(1), x)
    c, optimizer = (
        rigl(erk(variables["params"], 0.8), 40, KEY, every=4, drop=lambda step: 0.5),
        optax.adam(0.01),
    )
    state, step = create(variables, c, optimizer, KEY), jax.jit(make_step(loss, optimizer, c))
    first = None
    for i in range(13):
        old, (state, metrics) = state, step(state, (x, y))
        first = metrics["loss"] if first is None else first
        new = state.fixed["Dense_0/kernel"]["mask"] & ~old.fixed["Dense_0/kernel"]["mask"]
        assert bool(new.any()) == (i in (4, 8, 12))
        for tree in (
            state.params,
            state.opt_state[0].mu["params"],
            state.opt_state[0].nu["params"],
        ):
            assert (tree["Dense_0"]["kernel"][new] == 0).all() and (
                tree["Dense_0"]["kernel"][~new] != 0
            ).any()
    assert metrics["loss"] < first
    kept = sum(int(leaf["mask"].sum()) for leaf in state.fixed.values())
    assert kept == round(0.2 * (8 * 16 + 16 * 3))


def test_straight_through_trains_what_it_does_not_use():
    c = straight_through(magnitude(0.5))
    params = {"w": jnp.array([1.0, -2.0, 3.0, -4.0]), "steps": jnp.array(1)}
    state = c.init(params)
    np.testing.assert_array_equal(c.view(params, state)["w"], [0, 0, 3, -4])
    slope = jax.grad(
        lambda w: (
            c.view({**params, "w": w}, state)["w"] ** 2 + c.view({**params, "w": w}, state)["w"]
        ).sum()
    )
    np.testing.assert_array_equal(slope(params["w"]), [1, 1, 7, -7])


@pytest.mark.slow
def test_top_kast_uses_one_set_and_trains_a_larger_one():
    params = {"w": jnp.arange(1.0, 11.0)}
    c = top_kast(0.8, 0.5)
    state = c.update(params, c.init(params), step=0)
    view = c.view(params, state)["w"]
    np.testing.assert_array_equal(view, [0, 0, 0, 0, 0, 0, 0, 0, 9, 10])
    np.testing.assert_array_equal(
        jax.grad(lambda p: c.view(p, state)["w"].sum())(params)["w"], [0] * 5 + [1] * 5
    )
    np.testing.assert_array_equal(cj.unpack(c.pack(params, state))["w"], view)
    with pytest.raises(ValueError, match="backward is below the sparsity"):
        top_kast(0.5, 0.8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rigl(0.5, 0, KEY), "steps >= 1"),
        (lambda: rigl(0.5, 10, KEY, every=0), "every >= 1"),
        (lambda: rigl(0.5, 10, KEY, end_fraction=1.5), "end_fraction"),
        (lambda: cj.prune.sparse_evolution(0.5, 10, KEY, drop=2), "share of kept weights"),
        (lambda: cj.prune.sparse_evolution(1.5, 10, KEY), "between 0 and 1"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
