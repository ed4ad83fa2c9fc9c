"""Masks of bits are the masks of bytes: in a step, over devices, in a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax import prune, train
from compress_jax.core import ArgumentError
from compress_jax.core.compression import leaf_views
from compress_jax.prune import BitMask
from compress_jax.prune._masks.bit_mask import packed_axis, unpacked

VARIABLES = {"params": {"w": jax.random.normal(jax.random.key(0), (3, 16, 8)) / 4}}
BATCH = jax.random.normal(jax.random.key(1), (4, 16))
OPTIMIZER = optax.adam(0.01)
METHODS = {
    "magnitude": lambda: prune.magnitude(prune.cubic(0.7, 0, 3)),
    "rigl": lambda: prune.rigl(0.5, steps=40, every=1, key=jax.random.key(5)),
}


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (16, 3), (3, 16), (5, 7), (3, 24, 5), (2, 0)])
def test_words_are_those_of_numpy(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    packed = BitMask.pack(jnp.asarray(mask))
    wanted = np.packbits(mask, axis=packed.axis, bitorder="little")
    assert packed.words.dtype == jnp.uint8
    np.testing.assert_array_equal(packed.words, wanted)
    np.testing.assert_array_equal(packed.unpack(), mask)
    assert packed.unpack().dtype == jnp.bool_


def test_whole_words_are_preferred():
    assert packed_axis((4, 16, 12)) == -2
    assert packed_axis((4, 12, 16)) == -1
    assert packed_axis((16, 16)) == -2
    assert packed_axis((9, 63)) == -1  # 72 bits for 63 entries, where 16 would be for 9


def apply(params, x):
    """A loop over the layers of a stack, rematerialized."""

    @jax.checkpoint
    def layer(x, w):
        return jnp.tanh(x @ w) @ w.T, None

    return jax.lax.scan(layer, x, params["w"])[0]


def loss(params, model_state, batch, key, teacher, train=True):
    return jnp.square(apply(params, batch) - 1).mean(), (model_state, {})


def bound(method):
    return cj.bind(method, apply, VARIABLES["params"], BATCH)


def begun(c, variables=VARIABLES):
    return train.create(variables, c, OPTIMIZER, jax.random.key(1))


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_with_bytes_and_grown_weights_restart(name):
    states = []
    for wrap in (lambda c: c, prune.bit_masks):
        c = bound(wrap(METHODS[name]()))
        state, step = begun(c), jax.jit(train.make_step(loss, OPTIMIZER, c))
        for _ in range(3):
            state, _ = step(state, BATCH)
        states.append(state)
    plain, bits = states
    masks = jax.tree.leaves(plain.fixed)
    assert sum(x.nbytes for x in jax.tree.leaves(bits.fixed)) * 8 == sum(x.nbytes for x in masks)
    for x, y in zip(masks, jax.tree.leaves(unpacked(bits.fixed)), strict=True):
        np.testing.assert_array_equal(x, y)
    for tree in ("params", "opt_state"):
        for x, y in zip(*(jax.tree.leaves(getattr(each, tree)) for each in states), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_a_layer_of_the_stack_is_unpacked_inside_the_loop():
    c = bound(prune.bit_masks(prune.magnitude(0.5)))
    state = begun(c)
    view = leaf_views(c, state.params, state.compression)["w"]
    (words,) = jax.tree.leaves(view.layers)
    assert words.dtype == jnp.uint8
    assert view.stacked == 1
    layer = view.fn(state.params["w"][1], jax.tree.map(lambda x: x[1], view.layers), None)
    np.testing.assert_array_equal(layer, state.variables(c)["params"]["w"][1])


def test_words_are_divided_as_their_leaf_is_and_nothing_is_gathered():
    c = prune.bit_masks(prune.magnitude(0.5))
    state = begun(c, {"params": {"w": jax.random.normal(jax.random.key(0), (2, 64, 32))}})
    mesh = train.make_mesh(data=1, fsdp=4, tensor=2)
    rules = [("w", P(None, "fsdp", "tensor"))]
    placed = train.place(state, mesh, rules)
    assert placed.fixed["w"].words.sharding.spec == P(None, "fsdp", "tensor")
    assert placed.fixed["w"].words.addressable_shards[0].data.shape == (2, 2, 16)
    where = train.shardings(state, mesh, rules)

    def live(state):
        new = c.update(state.params, state.compression, step=state.step)
        return c.view(state.params, new), new

    compiled = jax.jit(live, in_shardings=(where,)).lower(placed).compile()
    assert "all-gather" not in compiled.as_text()
    step = train.make_step(loss, OPTIMIZER, c)
    batch = jax.random.normal(jax.random.key(1), (8, 64))
    divided, _ = train.jit_step(step, mesh, placed, rules=rules)(placed, batch)
    alone, _ = jax.jit(step)(state, batch)
    np.testing.assert_array_equal(divided.fixed["w"].words, alone.fixed["w"].words)


def test_a_checkpoint_holds_the_words(tmp_path):
    c = prune.bit_masks(prune.magnitude(0.5))
    state = begun(c, {"params": {"w": jax.random.normal(jax.random.key(0), (16, 5))}})
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        found = checkpoints.restore_latest(jax.tree.map(jnp.zeros_like, state))
    assert found is not None
    wanted = state.variables(c)["params"]["w"]
    np.testing.assert_array_equal(found[1].fixed["w"].words, state.fixed["w"].words)
    np.testing.assert_array_equal(found[1].variables(c)["params"]["w"], wanted)


def test_it_takes_a_compression():
    with pytest.raises(ArgumentError, match="compression"):
        prune.bit_masks(0.5)


def test_it_goes_around_once():
    half = prune.bit_masks(prune.magnitude(0.5))
    twice = prune.bit_masks(cj.chain(half, cj.quantize.uniform(4)))
    with pytest.raises(ArgumentError, match="once"):
        twice.init(VARIABLES["params"])
