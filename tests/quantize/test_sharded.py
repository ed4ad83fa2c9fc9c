"""Calibrated ranges and quantization-aware training on eight devices give what one device gives.

Ranges are maxima and counts, which no order of summing changes: bit for bit. A training step sums
gradients over devices in another order, and a weight or an activation near a tie may then take the
other code: training is held to a small part of the distance that it goes (a sum over one device
alone would be most of it).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax.core.paths import flatten
from compress_jax.quantize import activations, lsq, lsq_inputs, pact, static, uniform

INPUTS = {
    **{
        range: static(4, range=range) for range in ("minmax", "ema", "percentile", "entropy", "mse")
    },
    "asymmetric": static(symmetric=False, range="percentile"),
    "channel": static(granularity="channel"),
    "LSQ": lsq_inputs(4),
    "LSQ+": lsq_inputs(8, offset=True),
    "PACT": pact(4),
}


def model(params, x):
    return jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"up": {"kernel": normal(16, 24)}, "down": {"kernel": normal(24, 8, seed=1)}}
BATCHES = [normal(64, 16, seed=seed) * seed / 4 for seed in (2, 3, 4)]


def on(x, *axes):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))


def spread(params):
    return jax.tree.map(lambda x: on(x, None, "model"), params)


@pytest.mark.wide(1)
@pytest.mark.parametrize("name", INPUTS)
def test_ranges_of_sharded_batches(name):
    quantized = activations(model, INPUTS[name])
    alone = flatten(quantized.init(PARAMS, BATCHES))[0]
    together = flatten(quantized.init(PARAMS, [on(x, "data") for x in BATCHES]))[0]
    assert alone.keys() == together.keys() and any(path.startswith("up") for path in alone)
    for path, x in alone.items():
        # What enters the first layer is the data. What enters the second was summed by another
        # program.
        exact = path.startswith("up") and name not in (
            "LSQ",
            "LSQ+",
        )  # whose rule takes a mean of magnitudes
        np.testing.assert_allclose(together[path], x, rtol=0 if exact else 1e-5, atol=0)


@pytest.mark.wide(1)
@pytest.mark.parametrize("how", ["ema", "LSQ", "PACT"])
@pytest.mark.parametrize(
    "weights", [uniform(4, granularity="channel"), lsq(4, "channel")], ids=["uniform", "lsq"]
)
@pytest.mark.slow
def test_quantization_aware_steps(weights, how):
    c, quantized = cj.at("**/kernel", weights), activations(model, INPUTS[how])
    optimizer = optax.sgd(0.01)

    def loss(free, state, x, y):
        params, learned, ranges = free
        view = c.view(params, state._replace(learned=learned))
        return jnp.mean((quantized.apply(view, ranges, x) - y) ** 2)

    @jax.jit
    def step(free, moments, state, x, y):
        updates, moments = optimizer.update(jax.grad(loss)(free, state, x, y), moments, free)
        return optax.apply_updates(free, updates), moments

    state = c.init(PARAMS)
    begun = PARAMS, state.learned, quantized.init(PARAMS, BATCHES)

    def trained(free, place):
        moments = optimizer.init(free)
        for x in BATCHES[:2]:
            free, moments = step(free, moments, state, place(x), place(model(PARAMS, x)))
        return free

    alone, together = (
        trained(begun, lambda x: x),
        trained((spread(PARAMS), *begun[1:]), lambda x: on(x, "data")),
    )
    assert not together[0]["up"]["kernel"].sharding.is_fully_replicated
    for a, b, c in zip(*map(jax.tree.leaves, (alone, together, begun)), strict=True):
        assert np.linalg.norm(b - a) <= 0.3 * np.linalg.norm(a - c) + 1e-6
