"""Groups: known by hand, checked by permutation on every zoo model, the same names everywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from compress_jax.trace._groups.analyze import analyze
from compress_jax.trace._groups.groups import groups, verify_groups
from tests.trace.zoo import BIG, ZOO
from tests.trace.zoo_entry import randomise
from tests.trace.zoo_layers import causal_attention, rope

IMAGE, VECTOR, SEQUENCE = (
    jnp.asarray(np.random.default_rng(0).normal(size=s), "float32")
    for s in ((2, 6, 6, 3), (4, 5), (2, 7, 8))
)


def shapes(**sizes):
    return randomise({name: np.empty(size) for name, size in sizes.items()})


def members(found):
    return {group.name: set(group.members) for group in found}


@pytest.mark.wide(2)
@pytest.mark.parametrize(
    "name", ["mlp", "lenet", "resnet", "resnet_train", "vit", "llama", "moe", "mobilenet", "unet"]
)
def test_linen_and_nnx_agree(name):
    def found(framework):
        entry = next(each for each in ZOO if each.name == f"{name}/{framework}")
        return groups(*entry.make()[:2], *entry.make()[2])

    strip = lambda path: path.removeprefix("params/").removeprefix("batch_stats/")  # noqa: E731
    linen, nnx = (
        {frozenset((strip(p), i) for p, i in group.members) for group in found(f)}
        for f in ("linen", "nnx")
    )
    assert linen == nnx and len(linen) > 1


@pytest.mark.parametrize("entry", BIG, ids=lambda entry: entry.name)
def test_networks_of_published_size_by_shapes_alone(entry):
    fn, variables, inputs = entry.make()
    found = groups(fn, variables, *inputs)
    # ResNet: two inside each of 16 blocks, one for the stream of each of 4 stages, the stem. ViT:
    # heads, their queries' and their values' features and the hidden ones of each of 12 blocks, the
    # stream.
    assert (
        len(found) == {"resnet50/linen": 2 * 16 + 4 + 1, "vit_b16/linen": 4 * 12 + 1}[entry.name]
        and not found.unknown
    )


def test_mlp():
    params = shapes(w=(5, 8), b=(8,), v=(8, 3))
    found = groups(lambda p, x: jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"], params, VECTOR)
    assert members(found) == {"w:1": {("w", 1), ("b", 0), ("v", 0)}}
    assert found.frozen == {("w", 0): "input", ("v", 1): "output"} and found[0].size == 8
    assert all((places == np.arange(8)).all() for places in found[0].coordinates.values())


class Residual(nn.Module):
    """Stem, one block with batch norm and a skip, pooling, head."""

    train: bool = False
    widths: tuple[int, int] = (4, 6)

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False, name="stem")(x)
        y = nn.Conv(self.widths[1], (3, 3), use_bias=False, name="first")(
            nn.relu(norm(name="norm_0")(x))
        )
        y = nn.Conv(self.widths[0], (3, 3), name="second")(nn.relu(norm(name="norm_1")(y)))
        return nn.Dense(3, name="head")((x + y).mean((1, 2)))


def residual(**options):
    model = Residual(**options)
    variables = randomise(jax.eval_shape(model.init, jax.random.key(0), IMAGE))
    return partial(model.apply, mutable=["batch_stats"] if model.train else False), variables


@pytest.mark.parametrize("train", [False, True])
def test_residual_convolutions(train):
    """In training mode the new statistics go with the old ones."""
    fn, variables = residual(train=train)
    found = groups(fn, variables, IMAGE)

    def norm(i):
        scale, stats = (
            (f"params/norm_{i}", ("scale", "bias")),
            (f"batch_stats/norm_{i}", ("mean", "var")),
        )
        return {(f"{path}/{leaf}", 0) for path, names in (scale, stats) for leaf in names}

    stream = {
        ("params/stem/kernel", 3),
        ("params/second/kernel", 3),
        ("params/second/bias", 0),
        ("params/first/kernel", 2),
    }
    inner = {("params/first/kernel", 3), ("params/second/kernel", 2)}
    assert members(found) == {
        "params/stem/kernel:3": stream | norm(0) | {("params/head/kernel", 0)},
        "params/first/kernel:3": inner | norm(1),
    }
    assert found.frozen[("params/stem/kernel", 0)] == "spatial window"
    assert verify_groups(fn, variables, IMAGE).ok


def test_concatenation():
    def fn(p, x):
        left, right = jnp.tanh(x @ p["left"]), jnp.tanh(x @ p["right"])
        return jnp.concatenate([left, right], -1) @ p["head"] + right @ p["short"]

    found = groups(fn, shapes(left=(5, 3), right=(5, 4), head=(7, 2), short=(4, 2)), VECTOR)
    assert members(found) == {
        "left:1": {("left", 1), ("head", 0)},
        "right:1": {("right", 1), ("head", 0), ("short", 0)},
    }
    assert found["left:1"].coordinates[("head", 0)].tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert found["right:1"].coordinates[("head", 0)].tolist() == [-1, -1, -1, 0, 1, 2, 3]


def attention(p, x, rotate=False):
    """Four query heads, two key heads of three features each; kernels join heads and features."""
    q, k, v = (jnp.einsum("btd,de->bte", x, p[name]).reshape(2, 7, -1, 4) for name in "qkv")
    if rotate:
        q, k = rope(q), rope(k)
    return (
        causal_attention(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)).reshape(2, 7, -1) @ p["out"]
    )


GQA = {"q": (8, 16), "k": (8, 8), "v": (8, 8), "out": (16, 8)}


def test_grouped_query_attention():
    """Key heads with their queries; queries of a key head; features of queries, keys, values."""
    found = groups(attention, shapes(**GQA), SEQUENCE)
    heads, feature, value = (
        {("q", 1), ("k", 1), ("v", 1), ("out", 0)},
        {("q", 1), ("k", 1)},
        {("v", 1), ("out", 0)},
    )
    assert members(found) == {
        "q:1": heads,
        "q:1#2": {("q", 1), ("out", 0)},
        "q:1#3": feature,
        "v:1": value,
    }
    assert [group.size for group in found] == [2, 2, 4, 4]
    assert found["q:1"].coordinates[("q", 1)].tolist() == [0] * 8 + [1] * 8
    assert found["q:1#2"].coordinates[("out", 0)].tolist() == ([0] * 4 + [1] * 4) * 2
    assert found["q:1#3"].coordinates[("k", 1)].tolist() == [0, 1, 2, 3] * 2
    assert verify_groups(attention, shapes(**GQA), SEQUENCE).ok


def test_rotary_positions_freeze_the_features_of_queries_and_keys():
    found = groups(partial(attention, rotate=True), shapes(**GQA), SEQUENCE)
    assert list(members(found)) == ["q:1", "q:1#2", "v:1"]
    assert (
        found.frozen[("q", 1)] == found.frozen[("k", 1)] == "numbered by iota"
        and ("v", 1) not in found.frozen
    )


@pytest.mark.parametrize("layout", ["split", "three last"])
def test_fused_queries_keys_and_values(layout):
    def fn(p, x):
        y = x @ p["qkv"]
        if layout == "split":
            q, k, v = (part.reshape(2, 7, 2, 4) for part in jnp.split(y, 3, -1))
        else:
            q, k, v = jnp.split(y.reshape(2, 7, 2, 12), 3, -1)
        return causal_attention(q, k, v).reshape(2, 7, 8) @ p["out"]

    params = shapes(qkv=(8, 24), out=(8, 8))
    found = groups(fn, params, SEQUENCE)
    qk, v = sorted(
        [group for group in found if group.size == 4], key=lambda group: len(group.members)
    )
    (heads,) = [group for group in found if group.size == 2]
    assert set(heads.members) == set(v.members) == {("qkv", 1), ("out", 0)} and qk.members == (
        ("qkv", 1),
    )
    index = np.arange(24).reshape((2, 3, 4) if layout == "three last" else (3, 2, 4))
    along = 0 if layout == "three last" else 1
    place = np.argwhere(index >= 0)
    assert (heads.coordinates[("qkv", 1)] == place[:, along]).all()
    assert (v.coordinates[("qkv", 1)] == np.where(place[:, 1 - along] == 2, place[:, 2], -1)).all()
    assert (qk.coordinates[("qkv", 1)] == np.where(place[:, 1 - along] < 2, place[:, 2], -1)).all()
    assert verify_groups(fn, params, SEQUENCE).ok


def test_fused_kernels_indexed_after_a_reshape():
    """One axis of features for all three: queries, keys and values are permuted alike."""

    def fn(p, x):
        q, k, v = ((x @ p["qkv"]).reshape(2, 7, 3, 2, 4)[:, :, i] for i in range(3))
        return causal_attention(q, k, v).reshape(2, 7, 8) @ p["out"]

    found = groups(fn, shapes(qkv=(8, 24), out=(8, 8)), SEQUENCE)
    assert members(found) == dict.fromkeys(("qkv:1", "qkv:1#2"), {("qkv", 1), ("out", 0)})
    assert found["qkv:1#2"].coordinates[("qkv", 1)].tolist() == [0, 1, 2, 3] * 6


@pytest.mark.slow
def test_flattened_feature_map_keeps_and_permutes_by_coordinates():
    def fn(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(y).reshape(2, -1) @ p["head"]

    params = shapes(conv=(3, 3, 3, 4), head=(144, 5))
    found = groups(fn, params, IMAGE)
    assert found["conv:3"].coordinates[("head", 0)].tolist() == [0, 1, 2, 3] * 36
    swapped = found.permute(params, "conv:3", [2, 0, 3, 1])
    assert not jnp.allclose(swapped["conv"], params["conv"])
    np.testing.assert_allclose(fn(swapped, IMAGE), fn(params, IMAGE), rtol=1e-5, atol=1e-5)
    smaller, silent = (
        found.keep(params, {"conv:3": [3, 1]}),
        dict(params, conv=params["conv"].at[..., jnp.array([0, 2])].set(0)),
    )
    assert smaller["conv"].shape == (3, 3, 3, 2) and smaller["head"].shape == (72, 5)
    np.testing.assert_allclose(fn(smaller, IMAGE), fn(silent, IMAGE), rtol=1e-5, atol=1e-5)


def test_keep_takes_several_groups_of_one_axis():
    found = groups(attention, shapes(**GQA), SEQUENCE)
    smaller = found.keep(shapes(**GQA), {"q:1": [1], "v:1": [0, 2, 3]})
    assert {path: leaf.shape for path, leaf in smaller.items()} == {
        "q": (8, 8),
        "k": (8, 4),
        "v": (8, 3),
        "out": (6, 8),
    }
    np.testing.assert_array_equal(smaller["v"], shapes(**GQA)["v"][:, 4:][:, [0, 2, 3]])


def test_grouped_and_depthwise_convolutions():
    def fn(p, x):
        conv = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
        layout = ("NHWC", "HWIO", "NHWC")
        x = conv(x, p["wide"], dimension_numbers=layout)
        x = conv(jnp.tanh(x), p["depth"], feature_group_count=6, dimension_numbers=layout)
        x = conv(jnp.tanh(x), p["grouped"], feature_group_count=2, dimension_numbers=layout)
        return jnp.tanh(x).mean((1, 2)) @ p["head"]

    params = shapes(wide=(1, 1, 3, 6), depth=(3, 3, 1, 6), grouped=(3, 3, 3, 8), head=(8, 5))
    found = groups(fn, params, IMAGE)
    both = {("wide", 3), ("depth", 3)}
    assert members(found) == {
        "wide:3": both | {("grouped", 3), ("head", 0)},  # the groups of the grouped convolution
        "wide:3#2": both | {("grouped", 2)},  # the inputs of each
        "grouped:3": {("grouped", 3), ("head", 0)},  # the outputs of each
    }
    assert verify_groups(fn, params, IMAGE).ok and not verify_groups(fn, params, IMAGE).undetected


def test_names_and_order_depend_neither_on_widths_nor_on_the_order_of_the_tree():
    names = [
        [group.name for group in groups(*residual(widths=widths), IMAGE)]
        for widths in ((4, 6), (6, 4), (5, 5))
    ]
    assert names[0] == names[1] == names[2] == ["params/stem/kernel:3", "params/first/kernel:3"]

    def named(first, second):
        fn = lambda p, x: jnp.tanh(jnp.tanh(x @ p[first]) @ p[second]) @ p["head"]  # noqa: E731
        return [
            group.name
            for group in groups(
                fn, shapes(**{first: (5, 6), second: (6, 7), "head": (7, 3)}), VECTOR
            )
        ]

    assert named("a", "b") == ["a:1", "b:1"] and named("z", "b") == ["z:1", "b:1"]


def test_an_output_is_not_a_parameter_because_of_its_shape_alone():
    found = groups(lambda w, x: x @ w, jnp.ones((5, 5)), jnp.ones((5, 5)))
    assert not len(found) and set(found.frozen.values()) == {"input", "output"}


def test_the_axes_of_every_value_are_at_hand():
    """By position, the axes of operands and results, and the summed axes: `resize` needs them."""
    fn, variables = residual()
    walk = analyze(fn, variables, IMAGE).walk
    traced = analyze(fn, variables, IMAGE).traced.jaxpr.jaxpr
    for i, eqn in enumerate(traced.eqns):
        if (i,) in walk.values:
            sizes = [tuple(axis.size for axis in dims) for dims in walk.values[(i,)][1]]
            assert sizes == [var.aval.shape for var in eqn.outvars]
    assert any(walk.summed.values())
