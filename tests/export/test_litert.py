"""LiteRT flatbuffers against the simulation in JAX, in the LiteRT interpreter itself."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core import ExportError
from compress_jax.export._litert.interpreter import interpreter, run, tensors
from compress_jax.export._litert.to_litert import to_litert
from compress_jax.models import Bert, BertClassifier, LeNet300100, ResNet
from compress_jax.quantize._activations.static import static

for package in ("litert_converter", "ai_edge_litert", "ai_edge_quantizer"):
    pytest.importorskip(package, reason="needs pip install 'compress_jax[litert]'")

INT8 = static(bits=8, symmetric=False)


@pytest.fixture(scope="module")
def mlp():
    model = LeNet300100(hidden=(32, 16))
    x = np.asarray(jax.random.normal(jax.random.key(0), (4, 8, 8, 1)))
    return lambda params, x: model.apply(params, x), jax.jit(model.init)(jax.random.key(1), x), x


def types(path):
    return {each["name"]: each for each in interpreter(path).get_tensor_details()}


def test_float_is_the_function(mlp, tmp_path):
    fn, params, x = mlp
    done = to_litert(fn, params, x, tmp_path / "m.tflite")
    assert done.nbytes == done.path.stat().st_size and {row.form for row in done.rows} == {
        "float32"
    }
    wanted = fn(params, x)
    np.testing.assert_allclose(run(interpreter(done.path), [x]), wanted, rtol=1e-4, atol=1e-5)
    # Every tensor of a run can be read, those between the layers too.
    layer = params["params"]["dense_0"]
    hidden = jax.nn.relu(x.reshape(4, -1) @ layer["kernel"] + layer["bias"][None])
    found = tensors(interpreter(done.path, preserve=True), [x])
    for value in (wanted, hidden):
        assert [
            name
            for name, each in found.items()
            if each.shape == value.shape and np.allclose(each, value, 1e-4, 1e-5)
        ]


def test_static_int8_uses_our_grids(mlp, tmp_path):
    fn, params, x = mlp
    ranges = {
        f"params/{name}/kernel": {"input": {"low": jnp.float32(low), "high": jnp.float32(high)}}
        for name, low, high in [("dense_0", -4.0, 6.2), ("dense_1", 0.0, 5.1), ("head", 0.0, 2.55)]
    }
    done = to_litert(fn, params, x, tmp_path / "m.tflite", how=INT8, ranges=ranges, batches=[x])
    assert not [row.reason for row in done.rows if row.reason]
    scales = {
        round(float(s), 5)
        for each in types(done.path).values()
        for s in each["quantization_parameters"]["scales"]
    }
    assert {0.04, 0.02, 0.01} <= scales


def test_residual_networks_are_integers_throughout(tmp_path):
    model = ResNet(depth=8, width=4)
    x = np.asarray(jax.random.normal(jax.random.key(0), (4, 16, 16, 3)))
    params = jax.jit(model.init)(jax.random.key(1), x)
    done = to_litert(
        lambda p, x: model.apply(p, x),
        params,
        x,
        tmp_path / "m.tflite",
        how=INT8,
        batches=[x, x[::-1]],
    )
    kernels = [
        each
        for each in types(done.path).values()
        if len(each["shape"]) == 4 and each["dtype"] == np.float32
    ]
    assert len(kernels) <= 1 and done.difference < 0.1  # the image itself comes in floats
    assert not [row.name for row in done.rows if row.reason]


def test_a_transformer_of_tokens_multiplies_in_int8_and_normalises_in_floats(tmp_path):
    model = BertClassifier(Bert(vocabulary=50, width=16, depth=1, heads=2))
    tokens = np.random.default_rng(0).integers(0, 50, (4, 9)).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    c = cj.at("**/kernel", cj.quantize.uniform(8, granularity="channel"))
    packed, batches = c.pack(params, c.init(params)), [tokens, tokens[::-1]]
    done = to_litert(
        lambda p, x: model.apply(p, x),
        packed,
        tokens,
        tmp_path / "m.tflite",
        how=INT8,
        batches=batches,
    )
    assert done.difference < 0.1 and not [row.reason for row in done.rows if row.reason]
    roots = [each for name, each in types(done.path).items() if "rsqrt" in name]
    assert roots and all(each["dtype"] == np.float32 for each in roots)
    weights = [each for each in types(done.path).values() if list(each["shape"]) == [16, 16]]
    assert weights and all(each["dtype"] == np.int8 for each in weights)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_alone(mlp, bits, tmp_path):
    fn, params, x = mlp
    c = cj.at("**/kernel", cj.quantize.uniform(bits, granularity="channel"))
    done = to_litert(fn, c.pack(params, c.init(params)), x, tmp_path / "m.tflite")
    assert {row.form for row in done.rows} == {f"dynamic_wi{bits}"}


def test_a_crash_or_a_refusal_is_an_error(mlp, tmp_path):
    fn, params, x = mlp
    with pytest.raises(ExportError, match="pass batches="):
        to_litert(fn, params, x, tmp_path / "m.tflite", how=INT8)
    with pytest.raises(ExportError, match="LiteRT converter"):
        to_litert(lambda p, x: jnp.linalg.qr(x.reshape(4, -1))[0], params, x, tmp_path / "m.tflite")
    assert not (tmp_path / "m.tflite").exists()


def test_a_crash_of_the_runtime_is_an_error(mlp, tmp_path, monkeypatch):
    """A converted file that kills the runtime, as int8 indices of an embedding once did."""
    fn, params, x = mlp
    real = subprocess.run

    def dies(command, **options):
        (Path(command[-1]) / "model.tflite").write_bytes(b"written, then")
        return real([sys.executable, "-c", "import os; os.abort()"], **options)

    monkeypatch.setattr("compress_jax.export._litert.to_litert.subprocess.run", dies)
    with pytest.raises(
        ExportError, match="LiteRT runtime, on the converted model, crashed .signal 6."
    ):
        to_litert(fn, params, x, tmp_path / "m.tflite")
    assert not (tmp_path / "m.tflite").exists()


@pytest.mark.parametrize("size", [0.0, 1e-10])
def test_the_bias_of_a_channel_that_is_nearly_zero_is_kept(size, tmp_path):
    x = np.asarray(jax.random.normal(jax.random.key(0), (16, 12)))
    kernel = jax.random.normal(jax.random.key(1), (12, 6)).at[:, jnp.array([0, 4])].multiply(size)
    params = {"kernel": kernel, "bias": jnp.array([0.5, 0, 0.1, -0.2, -1.7, 1])}
    fn = lambda p, x: x @ p["kernel"] + p["bias"][None]  # noqa: E731
    done = to_litert(fn, params, x, tmp_path / "m.tflite", how=INT8, batches=[x])
    assert done.notes and "2 channels" in done.notes[0]
    found, wanted = (
        run(interpreter(done.path), [x]),
        x.astype(np.float64) @ np.asarray(kernel) + np.asarray(params["bias"]),
    )
    step = np.ptp(wanted) / 255
    assert np.abs(found[:, [0, 4]] - wanted[:, [0, 4]]).max() < step
    assert np.abs(found - wanted).max() < 8 * step


def test_every_result_is_compared(tmp_path):
    fn = lambda p, x: {"a": x @ p["kernel"], "b": jnp.tanh(x @ p["kernel"])}  # noqa: E731
    x = np.asarray(jax.random.normal(jax.random.key(0), (4, 5)))
    assert to_litert(fn, {"kernel": jnp.eye(5, 3)}, x, tmp_path / "m.tflite").difference < 1e-4


def test_twelve_inputs_keep_their_order(tmp_path):
    """By name as text, x10 would come before x2."""
    xs = tuple(np.full((2, 8), i, np.float32) for i in range(12))

    def fn(params, *xs):
        return sum((i + 1) * x for i, x in enumerate(xs)) @ params

    weights = jnp.eye(8)
    done = to_litert(fn, weights, xs, tmp_path / "m.tflite")
    found = run(interpreter(done.path), xs)
    np.testing.assert_allclose(found, fn(weights, *xs), rtol=1e-5)
