"""Resized functions: against modules that read their widths, zeroed parameters, and by hand."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from compress_jax.core.errors import NoMatchError, ShapeError
from compress_jax.core.paths import flatten
from compress_jax.models import ResNet
from compress_jax.trace import groups, resize
from tests.trace.zoo import ZOO
from tests.trace.zoo_entry import randomise
from tests.trace.zoo_linen import ViT

ENTRIES = {entry.name: entry for entry in ZOO}
# Parameters of these may simply be shorter: no shape is written down in them, so they say
# themselves what is right.
QUICK = """mlp/nnx plain/cast plain/convolutions plain/routed plain/custom_jvp plain/custom_vjp
plain/scanned""".split()
DIRECT = """moe/nnx lenet/nnx resnet/nnx resnet_train/nnx plain/operators plain/on_the_left
plain/transposed plain/contracted_in_place plain/einsum plain/both_parameters plain/low_rank
plain/vmapped""".split()
# In these, some groups go through a norm or a softmax, for which a channel of zeros is not the same
# as none.
NORMALISED = {
    "vit": "patches/kernel:3",
    "llama": "embed/embedding:1",
    "tied_lm": "embed/embedding:1",
    "unet": "mix_0/kernel:3#2",
    "moe/linen": "router/kernel:1",
    "moe/nnx": "up:0",
    "convnet": "dense/layers/2/weight:0",
}
ZEROED = [
    *(name for name in ENTRIES if name.endswith(("/linen", "/equinox"))),
    "recurrent/nnx",
    "plain/reshaped",
]
ZEROED.remove("lenet/linen")  # quick


@cache
def made(name):
    fn, variables, inputs = ENTRIES[name].make()
    return fn, variables, inputs, groups(fn, variables, *inputs)


def half(found, seed=0):
    """Keep a random half of every group, of odd ones the smaller."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(rng.permutation(group.size)[: max(1, group.size // 2)])
        for group in found
    }


def zeroed(variables, found, kept):
    """Return variables whose members hold zeros where a channel is removed; variances stay."""
    leaves, rebuild = flatten(variables)
    for name, channels in kept.items():
        for path, axis in found[name].members:
            if not path.endswith("var"):
                mask = np.moveaxis(np.zeros(leaves[path].shape, bool), axis, -1) | found[name].mask(
                    (path, axis), channels
                )
                leaves[path] = jnp.where(np.moveaxis(mask, -1, axis), leaves[path], 0)
    return rebuild(leaves)


def assert_close(a, b, tolerance=2e-5):
    a, b = flatten(a)[0], flatten(b)[0]
    assert a.keys() == b.keys()
    for path, x in b.items():
        assert a[path].shape == x.shape and a[path].dtype == x.dtype, path
        x, y = np.asarray(x, np.float32), np.asarray(a[path], np.float32)
        np.testing.assert_allclose(
            y, x, rtol=0, atol=tolerance * max(np.abs(x).max(initial=0), 1e-3), err_msg=path
        )


def scalar(fn, inputs):
    def loss(variables):
        leaves = [
            x
            for x in jax.tree.leaves(fn(variables, *inputs))
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in leaves)

    return loss


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in DIRECT)]
)
def test_it_is_the_function_of_shorter_parameters(name):
    """In value and gradient, where the function itself takes parameters of any width."""
    fn, variables, inputs, found = made(name)
    kept = half(found)
    smaller, short = resize(fn, variables, found, kept), found.keep(variables, kept)
    assert kept and jax.tree.map(jnp.shape, short) != jax.tree.map(jnp.shape, variables)
    assert_close(smaller(short, *inputs), jax.jit(fn)(short, *inputs), 1e-6)
    gradients = [jax.jit(jax.grad(scalar(each, inputs)))(short) for each in (smaller, fn)]
    assert_close(*gradients, 1e-5)


@pytest.mark.parametrize(
    "name", ["lenet/linen", *(pytest.param(name, marks=pytest.mark.slow) for name in ZEROED)]
)
def test_removed_channels_of_zeros_make_no_difference(name):
    fn, variables, inputs, found = made(name)
    apart = next((group for start, group in NORMALISED.items() if name.startswith(start)), None)
    kept = {
        group: left
        for group, left in half(found, 1).items()
        if group.removeprefix("params/") != apart
    }
    if not kept:
        return
    smaller = resize(fn, variables, found, kept)(found.keep(variables, kept), *inputs)
    full = jax.jit(fn)(zeroed(variables, found, kept), *inputs)
    if not isinstance(full, tuple):
        assert_close(smaller, full)
    else:
        assert_close(smaller[0], full[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_the_whole_zoo_runs_and_trains_at_half_its_widths(name):
    """Traced only; `test_it_is_the_function_of_shorter_parameters` runs the custom rules."""
    fn, variables, inputs, found = made(name)
    kept = half(found, 2)
    smaller = resize(fn, variables, found, kept)
    short = jax.eval_shape(lambda v: found.keep(v, kept), variables)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    out, full = (
        jax.eval_shape(each, v, *inputs) for each, v in ((smaller, short), (fn, variables))
    )
    assert shapes(out[0] if "train" in name else out) == shapes(
        full[0] if "train" in name else full
    )
    if ENTRIES[name].reverse:
        assert shapes(jax.eval_shape(jax.grad(scalar(smaller, inputs)), short)) == shapes(short)


def test_all_kept_is_the_function_itself():
    fn, variables, inputs, found = made("resnet_train/linen")
    everything = {group.name: range(group.size) for group in found}
    assert_close(
        resize(fn, variables, found, everything)(variables, *inputs),
        jax.jit(fn)(variables, *inputs),
        0,
    )


@pytest.mark.slow
def test_a_residual_network_of_half_the_width_is_the_same():
    """The module with other arguments: convolutions, norms in training, updated statistics."""
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))

    def learn(width):
        return partial(ResNet(depth=8, width=width).apply, train=True, mutable=["batch_stats"])

    variables = randomise(jax.eval_shape(ResNet(depth=8, width=4).init, jax.random.key(0), x))
    found = groups(learn(4), variables, x)
    kept = half(found)
    smaller, short = resize(learn(4), variables, found, kept), found.keep(variables, kept)
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(
        jnp.shape, jax.eval_shape(ResNet(depth=8, width=2).init, jax.random.key(0), x)
    )
    assert_close(smaller(short, x), jax.jit(learn(2))(short, x), 1e-5)


@pytest.mark.slow
def test_a_transformer_of_half_the_width_is_the_same():
    """Layer norms over a shorter axis, half of the heads, half of the hidden features."""
    fn, variables, inputs, found = made("vit/linen")
    whole = {
        group.name
        for group in found
        if group.size == 4 and "attention" in group.name and group.name.endswith(":2")
    }
    kept = {name: left for name, left in half(found).items() if name not in whole}
    smaller, short = resize(fn, variables, found, kept), found.keep(variables, kept)
    module = ViT(width=8, heads=2, hidden=14)
    assert len(whole) == 4 and short["params"]["block_0"]["attention"]["query"]["kernel"].shape == (
        8,
        2,
        4,
    )
    assert_close(smaller(short, *inputs), jax.jit(module.apply)(short, *inputs), 1e-5)


@pytest.mark.parametrize("written_down", [False, True])
def test_counts_of_means_and_variances_follow_and_other_numbers_stay(written_down):
    """A sixth of a sum stays where the code at the new width says so, else it makes a mean."""

    def fn(p, x):
        x = (x @ p["a"]).reshape((2, 6) if written_down else (2, -1))
        unbiased = jnp.var(x, 1, keepdims=True, ddof=1)
        return jnp.stack(
            [x.mean(1), unbiased[:, 0], (x.sum(1) * (1 / 6)), x.sum(1) / 4, x.std(1)]
        ), (x / 6) @ p["b"]

    p = randomise({"a": np.empty((3, 6)), "b": np.empty((6, 1))})
    x = randomise({"x": np.empty((2, 3))})["x"]
    found, left = groups(fn, p, x), [0, 2, 5]
    got, product = resize(fn, p, found, {"a:1": left})(found.keep(p, {"a:1": left}), x)
    h = np.asarray(x, np.float64) @ np.asarray(p["a"], np.float64)[:, left]
    expected = [
        h.mean(1),
        h.var(1, ddof=1),
        h.mean(1) if written_down else h.sum(1) / 6,
        h.sum(1) / 4,
        h.std(1),
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        product, h / 6 @ np.asarray(p["b"], np.float64)[left], rtol=1e-5, atol=1e-6
    )


def test_shapes_that_are_written_down_follow():
    """Reshapes, broadcasts, padding, slices and noise with literal shapes; reference by hand."""

    def fn(p, x):
        h = (x @ p["a"]).reshape(2, 3, 4)  # 3 heads of 4
        h = h + jnp.broadcast_to(p["c"], (2, 3, 4))
        h = jnp.pad(h, ((0, 0), (0, 0), (1, 2)))[:, :, 1:5]
        left, right = jnp.split(jnp.concatenate([h, 2 * h], -1), [4], -1)
        return (left * right + jnp.zeros((2, 3, 4))).reshape(2, 12) @ p["b"]

    p = randomise({"a": np.empty((5, 12)), "b": np.empty((12, 2)), "c": np.empty((3, 4))})
    x = randomise({"x": np.empty((2, 5))})["x"]
    found = groups(fn, p, x)
    assert [(group.name, group.size) for group in found] == [("a:1", 3), ("a:1#2", 4)]
    kept = {"a:1": [0, 2], "a:1#2": [1]}
    h = (np.asarray(x @ p["a"]).reshape(2, 3, 4) + np.asarray(p["c"]))[:, [0, 2]][:, :, [1]]
    expected = (2 * h * h).reshape(2, 2) @ np.asarray(p["b"]).reshape(3, 4, 2)[[0, 2]][
        :, [1]
    ].reshape(2, 2)
    np.testing.assert_allclose(
        resize(fn, p, found, kept)(found.keep(p, kept), x), expected, rtol=1e-5
    )


def padded(config, width):
    """Return two layers with padding between them and their width written down."""

    def fn(p, x):
        h = (x @ p["a"]).reshape(5, width)
        return jax.lax.pad(h, 0.5, config) @ p["b"]

    return fn


@pytest.mark.wide(7)
@pytest.mark.parametrize("inner", [0, 1])
@pytest.mark.parametrize("high", [-1, 0, 2])
@pytest.mark.parametrize("low", [-1, 0, 2])
def test_padding_of_any_sign_is_that_of_the_function_at_its_own_width(low, high, inner):
    """Along the axis that is shortened, or else that axis is frozen, and along another."""
    x = randomise({"x": np.empty((5, 3))})["x"]
    around, stays = (low, high, inner), (0, 0, 0)
    for config, out in (
        ((around, stays), 4),
        ((stays, around), 4 + 3 * inner + low + high),
        ((around, (1, 0, 0)), 5),
    ):
        p = randomise({"a": np.empty((3, 4)), "b": np.empty((out, 2))})
        found = groups(padded(config, 4), p, x)
        whole = config[1] == stays or (min(low, high) >= 0 and not inner) or config[1] == (1, 0, 0)
        assert ("a:1" in [group.name for group in found]) == whole
        if whole:
            short = found.keep(p, {"a:1": [0, 2]})
            got = resize(padded(config, 4), p, found, {"a:1": [0, 2]})(short, x)
            np.testing.assert_allclose(got, padded(config, 2)(short, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("take", [
    lambda h: h[1::2], lambda h: h[::3], lambda h: jnp.repeat(h, 2, 1)[:, ::2],
    lambda h: jnp.repeat(h, 2, 1)[:, 1::2],
])  # fmt: skip
def test_slices_of_any_stride_are_those_of_the_function_at_its_own_width(take):
    """So that its own code decides on the numbers: a fourth of a sum is no mean here."""

    def fn(p, x):
        h = take(x @ p["a"])
        return (h.sum(1, keepdims=True) * 0.25 + h) @ p["b"]

    p = randomise({"a": np.empty((3, 4)), "b": np.empty((4, 2))})
    x = randomise({"x": np.empty((5, 3))})["x"]
    found, kept = groups(fn, p, x), {"a:1": [0, 2]}
    short = found.keep(p, kept)
    got = resize(fn, p, found, kept)(short, x)
    np.testing.assert_allclose(got, fn(short, x), rtol=1e-5)


def test_an_empty_batch_is_tiled():
    fn = lambda p, x: jnp.tile(x @ p["a"], (2, 1)) @ p["b"]  # noqa: E731
    p, x = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((0, 3))
    found, kept = groups(fn, p, x), {"a:1": [0, 2]}
    assert resize(fn, p, found, kept)(found.keep(p, kept), x).shape == (0, 2)


@pytest.mark.slow
def test_other_inputs_dtypes_and_transformations():
    fn, variables, (x,), found = made("mlp/linen")
    kept = half(found)
    smaller, short = resize(fn, variables, found, kept), found.keep(variables, kept)
    more = jnp.concatenate([x, 2 * x, -x])
    out = smaller(short, more)
    assert_close(out[: len(x)], smaller(short, x), 1e-5)
    assert_close(jax.vmap(smaller, (None, 0))(short, more[:, None])[:, 0], out, 1e-5)
    low, low_x = jax.tree.map(lambda w: w.astype(jnp.bfloat16), (short, x))
    assert smaller(low, low_x).dtype == jnp.bfloat16
    assert_close(smaller(low, low_x).astype(jnp.float32), smaller(short, x), 0.1)


def test_an_error_says_what_is_wrong():
    fn, variables, inputs, found = made("mlp/linen")
    first = found[0].name
    with pytest.raises(NoMatchError, match="dense_0"):
        resize(fn, variables, found, {"nowhere": [0]})
    for wrong in ([], [99], [-1]):
        with pytest.raises(ShapeError, match="coordinates 0 to 19"):
            resize(fn, variables, found, {first: wrong})
    with pytest.raises(
        ShapeError, match="dense_0/bias' has shape .20,., but the coordinates to keep .* shape .2,."
    ):
        resize(fn, variables, found, {first: [0, 1]})(variables, *inputs)
    with pytest.raises(ShapeError, match="only in one of the two"):
        resize(fn, variables, found, {first: [0, 1]})({**variables, "more": jnp.ones(3)}, *inputs)


@pytest.mark.slow
def test_it_is_compiled_once():
    traces = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.Dense(2)(nn.relu(nn.Dense(6)(x)))

    module, x = Counted(), jnp.ones((1, 3))
    variables = module.init(jax.random.key(0), x)
    found = groups(module.apply, variables, x)
    smaller = resize(module.apply, variables, found, {found[0].name: [0, 1]})
    short = found.keep(variables, {found[0].name: [0, 1]})
    smaller(short, x)
    before = len(traces)
    for scale in range(3):
        smaller(jax.tree.map(lambda w, scale=scale: scale * w, short), x)
    assert len(traces) == before
