"""Ratios and multiples are of widths: the inputs or outputs of a kernel, of one group or more."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.core.errors import ShapeError
from compress_jax.core.paths import flatten

X = jnp.ones((1, 4, 4, 3))


class Net(nn.Module):
    groups: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(self.groups)(nn.Conv(32, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


def shape(model, ratio, **options):
    v = jax.eval_shape(model.init, jax.random.key(0), X)
    v = jax.tree.map(lambda x: jnp.ones(x.shape), v)
    small = cj.prune.shrink(model.apply, v, X, ratio=ratio, **options)
    return small.params["params"]["Conv_0"]["kernel"].shape[-1], small


@pytest.mark.wide(2)
@pytest.mark.parametrize("groups", [1, 2, 8, 32])
@pytest.mark.parametrize("ratio, multiple", [(0.5, 1), (0.25, 1), (0.5, 8), (0.3, 8)])
def test_half_of_a_width_is_half_whatever_makes_it_up(groups, ratio, multiple):
    width, small = shape(Net(groups), ratio, round_to=multiple)
    step = math.lcm(multiple, min(groups, 32 // groups) if 1 < groups < 32 else 1)
    assert width % multiple == 0 and abs(width - 32 * (1 - ratio)) < step
    if 1 < groups < 32:
        assert f"width params/Conv_0/kernel:3: 32 -> {width}" in str(
            small.table
        ) and "is shortened by" in str(small.table)


def attention(p, x):
    """Stored as tensors, as Flax does, or as matrices, as others do: the same widths."""
    heads = [jnp.einsum("btd,dhk->bthk", x, p[name].reshape(6, 4, 8)) for name in "qkv"]
    a = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", heads[0], heads[1]))
    y = jnp.einsum("bhqs,bshk->bqhk", a, heads[2])
    return jnp.einsum("bqhk,hkd->bqd", y, p["o"].reshape(4, 8, 6)) @ p["head"]


@pytest.mark.wide(1)
@pytest.mark.parametrize("stored", [(4, 8), (32,)])
@pytest.mark.slow
def test_heads_and_their_features_are_one_width_however_it_is_stored(stored):
    rng = np.random.default_rng(0)
    p = {name: jnp.asarray(rng.normal(size=(6, *stored)), jnp.float32) for name in "qkv"}
    p |= {"o": jnp.asarray(rng.normal(size=(*stored, 6)), jnp.float32), "head": jnp.ones((6, 2))}
    x = jnp.ones((1, 3, 6))
    for options in ({}, {"round_to": 8}):
        small = cj.prune.shrink(attention, p, x, ratio=0.5, exclude="o:*", **options)
        assert [math.prod(small.params[name].shape) for name in "qkv"] == [6 * 16] * 3
    names = [group.name for group in cj.trace.groups(attention, p, x)]
    both = cj.prune.shrink(
        attention, p, x, ratio={names[0]: 0.5, names[1]: 0.5}
    )  # each as it is said
    assert math.prod(both.params["q"].shape) == 6 * 8


def interleaved(p, x):
    h = x @ p["up"]
    return (jax.nn.silu(h[..., ::2]) * h[..., 1::2]) @ p["down"]


def reshaped(p, x):
    h = (x @ p["up"]).reshape(*x.shape[:-1], -1, 2)
    return (jax.nn.silu(h[..., 0]) * h[..., 1]) @ p["down"]


@pytest.mark.parametrize("pinned", [False, True])
def test_interleaved_channels_are_those_of_the_reshape(pinned):
    rng = np.random.default_rng(1)
    p = {
        "up": jnp.asarray(rng.normal(size=(6, 16)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)

    def fn(p, x):
        assert not pinned or p["up"].shape[1] == 16  # runs at no other width by itself
        return interleaved(p, x)

    found, same = cj.trace.groups(fn, p, x), cj.trace.groups(reshaped, p, x)
    assert (
        [(g.name, g.size, g.members) for g in found]
        == [(g.name, g.size, g.members) for g in same]
        != []
    )
    assert found.frozen == same.frozen and cj.trace.verify_groups(fn, p, x, groups=found).ok
    small = cj.prune.narrow(fn, p, x, kept={"up:1": [1, 4, 6]})
    np.testing.assert_allclose(small.fn(small.params, x), reshaped(small.params, x), rtol=1e-5)


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["w"]) @ p["o"]


SHAPES = {"a": (5, 6), "b": (6,), "w": (6, 6), "o": (6, 3)}
P = {
    name: jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    for name, shape in SHAPES.items()
}


@pytest.mark.wide(2)
@pytest.mark.parametrize(
    "kept", [{"a:1": [0, 2, 5], "w:1": [1, 2, 3, 5]}, {"a:1": [0, 2, 5]}, {"w:1": [0]}]
)
@pytest.mark.parametrize("name", ["adafactor", "sm3"])
def test_moments_of_square_kernels_are_carried_by_name(name, kept):
    """Row and column means lack one axis, also where the longer axis becomes the shorter one."""
    optimizer = {
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=1),
        "sm3": optax.sm3(1e-3),
    }[name]
    small = cj.prune.narrow(mlp, P, jnp.ones((2, 5)), kept=kept)
    state = jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), optimizer.init(P)
    )
    carried, fresh = small.slice_state(state), optimizer.init(small.params)
    assert jax.tree.map(jnp.shape, carried) == jax.tree.map(jnp.shape, fresh)
    for path, size in SHAPES.items():
        axes = [small.cuts[path].indices.get(axis, np.arange(n)) for axis, n in enumerate(size)]
        if name == "sm3":
            for axis, left in enumerate(axes):
                np.testing.assert_array_equal(carried[0].mu[path][axis], left)
        elif len(size) == 2:  # optax: rows lack the largest axis, columns the second largest
            small_shape = small.params[path].shape
            second, largest = np.argsort(small_shape)[-2:]
            np.testing.assert_array_equal(carried[0].v_row[path], axes[1 - largest])
            np.testing.assert_array_equal(carried[0].v_col[path], axes[1 - second])


def test_a_state_of_one_vector_is_refused():
    small = cj.prune.narrow(mlp, P, jnp.ones((2, 5)), kept={"a:1": [0]})
    with pytest.raises(ShapeError, match="as many entries as all parameters"):
        small.slice_state(optax.flatten(optax.adam(1e-3)).init(P))
    learned = {"learned": {"w": {"scale": jnp.ones((1, 6))}}}
    assert flatten(
        cj.prune.narrow(mlp, P, jnp.ones((2, 5)), kept={"w:1": [0]}).slice_state(learned)
    )[0]["learned/w/scale"].shape == (1, 1)
