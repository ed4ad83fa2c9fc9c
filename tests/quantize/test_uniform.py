"""Uniform quantization as a Compression: rounding, train = ship, gradients, sharding, refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax.core import NonFiniteError, ShapeError
from compress_jax.quantize import Grid, rms, uniform

SCALES = ("absmax", "minmax", "percentile", "rms", "mse")
GRANULARITIES = ("tensor", "channel", 4)
bits_ = st.integers(2, 8)
cheap_scales = st.sampled_from([s for s in SCALES if s != "mse"])


def weights(seed: int = 0, shape: tuple[int, ...] = (16, 8), dtype=jnp.float32) -> jax.Array:
    return (jnp.asarray(np.random.default_rng(seed).laplace(size=shape), jnp.float32) + 0.2).astype(
        dtype
    )


def bits_of(x: jax.Array) -> np.ndarray:
    """The bit pattern, so that -0.0 and 0.0 differ."""
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def viewed(c: cj.Compression, w: jax.Array) -> tuple[jax.Array, dict]:
    state = c.init({"w": w})
    return c.view({"w": w}, state)["w"], state.fixed["w"]


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), bits_, st.booleans(), st.sampled_from(GRANULARITIES), cheap_scales)
def test_view_is_idempotent_bit_for_bit(seed, bits, symmetric, granularity, scale):
    c, params = uniform(bits, symmetric, granularity, scale), {"w": weights(seed)}
    state = c.init(params)
    once = c.view(params, state)
    np.testing.assert_array_equal(bits_of(c.view(once, state)["w"]), bits_of(once["w"]))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), bits_, st.booleans(), st.sampled_from(GRANULARITIES), cheap_scales)
@pytest.mark.slow
def test_every_weight_goes_to_the_nearest_level(seed, bits, symmetric, granularity, scale):
    c, w = uniform(bits, symmetric, granularity, scale), weights(seed)
    view, fixed = viewed(c, w)
    s, z = (np.asarray(fixed[key], np.float64) for key in ("scale", "zero_point"))
    if granularity == 4:  # [4 groups, 1, 8] -> [16, 8]
        s, z = (
            np.repeat(s, 4, axis=1).reshape(16, 8),
            (np.repeat(z, 4, axis=1).reshape(16, 8) if z.ndim else z),
        )
    codes = np.asarray(view) / s + z
    assert codes.round().min() >= 0 and codes.round().max() <= 2**bits - 1
    np.testing.assert_allclose(codes, codes.round(), atol=1e-3)
    inside = (w / s + z >= 0) & (w / s + z <= 2**bits - 1)
    assert np.all(np.abs(view - w)[inside] <= np.broadcast_to(s, w.shape)[inside] * 0.5001)
    np.testing.assert_array_equal(
        codes.round()[~inside], np.where(w / s + z < 0, 0, 2**bits - 1)[~inside]
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    ("symmetric", "scale"), [(True, s) for s in SCALES] + [(False, "minmax"), (False, "rms")]
)
def test_error_falls_with_every_bit(scale, symmetric):
    w, choices = weights(), (2, 4, 8) if scale == "mse" else range(2, 9)
    errors = [
        float(jnp.abs(viewed(uniform(b, symmetric, "channel", scale), w)[0] - w).mean())
        for b in choices
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "symmetric"), [(b, True) for b in range(2, 9)] + [(2, False), (5, False), (8, False)]
)
def test_what_is_packed_is_what_was_trained_compiled_or_not(bits, symmetric):
    params = {
        dtype: weights(1, (16, 8), jnp.dtype(dtype)) for dtype in ("float32", "bfloat16", "float16")
    }
    compressions = [
        uniform(bits, symmetric, granularity, pad=True) for granularity in ("tensor", "channel", 12)
    ]
    states = [c.init(params) for c in compressions]

    def views(params, states):
        return [c.view(params, state) for c, state in zip(compressions, states, strict=True)]

    forms = [
        [cj.unpack(c.pack(params, state)) for c, state in zip(compressions, states, strict=True)],
        jax.jit(views)(params, states),
        jax.jit(lambda params: views(params, states))(params),  # the states as constants
    ]
    for form in forms:
        for got, want in zip(form, views(params, states), strict=True):
            for name in params:
                assert got[name].dtype == name and got[name].shape == (16, 8)
                np.testing.assert_array_equal(bits_of(got[name]), bits_of(want[name]))


@pytest.mark.wide(1)
@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_rule_packs_what_it_shows(scale):
    c, w = uniform(3, True, "channel", scale), weights(2)
    state = c.init({"w": w})
    np.testing.assert_array_equal(
        bits_of(cj.unpack(c.pack({"w": w}, state))["w"]), bits_of(c.view({"w": w}, state)["w"])
    )


def test_codes_are_really_packed():
    w = jnp.asarray(
        np.random.default_rng(0).uniform(-1, 1, size=(128, 8)), jnp.float32
    )  # few zeros: dense codes
    c = uniform(4, True, "channel")
    packed = c.pack({"w": w}, c.init({"w": w}))["w"]
    assert packed.codes.nbytes == 128 * 8 // 2 and packed.nbytes == 128 * 8 // 2 + 8 * 4 + 1


@pytest.mark.wide(2)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradient_is_that_of_the_identity_even_where_weights_are_clipped(granularity):
    w, c = weights(), uniform(2, True, granularity, "rms")
    state = c.init({"w": w})
    cotangent = weights(5)
    grad = jax.grad(lambda w: (c.view({"w": w}, state)["w"] * cotangent).sum())(w)
    np.testing.assert_array_equal(grad, cotangent)


def test_update_follows_the_weights_and_compiles_once():
    c, w = uniform(4, True, "channel", "mse"), weights()
    traces = []

    @jax.jit
    def step(w, state, i):
        traces.append(i)
        state = c.update({"w": w}, state, step=i)
        return c.view({"w": w}, state)["w"], state

    state = c.init({"w": w})
    for i in range(3):
        view, state = step(w * (i + 1), state, jnp.array(i))
    assert len(traces) == 1
    np.testing.assert_allclose(view, 3 * viewed(c, w)[0], rtol=1e-5)


@pytest.mark.wide(1)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("symmetric", "scale"), [(True, "absmax"), (False, "minmax"), (True, "mse")]
)
@pytest.mark.slow
def test_sharded_on_any_axis_is_as_unsharded(axis, granularity, symmetric, scale):
    c, w = uniform(4, symmetric, granularity, scale), weights(3, (32, 16))
    spec = PartitionSpec(*("d" if a == axis else None for a in range(2)))
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "d"), spec)
    there = jax.device_put(w, sharding)
    (here_view, here), (there_view, fixed) = viewed(c, w), viewed(c, there)
    assert there_view.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(
        fixed["scale"], here["scale"], rtol=0 if scale in ("absmax", "minmax") else 1e-6
    )
    np.testing.assert_array_equal(fixed["zero_point"], here["zero_point"])
    if scale in ("absmax", "minmax"):
        np.testing.assert_array_equal(bits_of(there_view), bits_of(here_view))


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    ("symmetric", "scale"), [(True, s) for s in SCALES] + [(False, "minmax"), (False, "rms")]
)
@pytest.mark.slow
def test_degenerate_leaves(symmetric, scale):
    c = uniform(4, symmetric, "channel", scale)
    params = {
        "zeros": jnp.zeros((4, 3)),
        "one": jnp.full((1, 1), -0.7),
        "scalar": jnp.array(0.3),
        "constant": jnp.full((4, 3), 2.5),
        "denormal": jnp.full((4, 3), 1e-41),
        "a zero channel": jnp.array([[0.0, 1.0, 1.0]] * 4),
    }
    view = c.view(params, c.init(params))
    for path, x in params.items():
        np.testing.assert_allclose(view[path], x, rtol=0.26, atol=1e-37)  # 4 bits, clipped at worst
    assert float(jnp.abs(view["zeros"]).max()) == 0.0 and float(view["a zero channel"][0, 0]) == 0.0
    np.testing.assert_allclose(view["constant"], params["constant"], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_weights_are_refused_with_their_path(bad):
    c, good = uniform(), {"dense": {"kernel": jnp.ones((2, 2))}}
    state, broken = c.init(good), {"dense": {"kernel": jnp.full((2, 2), bad)}}
    for call in (
        lambda: c.init(broken),
        lambda: c.view(broken, state),
        lambda: c.pack(broken, state),
    ):
        with pytest.raises(NonFiniteError, match="dense/kernel"):
            call()


def test_groups_that_do_not_divide_are_refused_with_their_path():
    params = {"dense": {"kernel": jnp.ones((10, 2))}}
    with pytest.raises(ShapeError, match=r"'dense/kernel'.*groups of 4.*pad=True"):
        uniform(granularity=4).init(params)
    with pytest.raises(ShapeError, match=r"'dense/kernel'.*axis 5"):
        uniform(granularity="channel", axis=5).init(params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits=1 .*above zero"),
        ({"bits": 9}, "2 to 8, got 9"),
        ({"bits": 4.5}, "2 to 8, got 4.5"),
        ({"bits": True}, "2 to 8, got True"),
        ({"symmetric": "yes"}, "True or False, got 'yes'"),
        ({"symmetric": False, "narrow": True}, "only for a symmetric grid, got True"),
        ({"scale": "best"}, "'absmax', .* got 'best'"),
        ({"granularity": "row"}, "'tensor', 'channel' or a group size.* got 'row'"),
        ({"granularity": 0}, "at least 1, got 0"),
    ],
)
def test_wrong_arguments_say_what_is_right(arguments, message):
    with pytest.raises(ValueError, match=message):
        uniform(**arguments)


def test_a_rule_may_be_a_function_of_ones_own():
    w = weights()
    np.testing.assert_array_equal(
        viewed(uniform(3, scale=rms), w)[0], viewed(uniform(3, scale="rms"), w)[0]
    )
    halves = uniform(
        4, scale=lambda w, layout, grid: (jnp.full(layout.scale_shape, 0.5), grid.middle)
    )
    np.testing.assert_array_equal(viewed(halves, w)[0], np.clip(np.round(2 * w), -8, 7) / 2)


def test_channels_may_be_any_axes():
    w = weights(4, (3, 5, 4))
    _, fixed = viewed(uniform(8, granularity="channel", axis=(0, 2)), w)
    np.testing.assert_allclose(fixed["scale"][:, 0], np.abs(w).max(1) / 127, rtol=1e-6)


@pytest.mark.slow
def test_pruned_weights_stay_zero_and_only_the_others_are_stored():
    w = jnp.where(
        jax.random.uniform(jax.random.key(0), (64, 32)) < 0.05, weights(shape=(64, 32)), 0.0
    )
    for symmetric in (True, False):
        c = uniform(8, symmetric, "channel")
        state = c.init({"w": w})
        assert not np.any(np.asarray(c.view({"w": w}, state)["w"])[np.asarray(w) == 0])
        assert c.pack({"w": w}, state)["w"].nbytes < w.size / 2


def test_grid_levels_of_both_kinds():
    x = jnp.array([-100.0, -0.4, 0.5, 1.5, 100.0])
    codes = partial(Grid(2).encode, x, jnp.ones(1))
    assert codes(jnp.array([2], jnp.uint8)).tolist() == [0, 2, 2, 3, 3]
    assert codes(jnp.array([0], jnp.uint8)).tolist() == [0, 0, 0, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["absmax", "mse", "rms"])
def test_a_narrow_grid_has_the_negative_of_every_level(scale):
    w = jnp.append(weights(6, (200,)), -9.0)
    for bits in (2, 4):
        narrow = uniform(bits, scale=scale, narrow=True)
        view, fixed = viewed(narrow, w)
        assert np.abs(np.round(view / fixed["scale"])).max() == 2 ** (bits - 1) - 1
        packed = narrow.pack({"w": w}, narrow.init({"w": w}))
        np.testing.assert_array_equal(bits_of(cj.unpack(packed)["w"]), bits_of(view))


@pytest.mark.slow
def test_weights_that_are_not_negative_get_unsigned_integers():
    w = jnp.abs(weights(7))
    c = uniform(8, symmetric=False)
    state = c.init({"w": w})
    assert int(state.fixed["w"]["zero_point"].max()) == 0
    assert c.pack({"w": w}, state)["w"].codes.unpack().max() == 255
