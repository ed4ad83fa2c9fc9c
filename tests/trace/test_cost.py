"""Costs: published numbers, loops and devices, notes on what is not counted, and the table."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax.core.errors import ConfigError, NoMatchError, ShapeError, StateError
from compress_jax.core.paths import flatten
from compress_jax.core.table import units
from compress_jax.trace._cost import cost
from tests.trace.zoo import BIG, ZOO

ENTRIES = {entry.name: entry for entry in (*ZOO, *BIG)}


@cache
def made(name):
    fn, variables, inputs = ENTRIES[name].make()
    return fn, variables, inputs, cost(fn, variables, *inputs)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


@pytest.mark.parametrize(
    ("name", "gmacs", "parameters"),
    [("resnet50/linen", 4.09, 25_557_032), ("vit_b16/linen", 17.56, 86_567_656)],
)
def test_published_costs(name, gmacs, parameters):
    """At 224x224, as torchvision lists them, padding and both products of attention included."""
    total = made(name)[3]
    assert total.params == parameters
    assert abs(total.macs / 1e9 / gmacs - 1) < 0.001
    assert not total.notes


def test_attention_is_the_share_of_vit_that_the_formula_says():
    """Two products of 197 x 197 x 768 in each of 12 layers: 4.07 % of the whole."""
    total = made("vit_b16/linen")[3]
    between_activations = [each for each in total.by_site.values() if each.site.param is None]
    assert sum(each.macs for each in between_activations) == 12 * 2 * 197**2 * 768
    assert all(each.weight_bits is None and each.params == 0 for each in between_activations)


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_known_by_hand_of_the_zoo(name):
    total = made(name)[3]
    assert total.macs == ENTRIES[name].macs == sum(each.macs for each in total.by_site.values())
    assert not total.notes.keys() - {"cond", "while", "sort", "random_bits", "random_split"}, (
        "an operation is missing"
    )


SQUARE = ones(6, 6)
PARAMS = {
    "up": {
        "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32),
        "bias": ones(1, 16),
    }
}
PARAMS["down"] = {
    "kernel": jnp.asarray(np.random.default_rng(1).normal(size=(16, 4)), jnp.float32),
    "bias": ones(1, 4),
}
X = ones(3, 8)


def model(params, x):
    x = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return x @ params["down"]["kernel"] + params["down"]["bias"]


def kernels(compression):
    return cj.at("**/kernel", compression)


def test_a_loop_costs_what_its_turns_cost():
    def turn(params, x):
        return jnp.tanh(x @ params) * 2

    def loop(params, x):
        for _ in range(5):
            x = turn(params, x)
        return x

    scanned = cost(
        lambda p, x: lax.scan(lambda x, _: (turn(p, x), None), x, None, length=5)[0], SQUARE, SQUARE
    )
    unrolled = cost(loop, SQUARE, SQUARE)
    numbers = (5 * 6**3, 5 * (2 * 6**3 + 36), 5 * 36, 5 * 36 * 4)
    for total in (scanned, unrolled):
        assert (total.macs, total.flops, total.transcendentals, total.activation_bytes) == numbers
    (site,) = scanned.by_site.values()
    assert (site.count, site.flops, site.params) == (5, 2 * 5 * 6**3, 36)


def test_sharded_over_devices_it_costs_the_same():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))

    def fn(params, x):
        y = jnp.tanh(x @ params["up"])
        return y + y

    specs = {"up": P(None, "tensor")}, P("data")
    sharded = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P("data", "tensor"))
    args = {"up": ones(6, 10)}, ones(8, 6)
    whole, pieces = cost(fn, *args), cost(sharded, *args)
    assert pieces.by_site["up"].count == 8
    for number in (
        "macs",
        "flops",
        "transcendentals",
        "params",
        "bit_operations",
        "activation_bytes",
    ):
        assert getattr(pieces, number) == getattr(whole, number) > 0, number


def test_a_while_loop_counts_once_and_says_so():
    total = cost(
        lambda w, x: lax.while_loop(lambda y: y[0, 0] < 9, lambda y: jnp.exp(y @ w), x),
        SQUARE,
        SQUARE,
    )
    assert (total.macs, total.transcendentals) == (6**3, 36)
    assert "one" in total.notes["while"]
    assert "1?" in str(total).splitlines()[1].split()


def test_every_branch_counts_and_it_says_so():
    total = cost(
        lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w), SQUARE, SQUARE
    )
    assert total.macs == 3 * 6**3 and all(each.site.conditional for each in total.by_site.values())
    assert "every branch" in total.notes["cond"]


def test_what_nobody_looks_into_is_listed():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def fn(w, x):
        y = pl.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct((6, 6), jnp.float32), interpret=True
        )(x, w)
        return jnp.fft.fft(jnp.sort(y)).real

    total = cost(fn, SQUARE, SQUARE)
    assert total.macs == 0 and total.notes.keys() == {"pallas_call", "sort", "fft"}
    assert "products" in total.notes["pallas_call"] and "products" not in total.notes["sort"]
    assert all(note in str(total) for note in total.notes.values())


def test_statistics_are_no_parameters():
    _, variables, _, total = made("resnet/linen")
    sizes = {path: x.size for path, x in flatten(variables)[0].items()}
    assert (
        total.params
        == sum(size for path, size in sizes.items() if path.startswith("params/"))
        < sum(sizes.values())
    )
    assert (
        cost(lambda p, x: x @ p["table"], {"table": SQUARE, "codes": jnp.arange(5)}, SQUARE).params
        == 36 + 5
    )


def test_a_tied_parameter_shows_at_both_sites_and_counts_once():
    total = cost(lambda p, x: x @ p["w"] @ p["w"].T, {"w": ones(6, 4)}, SQUARE)
    assert [each.params for each in total.by_site.values()] == [24, 24] and total.params == 24


def test_shapes_cost_what_arrays_cost():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert cost(model, shapes, jax.ShapeDtypeStruct(X.shape, X.dtype)) == cost(model, PARAMS, X)


def test_errors_say_what_to_do():
    quantize = kernels(cj.quantize.uniform(4))
    with pytest.raises(ShapeError, match="'down/bias' is only a shape.*give arrays"):
        cost(model, jax.eval_shape(lambda: PARAMS), X, compression=quantize)
    with pytest.raises(StateError, match="without the compression"):
        cost(model, PARAMS, X, state=quantize.init(PARAMS))
    with pytest.raises(NoMatchError, match="up/kernel"):
        cost(model, PARAMS, X, activation_bits={"conv*": 4})
    wrong: list[Any] = [0, -1, 2.5, True, {"up/*": 0}]
    for bits in wrong:
        with pytest.raises(ConfigError, match="not a number of bits"):
            cost(model, PARAMS, X, activation_bits=bits)


@pytest.mark.slow
def test_the_table_has_a_row_for_each_site_and_the_total():
    prune = kernels(cj.prune.magnitude(0.75))
    dense, sparse = (str(cost(model, PARAMS, X, compression=c)).splitlines() for c in (None, prune))
    assert [line.split()[0] for line in dense[:4]] == ["site", "up/kernel", "down/kernel", "total"]
    assert (
        dense[1].split() == "up/kernel 3x8 * 8x16 > 3x16 1 384 66.7% 128 32 x 32 393k 192".split()
    )
    assert dense[3].split() == "total 576 100.0% 212 590k 240".split()
    assert (
        sparse[1].split()
        == "up/kernel 3x8 * 8x16 > 3x16 1 384 66.7% 128 32 x 32 393k 25.0% 98.3k 192".split()
    )
    assert (
        str(cost(lambda p, x: x + p, SQUARE, SQUARE))
        .splitlines()[-1]
        .startswith("36 FLOPs: 0 in these products, 36 in")
    )


@example(999_999)
@given(st.integers(0, 10**18))
def test_units_are_right_to_three_digits(number):
    text = units(number)
    digits, unit = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    value = float(digits) * 1000 ** " kMGTPE".index(unit or " ")
    assert abs(value - number) <= 0.005 * number and float(digits) < 1000 and len(digits) <= 4
