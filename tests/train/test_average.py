"""Averages of weights equal a recursion in float64, on one device or eight, resumed or not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax import prune, quantize, train
from compress_jax.core import ArgumentError, StateError

PARAMS = {"w": np.linspace(-1, 2, 32, dtype=np.float32).reshape(8, 4), "b": np.ones(4, np.float32)}
TARGETS = [
    np.float32(np.sin(np.arange(64)).reshape(16, 4) + i) for i in range(5)
]  # batches [16, 4]
DECAY = 0.8


def loss(params, model_state, batch, key, teacher, train=True):
    x = jnp.cos(batch) @ params["w"].T  # [rows, 8]
    return jnp.square(x @ params["w"] + params["b"][None] - batch).mean(), (model_state, {})


def begun(compression, optimizer, params=PARAMS):
    return train.create({"params": params}, compression, optimizer, jax.random.key(0))


def by_hand(path: list[np.ndarray], debias: bool) -> np.ndarray:
    """The average of weights in float64, by its recursion and the correction of its bias."""
    average = 0.0 if debias else path[0].astype(float)
    for p in path[1:]:
        average = DECAY * average + (1 - DECAY) * p.astype(float)
    return average / (1 - DECAY ** (len(path) - 1)) if debias else average


def assert_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
def test_it_is_the_recursion_of_the_weights_after_each_step(debias, microbatches):
    inner = optax.adam(0.1)
    optimizer = train.averaged(inner, DECAY, debias=debias)
    c = quantize.lsq(4)
    step = jax.jit(train.make_step(loss, optimizer, c, microbatches=microbatches))
    plain = jax.jit(train.make_step(loss, inner, c, microbatches=microbatches))
    state, raw = begun(c, optimizer), begun(c, inner)
    path = [jax.tree.map(np.asarray, raw.trainable)]
    for batch in TARGETS:
        state, _ = step(state, batch)
        raw, _ = plain(raw, batch)
        path.append(jax.tree.map(np.asarray, raw.trainable))
    # The wrapper moves no weight, and counts steps, not microbatches.
    assert_bits(state.trainable, raw.trainable)
    assert int(state.opt_state.count) == len(TARGETS)
    found = train.average_of(state)
    for i, x in enumerate(jax.tree.leaves(found.trainable)):
        wanted = by_hand([jax.tree.leaves(each)[i] for each in path], debias)
        np.testing.assert_allclose(x, wanted, rtol=2e-6, atol=1e-7)
    assert np.abs(found.params["w"] - state.params["w"]).max() > 0.01  # it lags behind


def test_the_first_average_is_the_first_weights_also_where_the_decay_is_close_to_one():
    optimizer = train.averaged(optax.identity(), 0.99999)
    params = {"w": jnp.array([1.0, -3.0])}
    _, state = optimizer.update({"w": jnp.array([9.0, 9.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(state.average["w"], [10.0, 6.0], rtol=1e-6)


def test_weights_of_few_bits_are_averaged_in_float32():
    optimizer = train.averaged(optax.identity(), 0.999, debias=False)
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.array([3]), "none": None}
    state = optimizer.init(params)
    moves = {"w": jnp.full(2, 0.5, jnp.bfloat16), "n": jnp.array([2]), "none": None}
    wanted = 1.0
    for p in (1.5, 2.0, 2.5):
        updates, state = optimizer.update(moves, state, params)
        params = optax.apply_updates(params, updates)
        wanted = 0.999 * wanted + 0.001 * p
    np.testing.assert_allclose(state.average["w"], wanted, rtol=1e-6)
    assert state.average["w"].dtype == jnp.float32  # in bfloat16 no step would have moved it
    # What has no fractions is the latest one.
    assert state.average["n"].dtype == jnp.int32
    assert state.average["n"].tolist() == params["n"].tolist() == [9]
    assert state.average["none"] is None


def test_before_a_step_it_is_the_initial_weights_in_their_dtypes():
    params = {"w": jnp.full((2, 2), 0.1, jnp.bfloat16)}
    state = begun(cj.identity(), train.averaged(optax.sgd(0.1)), params)
    assert_bits(train.average_of(state).params, params)


def test_eight_devices_average_as_one_does_and_hold_their_part():
    rules = [("w", P("fsdp", None))]
    optimizer, c = train.averaged(optax.adam(0.1), DECAY), prune.magnitude(0.5)
    mesh = train.make_mesh(data=2, fsdp=4)
    step = train.make_step(loss, optimizer, c)
    placed = train.place(begun(c, optimizer), mesh, rules)
    divided, alone = train.jit_step(step, mesh, placed, rules=rules), jax.jit(step)
    state = begun(c, optimizer)
    for batch in TARGETS:
        placed, _ = divided(placed, batch)
        state, _ = alone(state, batch)
    average = placed.opt_state.average["params"]["w"]
    assert average.sharding.is_equivalent_to(placed.params["w"].sharding, 2)
    assert average.sharding.spec == P("fsdp", None)
    for x, y in zip(*map(jax.tree.leaves, (placed.opt_state, state.opt_state)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_has_the_same_bits(tmp_path):
    optimizer, c = train.averaged(optax.adam(0.1), DECAY), prune.magnitude(0.5)
    step = jax.jit(train.make_step(loss, optimizer, c))
    feed = dict(enumerate(TARGETS))
    for steps in (2, 5):
        cut = train.fit(step, begun(c, optimizer), feed, steps=steps, directory=tmp_path / "cut")
    whole = train.fit(step, begun(c, optimizer), feed, steps=5, directory=tmp_path / "whole")
    assert_bits(cut, whole)
    assert_bits(train.average_of(cut), train.average_of(whole))


def test_what_the_mask_prunes_is_zero_in_the_view_of_the_average():
    c, optimizer = prune.magnitude(0.5), train.averaged(optax.sgd(0.01), DECAY)
    step = jax.jit(train.make_step(loss, optimizer, c))
    state = begun(c, optimizer)
    for batch in TARGETS:
        state, _ = step(state, batch)
    found = train.average_of(state)
    seen = found.variables(c)["params"]["w"]
    mask = np.asarray(state.fixed["w"])
    np.testing.assert_array_equal(seen, np.where(mask, found.params["w"], 0))
    assert np.all(np.asarray(found.params["w"])[~mask] != 0)
    packed = c.pack(found.params, found.compression)
    np.testing.assert_array_equal(cj.unpack(packed)["w"], seen)


def test_grown_weights_start_with_an_average_of_zero():
    c = prune.rigl(0.5, steps=100, every=2, key=jax.random.key(3))
    optimizer = train.averaged(optax.adam(0.1), DECAY)
    step = jax.jit(train.make_step(loss, optimizer, c))
    state = begun(c, optimizer)
    before = state.fixed["w"]["mask"]
    for batch in TARGETS[:3]:  # masks change after steps 2, 4, ..., hence in the third step
        state, _ = step(state, batch)
    grown = np.asarray(state.fixed["w"]["mask"] & ~before)
    average = np.asarray(train.average_of(state).params["w"])
    assert grown.any()
    assert np.all(average[grown] == 0)
    assert np.all(average[~grown] != 0)
    state, _ = step(state, TARGETS[3])
    weight = (1 - DECAY) / (1 - DECAY**4)  # the average of zeros and one weight
    average = np.asarray(train.average_of(state).params["w"])
    np.testing.assert_allclose(
        average[grown], weight * np.asarray(state.params["w"])[grown], rtol=1e-5
    )


def test_what_is_wrong_is_said():
    for decay in (-0.1, 1.0, True, "0.9"):
        with pytest.raises(ArgumentError, match="decay"):
            train.averaged(optax.sgd(0.1), decay)
    with pytest.raises(StateError, match="0 averages"):
        train.average_of(begun(cj.identity(), optax.sgd(0.1)))
    of_a_part = train.label_optimizer(train.averaged(optax.sgd(0.1)), optax.sgd(0.1))
    with pytest.raises(StateError, match="around the whole optimizer"):
        train.average_of(begun(quantize.lsq(4), of_a_part))
    accumulating = train.averaged(optax.MultiSteps(optax.sgd(0.1), 2))
    with pytest.raises(ArgumentError, match="microbatches"):
        begun(cj.identity(), accumulating)
