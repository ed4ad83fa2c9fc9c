"""The axes of a parameter read from its products, against matrices by hand, in many spellings."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compress_jax as cj
from compress_jax.core.axes import Axes
from compress_jax.trace import layouts


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def letters(fn, params, *inputs) -> dict[str, str]:
    return {path: axes.letters for path, axes in layouts(fn, params, *inputs).items()}


def conv(kernel_spec: str, **options):
    def fn(p, x):
        numbers = ("NHWC", kernel_spec, "NHWC")
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, **options
        )

    return fn


def rows(p, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


# Function, shape of "w", shape of the input, what each axis is.
SPELLINGS = {
    "x @ w": (lambda p, x: x @ p["w"], (3, 4), (2, 3), "io"),
    "x @ w.T": (lambda p, x: x @ p["w"].T, (4, 3), (2, 3), "oi"),
    "w @ x": (lambda p, x: p["w"] @ x, (4, 3), (3,), "oi"),
    "vmapped w @ x": (lambda p, x: jax.vmap(lambda x: p["w"] @ x)(x), (4, 3), (2, 3), "oi"),
    "heads": (lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]), (6, 2, 3), (5, 6), "ioo"),
    "heads back": (lambda p, x: jnp.einsum("thk,hkd->td", x, p["w"]), (2, 3, 6), (5, 2, 3), "iio"),
    "heads by reshape": (lambda p, x: x @ p["w"].reshape(6, 6), (6, 2, 3), (5, 6), "ioo"),
    "experts": (lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"]), (4, 3, 5), (4, 2, 3), "sio"),
    "experts, loop": (lambda p, x: sum(x @ p["w"][i] for i in range(4)), (4, 3, 5), (2, 3), "sio"),
    "experts, ragged": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([1, 1, 0, 0], jnp.int32)),
        (4, 3, 5),
        (2, 3),
        "sio",
    ),
    "scan": (rows, (4, 3, 3), (2, 3), "sio"),
    "scan over axis 1": (
        lambda p, x: rows({"w": jnp.moveaxis(p["w"], 1, 0)}, x),
        (3, 4, 3),
        (2, 3),
        "iso",
    ),
    "fori": (
        lambda p, x: jax.lax.fori_loop(0, 4, lambda i, x: jnp.tanh(x @ p["w"][i]), x),
        (4, 3, 3),
        (2, 3),
        "sio",
    ),
    "nested scan": (
        lambda p, x: jax.lax.scan(lambda x, w: (rows({"w": w}, x), None), x, p["w"])[0],
        (2, 4, 3, 3),
        (2, 3),
        "ssio",
    ),
    "remat in scan": (jax.checkpoint(rows), (4, 3, 3), (2, 3), "sio"),
    "chunks of a scan": (
        lambda p, x: jax.lax.scan(lambda c, w: (c, x @ w.T), 0.0, p["w"].reshape(2, 4, 3))[1],
        (8, 3),
        (2, 3),
        "oi",
    ),
    "HWIO": (conv("HWIO"), (3, 3, 4, 5), (1, 6, 6, 4), "wwio"),
    "OIHW": (conv("OIHW"), (5, 4, 3, 3), (1, 6, 6, 4), "oiww"),
    "depthwise": (conv("HWIO", feature_group_count=4), (3, 3, 1, 4), (1, 6, 6, 4), "wwio"),
    "depthwise, Keras": (
        lambda p, x: conv("HWIO", feature_group_count=4)({"w": p["w"].reshape(3, 3, 1, 4)}, x),
        (3, 3, 4, 1),
        (1, 6, 6, 4),
        "wwoi",
    ),
    "cast, masked": (
        lambda p, x: x @ (p["w"].astype(jnp.bfloat16) * 2).astype(jnp.float32).T,
        (4, 3),
        (2, 3),
        "oi",
    ),
    "one output": (lambda p, x: x @ p["w"], (3, 1), (2, 3), "io"),
    "a vector": (lambda p, x: x @ p["w"], (3,), (2, 3), "i"),
}


@pytest.mark.wide(15)
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_axes_of_a_spelling(name):
    fn, shape, given, expected = SPELLINGS[name]
    assert letters(fn, {"w": ones(*shape)}, ones(*given)) == {"w": expected}


def test_every_kernel_of_one_joined_product_is_known():
    names = ("i", "f", "g", "o")
    params = {k: ones(3, 4) for k in names} | {"b": ones(16)}
    fn = lambda p, x: x @ jnp.concatenate([p[k] for k in names], -1) + p["b"][None]  # noqa: E731
    assert letters(fn, params, ones(2, 3)) == dict.fromkeys(names, "io") | {"b": "i"}


def test_what_has_no_product_keeps_the_convention_and_says_so():
    params = {"table": ones(9, 4), "scale": ones(4)}
    found = layouts(lambda p, t: p["table"][t] * p["scale"][None], params, jnp.array([1, 2]))
    assert {axes.source for axes in found.values()} == {"convention"}


def test_uses_that_disagree_are_noted():
    found = layouts(
        lambda p, x: (x @ p["w"]) @ p["w"].T + (x @ p["w"].T), {"w": ones(3, 3)}, ones(2, 3)
    )["w"]
    assert found.letters == "oi" and "disagree" in found.note


def test_a_bias_beside_a_stack_is_a_stack():
    def fn(p, x):
        return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["k"] + p["b"][None]), None), x, p)[0]

    assert letters(fn, {"k": ones(4, 3, 3), "b": ones(4, 3)}, ones(2, 3)) == {"k": "sio", "b": "si"}


@pytest.mark.slow
def test_other_people_s_layers():
    x = ones(2, 6)
    attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    params = attention.init(jax.random.key(0), x[None])["params"]
    found = letters(lambda p, x: attention.apply({"params": p}, x), params, x[None])
    assert {found[f"{name}/kernel"] for name in ("query", "key", "value")} == {"ioo"} and found[
        "out/kernel"
    ] == "iio"

    linear = eqx.nn.Linear(6, 4, key=jax.random.key(0))
    arrays, rest = eqx.partition(linear, eqx.is_array)
    found = letters(lambda p, x: jax.vmap(eqx.combine(p, rest))(x), arrays, x)
    assert found["weight"] == "oi"

    graph, state = nnx.split(
        nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs))(nnx.Rngs(0).split(3))
    )

    def run(state, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def layers(module, x):
            return module(x)

        return layers(nnx.merge(graph, state), x)

    found = letters(run, state, x)
    assert found["kernel"] == "sio" and found["bias"] == "si"


@pytest.mark.slow
def test_binding_gives_each_output_of_a_transposed_kernel_its_own_scale():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(64, 16)) * np.exp(2 * rng.normal(size=(64, 1))), jnp.float32)
    params, x = {"w": w}, jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    fn = lambda p, x: x @ p["w"].T  # noqa: E731
    int4 = cj.quantize.uniform(4, granularity="channel")

    def error(c):
        return float(
            jnp.linalg.norm(fn(c.view(params, c.init(params)), x) - fn(params, x))
            / jnp.linalg.norm(fn(params, x))
        )

    by_hand = error(cj.quantize.uniform(4, granularity="channel", axis=0))
    assert error(cj.bind(int4, fn, params, x)) == by_hand < 0.7 * error(int4)
    explicit = cj.bind(cj.quantize.uniform(4, granularity="channel", axis=1), fn, params, x)
    assert "axis=1" in cj.coverage(explicit, params)["w"].doubt


def test_a_bound_compression_refuses_other_trees_and_unbound_states():
    params, x = {"w": ones(4, 3)}, ones(2, 3)
    unbound = cj.quantize.uniform(4, granularity="channel")
    c = cj.bind(unbound, lambda p, x: x @ p["w"].T, params, x)
    with pytest.raises(cj.core.StateError, match="'v'.*not among.*w"):
        c.init({"v": ones(4, 3)})
    with pytest.raises(cj.core.StateError, match="axes 'oi'"):
        unbound.view(params, c.init(params))
    with pytest.raises(cj.core.StateError, match="axes 'outputs last"):
        c.view(params, unbound.init(params))
    replaced = unbound._replace(view=lambda p, s: p)
    with pytest.raises(cj.core.ArgumentError, match="replaced"):
        cj.bind(replaced, lambda p, x: x @ p["w"].T, params, x)


@pytest.mark.slow
def test_coverage_doubts_what_looks_otherwise():
    params = {
        "torch": {"weight": ones(8, 4), "bias": ones(8)},
        "conv": {"kernel": ones(8, 4, 3, 3)},
        "stack": {"kernel": ones(3, 4, 4), "bias": ones(3, 4)},
        "depthwise": {"kernel": ones(3, 3, 8, 1)},
        "flax": {"kernel": ones(4, 8), "bias": ones(8)},
    }
    table = cj.coverage(cj.quantize.uniform(8, granularity="channel"), params)
    assert "axis 0" in table["torch/weight"].doubt and "[out, in" in table["conv/kernel"].doubt
    assert (
        "stacks of 3" in table["stack/kernel"].doubt and "size 1" in table["depthwise/kernel"].doubt
    )
    assert table["flax/kernel"].doubt == "" and table["flax/kernel"].axes == "io"
    assert "use cj.bind" in str(table)


@pytest.mark.slow
def test_coverage_warns_of_an_emptied_layer():
    params = {
        "w": jnp.stack([jnp.full((4, 4), 1e-3), jnp.ones((4, 4)), jnp.full((4, 4), 2.0)]),
        "v": jnp.ones((4, 4)),
    }
    c = cj.prune.magnitude(0.25, scope="global")

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0] @ params["v"]

    bound = cj.bind(c, fn, params, jnp.ones((2, 4)))
    table = cj.coverage(bound, params)
    assert "every weight of layer 0 is zero" in table["w"].doubt and table["v"].doubt == ""
    whole = cj.prune.magnitude(0.5, scope="global")
    zeros = {"v": jnp.zeros((4, 4))}
    assert cj.coverage(cj.quantize.uniform(4), zeros)["v"].doubt == ""
    assert (
        "every weight is zero"
        in cj.coverage(whole, {"v": params["v"], "w": params["w"][0]})["w"].doubt
    )


def test_inputs_that_the_function_does_not_take_are_refused_by_name():
    with pytest.raises(cj.core.ShapeError, match=r"inputs/0 float32\[2,3\].*\(3,\) and \(4,\)"):
        cj.bind(
            cj.quantize.uniform(8),
            lambda p, x: x @ p["w"],
            {"w": jnp.ones((4, 4))},
            jnp.ones((2, 3)),
        )


def test_a_cell_that_changes_its_keys_is_refused_with_what_to_do():
    graph, params, rest = nnx.split(nnx.RNN(nnx.LSTMCell(2, 3, rngs=nnx.Rngs(0))), nnx.Param, ...)
    x = jnp.ones((1, 4, 2))
    with pytest.raises(cj.core.ArgumentError, match="copy=True"):
        cj.trace.sites(lambda p, x: nnx.merge(graph, p, rest)(x), params, x)
    found = cj.trace.sites(lambda p, x: nnx.merge(graph, p, rest, copy=True)(x), params, x)
    assert {site.param.split("/")[-1] for site in found if site.param} == {"kernel"}


def test_axes_of_a_layer():
    axes = Axes((2, 3, 4, 5), outputs=(1, 3), stack=(0, 2), window=(), source="trace")
    assert (
        axes.letters == "soso"
        and axes.layer.shape == (3, 5)
        and axes.layer.outputs == (0, 1)
        and axes.layers == 8
    )
