"""Quantized activations against numpy in float64, in many models, under every transformation."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.errors import DataError, NoMatchError, NonFiniteError, ShapeError, StateError
from compress_jax.quantize._activations import range_rules
from compress_jax.quantize._activations.activations import activations
from compress_jax.quantize._activations.dynamic import dynamic
from compress_jax.quantize._activations.quantizer import round_to_grid, stable_scale_from_range
from compress_jax.quantize._activations.site_patterns import match_site
from compress_jax.quantize._activations.static import static
from compress_jax.quantize._integer.integer import integer
from compress_jax.quantize._learned.lsq import lsq_inputs
from compress_jax.quantize._learned.pact import pact
from compress_jax.quantize._scales.grid import Grid
from compress_jax.quantize._weights.uniform import uniform
from compress_jax.trace import calibrate, sites
from compress_jax.trace.reducers import histogram
from tests.trace.zoo import ZOO

EVERY = {
    "dynamic": dynamic(),
    "token": dynamic(bits=4, symmetric=False, granularity="token"),
    "minmax": static(symmetric=False),
    "channel": static(granularity="channel"),
    "ema": static(range="ema", momentum=0.9),
    "percentile": static(bits=6, range="percentile"),
    "entropy": static(range="entropy"),
    "mse": static(bits=4, symmetric=False, range="mse"),
    "rms": static(bits=4, range="rms"),
    "rms channel": static(bits=4, symmetric=False, granularity="channel", range="rms"),
    "lsq": lsq_inputs(bits=4),
    "lsq+": lsq_inputs(bits=4, offset=True),
    "pact": pact(bits=4),
}
QUANTIZERS = pytest.mark.parametrize("how", EVERY.values(), ids=EVERY)


def dense(w, x):
    return jnp.einsum("btk,kn->btn", x, w["kernel"])


PARAMS = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)}


def normal(*shape, seed=0, scale=1.0, shift=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(shift, scale, shape), jnp.float32)


def reference(x, low, high, bits, symmetric):
    """Round to the grid that spans a range, in float64."""
    x, low, high = (np.asarray(each, np.float64) for each in (x, low, high))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        scale, zero = np.maximum(-low, high) / (2 ** (bits - 1) - 1), 2.0 ** (bits - 1)
    else:
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale, scale


def close_but_for_ties(ours, x, low, high, bits, symmetric):
    expected, scale = reference(x, low, high, bits, symmetric)
    wrong = np.abs(ours - expected) > 1e-4 * scale
    assert wrong.mean() < 0.002 and (np.abs(ours - expected) < 1.01 * scale).all()


@pytest.mark.wide(1)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.slow
def test_values_are_those_of_float64(bits, symmetric):
    x = normal(4, 50, 6, scale=2, shift=0.3)
    (site,) = sites(dense, PARAMS, x)
    wide, rows = np.asarray(x), (2,)
    ours = dynamic(bits, symmetric).quantize_fn(site, 0, x, {})
    close_but_for_ties(ours, x, wide.min(), wide.max(), bits, symmetric)
    ours = dynamic(bits, symmetric, "token").quantize_fn(site, 0, x, {})
    close_but_for_ties(
        ours, x, wide.min(rows, keepdims=True), wide.max(rows, keepdims=True), bits, symmetric
    )
    for granularity, axes in (("tensor", None), ("channel", (0, 1))):
        how = static(bits, symmetric, granularity)
        own = activations(dense, how).init(PARAMS, [x])["kernel"]["input"]
        low, high = wide.min(axes, keepdims=True), wide.max(axes, keepdims=True)
        np.testing.assert_array_equal(own["low"], low.squeeze())
        close_but_for_ties(how.quantize_fn(site, 0, x, own), x, low, high, bits, symmetric)


@pytest.mark.wide(1)
@QUANTIZERS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_seen_is_what_the_codes_stand_for_bit_for_bit(how, dtype):
    x = jax.nn.relu(normal(4, 5, 6)).astype(dtype)
    params = {"kernel": PARAMS["kernel"].astype(dtype)}
    (site,) = sites(dense, params, x)
    own = activations(dense, how).init(params, [x, x * 2]).get("kernel", {"input": {}})["input"]
    other = 3 * normal(4, 5, 6, seed=1).astype(dtype)

    def by_codes(x, own):
        scale, zero_point = how.scale_fn(site, 0, x, own)
        assert scale.dtype == jnp.float32 and zero_point.dtype == jnp.uint8
        jnp.broadcast_shapes(scale.shape, zero_point.shape, x.shape)
        codes = how.grid.encode(x, scale, zero_point)
        return how.grid.decode(codes, scale, zero_point).astype(x.dtype), codes

    def see(x, own):
        return how.quantize_fn(site, 0, x, own)

    seen, codes = by_codes(other, own)
    assert codes.min() >= 0 and codes.max() <= how.grid.top
    for each in (see(other, own), jax.jit(see)(other, own), jax.jit(by_codes)(other, own)[0]):
        assert each.dtype == dtype and np.asarray(each).tobytes() == np.asarray(seen).tobytes()


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-(2.0**99), 2.0**99, width=32),
    st.floats(-(2.0**99), 2.0**99, width=32),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
)
def test_a_grid_spans_its_range_and_holds_zero(a, b, bits, symmetric):
    low, high = min(a, b), max(a, b)
    grid = Grid(bits, symmetric)
    scale, zero_point = stable_scale_from_range(jnp.float32(low), jnp.float32(high), grid)
    assert np.isfinite(scale) and scale > 0 and 0 <= int(zero_point) <= grid.top
    assert float(grid.decode(zero_point.astype(jnp.int32), scale, zero_point)) == 0
    if symmetric:
        assert int(zero_point) == 2 ** (bits - 1)
        return
    if low >= 0:
        assert int(zero_point) == 0
    ends = jnp.float32([min(low, 0), max(high, 0)])
    seen = grid.decode(grid.encode(ends, scale, zero_point), scale, zero_point)
    np.testing.assert_allclose(
        seen, ends, atol=0.501 * float(scale)
    )  # rounding the zero point moves either end


@pytest.mark.slow
def test_the_gradient_is_straight_through_and_zero_where_it_clips():
    x = jnp.array([[-0.5, 0.0, 0.7, 0.99, 1.3, 5.0]])
    params, ranges = (
        {"kernel": jnp.eye(6)},
        {"kernel": {"input": {"low": jnp.float32(0), "high": jnp.float32(1)}}},
    )
    fn = lambda w, x: x @ w["kernel"]  # noqa: E731
    for how, expected in (
        (static(symmetric=False), [0, 1, 1, 1, 0, 0]),
        (static(symmetric=False, clipped=False), [1] * 6),
        (dynamic(bits=2), [1] * 6),
    ):
        grad = jax.grad(lambda x, how=how: activations(fn, how).apply(params, ranges, x).sum())(x)
        assert grad.tolist() == [expected]
    extreme = jax.grad(
        lambda x: round_to_grid(Grid(8), True, x, *stable_scale_from_range(-x, x, Grid(8)))
    )
    assert all(
        float(extreme(jnp.float32(x))) == 1 for x in np.random.default_rng(0).uniform(0.1, 9, 50)
    )


@pytest.mark.slow
def test_nan_is_not_hidden_by_a_code():
    fn = lambda w, x: x @ w["kernel"]  # noqa: E731
    x = jnp.array([[1.0, jnp.nan]])
    for how in EVERY.values():
        own = {"low": -1, "high": 1, "scale": 0.1, "zero_point": 0, "offset": 0, "alpha": 1}
        ranges = {"kernel": {"input": {name: jnp.float32(value) for name, value in own.items()}}}
        if "channel" in how.call:
            ranges = jax.tree.map(lambda end: jnp.full(2, end), ranges)
        assert jnp.isnan(activations(fn, how).apply({"kernel": jnp.ones((2, 2))}, ranges, x)).any()


# Ranges.


def seen_by(x, batches=1):
    parts = np.array_split(np.asarray(x, np.float32).reshape(-1, 1), batches)
    fn = lambda w, x: x @ w  # noqa: E731
    (name,) = calibrate(fn, histogram(8), jnp.ones((1, 1)), [parts[0]])
    return lambda reducer: calibrate(fn, reducer, jnp.ones((1, 1)), map(jnp.asarray, parts))[name][
        "input"
    ]


def error(x, low, high, bits, symmetric):
    return ((reference(x, low, high, bits, symmetric)[0] - x) ** 2).mean()


@pytest.mark.wide(1)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "laplace", "skewed", "outlier"])
@pytest.mark.slow
def test_mse_finds_the_least_error_there_is(kind, bits, symmetric):
    rng = np.random.default_rng(0)
    x = {
        "normal": rng.normal(size=4_000),
        "relu": np.maximum(rng.normal(size=4_000), 0),
        "laplace": rng.laplace(size=4_000),
        "skewed": scipy.stats.norm.cdf(y := rng.normal(size=4_000)) * y,  # GELU
        "outlier": np.append(rng.normal(size=4_000), 30.0),
    }[kind]
    low, high = range_rules.mse(seen_by(x, 3)(histogram(range_rules.BINS)), Grid(bits, symmetric))
    ours = error(x, float(low), float(high), bits, symmetric)
    ends = (
        (min(x.min(), -x.max()), max(x.max(), -x.min()))
        if symmetric
        else (min(x.min(), 0), x.max())
    )
    shares = np.geomspace(1, 1 / 64, 300 if symmetric else 40)
    pairs = (
        [(share, share) for share in shares]
        if symmetric
        else [(a, b) for a in shares for b in shares]
    )
    brute = min(error(x, ends[0] * a, ends[1] * b, bits, symmetric) for a, b in pairs)
    assert ours <= 1.02 * brute


@pytest.mark.slow
def test_mse_of_a_unit_normal_is_the_known_optimum():
    """The best steps of a unit normal (Max, 1960; `quantize.normal_clip`), from a histogram."""
    x = scipy.stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    for bits, step in ((2, 1.0484), (3, 0.6018), (4, 0.3386), (6, 0.1042)):
        _, high = range_rules.mse(seen_by(x)(histogram(range_rules.BINS)), Grid(bits))
        np.testing.assert_allclose(float(high) / (2 ** (bits - 1) - 1), step, rtol=0.03)


@pytest.mark.slow
def test_percentile_and_rms_are_those_of_numpy():
    x = np.random.default_rng(1).laplace(0.4, 2.0, 30_000)
    seen = seen_by(x, 4)(histogram(range_rules.BINS))
    width = 2 ** math.ceil(math.log2(np.abs(x).max())) * 2 / range_rules.BINS
    high = range_rules.percentile(seen, Grid(8), 99.0)[1]
    np.testing.assert_allclose(float(high), np.percentile(np.abs(x), 99), atol=2 * width)
    ends = range_rules.percentile(seen, Grid(8, False), 99.0)
    np.testing.assert_allclose(
        [float(end) for end in ends], np.percentile(x, [0.5, 99.5]), atol=2 * width
    )
    spread = seen_by(x, 4)(range_rules.spread())
    np.testing.assert_allclose(
        [float(each) for each in spread],
        [x.mean(), np.abs(x).mean(), (x**2).mean(), x.min(), x.max(), 30_000],
        rtol=1e-4,
    )
    low, high = range_rules.rms(spread, Grid(4, False))
    reach = 2.3702614 * x.std()  # normal_clip(Grid(4))
    np.testing.assert_allclose(
        [float(low), float(high)], [x.mean() - reach, x.mean() + reach], rtol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_lets_an_outlier_go_and_keeps_a_uniform_range(symmetric):
    rng = np.random.default_rng(2)
    heavy = np.append(np.maximum(rng.normal(size=50_000), 0), [200.0])
    low, high = range_rules.entropy(
        seen_by(heavy, 2)(histogram(range_rules.BINS)), Grid(8, symmetric)
    )
    assert 2 < high < 20 and low == (-high if symmetric else 0)
    flat = rng.uniform(-1, 1, 100_000)
    low, high = range_rules.entropy(
        seen_by(flat, 2)(histogram(range_rules.BINS)), Grid(4, symmetric)
    )
    assert high > 0.9 and low < -0.9


@pytest.mark.wide(2)
@pytest.mark.parametrize("rule", ["percentile", "entropy", "mse", "rms", "minmax", "ema"])
def test_ranges_are_what_all_batches_say_and_scale_with_the_data(rule):
    batches = [normal(64, 6, seed=seed, shift=1.0) for seed in range(4)]
    fn = lambda w, x: x @ w["kernel"]  # noqa: E731
    how = activations(fn, static(bits=6, symmetric=False, range=rule, momentum=0.75))
    own = how.init(PARAMS, batches)["kernel"]["input"]
    if rule in ("minmax", "ema"):
        low = np.asarray(batches[0]).min()
        for batch in batches[1:]:
            low = (
                min(low, np.asarray(batch).min())
                if rule == "minmax"
                else 0.75 * low + 0.25 * np.asarray(batch).min()
            )
        np.testing.assert_allclose(float(own["low"]), low, rtol=1e-6)
    doubled = how.init(PARAMS, [4 * batch for batch in batches])["kernel"]["input"]
    np.testing.assert_allclose(
        [4 * float(own[end]) for end in own], [float(doubled[end]) for end in own], rtol=1e-3
    )


# The model's side.


def fresh(inputs, seed):
    rng = np.random.default_rng(seed)

    def like(x):
        return jnp.asarray(
            rng.normal(size=x.shape) if x.dtype == jnp.float32 else rng.permuted(np.asarray(x)),
            x.dtype,
        )

    return jax.tree.map(like, inputs)


def distance(a, b):
    a, b = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(each)])
        for each in (a, b)
    )
    return np.linalg.norm(a - b) / np.linalg.norm(b)


QUICK = ("mlp/nnx", "llama/linen")
SAMPLE = [
    entry if entry.name in QUICK else pytest.param(entry, marks=pytest.mark.slow) for entry in ZOO
]


@pytest.mark.parametrize("entry", SAMPLE, ids=lambda entry: entry.name)
def test_eight_bits_change_every_model_a_little(entry):
    fn, variables, inputs = entry.make()
    found = sites(fn, variables, *inputs)
    how = [(site.name, None) for site in found if site.conditional]
    how += [(site.name, dynamic()) for site in found[1::2] if not site.conditional] + [
        ("**", static())
    ]
    quantized = activations(fn, how)
    ranges = quantized.init(variables, [inputs])
    chosen = {site.name for site in found if not isinstance(match_site(site, how), str)}
    assert set(ranges) == chosen and set(quantized.table(variables, *inputs)) == {
        site.name for site in found
    }

    @jax.jit
    def both(variables, ranges, *inputs):
        return quantized.apply(variables, ranges, *inputs), fn(variables, *inputs)

    ours, plain = both(variables, ranges, *inputs)
    assert (0 < distance(ours, plain) < 0.2) if chosen else (distance(ours, plain) == 0)


@pytest.mark.wide(1)
@QUANTIZERS
@pytest.mark.slow
def test_layers_in_a_scan_have_a_range_each(how):
    def fn(w, x):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w) - 0.1, None), x, w["layers"])[0]

    def unrolled(w, x):
        for i in range(3):
            x = jax.nn.relu(x @ w[f"layer{i}"]) - 0.1
        return x

    layers, x = normal(3, 6, 6, scale=0.7), normal(20, 6)
    scanned, flat = activations(fn, how), activations(unrolled, how)
    apart = {f"layer{i}": layers[i] for i in range(3)}
    ranges, separate = scanned.init({"layers": layers}, [x]), flat.init(apart, [x])
    for key, value in ranges.get("layers", {}).get("input", {}).items():
        each = jnp.stack([separate[f"layer{i}"]["input"][key] for i in range(3)])
        np.testing.assert_allclose(value, each, rtol=1e-5, atol=1e-6)
    ours, expected = scanned.apply({"layers": layers}, ranges, x), flat.apply(apart, separate, x)
    assert (np.abs(ours - expected) > 1e-4).mean() < 0.02
    grads = jax.jit(jax.grad(lambda w: (scanned.apply(w, ranges, x) ** 2).sum()))(
        {"layers": layers}
    )
    assert np.isfinite(grads["layers"]).all() and np.asarray(grads["layers"]).any(axis=(1, 2)).all()


@pytest.mark.slow
@QUANTIZERS
def test_jit_vmap_and_remat_agree_with_plain_calls(how):
    def fn(w, x):
        return jax.checkpoint(lambda x: jax.nn.relu(x @ w["a"]))(x) @ w["b"]

    params, x = {"a": normal(6, 8), "b": normal(8, 3, seed=1)}, normal(4, 5, 6)
    quantized = activations(fn, how)
    ranges = quantized.init(params, [x])
    one = quantized.apply(params, ranges, x)
    np.testing.assert_allclose(
        jax.jit(quantized.apply)(params, ranges, x), one, rtol=1e-5, atol=1e-5
    )
    mapped = jax.vmap(partial(quantized.apply, params, ranges))(x)
    np.testing.assert_allclose(
        mapped,
        jnp.stack([quantized.apply(params, ranges, each) for each in x]),
        rtol=1e-5,
        atol=1e-5,
    )
    if not how.call.startswith("dynamic"):
        np.testing.assert_allclose(mapped, one, rtol=1e-5, atol=1e-5)


def attention(w, x):
    q, k = x @ w["q"], x @ w["k"]
    return jax.nn.softmax(q @ k.T) @ (x @ w["v"])


HEADS = {name: normal(6, 6, seed=seed) for seed, name in enumerate("qkv")}


@pytest.mark.slow
def test_products_of_activations_are_quantized_only_when_named():
    x = normal(7, 6)
    names = [site.name for site in sites(attention, HEADS, x)]
    products = [site.name for site in sites(attention, HEADS, x) if site.operand is None]
    assert len(products) == 2
    usual = activations(attention, static())
    assert set(usual.init(HEADS, [x])) == set(names) - set(products)
    assert all("a pattern names it" in usual.table(HEADS, x)[name] for name in products)
    everywhere = activations(attention, static(symmetric=False), where="*")
    ranges = everywhere.init(HEADS, [x])
    assert set(ranges) == set(names) and set(ranges[products[0]]) == {"lhs", "rhs"}
    assert (
        0
        < distance(
            everywhere.apply(HEADS, ranges, x), usual.apply(HEADS, usual.init(HEADS, [x]), x)
        )
        < 0.1
    )
    first = activations(attention, [(products[0], dynamic(bits=4)), ("q", None), ("k", static())])
    table = first.table(HEADS, x)
    assert (
        table[products[0]].startswith("dynamic") and table["q"] == "pattern 'q' leaves it as it is"
    )
    assert table["v"] == "no pattern matches" and set(first.init(HEADS, [x])) == {
        products[0],
        "k",
    }


@pytest.mark.wide(1)
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_an_image_of_a_convolution_and_both_kernels(granularity):
    def fn(w, x):
        return jax.lax.conv_general_dilated(
            x, w["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, params = (
        normal(3, 5, 5, 4) * jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1, 1),
        {"kernel": normal(3, 3, 4, 2)},
    )
    (site,) = sites(fn, params, x)
    scale, _ = dynamic(granularity=granularity).scale_fn(site, 0, x, {})
    assert scale.shape == ((3, 1, 1, 1) if granularity == "token" else ())
    own = activations(fn, static(granularity="channel")).init(params, [x])["kernel"]["input"]
    np.testing.assert_array_equal(own["high"], np.asarray(x).max((0, 1, 2)))


def test_moving_ranges():
    fn = lambda w, x: x @ w["kernel"]  # noqa: E731
    first, second = normal(16, 6), 3 * normal(16, 6, seed=1)
    moving = activations(fn, static(range="ema", momentum=0.9, symmetric=False))
    out, ranges = jax.jit(moving.update)(PARAMS, None, first)
    assert (
        np.asarray(out).tobytes()
        == np.asarray(jax.jit(moving.apply)(PARAMS, ranges, first)).tobytes()
    )
    assert float(ranges["kernel"]["input"]["low"]) == float(first.min())
    _, later = moving.update(PARAMS, ranges, second)
    expected = 0.9 * float(first.max()) + 0.1 * float(second.max())
    np.testing.assert_allclose(float(later["kernel"]["input"]["high"]), expected, rtol=1e-6)
    widening = activations(fn, static())
    _, wide = widening.update(PARAMS, widening.init(PARAMS, [second]), first)
    assert float(wide["kernel"]["input"]["high"]) == float(second.max())
    blank = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), ranges)
    _, set_by_this = moving.update(PARAMS, blank, first)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), set_by_this, ranges))


@pytest.mark.wide(1)
@QUANTIZERS
def test_update_keeps_the_structure_and_what_is_learned(how):
    batch = jax.nn.relu(normal(2, 5, 6))
    quantized = activations(dense, how)
    ranges = quantized.init(PARAMS, [batch])
    _, new = quantized.update(PARAMS, ranges, 2 * batch)
    if ranges:
        assert jax.tree.structure(new) == jax.tree.structure(ranges)
        assert all(
            (new["kernel"]["input"][name] == ranges["kernel"]["input"][name]).all()
            for name in how.learned
        )


def branching(w, x):
    return jax.lax.cond(x.sum() > 0, lambda x: x @ w["up"], lambda x: x @ w["down"], x)


def test_a_branch_that_is_not_taken_keeps_its_range():
    params, x = {"up": jnp.eye(3), "down": -jnp.eye(3)}, jnp.ones((2, 3))
    moving = activations(branching, static(range="ema", momentum=0.0))
    ranges = moving.init(params, [x, -x])
    _, new = jax.jit(moving.update)(params, ranges, 5 * x)
    assert float(new["up"]["input"]["high"]) == 5 and float(new["down"]["input"]["low"]) == -1


@pytest.mark.slow
def test_what_cannot_be_calibrated_is_named():
    params, x = {"up": jnp.eye(3), "down": -jnp.eye(3)}, jnp.ones((2, 3))
    for how in (
        static(),
        static(range="mse"),
        static(range="entropy"),
        static(range="percentile"),
        static(range="rms"),
    ):
        with pytest.raises(NonFiniteError, match="'down': it did not run"):
            activations(branching, how).init(params, [x])
        assert set(activations(branching, [("down", None), ("**", how)]).init(params, [x])) == {
            "up"
        }
    fn = lambda w, x: x @ w["kernel"]  # noqa: E731
    for how in EVERY.values():
        for bad in (jnp.nan, jnp.inf, -jnp.inf) if how.reducer else ():
            with pytest.raises(NonFiniteError, match="'kernel': they are not finite"):
                activations(fn, how).init({"kernel": jnp.eye(3)}, [x.at[1, 1].set(bad)])
    with pytest.raises(DataError):
        activations(fn, static()).init(PARAMS, [])
    with pytest.raises(NoMatchError, match="'\\*/nothing' matches no site"):
        activations(fn, [("*/nothing", static()), ("**", None)]).init({"kernel": jnp.eye(3)}, [x])
    with pytest.raises(NoMatchError):
        activations(fn, dynamic(), where="other").apply({"kernel": jnp.eye(3)}, {}, x)
    with pytest.raises(StateError, match="'kernel'"):
        activations(fn, static()).apply({"kernel": jnp.eye(3)}, {}, x)
    with pytest.raises(ShapeError, match="kernel"):
        conv = lambda w, x: jax.lax.conv(x, w["bias"] * x[:, :, :1, :1], (1, 1), "SAME")  # noqa: E731
        image = jnp.ones((3, 3, 4, 4))
        how = activations(conv, static(granularity="channel"), where="**")
        how.apply({"bias": jnp.ones(())}, how.init({"bias": jnp.ones(())}, [image]), image)


@pytest.mark.parametrize(
    "make",
    [
        lambda: static(bits=1),
        lambda: static(bits=9),
        lambda: static(symmetric=1),
        lambda: static(granularity="token"),
        lambda: static(granularity="channel", range="mse"),
        lambda: static(range="maximum"),
        lambda: static(momentum=1.0),
        lambda: static(percent=99.0),
        lambda: static(range="percentile", percent=0.0),
        lambda: dynamic(granularity="channel"),
        lambda: dynamic(bits=True),
        lambda: pact(alpha=0.0),
        lambda: lsq_inputs(bits=12),
    ],
)
def test_wrong_arguments_are_refused(make):
    with pytest.raises(ValueError, match="must be|needs a histogram"):
        make()


def test_dynamic_needs_no_calibration():
    x = normal(4, 6)
    fn = lambda w, x: x @ w["kernel"]  # noqa: E731
    how = activations(fn, dynamic())
    assert how.init(PARAMS) == {} and how.init(PARAMS, [x]) == {"kernel": {"input": {}}}
    assert (how.apply(PARAMS, {}, x) == how.apply(PARAMS, how.init(PARAMS, [x]), x)).all()
    assert how.update(PARAMS, {}, x)[1] == {"kernel": {"input": {}}}


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    "how",
    [
        static(range="minmax"),
        static(range="ema", momentum=0.5, symmetric=False),
        pact(),
        lsq_inputs(),
    ],
)
def test_a_batch_that_is_not_finite_moves_no_range_and_is_counted(how):
    params, x = {"kernel": jnp.eye(6)}, jnp.linspace(-1.0, 2.0, 24).reshape(4, 6)
    quantized = activations(lambda p, x: x @ p["kernel"], how)
    watch = jax.jit(quantized.watch)
    _, ranges, none = watch(params, quantized.init(params, [x]), x)
    assert int(none["kernel"]) == 0
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        out, same, count = watch(params, ranges, x.at[0, 0].set(bad))
        assert (
            jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ranges, same))
            and int(count["kernel"]) == 1
        )
        assert jnp.isfinite(out[1:]).all()
    _, first, count = watch(
        params, jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), ranges), x.at[0, 0].set(jnp.inf)
    )
    assert int(count["kernel"]) == 1 and all(
        bool(jnp.isnan(v).all()) for v in jax.tree.leaves(first)
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("bad", [jnp.inf, jnp.nan])
@pytest.mark.slow
def test_a_range_that_is_not_finite_is_refused_where_it_is_used(bad):
    params, x, how = {"kernel": jnp.eye(6)}, jnp.ones((4, 6)), static(symmetric=False)
    ranges = {"kernel": {"input": {"low": jnp.float32(0), "high": jnp.float32(bad)}}}
    quantized, fn = activations(lambda p, x: x @ p["kernel"], how), lambda p, x: x @ p["kernel"]
    packed = uniform(8, granularity="channel").pack(
        params, uniform(8, granularity="channel").init(params)
    )
    for call in (
        lambda: quantized.apply(params, ranges, x),
        lambda: integer(fn, packed, x, how=how, ranges=ranges),
    ):
        with pytest.raises(NonFiniteError, match=r"\(input\) of site 'kernel'.*high"):
            call()
    assert jnp.isnan(
        jax.jit(quantized.apply)(params, ranges, x)
    ).all()  # never a constant that looks like a result
