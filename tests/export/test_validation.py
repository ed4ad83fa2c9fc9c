"""Files with right checksums are validated: every field of every node, every limit."""

import contextlib
import dataclasses
import json
import math
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard

import compress_jax as cj
from compress_jax.core import ArtifactError
from compress_jax.core.bits import Bits, Gaps
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Float, Table
from compress_jax.core.packed import Clustered, LowRank, Quantized, Sparse, Sum, Tabled
from compress_jax.export import Limits
from compress_jax.export._artifact.checks import CHECKS, Spec, check, memory
from compress_jax.export._artifact.container import rowed
from compress_jax.export._artifact.fields import FIELDS
from compress_jax.export._artifact.limits import LENGTHENED, PARSED
from compress_jax.export._artifact.structure import NODES
from tests.export.test_structure import NODES_TO_SAVE

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "faults"))
import fuzz_artifact  # noqa: E402
import mutations  # noqa: E402


def on_host(node: Any) -> Any:
    return jax.tree.map(np.asarray, node)


def specified(node: Any) -> Any:
    return jax.tree.map(lambda x: Spec(x.shape, x.dtype), node)


def u8(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


F32 = np.float32
CODES = Bits(u8(0x21, 0x43), 4, (2, 2))  # 1, 2, 3, 4
ONE = Layout((2, 2))
QUANTIZED = Quantized(CODES, np.ones((1, 1), F32), u8(8)[0:1].reshape(1, 1), ONE)
TABLED = Tabled(
    CODES, np.ones((1, 1), F32), None, Table((-2.0, -1.0, 0.0, 1.0, 2.0, *range(3, 8))), ONE
)
CLUSTERED = Clustered(CODES, np.arange(5, dtype=F32))
SPARSE = Sparse(np.array([5, 6], F32), Bits(u8(0b0110), 1, (2, 2)))
GAPS = Gaps(Bits(u8(0b00_01), 2, (2,)), (3,))  # one zero, a one, no zero, a one
GAPS_OF_FOUR = Gaps(Bits(u8(0b00_01), 2, (2,)), (2, 2))
LOW = LowRank(np.ones((6, 2), F32), np.ones((2, 4), F32), (2, 3, 4))
SUM = Sum(QUANTIZED, SPARSE)
RIGHT = [CODES, QUANTIZED, TABLED, CLUSTERED, SPARSE, GAPS, LOW, SUM]


def left_out(**fields: Any) -> Sparse:
    """Return codes of which two are left out."""
    return Sparse(
        **{"values": Bits(u8(0x21), 4, (2,)), "mask": Bits(u8(0b0110), 1, (2, 2)), **fields}
    )


WRONG = [  # a node that is right, fields that make it wrong, and what the error says
    (CODES, {"data": u8(1)}, r"shape \[1\].*\[2\]"),
    (CODES, {"data": u8(1, 2, 3)}, r"shape \[3\].*\[2\]"),
    (CODES, {"data": np.array([1, 2], np.int8)}, "dtype int8"),
    (CODES, {"data": [1, 2]}, "a list"),
    (CODES, {"bits": 5}, r"\[3\]"),
    (CODES, {"bits": 3}, "bits after the last code"),
    (CODES, {"shape": (1000,)}, r"\[500\]"),
    (GAPS, {"runs": Bits(u8(0b10_01), 2, (2,))}, "reach to entry 5 of a mask that has 3"),
    (GAPS, {"runs": Bits(u8(0b00_01), 2, (1, 2))}, "one row"),
    (GAPS, {"runs": SPARSE}, "Bits must stand here, not a Sparse"),
    (GAPS, {"shape": (2,)}, "reach to entry 3 of a mask that has 2"),
    (GAPS, {"shape": (2**31,)}, r"2\*\*31"),
    (SPARSE, {"values": np.ones(3, F32)}, "keeps 2 entries, and there are 3 values"),
    (SPARSE, {"values": np.ones((2, 1), F32)}, "one row"),
    (SPARSE, {"values": np.ones(2, np.float64)}, "x64"),
    (SPARSE, {"mask": Bits(u8(0x21, 0x43), 4, (2, 2))}, "1 bit an entry, not 4"),
    (SPARSE, {"mask": Bits(u8(0b1110), 1, (2, 2))}, "keeps 3 entries"),
    (SPARSE, {"mask": GAPS, "values": np.ones(1, F32)}, "keeps 2 entries, and there are 1 values"),
    (SPARSE, {"fill": 1e300}, "does not hold"),
    (SPARSE, {"values": np.ones(2, np.int8), "fill": 200}, "does not hold"),
    (SPARSE, {"values": np.ones(2, np.int8), "fill": 0.5}, "does not hold"),
    (QUANTIZED, {"codes": u8(1, 2)}, "Bits or Sparse must stand here"),
    (QUANTIZED, {"codes": SPARSE}, "Bits must stand here"),
    (QUANTIZED, {"codes": left_out(fill=3)}, "the fill is 3"),
    (QUANTIZED, {"codes": Bits(u8(0x21, 0x43), 4, (4,))}, r"layout is of shape \[2, 2\]"),
    (QUANTIZED, {"scale": np.ones((1, 2), F32)}, r"\[1, 2\].*\[1, 1\]"),
    (QUANTIZED, {"scale": np.ones((), F32)}, r"\[\].*\[1, 1\]"),
    (QUANTIZED, {"scale": np.ones((1, 1), np.float16)}, "float16"),
    (QUANTIZED, {"zero_point": u8(8, 8)}, r"\[2\]"),
    (QUANTIZED, {"zero_point": np.int32(8).reshape(1, 1)}, "int32"),
    (QUANTIZED, {"zero_point": u8(16).reshape(1, 1)}, "16 is no code of 4 bits"),
    (QUANTIZED, {"layout": Layout((2, 2), (1,))}, r"ask for \[1, 2\]"),
    (QUANTIZED, {"layout": Layout((2, 2), (), 2)}, r"ask for \[2, 1, 1\]"),
    (QUANTIZED, {"dtype": np.dtype(np.float64)}, "x64"),
    (TABLED, {"codes": CLUSTERED}, "must stand here"),
    (TABLED, {"scale": np.ones((1, 1), np.float16)}, "float16"),
    (TABLED, {"tensor_scale": np.ones(1, F32)}, r"\[1\]"),
    (TABLED, {"tensor_scale": np.float16(1).reshape(())}, "float16"),
    (TABLED, {"levels": Float(2, 0)}, "codes have 4 bits, and the levels need 3"),
    (TABLED, {"codes": Bits(u8(0x21, 0xA3), 4, (2, 2))}, "one of the codes is 10"),
    (TABLED, {"layout": Layout((4,))}, "layout"),
    (TABLED, {"dtype": np.dtype(np.float64)}, "x64"),
    (
        CLUSTERED,
        {"codes": Bits(u8(0x21, 0x63), 4, (2, 2))},
        "one of the codes is 6, and there are codes for 0 to 5",
    ),
    (CLUSTERED, {"codes": left_out(fill=6)}, "fill is 6"),
    (CLUSTERED, {"codes": left_out(fill=0.5)}, "fill of codes"),
    (CLUSTERED, {"codebook": np.arange(3, dtype=F32)}, "one of the codes is 4"),
    (CLUSTERED, {"codebook": np.ones((5, 1), F32)}, "one row a layer"),
    (CLUSTERED, {"stack": (0,)}, "one row a layer"),
    (CLUSTERED, {"stack": (1, 0)}, "ascending"),
    (CLUSTERED, {"codebook": np.arange(5)}, "int64|x64"),
    (CLUSTERED, {"dtype": np.dtype(np.float64)}, "x64"),
    (LOW, {"left": np.ones((6, 3), F32)}, "no product"),
    (LOW, {"left": np.ones((6, 2), np.int32)}, "floating"),
    (LOW, {"left": np.ones(6, F32)}, "two axes"),
    (LOW, {"right": CODES}, "an array must stand here, not a Bits"),
    (
        LOW,
        {"right": dataclasses.replace(QUANTIZED, zero_point=u8(16).reshape(1, 1))},
        "no code of 4 bits",
    ),
    (LOW, {"right": dataclasses.replace(QUANTIZED)}, r"do not make the shape \[2, 3, 4\]"),
    (LOW, {"shape": (2, 4, 3)}, "do not make"),
    (LOW, {"shape": (2, 3, 5)}, "do not make"),
    (LOW, {"shape": ()}, "no axes"),
    (LOW, {"columns": (3,)}, "no axes"),
    (LOW, {"columns": (0,)}, "do not make"),
    (LOW, {"stack": (0,)}, "two axes behind its layers"),
    (LOW, {"dtype": np.dtype(np.float64)}, "x64"),
    (SUM, {"delta": LOW}, r"terms of \[2, 2\] and \[2, 3, 4\]"),
    (SUM, {"base": np.ones((2, 2), np.int32)}, "floating"),
    (SUM, {"base": CODES}, "an array must stand here, not a Bits"),
    (SUM, {"base": dataclasses.replace(SPARSE, fill=1e300)}, "does not hold"),
    (SUM, {"delta": Sparse(Bits(u8(1), 4, (2,)), SPARSE.mask)}, "floating point, not int32"),
    (SUM, {"dtype": np.dtype(np.float64)}, "x64"),
]


@pytest.mark.parametrize(
    "node", [*RIGHT, *map(on_host, NODES_TO_SAVE.values())], ids=lambda node: type(node).__name__
)
def test_what_is_right_passes_decoded_or_not_and_the_memory_counted_covers_it(node):
    check(node, "x")
    check(specified(node), "x")
    dense = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, node).unpack())
    assert dense.shape == node.shape
    assert (
        memory(node)
        == memory(specified(node))
        >= node.nbytes + math.prod(dense.shape) * dense.dtype.itemsize
    )


@pytest.mark.parametrize(
    ("node", "fields", "said"), WRONG, ids=lambda x: type(x).__name__ if x in RIGHT else None
)
def test_what_is_wrong_is_refused_by_name(node, fields, said):
    with pytest.raises(ArtifactError, match=rf"entry 'dense/kernel[^']*': .*({said})"):
        check(dataclasses.replace(node, **fields), "dense/kernel")


def test_every_kind_of_node_and_each_of_its_fields_has_a_check():
    assert set(CHECKS) == set(NODES.values()) == {type(node) for node in RIGHT}
    fields = {(cls, field) for cls in CHECKS for field in dataclasses.fields(cls)}
    named = {(type(node), name) for node, changes, _ in WRONG for name in changes}
    assert {(cls, field.name) for cls, field in fields} == named
    assert {field.name for _, field in fields if field.metadata.get("static")} == set(FIELDS)


def test_a_groups_padding_counts_as_memory():
    """A layout may pad a group of two entries to a billion."""
    node = dataclasses.replace(
        QUANTIZED, layout=Layout((2, 2), (1,), 10**9), scale=np.ones((1, 1, 2), F32)
    )
    node = dataclasses.replace(node, zero_point=u8(8)[0:1].reshape(1, 1, 1))
    check(node, "x")
    assert memory(node) > 4 * 2 * 10**9


FIELD_VALUES = [
    ("bits", [0, 17, -1, 4.0, True, None, "4", [4], 10**30]),
    (
        "shape",
        [None, 4, "ab", [-1], [2.0], [True], [None], [10**15], [10**15, 0], [1] * 33, {"a": 1}],
    ),
    ("fill", [None, "0", True, [0], 10**400]),
    (
        "dtype",
        [
            "int32",
            "float",
            "object",
            "dtype",
            "uint8",
            "nonsense",
            "",
            3,
            None,
            ["float32"],
            "complex64",
        ],
    ),
    (
        "layout",
        [
            None,
            [],
            [[2, 2]] * 9,
            3,
            [[2], [1], None],
            [[2, 2], [0, 0], None],
            [[2, 2], [True], None],
            [[2, 2], [0], 0],
            [[2, 2], [0], -4],
            [[2, 2], [0], 1.5],
            [[2, 2], [-1], None],
            [[2, 2], 1, None],
        ],
    ),
    (
        "levels",
        [
            None,
            [],
            [2],
            [0, 1, 0],
            [8, 1, 0],
            [2, 9, 0],
            [2, 1, 8],
            [2, 1, -1],
            [2.0, 1, 0],
            [[]],
            [["a"]],
            [[1.0, 1.0]],
            [[2.0, 1.0]],
            [[1e300]],
            [[0.1]],
            [[True]],
            [[0.0], 1, 1, 1],
            [[10**400]],
        ],
    ),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in FIELD_VALUES for value in values]
)
def test_a_field_beyond_its_range_is_refused_by_name(field, value):
    from compress_jax.export._artifact.fields import static

    with pytest.raises(ArtifactError, match=f"'dense/kernel'.*field '{field}'"):
        static(field, value, "dense/kernel")


TREES = [
    [True, "a"],
    {"a": True, "b": True},
    {},
    {"dict": {"a": True}},
    {"dict": [["a"]]},
    {"dict": [[None, True]]},
    False,
    3,
    0.5,
    {"dict": [["a", None], ["a", None]]},
    {"dict": [["a", None], [1, None]]},
    {"list": True},
    {"Sparser": {}},
    {"Bits": []},
    {"Bits": {"data": True, "bits": 4}},
    {"Bits": {"data": True, "bits": 4, "shape": [2], "color": 3}},
    "float32",
    "nonsense",
    {"Gaps": {"runs": None, "shape": [2]}},
    {"Bits": {"data": None, "bits": 4, "shape": [2]}},
    {"Bits": {"data": {"list": [True]}, "bits": 4, "shape": [2]}},
    {"dict": [["__metadata__", True]]},
    {"tuple": [True, True]},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("form", ["named", "old coded"])
@pytest.mark.parametrize("tree", TREES, ids=str)
def test_a_structure_that_is_none_is_refused(tree, form, file):
    mutations.FORMS[form](file, {"x": jnp.ones(2)}, {})
    file.write_bytes(
        mutations.with_content(file.read_bytes(), lambda content: {**content, "tree": tree})
    )
    with pytest.raises(ArtifactError, match=str(file)):
        cj.load(file)


SHORT = [  # what stands for {"x": [2]}, and what the error says
    ("x", "an object or a list"),
    (3, "an object or a list"),
    ({"x": True}, "an object or a list"),
    ({"x": ["float99", 2]}, "float99"),
    ({"x": ["key:lucky", 2]}, "key:lucky"),
    ({"x": ["object", 1]}, "no such dtype"),
    ({"x": [-2]}, "shape"),
    ({"x": [2.0]}, "shape"),
    ({"x": [True]}, "shape"),
    ({"x": [[2]]}, "shape"),
    ({"x": [2, "int8"]}, "shape"),
    ({"x": [10**15]}, "shape"),
    ({"x": [1] * 33}, "shape"),
    ({"x": [3]}, "8 bytes, and by its description they have 12"),
    ({"x": [2], "y": [2]}, "8 bytes, and by its description they have 16"),
    ({}, "8 bytes, and by its description they have 0"),
    ({"x": [0]}, "8 bytes, and by its description they have 0"),
    ({"__metadata__": [2]}, "two entries"),
    ({"a": {"b": [1]}, "a/b": [1]}, "two entries"),
    (["dict", ["x"]], "a pair"),
    (["dict", 3], "a pair"),
    (["dict", [None, [2]]], "a pair"),
    (["dict", [[1], [2]]], "a pair"),
    (["dict", ["x", [1]], [1, [1]]], "text and integers"),
    (["dict", [1, [1]], [1, [1]]], "twice"),
    (["Cake", {}], "Cake"),
    (["Bits"], "an object of its fields"),
    (["Bits", [2]], "an object of its fields"),
    (["Bits", {"bits": 8, "shape": [8]}, 1], "an object of its fields"),
    (["Bits", {"bits": 8, "shape": [8], "data": [2]}], "data left out"),
    (["Bits", {"bits": 8}], "without its field 'shape'"),
    (["Bits", {"bits": 80, "shape": [8]}], "bits"),
    (["Bits", {"bits": 8, "shape": [8], "color": 1}], "has others"),
    (["Quantized", {}], "without its field 'codes'"),
    (["Quantized", {"layout": 3}], "layout"),
    (["Quantized", {"layout": [[2**60]]}], "layout"),
    (["Quantized", {"codes": ["Bits", {"bits": 8}], "layout": [[4]]}], "and by its description"),
    (["Quantized", {"codes": [3], "layout": [[3]]}], "and by its description"),
    (["Quantized", {"codes": 3, "layout": [[3]]}], "an object or a list"),
    (["Gaps", {"runs": ["Bits", {"bits": 8}], "shape": [9]}], "without its field 'shape'"),
    (["Sparse", {"values": [2]}], "without its field 'mask'"),
]


@pytest.mark.parametrize(("tree", "said"), SHORT, ids=[str(tree)[:60] for tree, _ in SHORT])
def test_a_short_form_that_is_none_is_refused(tree, said, file):
    describe(file, {"tree": tree}, bytes(8))
    with pytest.raises(ArtifactError, match=f"^{file}: .*{said}"):
        cj.load(file)


@pytest.mark.parametrize(
    "change", [{"more": 1}, {"metadata": []}, {"metadata": None}, {"coded": 3}]
)
def test_a_description_of_other_entries_is_refused(change, file):
    cj.save(file, {"x": jnp.ones(2)})
    data = mutations.with_content(file.read_bytes(), lambda content: {**content, **change})
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=str(file)):
        cj.load(file)


TEXT = b'{"tree":[2],"metadata":{}}'


def rows() -> dict[str, bytes]:
    """Return rows of bytes, by what is wrong with them."""
    good = mutations.described(TEXT)
    body = bytes(8)
    return {
        "nothing": b"",
        "half a size": good[:6],
        "half a description": good[:12],
        "no tensors": good,
        "a byte too many": good + body + b"1",
        "no deflate": b"\xff" * 30,
        "a size of zero": good[:4] + bytes(4) + good[8:] + body,
        "a size too small": mutations.described(TEXT, len(TEXT) - 1) + body,
        "a size too large": mutations.described(TEXT, len(TEXT) + 1) + body,
        "a size of 4 GB": mutations.described(TEXT, 2**32 - 1) + body,
        "no end": mutations.described(TEXT)[:-1] + body,
        "another end": (len(good) - 7).to_bytes(4, "little") + good[4:] + b"1" + body,
        "digits that are not there": mutations.described(TEXT[:-1] + b',"a":"\0"}') + body,
        "a digit for all": mutations.described(b"\0" * 1000) + body,
        "no text": mutations.described(b"\xff\xfe") + body,
        "no object": mutations.described(b"[2]") + body,
        "half of JSON": mutations.described(TEXT[:9]) + body,
        "a name twice": mutations.described(TEXT[:-1] + b',"tree":[2]}') + body,
        "NaN": mutations.described(TEXT[:-2] + b'"a":NaN}}') + body,
    }


@pytest.mark.parametrize("name", rows())
def test_a_row_that_is_none_is_refused(name, file):
    file.write_bytes(rowed(mutations.described(TEXT) + bytes(8)))
    assert cj.load(file)[0].tolist() == [0, 0]
    file.write_bytes(rowed(rows()[name]))
    with pytest.raises(ArtifactError, match=f"^{file}: "):
        cj.load(file)


ROWS = [
    {"dtype": "I8"},
    {"shape": [1, "size"]},
    {"shape": []},
    {"data_offsets": [0, 3]},
    {"data_offsets": [1, "size"]},
]


@pytest.mark.parametrize("change", ROWS, ids=str)
def test_a_compact_file_of_another_tensor_is_refused(change, file):
    header, body = mutations.parts(rowed(mutations.described(TEXT) + bytes(8)))
    text = json.dumps({**header, "model": {**header["model"], **change}}, separators=(",", ":"))
    text = text.replace('"size"', str(len(body)))
    file.write_bytes(mutations.sealed(text.encode(), body))
    with pytest.raises(ArtifactError, match=f"^{file}: "):
        cj.load(file)


@pytest.mark.parametrize("name", ["", "models"])
def test_a_compact_file_whose_tensor_has_another_name_is_refused(name, file):
    header, body = mutations.parts(rowed(mutations.described(TEXT) + bytes(8)))
    renamed = {"__metadata__": header["__metadata__"], name: header["model"]}
    file.write_bytes(mutations.sealed(renamed, body))
    with pytest.raises(ArtifactError, match="rows of bytes called model"):
        cj.load(file)


def test_a_tensor_that_is_missing_or_of_another_name_or_one_too_many_is_refused(file):
    mutations.as_named(file, {"x": jnp.ones(2)}, {})
    for tree, said in (({"dict": [["b", True]]}, "entry 'b'"), ({"dict": []}, "1 tensors")):
        file.write_bytes(
            mutations.with_content(
                file.read_bytes(), lambda content, tree=tree: {**content, "tree": tree}
            )
        )
        with pytest.raises(ArtifactError, match=f"{file}: .*{said}"):
            cj.load(file)


def test_a_name_twice_and_numbers_that_json_does_not_have_are_refused(file):
    mutations.as_named(file, {"x": jnp.ones(2)}, {"a": 12345})
    data = file.read_bytes()
    for new in ("NaN", "Infinity", "1e999", '1,\\"a\\":2'):
        header, body = mutations.parts(data)
        text = json.dumps(header, separators=(",", ":")).replace("12345", new)
        file.write_bytes(mutations.sealed(text.encode(), body))
        with pytest.raises(ArtifactError, match="JSON"):
            cj.load(file)


INDEX = [
    {"tensors": [0, ["float32", [2]]]},
    {"tables": ["zz"], "tensors": [0, ["float32", [2]]], "crc32": 0},
    [],
    None,
    {"tables": [], "tensors": [None], "crc32": 0},
    {"tables": [], "tensors": [None, None], "crc32": 0},
    {"tables": [], "tensors": [None, ["float32", [3]]], "crc32": 0},
    {"tables": [], "tensors": [0, ["float32", [2]]], "crc32": 0},
    {"tables": ["00ff"], "tensors": [0, ["float32", [2]]], "crc32": 0},
    {"tables": ["ff" * 16], "tensors": [0, ["float32", [2]]], "crc32": 0},
    {"tables": ["00" * 16] * 2, "tensors": [0, ["float32", [2]]], "crc32": 0},
    {"tables": [], "tensors": [None, ["bfloat16", [2]]], "crc32": 0},
    {"tables": [], "tensors": [None, ["float32", [-2]]], "crc32": 0},
    {"tables": [], "tensors": [True, ["float32", [2]]], "crc32": 0},
    {"tables": [3], "tensors": [0, ["float32", [2]]], "crc32": 0},
    {"tables": [], "tensors": [None, ["float32", [2]]], "crc32": None},
    {"tables": ["00" * 16], "tensors": [-1, ["float32", [2]]], "crc32": 0},
]


@pytest.mark.parametrize("index", INDEX, ids=str)
def test_an_index_that_does_not_fit_its_structure_is_refused(index, file):
    tree = {"codes": Bits.pack(jnp.arange(40) % 16, 4), "x": jnp.ones(2)}
    mutations.as_old_coded(file, tree, {})
    file.write_bytes(
        mutations.with_content(file.read_bytes(), lambda content: {**content, "index": index})
    )
    with pytest.raises(ArtifactError, match=str(file)):
        cj.load(file)


CODED: list[Any] = [
    [],
    None,
    {},
    {"more": 1},
    {"ans": -4},
    {"ans": None},
    {"ans": True},
    {"ans": 10**9},
    {"ans": 3},
    {"ans": 8},
    {"streams": []},
    {"streams": [0, 0]},
    {"streams": [1]},
    {"streams": [-1]},
    {"streams": [False]},
    {"streams": ["0"]},
    {"streams": [["float32", [2]]]},
    {"streams": None},
    {"tables": []},
    {"tables": ["00ff"]},
    {"tables": ["zz"]},
    {"tables": ["ff" * 16]},
    {"tables": ["00" * 16] * 2},
    {"tables": None},
    {"crc32": 0},
    {"crc32": None},
]


@pytest.mark.parametrize("change", CODED, ids=str)
def test_coded_tensors_that_do_not_fit_their_structure_are_refused(change, file):
    skewed = jnp.asarray(np.random.default_rng(0).geometric(0.7, 4000) % 16)
    cj.save(file, {"codes": Bits.pack(skewed, 4), "x": jnp.ones(2)}, coded=True)

    def changed(content: Any) -> Any:
        assert content["coded"]["streams"] == [0] and content["coded"]["ans"] > 8
        return {**content, "coded": content["coded"] | change if change else change}

    file.write_bytes(mutations.with_content(file.read_bytes(), changed))
    with pytest.raises(ArtifactError, match=f"^{file}: "):
        cj.load(file)


ENTRIES = [
    {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
    {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},
    {"dtype": "U8", "shape": [7], "data_offsets": [0, 7]},
    {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]},
    {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]},
    {"dtype": "F32", "shape": [2]},
    3,
    None,
    {},
    {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
    {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]},
]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_container_that_does_not_fit_its_bytes_is_refused(entry, file):
    mutations.as_named(file, {"x": Bits.pack(jnp.arange(16) % 16, 4)}, {})
    header, body = mutations.parts(file.read_bytes())
    file.write_bytes(mutations.sealed({**header, "x": entry}, body))
    with pytest.raises(ArtifactError, match=str(file)):
        cj.load(file)


def test_bytes_that_stand_for_no_value_are_refused(file):
    for tree, old, new in (
        ([jnp.array([True, False])], b"\x01\x00", b"\x07\x00"),
        ([jnp.arange(2).astype(jnp.int4)], b"\x00\x01", b"\x10\x01"),
    ):
        mutations.as_named(file, tree, {})
        header, body = mutations.parts(file.read_bytes())
        assert body == old
        file.write_bytes(mutations.sealed(header, new))
        with pytest.raises(ArtifactError, match="entry '0': some bytes stand for no"):
            cj.load(file)
        cj.save(file, tree)
        row = mutations.row_of(file.read_bytes())
        assert row[-2:] == old
        file.write_bytes(mutations.with_row(file.read_bytes(), row[:-2] + new))
        with pytest.raises(ArtifactError, match="entry '0': some bytes stand for no"):
            cj.load(file)


def claim(file: Path, tree: Any, index: Any) -> None:
    """Write a coded file of version 2, of a structure and an index, with nothing behind them."""
    mutations.as_old_coded(file, {}, {})
    data = mutations.with_content(
        file.read_bytes(), lambda content: {**content, "tree": tree, "index": index}
    )
    file.write_bytes(mutations.with_pieces(data, {"ans": b"", "rest": zstandard.compress(b"")}))


def describe(file: Path, content: Any, behind: bytes = b"") -> None:
    """Write a compact file of a description."""
    text = json.dumps({"metadata": {}, **content}, separators=(",", ":")).encode()
    file.write_bytes(rowed(mutations.described(text) + behind))


def refused_within(file: Path, size: int, said: str) -> None:
    """Check that a file is refused before it has taken so many bytes."""
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=said):
        cj.load(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size


@pytest.mark.parametrize("size", [10**9, 10**12, 2**47])
@pytest.mark.parametrize("rare", ["ff", "fe"])
def test_a_few_bytes_that_claim_many_symbols_cost_neither_memory_nor_time(size, rare, file):
    many = {"Bits": {"data": True, "bits": 1, "shape": [size]}}
    claim(file, many, {"tensors": [0], "tables": ["00" + rare], "crc32": 0})
    assert file.stat().st_size < 600
    refused_within(file, 2**20, "entry ''.*limit.*max_bytes")
    coded = {"ans": 0, "streams": [0], "tables": ["00" + rare], "crc32": 0}
    rest = zstandard.compress(b"")
    describe(file, {"tree": ["Bits", {"bits": 1, "shape": [size]}], "coded": coded}, rest)
    assert file.stat().st_size < 300
    refused_within(file, 2**20, "entry ''.*limit.*max_bytes")


def test_a_few_bytes_that_unpack_to_gigabytes_are_refused_before_they_do(file):
    zeros = zstandard.ZstdCompressor(level=1).compress(bytes(2**30))
    claim(file, {"list": [True]}, {"tensors": [["uint8", [2**30]]], "tables": [], "crc32": 0})
    data = mutations.with_pieces(file.read_bytes(), {"rest": zeros})
    for broken in (data, mutations.with_pieces(data, {"content": zeros})):
        file.write_bytes(broken)
        refused_within(file, 2**24, "limit")
    coded = {"ans": 0, "streams": [], "tables": [], "crc32": 0}
    describe(file, {"tree": ["uint8", 2**30], "coded": coded}, zeros)
    refused_within(file, 2**24, "limit")


@pytest.mark.wide(7)
@pytest.mark.parametrize("byte", [b" ", b"\0", b"[", b"0"])
@pytest.mark.parametrize("size", [0, 100, 2**21, 2**24 + 1, 2**27])
def test_a_description_unpacks_to_no_more_than_it_says_and_may(byte, size, file):
    file.write_bytes(rowed(mutations.described(byte * 2**27, size)))
    refused_within(file, 2**23, "limit|unpack")


PIECES = [b"{}", b"[]", b"null", b'["list"]', b'["Bits",{}]', b'["Quantized",{"layout":[[9]]}]']


@pytest.mark.wide(3)
@pytest.mark.parametrize("piece", PIECES, ids=bytes.decode)
def test_a_structure_of_many_parts_stays_within_the_memory_it_may_take(piece, file):
    text = b'{"metadata":{},"tree":["list",' + b",".join([piece] * 30_000) + b"]}"
    file.write_bytes(rowed(mutations.described(text)))
    tracemalloc.start()
    with contextlib.suppress(ArtifactError):
        cj.load(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (PARSED + LENGTHENED) * len(text)


@pytest.mark.wide(1)
@pytest.mark.parametrize("piece", [b"null", b"{}", b"[]"], ids=bytes.decode)
@pytest.mark.slow
def test_a_structure_of_too_many_parts_is_refused_in_time(piece, file):
    text = b'{"metadata":{},"tree":["list",' + b",".join([piece] * 600_000) + b"]}"
    file.write_bytes(rowed(mutations.described(text)))
    assert file.stat().st_size < 5000
    start = time.process_time()
    with pytest.raises(ArtifactError, match="more than .*00,000"):
        cj.load(file)
    assert time.process_time() - start < 8


@pytest.mark.parametrize("form", mutations.FORMS)
def test_one_long_name_above_many_entries_costs_neither_memory_nor_time(form, file):
    mutations.FORMS[form](file, {}, {})
    short = form in ("compact", "coded")
    for length, said in ((10**6, "4,096 characters"), (4000, "have over 16,777,216 characters")):
        name = "k" * length
        tree = {"dict": [[name, {"list": [True] * 90_000}]]}
        tree = {name: ["list", *[[0]] * 90_000]} if short else tree
        file.write_bytes(
            mutations.with_content(
                file.read_bytes(), lambda content, tree=tree: {**content, "tree": tree}
            )
        )
        refused_within(file, 2**27, said)


def test_limits_can_be_raised_and_lowered(file):
    zeros = {"x": jnp.zeros(2**22)}
    cj.save(file, zeros, coded=True)
    assert file.stat().st_size < 2**14
    for call in (cj.load, lambda *a, **k: list(cj.export.stream(*a, **k)), cj.export.breakdown):
        with pytest.raises(ArtifactError, match=f"{file}: .*max_bytes"):
            call(file, max_bytes=2**22)
        call(file, max_bytes=2**26)
    deep: Any = jnp.ones(2)
    for _ in range(120):
        deep = [deep]
    mutations.as_named(file, [jnp.ones(2)], {})
    nested = json.loads('{"list":[' * 120 + "true" + "]}" * 120)
    changed = mutations.with_content(file.read_bytes(), lambda content: {**content, "tree": nested})
    header, body = mutations.parts(changed)
    header["/".join("0" * 120)] = header.pop("0")
    file.write_bytes(mutations.sealed(header, body))
    with pytest.raises(ArtifactError, match="nested"):
        cj.load(file)
    assert jax.tree.structure(cj.load(file, limits=Limits(depth=120))[0]) == jax.tree.structure(
        deep
    )
    short = json.loads('["list",' * 120 + "[2]" + "]" * 120)
    describe(file, {"tree": short}, bytes(8))
    with pytest.raises(ArtifactError, match="nested"):
        cj.load(file)
    assert jax.tree.structure(cj.load(file, limits=Limits(depth=120))[0]) == jax.tree.structure(
        deep
    )
    for form in ("named", "compact"):
        mutations.FORMS[form](file, [jnp.ones(2)] * 11, {})
        for limits, said in ((Limits(arrays=10), "arrays"), (Limits(header=50), "limit is 50")):
            with pytest.raises(ArtifactError, match=said):
                cj.load(file, limits=limits)
        cj.load(file, limits=Limits(arrays=11))
    describe(file, {"tree": [2], "metadata": {"a": "b" * 500}}, bytes(8))
    with pytest.raises(ArtifactError, match="its description has .* the limit is 500"):
        cj.load(file, limits=Limits(header=500))
    cj.load(file, limits=Limits(header=550))


def test_what_could_not_be_loaded_is_not_saved(file):
    for node, fields, _ in WRONG:
        if all(isinstance(x, (np.ndarray, Bits, Sparse, int, float)) for x in fields.values()):
            with pytest.raises(ArtifactError, match="dense/kernel"):
                cj.save(file, {"dense": {"kernel": dataclasses.replace(node, **fields)}})
    for tree, metadata in (
        ({"a": jnp.ones(1), 1: jnp.ones(1)}, {}),
        ({}, [1]),
        ({}, {"a": json.loads("[" * 200 + "]" * 200)}),
    ):
        with pytest.raises(ArtifactError):
            cj.save(file, tree, metadata)
    assert not file.exists()


@pytest.mark.slow
def test_mutations_behind_a_right_checksum_are_refused_or_consistent(tmp_path):
    """A small part of experiments/faults/fuzz_artifact.py, which has the campaign of 10,000."""
    nested = dataclasses.replace(QUANTIZED, codes=left_out(mask=GAPS_OF_FOUR))
    nodes = {
        f"{type(node).__name__} {i}": jax.tree.map(jnp.asarray, node)
        for i, node in enumerate([*RIGHT, nested])
    }
    files = mutations.written(mutations.beside_arrays(nodes))
    counts = dict.fromkeys(("refused", "other", "equal"), 0)
    for number in range(120):
        rng, name = np.random.default_rng([23, number]), list(files)[number % len(files)]
        try:
            data, way = mutations.mutate(files[name], rng)
        except (ValueError, KeyError, TypeError, RecursionError):  # what cannot be written again
            continue
        (tmp_path / "f").write_bytes(data)
        kind, why = fuzz_artifact.outcome(tmp_path / "f")
        assert kind in counts, f"{name}, {way}: {kind}\n{why}"
        counts[kind] += 1
    assert counts["refused"] > 60 and sum(counts.values()) > 100
