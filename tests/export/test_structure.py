"""Every tree that can be saved is read bit for bit; others are refused by name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax.dtypes import bfloat16

import compress_jax as cj
from compress_jax.core import ArtifactError
from compress_jax.core.bits import Bits, Gaps
from compress_jax.core.layout import Layout
from compress_jax.core.packed import LowRank, Quantized, Sparse, Sum, is_packed
from compress_jax.export._artifact.structure import NODES, decode, encode

X = jax.random.normal(jax.random.key(0), (12, 10))
SCARCE = jnp.where(X > 1.5, X, 0)  # few entries: their mask is smaller as gaps
DENSE = jnp.where(X > -0.5, X, 0)  # many: a bit each


def packed(compression: cj.Compression, x: jax.Array = X):
    return compression.pack({"w": x}, compression.init({"w": x}))["w"]


def factored() -> LowRank:
    left, right = packed(cj.quantize.uniform(4), X[:, :2]), packed(cj.cluster.kmeans(3), X[:2])
    return LowRank(left, right, (2, 6, 10), jnp.dtype(jnp.bfloat16))


NODES_TO_SAVE = {
    "bits": Bits.pack(jnp.arange(77).reshape(7, 11) % 8, 3),
    "bits of two bytes": Bits.pack(jnp.arange(5) * 9000, 16),
    "bits of nothing": Bits.pack(jnp.zeros((0, 3), jnp.uint8), 5),
    "gaps": Gaps.pack(SCARCE != 0, 3),
    "sparse floats, gaps": Sparse.pack(SCARCE, SCARCE != 0),
    "sparse floats, bitmask": Sparse.pack(DENSE.astype(jnp.bfloat16), DENSE != 0),
    "sparse, filled": Sparse.pack(X, X > 0, fill=0.25),
    "sparse, filled with minus zero": Sparse.pack(X, X > 0, fill=-0.0),
    "sparse, nothing kept": Sparse.pack(X, jnp.zeros_like(X)),
    "quantized": packed(cj.quantize.uniform(3)),
    "quantized, asymmetric, by channel": packed(cj.quantize.uniform(5, symmetric=False,
    granularity="channel")),
    "quantized in groups": packed(cj.quantize.uniform(4, granularity=4)),
    "quantized, last group padded": Quantized.pack(
        jnp.arange(120).reshape(12, 10) % 16, 4, jnp.full((3, 1, 10), 0.1), jnp.uint8(8),
        Layout.of((12, 10), 5, pad=True), jnp.dtype(jnp.float16),
    ),
    "pruned, quantized": packed(cj.chain(cj.prune.magnitude(0.9), cj.quantize.uniform(4))),
    "quantized bfloat16": packed(cj.quantize.uniform(8), X.astype(jnp.bfloat16)),
    "tabled": packed(cj.quantize.nf4("channel")),
    "tabled by one's own levels": packed(cj.quantize.codebook(cj.quantize.Table((-1.0, 0.1, 0.3)))),
    "tabled, scales e8m0": packed(cj.quantize.mxfp8(pad=True)),
    "tabled, scales e4m3, times one of the tensor": packed(cj.quantize.nvfp4(pad=True),
    X.astype(jnp.bfloat16)),
    "pruned, tabled": packed(cj.chain(cj.prune.magnitude(0.9), cj.quantize.fp8("e5m2"))),
    "binary, pruned": packed(cj.chain(cj.quantize.binary(), cj.prune.magnitude(0.5))),
    "clustered": packed(cj.cluster.kmeans(6)),
    "pruned, clustered": packed(cj.chain(cj.prune.magnitude(0.8), cj.cluster.kmeans(4))),
    "low rank": packed(cj.lowrank.svd(2)),
    "low rank, factors packed": factored(),
    "sum": Sum(packed(cj.quantize.uniform(4)), packed(cj.lowrank.svd(2))),
    "sum with an array, bfloat16": Sum(X.reshape(2, 6, 10), factored(), jnp.dtype(jnp.bfloat16)),
}  # fmt: skip


def pass_through(tree):
    """Save and load without a file."""
    structure, tensors = encode(tree)
    return decode(json.loads(json.dumps(structure)), tensors)


def assert_same(a, b):
    """Same structure, static fields, dtypes, shapes, and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", NODES_TO_SAVE)
def test_a_packed_node_comes_back_with_what_it_unpacks_to(name):
    node = NODES_TO_SAVE[name]
    back = pass_through({"w": node})["w"]
    assert type(back) is type(node)
    assert_same(node, back)
    assert_same(node.unpack(), back.unpack())
    for field in dataclasses.fields(node):
        if field.metadata.get("static"):
            value = getattr(node, field.name)
            assert repr(value) == repr(getattr(back, field.name)), (
                f"{field.name}, and a -0.0 is no 0"
            )


def test_the_nodes_above_are_of_every_kind_and_nesting():
    def kinds(node):
        inner = [
            x
            for f in dataclasses.fields(node)
            if type(x := getattr(node, f.name)).__name__ in NODES
        ]
        return {type(node).__name__}.union(
            *({f"{type(node).__name__}/{k}" for k in kinds(x)} for x in inner)
        )

    found = set().union(*map(kinds, NODES_TO_SAVE.values()))
    assert {name.split("/")[-1] for name in found} == set(NODES)
    assert {
        "Quantized/Bits",
        "Quantized/Sparse/Bits",
        "Quantized/Sparse/Gaps/Bits",
        "Clustered/Bits",
    } <= found
    assert {"Tabled/Bits", "Tabled/Sparse/Bits", "Tabled/Sparse/Gaps/Bits"} <= found
    assert {
        "Clustered/Sparse/Gaps/Bits",
        "LowRank/Quantized/Bits",
        "LowRank/Clustered/Bits",
        "Sparse/Gaps/Bits",
        "Sum/Quantized/Bits",
        "Sum/LowRank/Quantized/Bits",
    } <= found


DTYPES = [
    "bool", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16",
    "bfloat16", "float32",
    "float8_e4m3fn", "float8_e5m2", "complex64",
]  # fmt: skip


@pytest.mark.wide(14)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0,), (2, 0), (0, 3)], ids=str)
def test_an_array_of_any_dtype_and_shape_comes_back(dtype, shape):
    x = jnp.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape) - 3).astype(dtype)
    back = pass_through([x])[0]
    assert isinstance(back, jax.Array)
    assert_same(x, back)


def test_bits_of_floats_that_are_no_number_come_back():
    x = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0x80000000, 0x00000001], np.uint32).view(
        np.float32
    )
    assert np.asarray(pass_through([x])[0]).tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "complex128"])
def test_64_bits_are_not_cut_to_32(dtype):
    x = (np.arange(4) * 7 + 2.0**53 - 1).astype(dtype)
    assert_same(x, pass_through([x])[0])


@pytest.mark.parametrize("dtype", ["float32", bfloat16, ">f4", ">i2"])
def test_memory_order_does_not_matter(dtype):
    x = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for view in (x.T, x[:, ::-1], x[:, 1], np.asfortranarray(x)):
        back = np.asarray(pass_through([view])[0])
        assert back.shape == view.shape and (back == view).all()


def test_python_numbers_become_arrays():
    back = pass_through({"int": 2**40, "float": 0.1, "bool": True})
    assert {name: (x.dtype.name, x.item()) for name, x in back.items()} == {
        "int": ("int64", 2**40), "float": ("float64", 0.1), "bool": ("bool", True),
    }  # fmt: skip


def test_containers_and_keys_come_back():
    one = jnp.ones(1)
    tree = {
        "empty": [{}, [], (), None],
        "nested": ({"a": [one, None]}, [(one,)], one),
        "numbers": {1: one, -2: one, 0: {"x": one}},
        "odd": {
            "": one,
            " ": one,
            "a.b": one,
            "ä/ö": one,
            '"\\\n\t': one,
            "\x00": one,
            "💥": one,
            "sha256": one,
        },
        "dict": {"dict": one, "Quantized": {"codes": one}, "tuple": one},
    }
    back = pass_through(tree)
    assert_same(tree, back)
    assert [type(x) for x in back["empty"]] == [dict, list, tuple, type(None)]
    assert list(back["numbers"]) == [1, -2, 0] and list(back["odd"]) == list(tree["odd"])


@pytest.mark.parametrize(
    "tree", [X, None, [], (), {}, NODES_TO_SAVE["quantized"]], ids=lambda tree: type(tree).__name__
)
def test_the_root_may_be_anything(tree):
    assert_same(tree, pass_through(tree))


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(4, 6, rngs=nnx.Rngs(i)) for i in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_an_nnx_state_becomes_a_nested_dict():
    state = nnx.split(Net())[1]
    quantize = cj.at("**/kernel", cj.quantize.uniform(4))
    packed, view = (
        quantize.pack(state, quantize.init(state)),
        quantize.view(state, quantize.init(state)),
    )
    back = pass_through(packed)
    assert is_packed(back["layers"][0]["kernel"]) and type(back["layers"]) is dict
    assert_same(nnx.to_pure_dict(view), cj.unpack(back))


def test_a_frozen_dict_and_a_named_tuple_become_plain():
    tree = freeze({"a": cj.CompressionState({"w": X}, {})})
    assert_same({"a": ({"w": X}, {})}, pass_through(tree))


@dataclasses.dataclass
class Impostor:
    codes: int = 0


Impostor.__name__ = "Quantized"


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        ("text", "str"),
        (b"bytes", "bytes"),
        (object(), "object"),
        (len, "builtin"),
        (1j, "complex"),
        (2**100, "object"),
        (np.array(["a"]), "str"),
        (np.array([None]), "object"),
        (np.array(["2020-01-01"], "M8[D]"), "datetime64"),
        (np.zeros(2, [("a", "f4")]), "void"),
        (Impostor(), "Quantized"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_array_is_refused_by_path(leaf, said):
    with pytest.raises(ArtifactError, match=rf"'a/0/b' is a .*{said}"):
        encode({"a": [{"b": leaf}]})


@pytest.mark.parametrize("key", [(1, 2), 1.5, None, np.int64(3), b"x"], ids=repr)
def test_a_key_that_would_come_back_as_another_is_refused(key):
    with pytest.raises(ArtifactError, match="in 'a' is a"):
        encode({"a": {key: X}})


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": X}, "a/b": X + 1},
        {"a": {1: X, "1": X + 1}},
        {"": {"a": X}, "a": X + 1},
        {"w": NODES_TO_SAVE["quantized"], "w.scale": X},
        {"__metadata__": X},
    ],
    ids=lambda tree: " ".join(map(str, tree)),
)
def test_two_leaves_of_one_name_are_refused(tree):
    with pytest.raises(ArtifactError, match="rename a key"):
        encode(tree)


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        ({"dict": [["x", True]]}, "'x'"),
        ({"Cake": {}}, "'Cake'"),
        ({"Bits": {"data": "int4"}}, "''"),
    ],
)
def test_a_structure_that_names_what_is_not_there_is_an_error(structure, said):
    with pytest.raises(ArtifactError, match=said):
        decode(structure, {})


@pytest.mark.slow
def test_default_static_fields_cost_nothing():
    structure, tensors = encode({"w": NODES_TO_SAVE["pruned, quantized"]})
    node = structure["dict"][0][1]["Quantized"]
    assert set(node) == {"codes", "scale", "zero_point", "layout"} and set(
        node["codes"]["Sparse"]
    ) == {"values", "mask"}
    assert set(tensors) == {"w.codes.values", "w.codes.mask", "w.scale", "w.zero_point"}
