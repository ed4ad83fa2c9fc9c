"""Leaves that are alike are compiled once, and their states are those of each alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax import cluster, quantize
from compress_jax.core.alike import map_leaves

KEY = jax.random.key(3)
METHODS = {
    "mse": quantize.uniform(4, granularity="channel", scale="mse"),
    "k-means": cluster.kmeans(4, iterations=5),
}


def decoder(layers: int, shape: tuple[int, ...] = (12, 6)) -> dict:
    """Two kernels of one shape a layer, of many equal entries, and a bias."""
    rng = np.random.default_rng(0)

    def kernel() -> dict:
        entries = rng.integers(-9, 10, shape) / 8 + rng.choice([0.0, 1 / 64], shape)
        return {"kernel": jnp.asarray(entries, jnp.float32), "bias": jnp.zeros(shape[-1])}

    return {f"layer_{i}": {"up": kernel(), "down": kernel()} for i in range(layers)}


def equations(jaxpr) -> int:
    return sum(1 + sum(map(equations, jaxprs_in_params(eqn.params))) for eqn in jaxpr.eqns)


def loops(jaxpr) -> int:
    """Count the loops and what is nested in them, once each."""
    own = sum(eqn.primitive.name in ("while", "scan") for eqn in jaxpr.eqns)
    return own + sum(loops(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))


def run(c: cj.Compression, params: dict) -> tuple:
    """Return the states after `init` and after `update` at other weights."""
    state = c.init(params)
    later = jax.tree.map(lambda x: x * x - 0.5 * x, params)
    grads = jax.tree.map(jnp.cos, params)
    return state, c.update(later, state, step=jnp.int32(1), grads=grads, key=KEY)


@pytest.mark.parametrize("name", METHODS)
def test_the_program_does_not_grow_with_the_layers(name):
    c = cj.at("**/kernel", METHODS[name])
    jaxprs = [jax.make_jaxpr(partial(run, c))(decoder(n)).jaxpr for n in (10, 40)]
    few, many = map(loops, jaxprs)
    assert few == many > 0, "a loop of its own for every leaf"
    # What is left a kernel is little: its view, counts and slices; alone each has 350 to 1500.
    assert (equations(jaxprs[1]) - equations(jaxprs[0])) / 60 < 120


@pytest.mark.parametrize("name", METHODS)
def test_states_are_those_of_each_leaf_alone(name):
    """Outside a trace every leaf is computed by itself: the same bits, the same types."""
    c, params = cj.at("**/kernel", METHODS[name]), decoder(9)
    alone, together = run(c, params), jax.jit(partial(run, c))(params)
    assert jax.tree.structure(alone) == jax.tree.structure(together)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_only_what_is_alike_is_put_together():
    """Names that differ in more than numbers, other shapes and other options are calls apart."""
    seen = []

    def fn(path: str, x: jax.Array) -> jax.Array:
        seen.append((path, x.shape))
        for _ in range(100):
            x = jnp.sin(x)
        return x

    paths = [f"{role}_{i}" for role in ("up", "down") for i in range(8)]
    static = {path: path == "up_7" for path in paths}
    shapes = {path: (3,) if path == "down_7" else (2,) for path in paths}
    inputs = {
        path: (jnp.full(shape, i, jnp.float32),) for i, (path, shape) in enumerate(shapes.items())
    }
    jax.make_jaxpr(lambda inputs: map_leaves(fn, inputs, static))(inputs)
    assert len(set(seen)) == 16, "seven of a kind and one other are too few for a loop"
    seen.clear()
    found = jax.jit(lambda inputs: map_leaves(fn, inputs))({**inputs, "down_7": inputs["up_0"]})
    assert {path for path, _ in seen} == {"up_0", "down_0"}
    assert set(found) == set(paths)


def test_nothing_is_gathered():
    """Kernels of one shape, sharded in two ways: each is stacked with its like."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("model",))
    places = {"up": PartitionSpec(None, "model"), "down": PartitionSpec("model")}
    params = {
        f"layer_{i}": {
            role: {"kernel": jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, place))}
            for role, place in places.items()
        }
        for i in range(8)
    }
    c = METHODS["mse"]  # whose scales are of channels: k-means looks at all entries of a kernel
    text = jax.jit(partial(run, c)).lower(params).compile().as_text()
    assert text is not None
    assert "all-gather" not in text and "all-to-all" not in text
