"""The reference networks are the published ones, and their logits are float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from compress_jax.models import LeNet5, LeNet300100, ResNet
from compress_jax.models._lenet import max_pool


def count(model, shape):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        (LeNet300100(), (28, 28, 1), 266_610),  # Han et al. 2015, table 1: 267K
        (LeNet5(), (32, 32, 1), 61_706),  # LeCun et al. 1998 with a full second convolution
        (
            LeNet5(features=(20, 50), hidden=(500,)),
            (28, 28, 1),
            431_080,
        ),  # Han et al. 2015, table 1: 431K
        (ResNet(20, 16), (32, 32, 3), 272_474),  # He et al. 2016, table 6: 0.27M; option B
        (ResNet(20, 16, projection=False), (32, 32, 3), 269_722),  # option A
        (ResNet(56, 16, projection=False), (32, 32, 3), 853_018),  # He et al. 2016, table 6: 0.85M
        (ResNet(8, 16), (28, 28, 1), 77_754),
    ],
)
def test_parameter_counts_are_the_textbook_numbers(model, shape, parameters):
    assert count(model, shape) == parameters


@pytest.mark.wide(7)
@pytest.mark.parametrize(
    "model", [LeNet300100(7), LeNet5(7, padding="SAME"), ResNet(8, 4, 7), ResNet(8, 4, 7, 2, False)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
@pytest.mark.parametrize("size", [8, 15])
def test_shapes_and_dtypes(model, dtype, size):
    def both(key, x):
        variables = model.clone(dtype=dtype).init(key, x)
        trained, _ = model.clone(dtype=dtype).apply(
            variables, x, train=True, mutable=["batch_stats"]
        )
        return variables, (model.clone(dtype=dtype).apply(variables, x), trained)

    with (
        jax.enable_x64(dtype == jnp.float64),
        jax.numpy_dtype_promotion("standard"),
    ):  # flax's BatchNorm promotes
        variables, logits = jax.eval_shape(
            both, jax.random.key(0), jnp.zeros((3, size, size, 1), jnp.float32)
        )
    wanted = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert [(out.shape, out.dtype) for out in logits] == 2 * [((3, 7), wanted)]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_the_head_itself_computes_in_float32_under_bfloat16():
    model = LeNet300100(hidden=(8,), dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (3, 5))
    variables = model.init(jax.random.key(1), x)
    hidden = nn.Dense(8, dtype=jnp.bfloat16).apply({"params": variables["params"]["dense_0"]}, x)
    kernel = np.asarray(variables["params"]["head"]["kernel"], np.float64)
    exact = np.asarray(nn.relu(hidden), np.float64) @ kernel
    np.testing.assert_allclose(
        model.apply(variables, x), exact, rtol=1e-5, atol=1e-6
    )  # bfloat16 would miss by 1e-3


def test_paths_of_parameters_are_readable():
    params = jax.eval_shape(ResNet(8, 4).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    blocks = ["block_0_0", "block_1_0", "block_2_0"]
    assert sorted(params) == [*blocks, "head", "stem", "stem_norm"]
    assert sorted(params["block_1_0"]) == [
        "conv_0",
        "conv_1",
        "norm_0",
        "norm_1",
        "projection",
        "projection_norm",
    ]


@pytest.mark.slow
def test_batch_norm_uses_the_batch_in_training_and_running_averages_after():
    model, x = ResNet(8, 4), jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    train, updated = jax.jit(lambda v: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables
    )
    assert not np.allclose(train, jax.jit(model.apply)(variables, x))
    stem = nn.Conv(4, (3, 3), use_bias=False).apply({"params": variables["params"]["stem"]}, x)
    mean = 0.1 * np.asarray(stem, np.float64).mean((0, 1, 2))  # momentum 0.9 from zero
    np.testing.assert_allclose(updated["batch_stats"]["stem_norm"]["mean"], mean, atol=1e-6)


@pytest.mark.slow
def test_option_a_shortcut_subsamples_and_pads_with_zeros():
    model, x = ResNet(8, 4, projection=False), jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    silent = jax.tree.map(jnp.zeros_like, variables["params"]["block_1_0"])
    params = {**variables["params"], "block_1_0": silent}
    watch = {"capture_intermediates": True, "mutable": ["intermediates"]}
    captured = jax.jit(lambda v: model.apply(v, x, **watch))({**variables, "params": params})
    before = captured[1]["intermediates"]["block_0_0"]["__call__"][0]
    after = captured[1]["intermediates"]["block_1_0"]["__call__"][0]
    np.testing.assert_array_equal(after[..., :4], before[:, ::2, ::2])
    assert not after[..., 4:].any()


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_a_depth_that_is_no_such_network_is_refused(depth):
    with pytest.raises(ValueError, match=f"6 n \\+ 2.*depth={depth}"):
        ResNet(depth).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def test_stem_stride_halves_every_later_resolution():
    def run(x):
        return ResNet(8, 4, stem_stride=2).init_with_output(
            jax.random.key(0), x, capture_intermediates=True, mutable=True
        )

    _, captured = jax.eval_shape(run, jnp.zeros((1, 28, 28, 1)))
    shapes = {
        name: out["__call__"][0].shape[1:3]
        for name, out in captured["intermediates"].items()
        if "block" in name
    }
    assert shapes == {"block_0_0": (14, 14), "block_1_0": (7, 7), "block_2_0": (4, 4)}


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    ("height", "width", "window"), [(4, 6, 2), (5, 4, 2), (9, 6, 3), (3, 3, 2), (2, 2, 2)]
)
def test_max_pool_equals_the_window_reduction_with_its_gradient(height, width, window):
    x = jax.random.normal(jax.random.key(0), (2, height, width, 3))

    def reference(x, window):
        return nn.max_pool(x, (window, window), strides=(window, window))

    np.testing.assert_array_equal(max_pool(x, window), reference(x, window))
    grads = [
        jax.jit(jax.grad(lambda x, f=f: jnp.square(f(x, window)).sum()))(x)
        for f in (max_pool, reference)
    ]
    np.testing.assert_array_equal(*grads)
