"""Formats of uneven levels: rounding, train = ship, gradients, sharding, nesting, artifacts."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax import quantize
from compress_jax.core import NonFiniteError, ShapeError, Tabled
from compress_jax.core.layout import Layout
from compress_jax.core.sparse import Sparse
from compress_jax.quantize import Table, codebook, float_format, fp4, fp8, nf4
from compress_jax.quantize._scales import levels as level_rules
from compress_jax.quantize._weights.binary import BINARY
from compress_jax.quantize._weights.floats import E2M1, E4M3, NF4
from compress_jax.quantize._weights.ternary import TERNARY

GRANULARITIES = ("tensor", "channel", 4)
FORMATS = {
    "fp8": fp8,
    "fp8 e5m2": lambda *args, **options: fp8("e5m2", *args, **options),
    "fp4": fp4,
    "nf4": nf4,
    "fp6": lambda *args, **options: codebook(float_format(3, 2), *args, **options),
    "ternary": quantize.ternary,
    "binary": quantize.binary,
}
BLOCKS = {
    "mxfp8": lambda **options: quantize.mxfp8(**options),
    "mxfp8 e5m2": lambda **options: quantize.mxfp8("e5m2", **options),
    "mxfp4": quantize.mxfp4,
    "nvfp4": quantize.nvfp4,
}


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
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.sampled_from(list(FORMATS)), st.sampled_from(GRANULARITIES))
def test_view_is_idempotent_bit_for_bit_and_never_minus_zero(seed, name, granularity):
    c, params = FORMATS[name](granularity=granularity), {"w": weights(seed)}
    state = c.init(params)
    once = c.view(params, state)
    np.testing.assert_array_equal(bits_of(c.view(once, state)["w"]), bits_of(once["w"]))
    assert not (np.signbit(once["w"]) & (np.asarray(once["w"]) == 0)).any()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 9),
    st.sampled_from([E2M1, E4M3, NF4, TERNARY, BINARY]),
    st.sampled_from(GRANULARITIES),
)
@pytest.mark.slow
def test_every_weight_goes_to_the_nearest_level(seed, levels, granularity):
    w = weights(seed)
    view, fixed = viewed(codebook(levels, granularity), w)
    layout = Layout.of(w.shape, granularity)
    scale = np.asarray(layout.spread(fixed["scale"]), np.float64)
    distance = np.abs(
        np.asarray(w, np.float64)[..., None] - scale[..., None] * np.unique(np.array(levels.values))
    ).min(-1)
    np.testing.assert_allclose(
        np.abs(np.asarray(view, np.float64) - w), distance, atol=1e-6 * float(jnp.abs(w).max())
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
@pytest.mark.slow
def test_fp8_of_a_tensor_is_the_cast_of_ml_dtypes_times_the_scale(kind):
    w, dtype = (
        weights(1, (64, 8)),
        {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[kind],
    )
    scale = np.abs(np.asarray(w)).max() * np.float32(1 / float(ml_dtypes.finfo(dtype).max))
    cast = (np.asarray(w) * (1 / scale)).astype(dtype)
    view, fixed = viewed(fp8(kind), w)
    assert fixed["scale"] == scale
    np.testing.assert_array_equal(view, cast.astype(np.float32) * scale)
    codes = fp8(kind).pack({"w": w}, fp8(kind).init({"w": w}))["w"].codes.unpack()
    np.testing.assert_array_equal(codes, np.where(cast == 0, 0, cast.view(np.uint8)))


@pytest.mark.wide(9)
@pytest.mark.parametrize("levels", [TERNARY, E2M1, NF4], ids=["ternary", "e2m1", "nf4"])
@pytest.mark.parametrize("n", [16, 200])
@pytest.mark.parametrize("name", ["normal", "standard_cauchy", "uniform"])
def test_mse_is_no_worse_than_the_best_of_4000_scales(name, n, levels):
    w = np.asarray(getattr(np.random.default_rng(0), name)(size=n), np.float32)
    numbers = np.unique(np.array(levels.values))

    def error(scale: float) -> float:
        distance = np.abs(w.astype(np.float64)[:, None] - scale * numbers)
        return float((distance.min(1) ** 2).sum())

    fixed = level_rules.mse(jnp.asarray(w), Layout((n,)), levels)
    dense = min(map(error, np.abs(w).max() * np.geomspace(1e-3, 1.5, 4000)))
    assert error(float(fixed["scale"][0])) <= dense * (1 + 1e-3)


@pytest.mark.slow
def test_mse_finds_an_outlier_among_many_and_scales_with_the_weights():
    w = jnp.append(weights(2, (2**14,)), 60.0)
    fixed = level_rules.mse(w, Layout(w.shape), NF4)
    assert 2 < float(fixed["scale"][0]) < 30
    for size in (2.0**-100, 2.0**100):
        again = level_rules.mse(w * size, Layout(w.shape), NF4)
        np.testing.assert_array_equal(again["scale"], fixed["scale"] * np.float32(size))


def test_levels_on_one_side_of_zero_never_get_a_negative_scale():
    view, fixed = viewed(codebook(Table((1.0, 2.0)), scale="mse"), jnp.array([-3.0, -2.0, 0.1]))
    assert float(fixed["scale"][0]) > 0 and bool((view > 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, *BLOCKS])
def test_what_is_packed_is_what_was_trained_compiled_or_not(name):
    params = {
        dtype: weights(1, (48, 8), jnp.dtype(dtype)) for dtype in ("float32", "bfloat16", "float16")
    }
    options = [{"granularity": g} for g in ("tensor", "channel", 20)] if name in FORMATS else [{}]
    compressions = [{**FORMATS, **BLOCKS}[name](**each, pad=True) for each in options]
    states = [c.init(params) for c in compressions]

    def views(params, states):
        return [c.view(params, state) for c, state in zip(compressions, states, strict=True)]

    packed = [c.pack(params, state) for c, state in zip(compressions, states, strict=True)]
    forms = [
        cj.unpack(packed),
        jax.jit(cj.unpack)(packed),
        jax.jit(views)(params, states),
        jax.jit(lambda params: views(params, states))(params),  # the states as constants
        jax.jit(lambda: cj.unpack(packed))(),
    ]
    for form in forms:
        for got, want in zip(form, views(params, states), strict=True):
            for dtype in params:
                assert got[dtype].dtype == dtype and got[dtype].shape == (48, 8)
                np.testing.assert_array_equal(bits_of(got[dtype]), bits_of(want[dtype]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nbytes"),
    [("fp8", 2048 + 4), ("fp4", 1024 + 4), ("fp6", 1536 + 4), ("binary", 256 + 32),
     ("mxfp4", 1024 + 64), ("mxfp8", 2048 + 64), ("nvfp4", 1024 + 128 + 4)],
)  # fmt: skip
def test_stored_sizes_are_the_true_ones(name, nbytes):
    w = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, (256, 8)), jnp.float32)
    c = {**FORMATS, **BLOCKS}[name]()
    packed = c.pack({"w": w}, c.init({"w": w}))
    assert isinstance(packed["w"], Tabled) and packed["w"].nbytes == nbytes
    row = cj.coverage(c, {"w": w})["w"]
    assert (row.form, row.nbytes, row.reason) == ("Tabled", nbytes, "")


@pytest.mark.wide(1)
@pytest.mark.parametrize("name", [*FORMATS, *BLOCKS])
@pytest.mark.slow
def test_gradient_is_that_of_the_identity_even_where_weights_saturate(name):
    w, c = weights(shape=(32, 4)), {**FORMATS, **BLOCKS}[name](pad=True)
    state = c.init({"w": 0.3 * w})
    cotangent = weights(5, (32, 4))
    grad = jax.grad(lambda w: (c.view({"w": w}, state)["w"] * cotangent).sum())(w)
    np.testing.assert_array_equal(grad, cotangent)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["fp8", "nf4", "mxfp4", "nvfp4"])
def test_sharded_on_any_axis_is_as_unsharded_bit_for_bit(axis, name):
    c, w = {**FORMATS, **BLOCKS}[name](), weights(3, (64, 16))
    spec = PartitionSpec(*("d" if a == axis else None for a in range(2)))
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "d"), spec)
    there_view, there = viewed(c, jax.device_put(w, sharding))
    here_view, here = viewed(c, w)
    assert jax.tree.all(jax.tree.map(np.array_equal, here, there))
    np.testing.assert_array_equal(bits_of(there_view), bits_of(here_view))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, *BLOCKS])
def test_degenerate_leaves(name):
    c = {**FORMATS, **BLOCKS}[name](pad=True)
    params = {
        "zeros": jnp.zeros((4, 3)),
        "one": jnp.full((1, 1), -0.7),
        "scalar": jnp.array(0.3),
        "constant": jnp.full((40, 3), 2.5),
        "huge": jnp.full((4, 3), 3e37),
        "tiny": jnp.full((4, 3), 1e-41),
    }
    view = c.view(params, c.init(params))
    assert all(bool(jnp.isfinite(x).all()) for x in view.values())
    for path in ("one", "scalar", "constant", "huge"):
        np.testing.assert_allclose(
            view[path], params[path], rtol=0.2
        )  # mxfp4 saturates at 6 of up to 8
    assert float(jnp.abs(view["zeros"]).max()) == (2.0**-126 if name == "binary" else 0.0)
    assert float(jnp.abs(view["tiny"]).max()) < 1e-36


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in [*FORMATS, *BLOCKS] if name != "binary"])
def test_pruned_chains_nest(name):
    w = weights(4, (64, 32))
    c = cj.chain(cj.prune.magnitude(0.9), {**FORMATS, **BLOCKS}[name](pad=True))
    state = c.init({"w": w})
    view, node = c.view({"w": w}, state)["w"], c.pack({"w": w}, state)["w"]
    assert isinstance(node, Tabled) and isinstance(node.codes, Sparse)
    assert float((view == 0).mean()) >= 0.9 - 1e-3
    np.testing.assert_array_equal(bits_of(node.unpack()), bits_of(view))


@pytest.mark.wide(1)
@pytest.mark.parametrize("name", ["nf4", "mxfp8", "nvfp4", "ternary"])
@pytest.mark.slow
def test_an_artifact_holds_them_exactly_and_at_their_size(name, tmp_path):
    w, c = weights(5, (64, 32)), cj.chain(cj.prune.magnitude(0.5), {**FORMATS, **BLOCKS}[name]())
    packed = c.pack({"w": w}, c.init({"w": w}))
    written = cj.save(tmp_path / "model.safetensors", packed)
    back, _ = cj.load(tmp_path / "model.safetensors")
    assert (
        back["w"].scale.dtype == packed["w"].scale.dtype and back["w"].levels == packed["w"].levels
    )
    np.testing.assert_array_equal(bits_of(cj.unpack(back)["w"]), bits_of(cj.unpack(packed)["w"]))
    assert written < packed["w"].nbytes + 2500  # the header


def test_convolutions_take_groups_along_their_contracting_axes():
    w = weights(6, (3, 3, 8, 4))
    view, fixed = viewed(nf4(granularity=8), w)
    matrix, _ = viewed(nf4(granularity=8), w.reshape(72, 4))
    assert fixed["scale"].shape == (9, 1, 4)
    np.testing.assert_array_equal(view.reshape(72, 4), matrix)


def test_channels_may_be_any_axes():
    w = weights(7, (3, 5, 4))
    _, fixed = viewed(fp8("e4m3", "channel", axis=(0, 2)), w)
    np.testing.assert_allclose(fixed["scale"][:, 0], np.abs(w).max(1) / 448, rtol=1e-6)


def test_one_s_own_table_and_rule():
    rule = lambda w, layout, levels: {"scale": jnp.full(layout.scale_shape, 0.5)}  # noqa: E731
    view, _ = viewed(codebook(Table((-1.0, 0.1, 3.0)), scale=rule), jnp.array([-9.0, 0.3, 0.9]))
    np.testing.assert_allclose(view, [-0.5, 0.05, 1.5], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_weights_are_refused_with_their_path(bad):
    c, broken = nf4("tensor"), {"dense": {"kernel": jnp.full((2, 2), bad)}}
    with pytest.raises(NonFiniteError, match="dense/kernel"):
        c.init(broken)


@pytest.mark.parametrize(
    ("c", "size"), [(nf4(), 64), (quantize.mxfp8(), 32), (quantize.nvfp4(), 16)]
)
def test_groups_that_do_not_divide_are_refused_with_their_path(c, size):
    with pytest.raises(ShapeError, match=rf"'dense/kernel'.*groups of {size}.*pad=True"):
        c.init({"dense": {"kernel": jnp.ones((10, 2))}})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp8("e3m4"), "'e4m3' or 'e5m2', got 'e3m4'"),
        (lambda: quantize.mxfp8("fp8"), "'e4m3' or 'e5m2', got 'fp8'"),
        (lambda: fp4(scale="floor"), "'absmax', 'mse' or a function .* got 'floor'"),
        (lambda: quantize.mxfp4("absmax"), "'floor', 'ceil', 'mse' or a function .* got 'absmax'"),
        (lambda: quantize.nvfp4("ceil"), "'absmax', 'mse' or a function"),
        (lambda: quantize.ternary(scale="absmax"), "'twn', 'mse' or a function"),
        (lambda: quantize.binary(scale="twn"), "'mse' or a function"),
        (lambda: quantize.binary(scale=-1.0), "above 0 and finite, got -1.0"),
        (lambda: quantize.binary(scale=True), "above 0 and finite, got True"),
        (lambda: nf4(0), "at least 1, got 0"),
        (
            lambda: codebook((1.0, 2.0)),  # pyright: ignore[reportArgumentType]
            "a Float, .* or a Table",
        ),
        (lambda: codebook(Table((1.0,))), "at least two ascending"),
        (lambda: codebook(Table((1.0, 1.0 + 1e-12))), "float32 can tell apart"),
        (lambda: codebook(Table((2.0, 1.0))), "ascending"),
        (lambda: codebook(Table((0.0, float("inf")))), "ascending"),
    ],
)
def test_wrong_arguments_say_what_is_right(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Qwix 0.1.8 on the same kind of input, the best factor of any of its rules;
# experiments/benchmarks/quantization_error.py.
FIGURES = {
    "nf4 channel": (nf4("channel", "mse"), 0.0992),
    "nf4 groups": (nf4(64, "mse"), 0.0913),
    "mxfp4": (quantize.mxfp4("mse"), 0.11166),
    "nvfp4": (quantize.nvfp4("mse"), 0.0946),
    "fp4": (fp4("channel", "mse"), 0.1121),
    "fp8": (fp8("e4m3", "channel", "mse"), 0.0263),
    "int2": (quantize.uniform(2, granularity="channel", scale="mse"), 0.3864),
    "int3": (quantize.uniform(3, granularity="channel", scale="mse"), 0.2012),
    "int8 asymmetric": (quantize.uniform(8, False, "channel", "mse"), 0.00737),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_the_error_on_a_normal_matrix_is_below_the_peer_s(name):
    (c, figure), w = FIGURES[name], jax.random.normal(jax.random.key(0), (1024, 1024))
    view = jax.jit(lambda w: c.view({"w": w}, c.init({"w": w}))["w"])(w)
    assert float(jnp.linalg.norm(view - w) / jnp.linalg.norm(w)) < figure
