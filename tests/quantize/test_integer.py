"""Integer inference: exact against NumPy's int64, equal to the simulation, throughout the zoo and
on eight devices."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax.core.errors import NoMatchError, ShapeError, StateError
from compress_jax.core.paths import flatten
from compress_jax.quantize import (
    activations,
    contractions,
    dynamic,
    integer,
    lsq,
    lsq_inputs,
    nf4,
    pact,
    static,
    uniform,
)
from compress_jax.quantize._integer.integer_dot import Coded, accumulate, product
from compress_jax.trace import sites
from tests.trace.zoo import ZOO

ENTRIES = {entry.name: entry for entry in ZOO}
NHWC = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


def packed_by(c, params):
    return c.pack(params, c.init(params))


def contracted(fn, *args):
    """Return the dtypes of operands and results of all contractions, nested ones too."""
    found = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                found.add(tuple(str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)))
            for inside in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if hasattr(inside, "eqns"):
                    walk(inside)

    walk(jax.make_jaxpr(fn)(*args))
    return found


# Exact sums.


def codes(seed, *shape):
    return np.random.default_rng(seed).integers(-128, 128, shape)


def coded(codes, zero, kept):
    """Put a zero for each row of some kept axis, or one for all, or none, beside codes."""
    shape = tuple(codes.shape[axis] for axis in kept)
    zeros = {
        "none": None,
        "one": jnp.full((1,) * (len(kept) + 1), -17),
        "rows": jnp.asarray(codes_of_rows(shape)),
    }[zero]
    wide = 0 if zeros is None else np.asarray(zeros, np.int64)
    return Coded(jnp.asarray(codes, jnp.int8), jnp.ones((1,) * (len(kept) + 1)), zeros), wide


def codes_of_rows(shape):
    return codes(9, *shape, 1).astype(np.int32)


@pytest.mark.wide(2)
@pytest.mark.parametrize("left", ["none", "one", "rows"])
@pytest.mark.parametrize("right", ["none", "one", "rows"])
def test_a_product_is_that_of_int64(left, right):
    a, b = codes(0, 2, 3, 40), codes(1, 2, 40, 5)
    (site,) = sites(
        lambda w, x: jnp.einsum("bmk,bkn->bmn", x, w), jnp.zeros(b.shape), jnp.zeros(a.shape)
    )
    flipped = site.lhs_shape != a.shape
    lhs, zero_a = coded(a, left, (0, 1))
    rhs, zero_b = coded(b, right, (0, 2))
    ours = accumulate(site, rhs, lhs).swapaxes(-1, -2) if flipped else accumulate(site, lhs, rhs)
    expected = (a - zero_a) @ (b - (np.moveaxis(zero_b, -1, 1) if right != "none" else 0))
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, expected)


def convolved(image, kernel, groups, stride, pad):
    """Convolve in int64: what is beyond the border is 0."""
    image = np.pad(image, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    n, high, wide, channels = image.shape
    size, _, inner, outer = kernel.shape
    rows, columns = range(0, high - size + 1, stride), range(0, wide - size + 1, stride)
    out = np.zeros((n, len(rows), len(columns), outer), np.int64)
    for o in range(outer):
        start = o // (outer // groups) * inner
        part = image[..., start : start + inner]
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                window = part[:, row : row + size, column : column + size]
                out[:, i, j, o] = (window * kernel[..., o]).sum((1, 2, 3))
    return out


@pytest.mark.wide(3)
@pytest.mark.parametrize("zero", ["none", "one", "rows"])
@pytest.mark.parametrize("groups, stride", [(1, 1), (1, 2), (2, 1), (4, 2)])
def test_a_convolution_is_that_of_int64(zero, groups, stride):
    image, kernel, pads = codes(2, 2, 6, 7, 4), codes(3, 3, 3, 4 // groups, 8), [(1, 1)] * 2

    def fn(w, x):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), pads, dimension_numbers=NHWC, feature_group_count=groups
        )

    (site,) = sites(fn, jnp.zeros(kernel.shape), jnp.zeros(image.shape))
    lhs, zero_x = coded(image, zero, (0,))
    rhs, zero_w = coded(kernel, zero, (3,))
    zero_x = zero_x.reshape(-1, 1, 1, 1) if zero != "none" else 0
    zero_w = zero_w.reshape(-1) if zero != "none" else 0
    expected = convolved(image - zero_x, kernel - zero_w, groups, stride, 1)
    np.testing.assert_array_equal(accumulate(site, lhs, rhs), expected)


def test_groups_are_scaled_one_by_one():
    a, b, scale = (
        codes(4, 3, 12),
        codes(5, 12, 5),
        np.random.default_rng(0).uniform(0.1, 1, (5, 4)).astype(np.float32),
    )
    (site,) = sites(lambda w, x: x @ w, jnp.zeros(b.shape), jnp.zeros(a.shape))
    lhs = Coded(jnp.asarray(a, jnp.int8), jnp.full((1, 1), 0.5))
    ours = product(
        site, lhs, Coded(jnp.asarray(b, jnp.int8), jnp.asarray(scale), jnp.full((1, 1), 3))
    )
    parts = [
        a[:, 3 * g : 3 * g + 3]
        @ (b[3 * g : 3 * g + 3] - 3)
        * (0.5 * scale[:, g].astype(np.float64))
        for g in range(4)
    ]
    np.testing.assert_allclose(ours, sum(parts), rtol=1e-5)


# Whole functions.


def two(w, x):
    return jax.nn.relu(x @ w["up"]["kernel"] + w["up"]["bias"][None]) @ w["down"]["kernel"]


DENSE = {
    "up": {"kernel": normal(12, 16), "bias": normal(16, seed=1)},
    "down": {"kernel": normal(16, 8, seed=2)},
}


def images(w, x):
    for name in ("up", "down"):
        x = jax.lax.conv_general_dilated(
            x, w[name]["kernel"], (1, 1), "SAME", dimension_numbers=NHWC
        )
        x = jax.nn.relu(x + w["up"]["bias"].reshape(1, 1, 1, -1)) if name == "up" else x
    return x


CONVS = {
    "up": {"kernel": normal(3, 3, 4, 8), "bias": normal(8, seed=1)},
    "down": {"kernel": normal(1, 3, 8, 6, seed=2)},
}
CASES = {
    "W8A8": (uniform(bits=8, granularity="channel"), dynamic()),
    "W8A8 static": (uniform(bits=8), static(symmetric=False)),
    "W8A8 both asymmetric": (
        uniform(bits=8, symmetric=False, granularity="channel"),
        dynamic(8, False, "token"),
    ),
    "W4A8": (uniform(bits=4, granularity="channel"), dynamic(granularity="token")),
    "W4A8 groups": (
        uniform(bits=4, symmetric=False, granularity=4),
        static(symmetric=False, range="mse"),
    ),
    "W3A4": (uniform(bits=3, granularity="channel"), static(4, range="percentile")),
    "W4A4 LSQ": (lsq(4, "channel"), lsq_inputs(4)),
    "W2A4 PACT": (lsq(2), pact(4)),
    "W8A8 LSQ+": (lsq(8), lsq_inputs(8, offset=True)),
}


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "fn, params, shape", [(two, DENSE, (5, 12)), (images, CONVS, (3, 6, 6, 4))], ids=["dot", "conv"]
)
def test_integers_give_what_the_simulation_gives(case, fn, params, shape):
    weights, how = CASES[case]
    packed, x = packed_by(cj.at("**/kernel", weights), params), normal(*shape, seed=7)
    simulated = activations(fn, how)
    ranges = simulated.init(params, [x])
    ours = integer(fn, packed, x, how=how, ranges=ranges)
    close(ours.apply(ours.params, x), simulated.apply(cj.unpack(packed), ranges, x))
    if case == "W4A8 groups" and fn is images:
        assert all("convolution sums over" in row.reason for row in ours.table.rows)
        return
    assert contracted(ours.apply, ours.params, x) == {("int8", "int8", "int32")}
    assert ours.table.integer == 1 and all(
        row.compute.endswith("-> int32") for row in ours.table.rows
    )


@pytest.mark.slow
def test_w8a8_is_numpys_arithmetic_in_int64():
    packed, x = (
        packed_by(uniform(bits=8, granularity="channel"), {"kernel": normal(50, 6)}),
        normal(9, 50, seed=3),
    )
    ours = integer(lambda w, x: x @ w["kernel"], packed, x, how=dynamic())
    node = packed["kernel"]
    w = np.asarray(node.codes.unpack(), np.int64) - 128
    step = np.float32(np.abs(np.asarray(x)).max() * np.float32(1 / 127))
    q = np.clip(np.round(np.asarray(x) * (np.float32(1) / step)), -128, 127).astype(np.int64)
    expected = (q @ w).astype(np.float64) * step * np.asarray(node.scale, np.float64).reshape(1, -1)
    np.testing.assert_allclose(ours.apply(ours.params, x), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_alone_are_the_unpacked_model_and_stay_packed_in_memory(bits):
    packed = packed_by(cj.at("**/kernel", uniform(bits=bits, granularity="channel")), DENSE)
    x = normal(5, 12, seed=7)
    ours = integer(two, packed, x)
    expected = jax.jit(two)(cj.unpack(packed), x)
    assert np.asarray(ours.apply(ours.params, x)).tobytes() == np.asarray(expected).tobytes()
    stored = ours.params["weights"]["up"]["kernel"]
    held = sum(array.nbytes for name, array in stored.items() if name != "scale")
    assert held == 12 * 16 * bits // 8
    assert {row.reason for row in ours.table.rows} == {"its activations are not quantized"}


@pytest.mark.slow
def test_layers_in_a_scan_are_unpacked_one_at_a_time():
    def fn(w, x):
        return jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w["kernel"] + w["bias"][None]), None), x, w["layers"]
        )[0]

    layers, x = {"kernel": normal(3, 8, 8), "bias": normal(3, 8, seed=1)}, normal(5, 8, seed=2)
    c = cj.at("**/kernel", uniform(bits=4, granularity="channel", axis=(0, -1)))
    packed = packed_by(c, {"layers": layers})
    for how in (None, dynamic(), static()):
        simulated = activations(fn, how) if how else None
        ranges = simulated.init({"layers": layers}, [x]) if simulated else None
        ours = integer(fn, packed, x, how=how, ranges=ranges)
        dense = cj.unpack(packed)
        close(
            ours.apply(ours.params, x),
            simulated.apply(dense, ranges, x) if simulated else fn(dense, x),
        )
        assert ours.params["weights"]["layers"]["kernel"]["bits4"].shape == (3, 4, 8)
        assert how is None or ours.table.integer == 1


@cache
def zoo(name):
    fn, variables, inputs = ENTRIES[name].make()
    paths = [site.param for site in sites(fn, variables, *inputs) if site.param]
    c = cj.rules([(path, uniform(bits=8, granularity="channel")) for path in dict.fromkeys(paths)])
    return fn, variables, inputs, packed_by(c, variables)


QUICK = ["mlp/linen", "lenet/nnx", "llama/linen"]


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENTRIES],
    ids=str,
)
def test_the_zoo_in_integers(name):
    fn, variables, inputs, packed = zoo(name)
    ours = integer(fn, packed, *inputs, how=dynamic())
    out = jax.jit(ours.apply)(ours.params, *inputs)
    simulated = jax.jit(activations(fn, dynamic()).apply)(cj.unpack(packed), {}, *inputs)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(simulated), strict=True):
        # A value on a rounding tie may fall to either side, where what came before is equal to
        # float rounding only.
        assert np.linalg.norm(np.float64(a) - np.float64(b)) <= 0.02 * max(
            np.linalg.norm(np.float64(b)), 1e-9
        )
    found = sites(fn, variables, *inputs)
    assert [row.name for row in ours.table.rows] == [site.name for site in found]
    assert all(row.reason or row.compute == "int8 x int8 -> int32" for row in ours.table.rows)
    assert str(ours.table).count("\n") == len(found) + 1


FLAX = [name for name in ENTRIES if name.endswith(("/linen", "/nnx"))]


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("mlp/linen", "mlp/nnx") else pytest.param(name, marks=pytest.mark.slow)
        for name in FLAX
    ],
)
def test_five_lines(name):
    apply, params, (x,) = ENTRIES[name].make()

    c = cj.at("**/kernel", cj.quantize.uniform(bits=8, granularity="channel"))
    packed = c.pack(params, c.init(params))
    int8 = cj.quantize.integer(apply, packed, x, how=cj.quantize.dynamic())
    logits = int8.apply(int8.params, x)
    table = str(int8.table)

    assert table.count("int8 x int8 -> int32") == sum(not row.reason for row in int8.table.rows) > 0
    assert name not in ("mlp/linen", "mlp/nnx") or "100.0% in integers" in table
    for got, exact in zip(jax.tree.leaves(logits), jax.tree.leaves(apply(params, x)), strict=True):
        assert np.linalg.norm(got - exact) <= 0.1 * np.linalg.norm(exact) + 1e-6


@pytest.mark.wide(1)
@pytest.mark.parametrize("case", ["W8A8", "W8A8 both asymmetric", "W4A8", "W4A8 groups", "W3A4"])
@pytest.mark.slow
def test_sharded_is_unsharded_bit_for_bit(case):
    weights, how = CASES[case]
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))

    def placed(x):
        axes = iter(("data", "model"))
        spec = [next(axes, None) if n % 4 == 0 else None for n in x.shape]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    x = normal(8, 12, seed=7)
    ranges = activations(two, how).init(DENSE, [x])
    again = activations(two, how).init(DENSE, [placed(x)])
    first = {
        path: np.asarray(each) for path, each in flatten(ranges)[0].items() if path.startswith("up")
    }
    assert all(
        each.tobytes() == np.asarray(flatten(again)[0][path]).tobytes()
        for path, each in first.items()
    )
    ours = integer(two, packed_by(cj.at("**/kernel", weights), DENSE), x, how=how, ranges=ranges)
    alone = ours.apply(ours.params, x)
    spread = jax.tree.map(placed, ours.params)
    assert not spread["weights"]["up"]["bias"].sharding.is_fully_replicated
    together = ours.apply(spread, placed(x))
    assert np.asarray(together).tobytes() == np.asarray(alone).tobytes()


# What stays in floats says why.


@pytest.mark.slow
def test_every_reason():
    def fn(w, x):
        scores = x @ w["q"] @ (x @ w["plain"]).T
        return scores @ (x @ (2 * w["changed"])) + x @ w["table"] + x @ w["rows"]

    names = ("q", "plain", "changed", "table", "rows")
    params = {name: normal(8, 8, seed=i) for i, name in enumerate(names)}
    c = cj.rules(
        [
            ("table", nf4(8)),
            ("rows", uniform(bits=8, granularity="channel", axis=0)),
            ("plain", cj.identity()),
            ("**", uniform(bits=8, granularity="channel")),
        ]
    )
    table = contractions(fn, packed_by(c, params), normal(4, 8), how=dynamic())
    reasons = {row.name: row.reason for row in table.rows}
    assert (
        reasons["q"] == ""
        and "not quantized" in reasons["plain"]
        and "changed on its way" in reasons["changed"]
    )
    assert "not as integers" in reasons["table"] and "scale varies" in reasons["rows"]
    assert any("product of two activations" in reason for reason in reasons.values())
    assert 0 < table.integer < 1 and table["q"].macs == 4 * 8 * 8
    with pytest.raises(NoMatchError, match="no contraction is named 'other'"):
        table["other"]


@pytest.mark.slow
def test_errors():
    packed, x = packed_by(cj.at("**/kernel", uniform(bits=8)), DENSE), normal(5, 12)
    with pytest.raises(StateError, match="no ranges for site 'up/kernel'"):
        integer(two, packed, x, how=static())
    with pytest.raises(NoMatchError, match="'nothing' matches no site"):
        integer(two, packed, x, how=[("nothing", dynamic())])
    ours = integer(two, packed, x, how=dynamic())
    assert ours.apply(ours.params, normal(7, 12)).shape == (7, 8)
    bad = ours.apply(ours.params, x.at[1, 1].set(jnp.nan))
    assert jnp.isnan(bad).all()  # one scale for all; never a plausible number
    rows = integer(two, packed, x, how=dynamic(granularity="token"))
    bad = jnp.isnan(rows.apply(rows.params, x.at[1, 1].set(jnp.nan)))
    assert bad[1].all() and not bad[0].any()
    per_shape = integer(
        lambda w, x: x @ w["kernel"][: x.shape[1]], packed["up"], normal(5, 12), how=dynamic()
    )
    with pytest.raises(ShapeError, match="another for these"):
        per_shape.apply(per_shape.params, normal(5, 6))


@pytest.mark.slow
def test_levels_beyond_the_dtype_unpack_as_the_node_does():
    """In float16 the outermost level of a grid may be beyond 65504."""
    params = {"kernel": jnp.array([[-65504.0], [-33500.0], [-33500.0], [33500.0]], jnp.float16)}
    packed = packed_by(uniform(bits=2, scale="mse"), params)

    def fn(params, x):
        return x @ params["kernel"]

    x = jnp.array([[1.0, 0.0, 0.0, 0.0]], jnp.float16)
    network = integer(fn, packed, x)
    assert network.apply(network.params, x).tolist() == fn(cj.unpack(packed), x).tolist()
