"""Integer exports: layouts of sites, biases, and the sites that stay in floats."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import compress_jax as cj
from compress_jax.core import ExportError
from compress_jax.export._onnx.to_onnx import to_onnx
from compress_jax.export._simulate import simulation
from compress_jax.export._verify.verify import runner

UINT8 = cj.quantize.static(8, symmetric=False)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


@pytest.fixture
def onnx():
    for package in ("onnxruntime", "jax2onnx"):
        pytest.importorskip(package, reason="needs pip install 'compress_jax[onnx]'")
    return pytest.importorskip("onnx", reason="needs pip install 'compress_jax[onnx]'")


def array(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def constants(onnx, path):
    return {
        each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer
    }


LAYOUTS = {
    "[in, out]": (lambda p, x: x @ p["w"], (8, 16), (0,)),
    "[out, in]": (lambda p, x: x @ p["w"].T, (16, 8), (1,)),
    "[heads, out, in]": (lambda p, x: jnp.einsum("bi,hoi->bho", x, p["w"]), (2, 8, 8), (2,)),
    "two sites, both ways": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, (8, 8), (0, 1)),
}


CPU = Path("/proc/cpuinfo")
needs_vnni = pytest.mark.skipif(
    CPU.is_file() and "sse2" in CPU.read_text() and "vnni" not in CPU.read_text(),
    reason="needs an x86 processor with VNNI: on others ONNX Runtime saturates sums of two "
    "products of 8 bits, and such an export is refused",
)


@pytest.mark.wide(1)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.slow
def test_scales_are_along_what_no_site_sums_over(name):
    fn, shape, summed = LAYOUTS[name]
    w, x = array(0, *shape) * jnp.exp(array(1, *shape)), array(2, 4, 8)
    simulated = simulation(fn, {"w": w}, [x], UINT8, None, [x], None)
    largest = np.abs(np.asarray(w, np.float64)).max(summed, keepdims=True)
    np.testing.assert_allclose(np.asarray(simulated.packed["w"].scale), largest / 127, rtol=1e-6)


@needs_vnni
@pytest.mark.parametrize("name", ["[in, out]", "[out, in]", "[heads, out, in]"])
def test_what_is_written_are_the_codes_of_each_output(name, onnx, tmp_path):
    fn, shape, summed = LAYOUTS[name]
    w, x = array(0, *shape) * jnp.exp(array(1, *shape)), np.asarray(array(2, 4, 8))
    done = to_onnx(fn, {"w": w}, x, tmp_path / "m.onnx", how=UINT8, batches=[x])
    found, dense = constants(onnx, done.path), np.asarray(w, np.float64)
    codes = np.round(dense / (np.abs(dense).max(summed, keepdims=True) / 127))
    outputs_last = np.moveaxis(codes, summed[0], 0).reshape(8, 16)
    stored = found["w:int"].astype(np.float64)
    np.testing.assert_array_equal(stored if stored.shape == (8, 16) else stored.T, outputs_last)


@needs_vnni
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-10, 1e-5])
@pytest.mark.parametrize("model", [nn.Dense(6), nn.Conv(6, (3, 3))], ids=["dense", "conv"])
def test_the_bias_of_a_channel_that_is_nearly_zero_is_kept(size, model, onnx, tmp_path):
    x = np.asarray(10 * array(0, *((16, 12) if isinstance(model, nn.Dense) else (4, 5, 5, 3))))
    kernel = model.init(jax.random.key(1), x)["params"]["kernel"].at[..., [0, 4]].multiply(size)
    params = {"params": {"kernel": kernel, "bias": jnp.array([0.5, 0, 0.1, -0.2, -1.7, 1])}}
    done = to_onnx(
        lambda p, x: model.apply(p, x), params, x, tmp_path / "m.onnx", how=UINT8, batches=[x]
    )
    found = constants(onnx, done.path)
    step = next(
        value
        for name, value in found.items()
        if name.endswith("kernel:step") or name == "params/kernel:step"
    )
    bias = found["params/kernel:bias:int"].astype(np.float64) * found["params/kernel:bias:step"]
    products = np.abs(np.asarray(kernel)).sum((*range(kernel.ndim - 1),)) * np.abs(x).max()
    np.testing.assert_allclose(
        bias, params["params"]["bias"], rtol=1e-5, atol=1e-9 + products.max() / 1000
    )
    np.testing.assert_allclose(bias[[0, 4]], [0.5, -1.7], rtol=1e-5)
    assert step.shape == (6,) and (step > 0).all()


def test_sites_without_an_integer_kernel_stay_float_and_are_listed(onnx, tmp_path):
    def fn(p, x):
        y = jax.lax.conv_transpose(x, p["up"], (2, 2), "SAME").mean((1, 2))
        y = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), y, p["scan"])[0]
        return jnp.einsum("bef,efo->beo", (y @ p["dense"]).reshape(-1, 2, 4), p["experts"])

    shapes = {"up": (3, 3, 3, 6), "scan": (2, 6, 6), "dense": (6, 8), "experts": (2, 4, 5)}
    params = {name: array(i, *shape) / 2 for i, (name, shape) in enumerate(shapes.items())}
    x = np.asarray(array(9, 3, 4, 4, 3))
    done = to_onnx(
        fn, params, x, tmp_path / "m.onnx", how=UINT8, batches=[x], weights="uint8", batch="example"
    )
    rows = {row.name: row for row in done.rows}
    assert rows["dense"].form == "uint8 x uint8" and not rows["dense"].reason
    for name, words in (
        ("up", "transposed"),
        ("scan", "inside a loop"),
        ("experts", "batch of weights"),
    ):
        assert rows[name].form == "float32" and words in rows[name].reason
    np.testing.assert_allclose(runner(done.path)(x), done.simulation(x), atol=2e-2)
    with pytest.raises(
        ExportError,
        match="no site can be computed in integers: 'scan': inside a loop.*; 'up': .*transposed",
    ):
        how = [("dense", None), ("experts", None), ("**", UINT8)]
        to_onnx(fn, params, x, tmp_path / "n.onnx", how=how, batches=[x], batch="example")
    assert not (tmp_path / "n.onnx").exists()


@pytest.mark.wide(1)
@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.slow
def test_ranges_that_are_not_finite_are_refused_by_every_integer_path(value):
    fn, params, x = lambda p, x: x @ p["w"], {"w": array(0, 4, 4)}, array(1, 3, 4)
    ranges = {"w": {"input": {"low": jnp.float32(-1), "high": jnp.float32(value)}}}
    with pytest.raises(ExportError, match="the range of site 'w'.*inf or NaN"):
        simulation(fn, params, [x], UINT8, ranges, (), None)
    c = cj.quantize.uniform(8)
    with pytest.raises(cj.core.errors.NonFiniteError, match="'w'.*not finite"):
        cj.quantize.integer(fn, c.pack(params, c.init(params)), x, how=UINT8, ranges=ranges)


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.a, self.drop, self.b = (
            nnx.Linear(8, 6, rngs=rngs),
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(6, 3, rngs=rngs),
        )

    def __call__(self, x):
        return self.b(self.drop(nnx.relu(self.a(x))))


@pytest.fixture(scope="module")
def dropping():
    model = Dropping(nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)
    return (lambda s, x: nnx.merge(graph, s)(x)), state, np.asarray(array(0, 4, 8))


@pytest.mark.wide(1)
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.slow
def test_a_state_with_random_keys_is_saved_as_it_is(dropping, coded, tmp_path):
    fn, state, x = dropping
    c = cj.at("**/kernel", cj.quantize.uniform(8, granularity="channel"))
    packed = c.pack(state, c.init(state))
    assert cj.save(tmp_path / "m.st", packed, coded=coded) == (tmp_path / "m.st").stat().st_size
    loaded = cj.unpack(cj.load(tmp_path / "m.st")[0])
    key, again = state["drop"]["rngs"]["key"].get_value(), loaded["drop"]["rngs"]["key"]
    assert again.dtype == key.dtype and jax.random.bits(again) == jax.random.bits(key)
    assert loaded["drop"]["rngs"]["count"].dtype == jnp.uint32
    np.testing.assert_array_equal(fn(loaded, x), fn(cj.unpack(packed), x))
    assert cj.export.to_safetensors(packed, tmp_path / "w.safetensors") > 0


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_implementation_and_shape(implementation, tmp_path):
    keys = jax.random.split(jax.random.key(3, impl=implementation), 6).reshape(2, 3)
    cj.save(tmp_path / "k.st", {"keys": keys})
    again = cj.load(tmp_path / "k.st")[0]["keys"]
    assert (
        again.dtype == keys.dtype
        and (jax.random.key_data(again) == jax.random.key_data(keys)).all()
    )


def test_a_state_with_random_keys_is_exported(dropping, onnx, tmp_path):
    fn, state, x = dropping
    assert to_onnx(fn, state, x, tmp_path / "m.onnx").difference < 1e-5
    assert cj.export.to_stablehlo(fn, state, x, tmp_path / "m.stablehlo").difference < 1e-5
