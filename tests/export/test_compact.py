"""Small models: the header's share of the file, the short form of a structure, one row of bytes."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import compress_jax as cj
from compress_jax import models
from compress_jax.core.bits import Bits, Gaps
from compress_jax.core.layout import Layout
from compress_jax.core.packed import Quantized, Sparse
from compress_jax.export import breakdown
from compress_jax.export._artifact.artifact import FREE, SHARE, with_names
from compress_jax.export._artifact.compact import VOCABULARY, lengthened, shortened
from compress_jax.export._artifact.limits import Limits
from compress_jax.export._artifact.structure import decode, encode, places
from tests.export.test_artifact import METADATA, MODEL, PACKED, bits
from tests.export.test_structure import NODES_TO_SAVE, assert_same

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "faults"))
from mutations import FORMS  # noqa: E402 # pyright: ignore[reportMissingImports]

VOCABULARY_SHA256 = "30902ec795ec60155c8b5f8223485cc6f0d5f980578d0d50211d67f174f2abc6"
INT4 = cj.at("**/kernel", cj.quantize.uniform(4, granularity="channel"))
BERT_TINY = models.BertClassifier(models.Bert(width=128, depth=2, heads=2), classes=2)


class Keywords(nn.Module):
    """A small DS-CNN whose layers have names that the vocabulary does not have."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, (window, groups) in enumerate([((10, 4), 1), ((3, 3), 16), ((1, 1), 1)]):
            x = nn.Conv(16, window, feature_group_count=groups, name=f"filterbank{i}")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True, name=f"statistics{i}")(x))
        return nn.Dense(8, name="keywords")(x.mean((1, 2)))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "LeNet-300-100": (models.LeNet300100(), (8, 8, 1)),
    "MLPerf Tiny DS-CNN": (models.DSCNN(), (49, 10, 1)),
    "ResNet-8": (models.ResNet(depth=8), (32, 32, 3)),
    "BERT-tiny": (BERT_TINY, (16,)),
    "small DS-CNN": (models.DSCNN(width=16, blocks=2), (49, 10, 1)),
    "small DS-CNN, shifts": (
        models.DSCNN(classes=8, width=16, blocks=2, depthwise="shifts"),
        (49, 10, 1),
    ),
    "other names": (Keywords(), (49, 10, 1)),
}


def packed(name: str) -> Any:
    """Return a network of random numbers, its kernels as 4 bits by channel."""
    model, shape = MODELS[name]
    x = jnp.zeros((1, *shape), jnp.int32 if name == "BERT-tiny" else jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    v = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    return {**v, "params": INT4.pack(v["params"], INT4.init(v["params"]))}


def of_a_run(tree: Any) -> dict[str, Any]:
    """Return metadata as `compress-jax run` writes them."""
    left = INT4.skipped(cj.unpack(tree)["params"])
    return {
        "experiment": "speech", "name": "int4-channel", "model": "Network(classes=8, width=16)",
        "config": "/data/jobs/0417/configs/speech.py",
        "arguments": {"teacher_steps": 800, "steps": 2500, "bits": 4, "max_drop": 0.015, "seed": 3},
        "left_alone": {"no pattern matches": list(left)}, "data": "speech_commands",
        "data_sha256": hashlib.sha256(b"data").hexdigest(), "validation": 0.9123711340206185,
    }  # fmt: skip


def header(file: Path) -> float:
    """Return the bytes that are not those of tensors."""
    (found,) = (part for part in breakdown(file) if part.cause == "header and metadata")
    return found.nbytes


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", MODELS)
def test_a_header_takes_two_percent_and_200_bytes(name, tmp_path):
    tree = packed(name)
    tensors = sum(x.nbytes for x in jax.tree.leaves(tree))
    for metadata in ({}, of_a_run(tree)):
        written = cj.save(tmp_path / "f", tree, metadata)
        assert written == tensors + header(tmp_path / "f") == (tmp_path / "f").stat().st_size
        # What a run says takes some 150 bytes beside those of the container, its digest and the
        # sizes: more than a file of 3 kB should.
        over = 0 if metadata == {} or written > 4000 else 165
        assert header(tmp_path / "f") <= SHARE * written + FREE + over
        back, told = cj.load(tmp_path / "f")
        assert told == metadata and bits(back) == bits(tree)


def test_a_file_has_names_as_long_as_they_cost_little(tmp_path):
    names = {f"layer {i}": i for i in range(9)}
    for size, compact in ((10, True), (10_000, False)):
        tree = {name: jnp.full(size, i, jnp.float32) for name, i in names.items()}
        written = cj.save(tmp_path / "f", tree)
        read = safetensors.numpy.load_file(tmp_path / "f")
        assert set(read) == ({"model"} if compact else set(names))
        assert header(tmp_path / "f") <= SHARE * written + FREE
        with_names_ = len(with_names(*encode(tree), {}))
        assert written <= with_names_ and compact == (
            with_names_ - 36 * size > SHARE * with_names_ + FREE
        )


@pytest.mark.parametrize("coded", [False, True])
def test_any_reader_of_safetensors_reads_a_compact_file(coded, tmp_path):
    cj.save(tmp_path / "f", packed("LeNet-300-100"), {"a": 1}, coded=coded)
    with safetensors.safe_open(tmp_path / "f", "numpy") as file:
        assert file.metadata() == {"format": "compress_jax", "version": "3"}
        assert list(file.keys()) == ["model"]
        row = file.get_tensor("model")
    assert (row.dtype, row.shape) == (np.uint8, (row.size,))
    assert row.tobytes() == (tmp_path / "f").read_bytes()[-row.size :]


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes_in_any_process(tmp_path):
    faults = Path(__file__).parents[2] / "experiments" / "faults"
    paths = os.pathsep.join(map(str, [Path(cj.__file__).parents[1], faults]))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "12345"}
    program = (
        f"{MODEL}\nimport sys, mutations, pathlib\nmade = model()\n"
        "for form, write in mutations.FORMS.items():\n"
        "    write(pathlib.Path(sys.argv[1]) / form, *made)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, check=True)
    for form, write in FORMS.items():
        write(tmp_path / "here", PACKED, METADATA)
        assert (tmp_path / form).read_bytes() == (tmp_path / "here").read_bytes(), form


def test_the_vocabulary_never_changes():
    """Files are read with this very text; were this test to change, old files would be lost."""
    assert hashlib.sha256(VOCABULARY).hexdigest() == VOCABULARY_SHA256


def test_a_file_written_by_hand_from_the_documentation_is_read(tmp_path):
    """Version 3 as it is described; were this test to change, old files would be lost."""
    kernel = ["Quantized", {"layout": [[2, 2], [1]], "codes": ["Bits", {"bits": 4}]}]
    inner = ["list", ["bfloat16", 2], None, ["tuple", ["bool"]]]
    content = {"tree": {"k": kernel, "n": ["dict", [7, inner]]}, "metadata": {"by": "\0"}}
    text = json.dumps(content).replace("\\u0000", "\0").encode()
    coder = zlib.compressobj(wbits=-15, zdict=VOCABULARY)
    description = coder.compress(text) + coder.flush()
    tensors = [
        np.float32([[0.5, 2.0]]),  # implied, in front of what is written
        np.uint8(8),
        np.uint8([0x81, 0x9F]),  # 1, 8, 15, 9, the first in the lower half of its byte
        np.uint8([0x80, 0x3F, 0x00, 0xC0]),  # 1.0 and -2.0, lower byte first
        np.uint8(1),
    ]
    row = struct.pack("<II", len(description), len(text)) + description + bytes(range(32))
    row += b"".join(x.tobytes() for x in tensors)
    file = safetensors.numpy.save(
        {"model": np.frombuffer(row + bytes(16), np.uint8)},
        {"format": "compress_jax", "version": "3"},
    )[:-16]
    (tmp_path / "f").write_bytes(file + hashlib.sha256(file).digest()[:16])
    tree, metadata = cj.load(tmp_path / "f")
    half, none, (true,) = tree["n"][7]
    assert metadata == {"by": bytes(range(32)).hex()} and none is None and true.item() is True
    assert cj.unpack(tree["k"]).tolist() == [[-3.5, 0.0], [3.5, 2.0]]
    assert half.dtype == jnp.bfloat16 and half.tolist() == [1.0, -2.0]


def through_json(tree: Any) -> Any:
    """Return a tree that was made short, written as JSON, and made long again."""
    structure, tensors = encode(tree)
    short = json.loads(json.dumps(shortened(structure, tensors.values())))
    again, entries = lengthened(short, Limits())
    assert len(entries) == len(tensors) == len(list(places(again)))
    for (name, held), entry in zip(places(again), entries, strict=True):
        tensor = tensors[name]
        assert entry == (None if held else [tensor.dtype.name, list(tensor.shape)])
    return decode(again, tensors)


@pytest.mark.parametrize("name", NODES_TO_SAVE)
def test_the_short_form_of_a_node_is_all_there_is_to_know(name):
    assert_same({"w": NODES_TO_SAVE[name]}, through_json({"w": NODES_TO_SAVE[name]}))


def test_what_is_implied_is_left_out():
    node = Quantized.pack(
        jnp.arange(120).reshape(12, 10) % 16, 4, jnp.full((1, 10), 0.1), jnp.uint8(8),
        Layout.of((12, 10), "channel"), jnp.dtype(jnp.float32),
    )  # fmt: skip
    structure, tensors = encode(node)
    wanted = ["Quantized", {"codes": ["Bits", {"bits": 4}], "layout": [(12, 10), (1,)]}]
    assert shortened(structure, tensors.values()) == wanted


TENSORS = hnp.arrays(
    st.sampled_from([np.float32, np.int8, np.bool_, np.uint16, jnp.bfloat16, jnp.int4, np.int64]),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
    elements=st.integers(0, 1),
)
SYMBOLS = st.tuples(st.integers(1, 16), st.integers(0, 40)).map(
    lambda of: Bits.pack(jnp.arange(of[1]) * 7919 % 2 ** of[0], of[0])
)
MASKS = hnp.arrays(np.bool_, st.tuples(st.integers(1, 4), st.integers(1, 9)))
SPARSE = MASKS.map(lambda mask: Sparse.pack(jnp.ones(mask.shape), jnp.asarray(mask)))
GAPS = MASKS.map(lambda mask: Gaps.pack(jnp.asarray(mask), 3))
NODES = st.sampled_from(list(NODES_TO_SAVE.values()))
TREES = st.recursive(
    st.one_of(TENSORS, SYMBOLS, SPARSE, GAPS, NODES, st.none()),
    lambda leaves: st.one_of(
        st.dictionaries(st.text(max_size=3), leaves, max_size=3),
        st.dictionaries(st.integers(-3, 99), leaves, max_size=3),
        st.lists(leaves, max_size=3),
        st.lists(leaves, max_size=3).map(tuple),
    ),
    max_leaves=7,
)
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-9, 2**60),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=4),
        st.binary(min_size=32, max_size=32).map(bytes.hex),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@pytest.mark.wide(9)
@given(TREES, st.dictionaries(st.text(max_size=3), JSON, max_size=3), st.sampled_from(list(FORMS)))
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_any_tree_and_metadata_come_back_and_every_byte_is_accounted_for(
    tmp_path_factory, tree, metadata, form
):
    file = tmp_path_factory.getbasetemp() / "any"
    try:
        encode(tree)
    except cj.core.ArtifactError:  # two leaves of one name
        return
    FORMS[form](file, tree, metadata)
    back, told = cj.load(file)
    assert told == metadata and json.dumps(told) == json.dumps(metadata)
    assert_same(tree, back)
    parts = breakdown(file)
    assert sum(part.nbytes for part in parts) == pytest.approx(file.stat().st_size)
    assert min(part.nbytes for part in parts) >= 0
    assert {part.path for part in parts} == {"", *dict(cj.export.stream(file))}


@pytest.mark.wide(3)
@given(TREES)
@settings(max_examples=50, deadline=None)
@pytest.mark.slow
def test_coded_files_are_never_larger(tmp_path_factory, tree):
    file = tmp_path_factory.getbasetemp() / "any"
    try:
        encode(tree)
    except cj.core.ArtifactError:  # two leaves of one name
        return
    FORMS["compact"](file, tree, {})
    plain = file.stat().st_size
    FORMS["coded"](file, tree, {})
    assert cj.save(file, tree, {}, coded=True) == min(plain, file.stat().st_size)
    assert_same(tree, cj.load(file)[0])


HEX = "0f" * 32


@pytest.mark.parametrize("text", [HEX, HEX.upper(), f'"{HEX}', f'{HEX}"', HEX[1:], f"{HEX}0", "\0"])
def test_digests_and_what_looks_like_them_come_back(text, tmp_path):
    metadata = {"a": text, text: [text, {"b": text}]}
    cj.save(tmp_path / "f", {text: jnp.ones(2)}, metadata)
    tree, told = cj.load(tmp_path / "f")
    assert told == metadata and list(tree) == [text]


@pytest.mark.slow
def test_a_digest_costs_its_32_bytes(tmp_path):
    def size(*digests: str) -> int:
        return cj.save(tmp_path / "f", {}, {"data_sha256": list(digests)})

    one, two = (hashlib.sha256(x).hexdigest() for x in (b"1", b"2"))
    assert size(one, two) - size(one) < 40
