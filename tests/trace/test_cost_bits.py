"""Bit-operations, with the bits of codes, of activations and of dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import compress_jax as cj
from compress_jax.core.paths import flatten
from compress_jax.trace._cost import cost


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


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
UP, DOWN = 3 * 8 * 16, 3 * 16 * 4


def model(params, x):
    x = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return x @ params["down"]["kernel"] + params["down"]["bias"]


def kernels(compression):
    return cj.at("**/kernel", compression)


def test_without_a_compression_bits_are_those_of_the_dtypes():
    assert cost(model, PARAMS, X).bit_operations == (UP + DOWN) * 32 * 32
    half = cost(
        lambda p, x: x.astype(jnp.bfloat16) @ p.astype(jnp.int8).astype(jnp.bfloat16),
        SQUARE,
        SQUARE,
    )
    assert half.bit_operations == 6**3 * 16 * 16 and half.activation_bytes == 36 * 2
    integer = lambda p, x: lax.dot(x.astype(jnp.int8), p, preferred_element_type=jnp.int32)  # noqa: E731
    assert cost(integer, ones(6, 6, dtype=jnp.int8), SQUARE).bit_operations == 6**3 * 8 * 8


@pytest.mark.wide(1)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 8])
@pytest.mark.slow
def test_quantized_weights_have_the_bits_of_their_codes(bits, granularity):
    """Scales do not count, even if a sparse form would be the smallest (2 and 3 bits)."""
    quantize = kernels(cj.quantize.uniform(bits, granularity=granularity))
    total = cost(model, PARAMS, X, compression=quantize, activation_bits=6)
    assert [each.weight_bits for each in total.by_site.values()] == [bits, bits]
    assert [each.activation_bits for each in total.by_site.values()] == [6, 6]
    assert total.bit_operations == (UP + DOWN) * bits * 6
    assert cost(model, PARAMS, X, compression=quantize).bit_operations == (UP + DOWN) * bits * 32
    assert (total.macs, total.params) == (UP + DOWN, 8 * 16 + 16 + 16 * 4 + 4)


PRUNE, QUANTIZE = kernels(cj.prune.magnitude(0.75)), kernels(cj.quantize.uniform(4))


@pytest.mark.parametrize(
    ("compression", "bits"), [(PRUNE, 32), (QUANTIZE, 4), (cj.chain(PRUNE, QUANTIZE), 4)]
)
def test_effective_numbers_leave_out_products_with_zero(compression, bits):
    """Each weight meets the three rows of the input once."""
    seen = flatten(compression.view(PARAMS, compression.init(PARAMS)))[0]
    left = {path: np.count_nonzero(np.asarray(seen[path])) for path in ("up/kernel", "down/kernel")}
    total = cost(model, PARAMS, X, compression=compression, activation_bits=8)
    assert {path: each.effective_macs for path, each in total.by_site.items()} == {
        path: 3 * n for path, n in left.items()
    }
    assert total.effective_macs == 3 * sum(left.values()) < total.macs == UP + DOWN
    assert total.effective_bit_operations == total.effective_macs * bits * 8
    assert total.bit_operations == total.macs * bits * 8
    assert compression is QUANTIZE or sum(left.values()) <= (8 * 16 + 16 * 4) // 4


@pytest.mark.slow
@pytest.mark.parametrize(("clusters", "bits"), [(2, 1), (16, 4), (17, 5)])
def test_shared_weights_have_the_bits_of_their_indices(clusters, bits):
    shared = cj.at("**/kernel", cj.cluster.kmeans(clusters))
    assert cost(model, PARAMS, X, compression=shared).bit_operations == (UP + DOWN) * bits * 32


def test_factors_of_low_rank_are_multiplied_out():
    total = cost(model, PARAMS, X, compression=kernels(cj.lowrank.svd(2)))
    assert total.bit_operations == total.effective_bit_operations == (UP + DOWN) * 32 * 32


@pytest.mark.slow
def test_a_state_is_used_and_packed_params_need_no_compression():
    sparsity = lambda step: jnp.where(step > 0, 0.5, 0.0)  # noqa: E731
    prune = kernels(cj.prune.magnitude(sparsity))
    state = prune.init(PARAMS)
    later = prune.update(PARAMS, state, step=jnp.asarray(10))
    before, after = (
        cost(model, PARAMS, X, compression=prune, state=s).effective_macs for s in (state, later)
    )
    assert 2 * after == before == UP + DOWN
    assert cost(model, prune.pack(PARAMS, later), X).effective_macs == after


def test_rules_give_sites_different_bits():
    mixed = cj.rules([("up/*", cj.quantize.uniform(8)), ("down/kernel", cj.quantize.uniform(3))])
    total = cost(model, PARAMS, X, compression=mixed, activation_bits={"down/*": 4, "**": 8})
    assert total.bit_operations == UP * 8 * 8 + DOWN * 3 * 4
    first = cost(model, PARAMS, X, compression=mixed, activation_bits={"**": 8, "down/*": 4})
    assert first.bit_operations == UP * 8 * 8 + DOWN * 3 * 8
    some = cost(model, PARAMS, X, compression=mixed, activation_bits={"down/*": 4})
    assert some.bit_operations == UP * 8 * 32 + DOWN * 3 * 4


@pytest.mark.slow
def test_parameters_side_by_side_have_their_mean():
    params = {"a": PARAMS["up"]["kernel"], "b": PARAMS["up"]["kernel"][:, :8]}
    mixed = cj.rules([("a", cj.quantize.uniform(4)), ("b", cj.quantize.uniform(7))])
    total = cost(
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1), params, X, compression=mixed
    )
    (site,) = total.by_site.values()
    assert site.weight_bits == 5 and site.params == 8 * 24


def test_bits_of_activations_are_for_data_only():
    """Operands of attention are activations; constants and products of parameters are not."""
    total = cost(attention, dict.fromkeys("qkv", SQUARE), ones(2, 5, 6), activation_bits=8)
    scores, values = (each for each in total.by_site.values() if each.site.param is None)
    assert scores.bit_operations == 2 * 5 * 5 * 6 * 8 * 8 == values.bit_operations
    rotation = np.eye(6, dtype=np.float32)
    turned = cost(lambda p, x: x @ rotation, {"unused": SQUARE}, SQUARE, activation_bits=8)
    assert turned.bit_operations == 6**3 * 8 * 32
    factors = cost(
        lambda p, x: p["a"] @ p["b"], {"a": SQUARE, "b": SQUARE}, SQUARE, activation_bits=8
    )
    assert factors.bit_operations == 6**3 * 32 * 32


def test_weights_on_the_left():
    quantize = cj.quantize.uniform(4)
    (site,) = cost(
        lambda p, x: p["w"] @ x, {"w": PARAMS["up"]["kernel"]}, ones(16, 2), compression=quantize
    ).by_site.values()
    assert (site.lhs_bits, site.rhs_bits, site.weight_bits, site.activation_bits) == (4, 32, 4, 32)


def attention(params, x):
    q, k, v = (x @ params[name] for name in ("q", "k", "v"))
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2.0) @ v
