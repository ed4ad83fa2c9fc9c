"""BiT: against a forward pass in NumPy float64, by the names of both kinds of published files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import WeightsError
from compress_jax.core.paths import flatten
from compress_jax.models import BiT, pretrained, standardized_kernels

MODEL = BiT(blocks=(1, 2), width=4, classes=5, groups=2)
IMAGES = np.random.default_rng(1).normal(size=(2, 16, 12, 3)).astype(np.float32)


def published():
    """Random weights under the names, and in the shapes, of a file such as BiT-M-R50x1.npz."""
    conv = "standardized_conv2d/kernel"
    shapes = {f"root_block/{conv}": (7, 7, 3, 4), "head/conv2d/kernel": (1, 1, 32, 5)}
    shapes |= {"head/conv2d/bias": (5,), "group_norm/gamma": (32,), "group_norm/beta": (32,)}
    for place, inputs, width in (
        ("block1/unit01", 4, 4), ("block2/unit01", 16, 8), ("block2/unit02", 32, 8),
    ):  # fmt: skip
        shapes[f"{place}/a/{conv}"] = (1, 1, inputs, width)
        shapes[f"{place}/b/{conv}"] = (3, 3, width, width)
        shapes[f"{place}/c/{conv}"] = (1, 1, width, 4 * width)
        if inputs != 4 * width:
            shapes[f"{place}/a/proj/{conv}"] = (1, 1, inputs, 4 * width)
        for part, channels in (("a", inputs), ("b", width), ("c", width)):
            shapes |= {f"{place}/{part}/group_norm/{n}": (channels,) for n in ("gamma", "beta")}
    random = np.random.default_rng(0)
    return {
        f"resnet/{name}": random.normal(0.2, 1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def reference(weights, images):
    """BiT by its paper: every sum is written out, in float64."""
    w = {name.removeprefix("resnet/"): x.astype(np.float64) for name, x in weights.items()}

    def conv(x, name, stride=1):
        kernel = w[f"{name}/kernel"]
        kernel = kernel - kernel.mean((0, 1, 2))
        kernel = kernel / np.sqrt(np.square(kernel).mean((0, 1, 2)) + 1e-10)
        around = len(kernel) // 2
        x = np.pad(x, ((0, 0), (around, around), (around, around), (0, 0)))
        rows = (x.shape[1] - len(kernel)) // stride + 1
        columns = (x.shape[2] - len(kernel)) // stride + 1
        out = np.zeros((len(x), rows, columns, kernel.shape[-1]))
        for i, j in np.ndindex(rows, columns):
            top, left = i * stride, j * stride
            window = x[:, top : top + len(kernel), left : left + len(kernel)]
            out[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel)
        return out

    def norm(x, name):
        first, second = np.split(x, 2, axis=-1)
        parts = []
        for part in (first, second):
            part = part - part.mean((1, 2, 3), keepdims=True)
            scale = np.sqrt(np.square(part).mean((1, 2, 3), keepdims=True) + 1e-5)
            parts.append(part / scale)
        scaled = np.concatenate(parts, -1) * w[f"{name}/gamma"] + w[f"{name}/beta"]
        return np.maximum(scaled, 0)

    x = conv(np.asarray(images, np.float64), "root_block/standardized_conv2d", 2)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shape = (len(x), (x.shape[1] - 3) // 2 + 1, (x.shape[2] - 3) // 2 + 1, x.shape[-1])
    pooled = np.zeros(shape)
    for i, j in np.ndindex(*shape[1:3]):
        pooled[:, i, j] = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    x = pooled
    for place, stride in (("block1/unit01", 1), ("block2/unit01", 2), ("block2/unit02", 1)):
        y = norm(x, f"{place}/a/group_norm")
        if f"{place}/a/proj/standardized_conv2d/kernel" in w:
            x = conv(y, f"{place}/a/proj/standardized_conv2d", stride)
        y = norm(conv(y, f"{place}/a/standardized_conv2d"), f"{place}/b/group_norm")
        y = norm(conv(y, f"{place}/b/standardized_conv2d", stride), f"{place}/c/group_norm")
        x = x + conv(y, f"{place}/c/standardized_conv2d")
    x = norm(x, "group_norm").mean((1, 2))
    return x @ w["head/conv2d/kernel"][0, 0] + w["head/conv2d/bias"]


def big_vision(weights):
    """The same weights by big_vision's names, in its shapes."""
    words = {
        "resnet/": "", "a/proj/standardized_conv2d": "conv_proj", "head/conv2d": "head",
        "root_block/standardized_conv2d": "root_block/conv_root",
        "gamma": "scale", "beta": "bias",
    }  # fmt: skip
    for number, letter in enumerate("abc", 1):
        words[f"{letter}/standardized_conv2d"] = f"conv{number}"
        words[f"{letter}/group_norm"] = f"gn{number}"
    words["group_norm"] = "norm-pre-head"
    found = {}
    for name, x in weights.items():
        if "group_norm" in name:
            x = x[None, None, None]
        for old, new in words.items():
            name = name.replace(old, new)
        found[name] = x[0, 0] if name == "head/kernel" else x
    return found


def shapes(model=MODEL, images=IMAGES):
    return jax.eval_shape(model.init, jax.random.key(0), images)


def test_it_computes_what_the_reference_does_from_either_names(tmp_path):
    weights = published()
    np.savez(tmp_path / "bit.npz", **weights)
    variables = pretrained.bit(shapes(), pretrained.read(tmp_path / "bit.npz"))
    logits = jax.jit(MODEL.apply)(variables, IMAGES)
    np.testing.assert_allclose(logits, reference(weights, IMAGES), rtol=1e-4, atol=1e-4)
    other = pretrained.bit(shapes(), big_vision(weights))
    jax.tree.map(np.testing.assert_array_equal, other, variables)
    numbered = {name.replace("conv2d/", "conv2d_7/") if "/b/" in name else name: x
                for name, x in weights.items()}  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, pretrained.bit(shapes(), numbered), variables)


def test_what_does_not_fit_is_listed_and_what_is_no_archive_refused(tmp_path):
    weights = published()
    del weights["resnet/block2/unit02/b/group_norm/gamma"]
    with pytest.raises(WeightsError, match=r"block_1_1/norm_1/scale \(their block2.unit02.gn2.we"):
        pretrained.bit(shapes(), weights)
    (tmp_path / "bit.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(WeightsError, match=r"bit\.npz"):
        pretrained.read(tmp_path / "bit.npz")


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [({}, 25_549_352), ({"blocks": (3, 8, 36, 3), "width": 128}, 236_335_208)],
)
def test_parameters_are_as_many_as_timm_counts(arguments, parameters):
    found = shapes(BiT(**arguments), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) == parameters


def test_standardized_kernels_give_the_same_network_and_zeros_stay_zeros():
    variables = pretrained.bit(shapes(), published())
    plain = MODEL.clone(standardize=False)
    own = {"params": standardized_kernels(variables["params"])}
    np.testing.assert_allclose(
        plain.apply(own, IMAGES), MODEL.apply(variables, IMAGES), rtol=1e-4, atol=1e-4
    )
    paths = set(flatten(own["params"])[0])
    sites = cj.trace.sites(plain.apply, own, IMAGES)
    found = {site.param.removeprefix("params/") for site in sites}
    assert {path for path in paths if path.endswith("kernel")} == found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_logits_and_parameters_are_float32(dtype):
    model = MODEL.clone(dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):  # flax's norms promote
        out = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("float32")}
