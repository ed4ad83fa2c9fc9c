"""ONNX files against the simulation in JAX, in ONNX Runtime itself."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core import ExportError
from compress_jax.export._extras import extra
from compress_jax.export._onnx.to_onnx import to_onnx
from compress_jax.models import DSCNN, Bert, BertClassifier, LeNet5, LeNet300100, ResNet, ViT
from compress_jax.quantize._activations.static import static

onnx = pytest.importorskip("onnx", reason="needs pip install 'compress_jax[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'compress_jax[onnx]'")
pytest.importorskip("jax2onnx", reason="needs pip install 'compress_jax[onnx]'")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)

UINT8 = static(bits=8, symmetric=False)


def images(seed, *shape):
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def variables(model, x, seed=0):
    """Initialise a model, with batch statistics that a fold must not get wrong."""
    tree = jax.jit(model.init)(jax.random.key(seed), x)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 1000))

    def noisy(path, leaf):
        name = jax.tree_util.keystr(path)
        if "var" in name or "scale" in name:
            return (
                leaf
                * jax.random.uniform(next(keys), leaf.shape, minval=0.5, maxval=1.5)
                * (-1 if "norm_0" in name and "scale" in name else 1)
            )
        return (
            leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)
            if "mean" in name or "bias" in name
            else leaf
        )

    return jax.tree_util.tree_map_with_path(noisy, tree)


def call(model):
    return lambda variables, *inputs: model.apply(variables, *inputs)


def run(path, *inputs):
    session = extra("onnxruntime", "onnx").InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    return session.run(
        None, {each.name: x for each, x in zip(session.get_inputs(), inputs, strict=True)}
    )[0]


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module")
def lenet():
    model = LeNet300100(hidden=(32, 16))
    x = images(0, 6, 8, 8, 1)
    return call(model), variables(model, x), x


@pytest.fixture(scope="module")
def resnet():
    model = ResNet(depth=8, width=4)
    x = images(0, 6, 16, 16, 3)
    return call(model), variables(model, x), x


MODELS = {
    "lenet5": (LeNet5(hidden=(16,)), images(1, 3, 16, 16, 1)),
    "resnet": (ResNet(depth=8, width=4), images(1, 3, 16, 16, 3)),
    "vit": (ViT(width=16, depth=1, heads=2, patch=4), images(1, 3, 8, 8, 3)),
    "ds_cnn": (DSCNN(width=8, blocks=1), images(1, 3, 20, 10, 1)),
    "bert": (
        BertClassifier(Bert(vocabulary=50, width=16, depth=1, heads=2, positions=8)),
        np.random.default_rng(0).integers(0, 50, (3, 8)).astype(np.int32),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_float_is_the_function_at_any_batch_size(name, tmp_path):
    model, x = MODELS[name]
    weights = variables(model, x)
    done = to_onnx(call(model), weights, x, tmp_path / "m.onnx")
    assert done.nbytes == (tmp_path / "m.onnx").stat().st_size
    five = np.concatenate([x, x[:2]])
    np.testing.assert_allclose(
        run(done.path, five), jax.jit(model.apply)(weights, five), rtol=1e-3, atol=1e-4
    )


def test_batch_norm_is_folded(resnet, tmp_path):
    fn, params, x = resnet
    done = to_onnx(fn, params, x, tmp_path / "m.onnx")
    assert "BatchNormalization" not in operators(done.path)


@pytest.mark.parametrize("name", MODELS)
def test_static_integers_follow_the_simulation(name, tmp_path):
    model, x = MODELS[name]
    weights, batches = variables(model, x), [x, x[::-1].copy()]
    done = to_onnx(
        call(model), weights, x, tmp_path / "m.onnx", how=UINT8, batches=batches, weights="uint8"
    )
    floats = [row.name for row in done.rows if row.form != "uint8 x uint8"]
    assert all("@" in name for name in floats), (
        floats
    )  # products of two activations, which `static` leaves alone
    assert done.difference < 0.05


def test_scales_and_codes_in_the_file_are_ours(lenet, tmp_path):
    fn, params, x = lenet
    quantized = cj.at("**/kernel", cj.quantize.uniform(8, granularity="channel"))
    packed = quantized.pack(params, quantized.init(params))
    ranges = {
        f"params/{name}/kernel": {"input": {"low": jnp.float32(low), "high": jnp.float32(high)}}
        for name, low, high in [("dense_0", -3.0, 2.1), ("dense_1", 0.0, 5.1), ("head", 0.0, 2.55)]
    }
    done = to_onnx(
        fn,
        packed,
        x,
        tmp_path / "m.onnx",
        how=UINT8,
        ranges=ranges,
        weights="uint8",
        tolerance=0.02,
    )
    constants = {
        each.name: onnx.numpy_helper.to_array(each)
        for each in onnx.load(done.path).graph.initializer
    }
    scales = sorted(float(value) for name, value in constants.items() if name.endswith(":scale"))
    np.testing.assert_allclose(scales, [0.01, 0.02, 0.02], rtol=1e-6)
    node = packed["params"]["head"]["kernel"]
    np.testing.assert_array_equal(constants["params/head/kernel:int"], node.codes.unpack())
    np.testing.assert_array_equal(constants["params/head/kernel:step"], np.ravel(node.scale))


def test_a_hand_made_integer_product(tmp_path):
    fn = lambda p, x: x @ p["kernel"]  # noqa: E731
    kernel, x = (
        jnp.array([[127.0, 1.0], [-64.0, 127.0]]) / 64,
        np.array([[1.0, 2.0], [0.26, -1.0]], np.float32),
    )
    ranges = {"kernel": {"input": {"low": jnp.float32(-1), "high": jnp.float32(4.1)}}}
    done = to_onnx(
        fn, {"kernel": kernel}, x, tmp_path / "m.onnx", how=UINT8, ranges=ranges, weights="uint8"
    )
    seen = (np.clip(np.round(x / 0.02) + 50, 0, 255) - 50) * 0.02
    np.testing.assert_allclose(run(done.path, x), seen @ np.asarray(kernel, np.float64), rtol=1e-5)


@pytest.mark.parametrize(
    ("bits", "granularity"), [(4, 16), (4, "channel"), (8, 32), (3, 16), (2, "tensor")]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_only_blocks_multiply_as_the_packed_weights(bits, granularity, symmetric, tmp_path):
    fn = lambda p, x: x @ p["kernel"]  # noqa: E731
    c = cj.quantize.uniform(bits, symmetric=symmetric, granularity=granularity)
    params, x = {"kernel": images(2, 64, 24)}, images(3, 5, 64)
    params = {"kernel": jnp.asarray(params["kernel"]) + 0.5}
    packed = c.pack(params, c.init(params))
    done = to_onnx(fn, packed, x, tmp_path / "m.onnx", accuracy_level=0, tolerance=1e-5)
    assert done.rows[0].form.startswith("MatMulNBits") and operators(done.path)["MatMulNBits"] == 1
    assert {each.name for each in onnx.load(done.path).graph.initializer} <= {
        "kernel:blocks",
        "kernel:step",
        "kernel:zero",
    }
    np.testing.assert_allclose(
        run(done.path, x), x @ np.asarray(cj.unpack(packed)["kernel"]), rtol=1e-3, atol=1e-3
    )


def test_packed_convolutions_are_small_in_the_file_and_exact(resnet, tmp_path):
    fn, params, x = resnet
    sizes = {}
    for bits in (8, 4):
        c = cj.at("**/kernel", cj.quantize.uniform(bits, granularity="channel"))
        done = to_onnx(
            fn,
            c.pack(params, c.init(params)),
            x,
            tmp_path / "m.onnx",
            accuracy_level=0,
            tolerance=1e-4,
        )
        assert all(
            "float32 when loaded" in row.form or "MatMulNBits" in row.form for row in done.rows
        )
        sizes[bits] = done.nbytes
        constants = onnx.load(done.path).graph.initializer
        codes = [each for each in constants if each.name.endswith(":codes")]
        assert codes
        for each in codes:
            assert len(each.raw_data) == -(-np.prod(each.dims) * bits // 8), each.name
    weights = sum(leaf.size for leaf in jax.tree.leaves(params["params"]) if leaf.ndim > 1)
    assert sizes[8] - sizes[4] > 0.4 * weights


def test_pruned_models_are_exported_too(lenet, tmp_path):
    fn, params, x = lenet
    c = cj.at(
        "**/kernel",
        cj.chain(cj.prune.magnitude(0.8), cj.quantize.uniform(8, granularity="channel")),
    )
    done = to_onnx(
        fn,
        c.pack(params, c.init(params)),
        x,
        tmp_path / "m.onnx",
        how=UINT8,
        batches=[x],
        weights="uint8",
    )
    codes = [
        each for each in onnx.load(done.path).graph.initializer if each.name.endswith("kernel:int")
    ]
    assert (
        all(0.75 < (onnx.numpy_helper.to_array(each) == 128).mean() < 0.95 for each in codes)
        and len(codes) == 3
    )


def test_what_cannot_be_fast_is_an_error_and_leaves_no_file(lenet, tmp_path):
    fn, params, x = lenet
    with pytest.raises(ExportError, match=r"static\(bits=8, symmetric=False\)"):
        to_onnx(fn, params, x, tmp_path / "m.onnx", how=static(bits=8), batches=[x])
    c = cj.at("**/kernel", cj.quantize.uniform(4, granularity=8))
    with pytest.raises(ExportError, match="no single scale for each output channel"):
        to_onnx(fn, c.pack(params, c.init(params)), x, tmp_path / "m.onnx", how=UINT8, batches=[x])
    with pytest.raises(ExportError, match="differ by"):
        to_onnx(fn, params, x, tmp_path / "m.onnx", how=UINT8, batches=[x], tolerance=1e-9)
    assert not (tmp_path / "m.onnx").exists()


def test_sites_that_cannot_be_are_left_in_floats_and_listed_among_those_that_can(lenet, tmp_path):
    fn, params, x = lenet
    c = cj.at(
        "**/kernel", cj.quantize.uniform(4, granularity=16)
    )  # a single group for each channel of the head alone
    done = to_onnx(
        fn,
        c.pack(params, c.init(params)),
        x,
        tmp_path / "m.onnx",
        how=UINT8,
        batches=[x],
        weights="uint8",
    )
    rows = {row.name.split("/")[1]: row for row in done.rows}
    assert rows["head"] == ("params/head/kernel", "uint8 x uint8", "")
    for name in ("dense_0", "dense_1"):
        assert rows[name].form.startswith("MatMulNBits") and "no single scale" in rows[name].reason


def test_residual_sums_ask_for_batches(resnet, tmp_path):
    fn, params, x = resnet
    from compress_jax.quantize._activations.activations import activations

    ranges = activations(fn, UINT8).init(params, [x])
    with pytest.raises(ExportError, match="residual sums"):
        to_onnx(fn, params, x, tmp_path / "m.onnx", how=UINT8, ranges=ranges)


def test_weights_that_end_as_float_constants_are_listed(tmp_path):
    """Every packed leaf has a row: integers in the file, or float32 and why."""
    model = DSCNN(classes=4, width=8, blocks=1, depthwise="shifts")
    x = images(0, 4, 20, 10, 1)
    dense = variables(model, x)
    c = cj.at("**/kernel", cj.quantize.uniform(4, granularity="channel"))
    packed = {**dense, "params": c.pack(dense["params"], c.init(dense["params"]))}
    exported = to_onnx(lambda v, x: model.apply(v, x), packed, x, tmp_path / "m.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]
    rows = {row.name: row for row in exported.rows}
    kernels = {f"params/{name}/kernel" for name in ("stem", "depthwise_0", "pointwise_0", "head")}
    assert kernels <= set(rows)
    row = rows["params/depthwise_0/kernel"]
    assert row.form == "float32" and "constants of the file" in row.reason


@pytest.mark.parametrize("batch", ["any", "example"])
def test_a_fourier_transform_is_refused_with_what_to_use_in_its_place(batch, tmp_path):
    def fn(p, x):
        return jnp.abs(jnp.fft.rfft(x)) @ p["w"]

    params, x = {"w": jnp.ones((9, 3))}, np.ones((2, 16), np.float32)
    with pytest.raises(ExportError, match="Fourier transform.*power_spectrum"):
        to_onnx(fn, params, x, tmp_path / "m.onnx", batch=batch)
    with pytest.raises(ExportError, match="(?s)^(?!.*Fourier)"):  # another fault has no such advice
        to_onnx(lambda p, x: x @ p["w"], params, x, tmp_path / "m.onnx", batch=batch)
    assert not list(tmp_path.iterdir())


def test_params_without_names_are_refused_with_how_to_give_them_one(tmp_path):
    with pytest.raises(ExportError, match="in a dict"):
        to_onnx(lambda p, x: x @ p, jnp.ones((16, 3)), np.ones((2, 16), "f"), tmp_path / "m.onnx")
