"""SmoothQuant's folding: the formula, the same function, every kind of layer, and what cannot be
folded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.paths import flatten
from compress_jax.quantize._rewrites.smooth import smooth
from compress_jax.trace import calibrate
from compress_jax.trace.reducers import absmax
from tests.quantize.test_gptq import fresh
from tests.trace.zoo import ZOO


def fn(p, x):
    y = jax.nn.relu(x @ p["in"] + p["bias"][None])
    return jnp.concatenate([y @ p["a"], y @ p["b"]], -1)


def case(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"in": (5, 7), "bias": (7,), "a": (7, 3), "b": (7, 4)}
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    return params, [jnp.asarray(rng.normal(size=(20, 5)) * 10, jnp.float32) for _ in range(3)]


@pytest.mark.wide(1)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_it_is_the_papers_equation_4(alpha):
    params, batches = case()
    result = smooth(
        fn, params, calibrate(fn, absmax("channel"), params, batches), batches[0], alpha=alpha
    )
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    hidden = np.maximum(np.concatenate(batches) @ p["in"] + p["bias"], 0).max(0)
    weights = np.maximum(np.abs(p["a"]).max(1), np.abs(p["b"]).max(1))
    s = hidden**alpha / weights ** (1 - alpha)
    for name, expected in {
        "in": p["in"] / s,
        "bias": p["bias"] / s,
        "a": p["a"] * s[:, None],
    }.items():
        np.testing.assert_allclose(result.params[name], expected, rtol=1e-5)
    assert result.changed == dict.fromkeys("ab", ("bias", "in"))
    assert result.skipped == {
        "in": "nothing before it can make up for a scale: it is the function's input"
    }


MODELS = (
    "llama/nnx",
    "vit/linen",
    "lenet/linen",
    "mobilenet/nnx",
    "resnet/linen",
    "moe/linen",
    "unet/nnx",
)
QUICK = ("llama/nnx",)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(e, id=e.name, marks=() if e.name in QUICK else (pytest.mark.slow,))
        for e in ZOO
        if e.name in MODELS
    ],
)
def test_models_stay_the_same_function_and_every_kernel_is_folded_or_listed(entry):
    model, variables, inputs = entry.make()
    seen = calibrate(
        model, absmax("channel"), variables, [fresh(inputs, seed) for seed in range(2)]
    )
    result = smooth(model, variables, seen, *inputs)
    run = jax.jit(model)
    old, new = run(variables, *inputs), run(result.params, *inputs)
    assert float(jnp.abs(old - new).max()) < 1e-5 * float(jnp.abs(old).max() + 1)
    fed = {site.param for site in seen.sites.values()} - {None}
    assert set(result.changed) | set(result.skipped) == fed and not set(result.changed) & set(
        result.skipped
    )
    assert result.changed and all(result.skipped.values())
    leaves, before = flatten(result.params)[0], flatten(variables)[0]
    assert all(
        (leaves[path] == before[path]).all()
        for path in set(result.skipped) - set().union(*result.changed.values())
    )


def test_smoothed_ranges_are_balanced_layer_by_layer_under_scan():
    def model(p, x):
        def layer(x, w):
            y = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w["norm"][None]
            return x + jnp.tanh(y @ w["kernel"]), None

        return jax.lax.scan(layer, x, p)[0]

    rng = np.random.default_rng(1)
    p = {"norm": np.exp(2 * rng.normal(size=(3, 6))), "kernel": rng.normal(size=(3, 6, 6))}
    p = {name: jnp.asarray(x, jnp.float32) for name, x in p.items()}
    x = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
    result = smooth(model, p, calibrate(model, absmax("channel"), p, [x]), x)
    np.testing.assert_allclose(model(result.params, x), model(p, x), rtol=2e-5, atol=2e-5)
    after = calibrate(model, absmax("channel"), result.params, [x])["kernel"]["input"]
    np.testing.assert_allclose(
        after, jnp.abs(result.params["kernel"]).max(2), rtol=1e-4
    )  # what strength 1/2 asks for


def test_channels_that_are_always_zero_are_left_alone():
    params, batches = case()
    params["in"] = params["in"].at[:, 2].set(0)
    params["bias"] = params["bias"].at[2].set(-1)
    result = smooth(fn, params, calibrate(fn, absmax("channel"), params, batches), batches[0])
    assert (result.params["a"][2] == params["a"][2]).all() and result.params["bias"][2] == -1
    with pytest.raises(ValueError, match="alpha"):
        smooth(fn, params, calibrate(fn, absmax("channel"), params, batches), batches[0], alpha=2)
