"""The row of bytes that a small or coded artifact is: a description, then all tensors.

====================  ==============================================================================
4 bytes               size of the description as it is stored, little-endian like all numbers
4 bytes               size of the JSON that it unpacks to
the description       JSON in raw deflate, with `VOCABULARY` as preset dictionary; in it
                      NUL stands for 64 hexadecimal digits between quotes
32 bytes for each     the numbers of these digits
all else              the tensors, one behind the other, in the order of the structure; or, if the
                      description has ``coded``, ``ans``, ``adaptive`` and ``rest`` of `streams`
====================  ==============================================================================

The JSON has ``tree``, a structure in its short form, and ``metadata``. That of a coded row has
``coded`` too: ``ans`` is the size of that part, ``adaptive`` that of its part, left out if there is
none, ``streams`` has the table or the settings of each coded tensor or null, ``tables`` and
``crc32`` are those of `streams`.

The same model gives the same bytes wherever deflate is zlib's. Another coder (zlib-ng) may write a
description of other bytes, and each reads what the other wrote.

The short form of a structure says everything once, dtypes and shapes too:

==============================  ====================================================================
``null``                        None
``{key: node, ...}``            a dict whose keys are text
``["dict", [key, node], ...]``  a dict whose keys are integers
``["list", node, ...]``         a list; ``"tuple"`` likewise
``[3, 4]``                      a float32 tensor of this shape
``["int8", 3, 4]``              a tensor of another dtype, or typed random keys
``["Quantized", {...}]``        a packed node and its fields
==============================  ====================================================================

Fields that others imply (see `implied`) are left out, and so are the data of Bits, whose size
follows from their bits and shape.
"""

import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np

from compress_jax.core.errors import ArtifactError
from compress_jax.core.layout import Layout
from compress_jax.core.types import JsonObject
from compress_jax.export._artifact.checks import Spec
from compress_jax.export._artifact.container import as_json, content_of
from compress_jax.export._artifact.fields import (
    KEY,
    KEY_WORDS,
    NATIVE,
    dtype_named,
    refuse,
    static,
)
from compress_jax.export._artifact.limits import LENGTHENED, Budget, Limits
from compress_jax.export._artifact.structure import (
    NODES,
    Stored,
    Structure,
    Tensors,
    below,
    places,
    tensor_fields,
    too_deep,
)
from compress_jax.export._artifact.validation import few, grammar, survey
from compress_jax.export._coding.streams import Coded, code, spec_of, specified

SHA256 = re.compile(rb'"([0-9a-f]{64})"')
LEVEL = 9  # the most that zlib does, of work and of memory: fixed, as the bytes depend on it
LARGEST = 2**62  # what is written needs no limit

Short: TypeAlias = JsonObject | list[Any] | None
"""A structure in its short form."""

Entry: TypeAlias = list[Any] | None
"""Dtype and shape of a tensor as a file has it, not checked yet; None for the data of Bits."""


def written(tree: Structure, tensors: Tensors, metadata: JsonObject) -> bytes:
    """Return a tree as a row of bytes.

    Args:
      tree: of `structure.encode`.
      tensors: of it, by name.
      metadata: anything JSON can hold.

    Returns:
      The row.

    Raises:
      ArtifactError: if the metadata cannot be written.

    Example:
      >>> row = written({"dict": [["w", True]]}, {"w": np.zeros(3, np.float32)}, {})
      >>> opened(memoryview(row), Budget(len(row)), Limits()).parts
      {'w': array([0., 0., 0.], dtype=float32)}
    """
    short = shortened(tree, tensors.values())
    # The order is that of the structure as it will be read: with the implied fields first.
    again = lengthened(short, Limits(arrays=LARGEST))[0]
    body = b"".join(tensors[name].tobytes() for name, _ in places(again))
    return _described({"tree": short, "metadata": metadata}) + body


class Row(NamedTuple):
    """A coded row.

    Attributes:
      data: its bytes.
      adaptive: whether some tensor is coded adaptively, which a reader of version 3 cannot read.
    """

    data: bytes
    adaptive: bool


def written_coded(tree: Structure, tensors: Tensors, metadata: JsonObject) -> Row:
    """Return a tree as a row of bytes, its symbols at their entropy.

    Args:
      tree: as of `written`.
      tensors: as of `written`.
      metadata: as of `written`.

    Returns:
      The row.

    Raises:
      ArtifactError: if the metadata cannot be written.
    """
    short = shortened(tree, tensors.values())
    again, entries = lengthened(short, Limits(arrays=LARGEST))
    parts = code(again, tensors)
    found = zip(entries, parts.index["tensors"], strict=True)
    coded = {
        "ans": len(parts.ans),
        "streams": [table for entry, table in found if entry is None],
        "tables": parts.index["tables"],
        "crc32": parts.index["crc32"],
    }
    if parts.adaptive:
        coded["adaptive"] = len(parts.adaptive)
    description = _described({"tree": short, "metadata": metadata, "coded": coded})
    return Row(description + parts.ans + parts.adaptive + parts.rest, bool(parts.adaptive))


class Opened(NamedTuple):
    """What a file says and holds, verified as far as it can be without decoding.

    Attributes:
      tree: the structure.
      metadata: of the file.
      parts: the tensors by name, or coded.
    """

    tree: Structure
    metadata: JsonObject
    parts: Tensors | Coded


def opened(row: memoryview, budget: Budget, limits: Limits) -> Opened:
    """Read a row and verify all of it that can be verified before its tensors are decoded.

    Args:
      row: of `written` or `written_coded`, or anything else.
      budget: of memory.
      limits: of JSON, depth and number.

    Returns:
      Its content.

    Raises:
      ArtifactError: if it is no such row, or beyond a limit.
    """
    text, body = _undescribed(row, budget, limits)
    content = content_of(text, limits, optional={"coded"})
    tree, entries = lengthened(content["tree"], limits)
    # Places are read along the tree, so it must be one before that.
    grammar(tree, limits)
    if "coded" in content:
        coded = _coded(content["coded"], entries, body)
        survey(tree, specified(tree, coded), budget, limits)
        return Opened(tree, content["metadata"], coded)
    found = zip(places(tree), entries, strict=True)
    specs = {name: spec_of(name, held, entry) for (name, held), entry in found}
    claimed = sum(map(_size, specs.values()))
    if claimed != len(body):
        raise ArtifactError(
            f"its tensors have {len(body):,} bytes, and by its description they have {claimed:,}"
        )
    survey(tree, specs, budget, limits)
    return Opened(tree, content["metadata"], dict(_sliced(specs, body)))


def _described(content: JsonObject) -> bytes:
    text = as_json(content).encode()
    # Deflate would need more than a byte for each of the 64 digits of a SHA-256.
    digests = [bytes.fromhex(digits.decode()) for digits in SHA256.findall(text)]
    text = SHA256.sub(b'"\0"', text)
    data = squeezed(text)
    sizes = len(data).to_bytes(4, "little") + len(text).to_bytes(4, "little")
    return b"".join([sizes, data, *digests])


def _undescribed(row: memoryview, budget: Budget, limits: Limits) -> tuple[bytes, memoryview]:
    """Return the JSON of a row and what is behind it."""
    end = 8 + int.from_bytes(row[:4], "little")
    size = int.from_bytes(row[4:8], "little")
    # The size that the JSON unpacks to is checked before it is unpacked.
    budget.parse(size, limits, "its description")
    budget.take(LENGTHENED * size, "its description")
    first, *others = unsqueezed(bytes(row[8:end]), size).split(b"\0")
    body = end + 32 * len(others)
    if len(row) < body:
        raise ArtifactError(f"its description should have {body:,} bytes, and it ends before")
    digests = [row[start : start + 32].hex().encode() for start in range(end, body, 32)]
    pieces = chain.from_iterable(zip(digests, others, strict=True))
    return b"".join([first, *pieces]), row[body:]


def squeezed(text: bytes) -> bytes:
    """Return text as raw deflate; what the vocabulary has costs next to nothing.

    Example:
      >>> text = b'{"dense_0":{"bias":[300],"kernel":["Quantized",{'
      >>> len(squeezed(text)) < 10, unsqueezed(squeezed(text), len(text)) == text
      (True, True)
    """
    coder = zlib.compressobj(
        LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, LEVEL, zlib.Z_DEFAULT_STRATEGY, VOCABULARY
    )
    return coder.compress(text) + coder.flush()


def unsqueezed(data: bytes, size: int) -> bytes:
    """Undo `squeezed`.

    Args:
      data: raw deflate.
      size: of the text; no more than this is unpacked.

    Returns:
      The text.

    Raises:
      ArtifactError: if it is damaged, or has another size.
    """
    decoder = zlib.decompressobj(-zlib.MAX_WBITS, zdict=VOCABULARY)
    try:
        text = decoder.decompress(data, size + 1)  # one more than there should be, and never 0
    except zlib.error as error:
        raise ArtifactError(f"its description cannot be unpacked: {error}") from error
    if len(text) != size or not decoder.eof or decoder.unused_data:
        raise ArtifactError(f"its description does not unpack to the {size:,} bytes that it names")
    return text


def _size(spec: Spec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _sliced(specs: dict[str, Spec], body: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a row; each has its own memory, as in the row none is aligned."""
    start = 0
    for name, spec in specs.items():
        own = bytes(body[start : start + _size(spec)])
        yield name, np.frombuffer(own, spec.dtype).reshape(spec.shape)
        start += len(own)


def _coded(coded: object, entries: Sequence[Entry], body: memoryview) -> Coded:
    """Return the parts of a coded row, its index as `streams` has it."""
    needed = {"ans", "streams", "tables", "crc32"}
    if not isinstance(coded, dict) or coded.keys() - {"adaptive"} != needed:
        raise ArtifactError("its coded tensors must have ans, streams, tables and crc32")
    streams = coded["streams"]
    if not isinstance(streams, list) or len(streams) != entries.count(None):
        raise ArtifactError(f"{entries.count(None)} of its tensors are symbols, and not so streams")
    sizes = [coded["ans"], coded.get("adaptive", 0)]
    whole = all(type(size) is int and size >= 0 for size in sizes)
    if not whole or sum(sizes) > len(body):
        raise ArtifactError("its coded symbols have no size, or a larger one than the file")
    of_symbols = iter(streams)
    tensors = [next(of_symbols) if entry is None else entry for entry in entries]
    index = {"tensors": tensors, "tables": coded["tables"], "crc32": coded["crc32"]}
    end, rest = sizes[0], sum(sizes)
    return Coded(index, bytes(body[:end]), bytes(body[rest:]), bytes(body[end:rest]))


# The short form of a structure.

KINDS = {"dict", "list", "tuple", *NODES}
# Containers, packed nodes and arrays for each array that there may be: empty containers cost time
# too, and a million of them take three kilobytes.
PARTS = 4


class Implied(NamedTuple):
    """What the fields of a node imply.

    Attributes:
      fields: the short form of those that may be left out.
      shapes: the shape of the nodes inside it, by field.
    """

    fields: dict[str, Short]
    shapes: dict[str, list[int] | None]

    def says(self, name: str, value: object) -> bool:
        """Return whether a field is as it is implied, so that it may be left out."""
        return name in self.fields and self.fields[name] == value


def implied(kind: str, fields: JsonObject, shape: list[int] | None, where: str) -> Implied:
    """Return what a node's other fields, and the node around it, say of its fields.

    Args:
      kind: of the node.
      fields: in JSON; of them only the layout counts.
      shape: of the array that it stands for, if the node around it says so.
      where: the entry, for errors.

    Returns:
      Fields and shapes.

    Raises:
      ArtifactError: if the layout is none.

    Example:
      >>> implied("Quantized", {"layout": [[9, 4], [1]]}, None, "kernel").fields
      {'scale': [1, 4], 'zero_point': ['uint8']}
    """
    if kind in ("Bits", "Gaps"):
        return Implied({} if shape is None else {"shape": shape}, {})
    if kind == "Sparse":
        return Implied({}, {"mask": shape})
    if kind not in ("Quantized", "Tabled") or "layout" not in fields:
        return Implied({}, {})
    layout = static("layout", fields["layout"], where)
    assert isinstance(layout, Layout)
    found: dict[str, Short] = {"scale": list(layout.scale_shape)}
    if kind == "Quantized":
        found["zero_point"] = ["uint8"]  # a symmetric grid has one zero point for all
    else:
        found["tensor_scale"] = None
    return Implied(found, {"codes": list(layout.shape)})


def shortened(structure: Structure, tensors: Iterable[np.ndarray]) -> Short:
    """Return the short form of a structure.

    Args:
      structure: of `structure.encode`.
      tensors: in its order.

    Returns:
      JSON.

    Example:
      >>> shortened({"dict": [["w", True], ["n", {"list": [True]}]]}, [np.ones(2), np.int8([3])])
      {'w': ['float64', 2], 'n': ['list', ['int8', 1]]}
    """
    return _shortened(structure, iter(tensors))


def _shortened(
    structure: Structure, tensors: Iterator[np.ndarray], shape: list[int] | None = None
) -> Short:
    if structure is None:
        return None
    if structure is True or isinstance(structure, str):
        return _dtype_and_shape(structure, next(tensors))
    ((kind, content),) = structure.items()
    if kind == "dict":
        pairs = [[key, _shortened(value, tensors)] for key, value in content]
        is_text = all(isinstance(key, str) for key, _ in pairs)
        return dict(pairs) if is_text else ["dict", *pairs]
    if kind in ("list", "tuple"):
        return [kind, *(_shortened(value, tensors) for value in content)]
    known = implied(kind, content, shape, "")
    fields: JsonObject = {}
    for name, value in content.items():
        if name not in tensor_fields(NODES[kind]):
            fields[name] = _static(name, value)
        elif kind == "Bits":  # its data
            next(tensors)
        else:
            fields[name] = _shortened(value, tensors, known.shapes.get(name))
    return [kind, {name: x for name, x in fields.items() if not known.says(name, x)}]


def _static(name: str, value: object) -> object:
    """Return a static field as JSON has it, a layout without the defaults at its end."""
    value = list(value) if isinstance(value, tuple) else value
    if name == "layout" and isinstance(value, list):
        while len(value) > 1 and value[-1] in (None, (), []):
            value.pop()
    return value


def _dtype_and_shape(stored: Stored, tensor: np.ndarray) -> Short:
    """Return dtype and shape of a tensor; a foreign dtype or a key has its parts as last axis."""
    dtype = tensor.dtype.name if stored is True else stored
    shape = list(tensor.shape if stored is True else tensor.shape[:-1])
    return shape if dtype == "float32" else [dtype, *shape]


def lengthened(short: Short, limits: Limits) -> tuple[Structure, list[Entry]]:
    """Undo `shortened`; whether the structure is one is for `grammar` to say.

    Args:
      short: from JSON, of an untrusted file.
      limits: of depth and number.

    Returns:
      The structure, and for each of its tensors in order of `places` an entry, or None for the data
      of Bits.

    Raises:
      ArtifactError: if it is no short form; says which entry and what is wrong.

    Example:
      >>> lengthened({"w": ["Bits", {"bits": 3, "shape": [5]}], "b": [2]}, Limits())[1]
      [None, ['float32', [2]]]
    """
    walk = _Lengthening(limits)
    return walk.tree(short, "", limits.depth), walk.entries


class _Lengthening:
    """The walk through a short form, which notes its tensors on the way."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.entries: list[Entry] = []
        self.parts = 0

    def tree(
        self, short: object, where: str, depth: int, shape: list[int] | None = None
    ) -> Structure:
        self.count()
        if short is None:
            return None
        if _is_array(short):
            return self.array(short, where)
        if depth < 1:
            raise too_deep(where)
        if isinstance(short, dict):
            return {"dict": self.pairs(short.items(), where, depth)}
        if not isinstance(short, list):
            raise refuse(where, "in the file's structure, an object or a list must stand here")
        kind, *rest = short
        if kind == "dict":
            return {kind: self.pairs([_pair(each, where) for each in rest], where, depth)}
        if kind in NODES:
            return {kind: self.node(kind, rest, where, depth, shape)}
        return {kind: [value for _, value in self.pairs(enumerate(rest), where, depth)]}

    def pairs(self, pairs: Iterable[tuple[Any, object]], where: str, depth: int) -> list[Any]:
        return [[key, self.tree(value, below(where, key), depth - 1)] for key, value in pairs]

    def node(
        self, kind: str, rest: list[object], where: str, depth: int, shape: list[int] | None
    ) -> JsonObject:
        written = rest[0] if len(rest) == 1 else None
        if not isinstance(written, dict) or (kind == "Bits" and "data" in written):
            raise refuse(where, f"behind {kind} stands an object of its fields, data left out")
        known = implied(kind, written, shape, where)
        names = tensor_fields(NODES[kind], where)
        content: JsonObject = {}
        if kind == "Bits":
            self.note(None)
            content["data"] = True
        for name, value in {**known.fields, **written}.items():
            if name in names:
                value = self.tree(value, names[name], depth - 1, known.shapes.get(name))
            content[name] = value
        return content

    def array(self, short: list[Any], where: str) -> Stored:
        stored, shape = _typed(short)
        dtype, parts = _parts(stored, where)
        self.note([dtype, [*shape, *parts]])
        return True if stored in NATIVE else stored

    def count(self) -> None:
        self.parts += 1
        most = PARTS * self.limits.arrays
        if self.parts > most:
            raise ArtifactError(
                f"it has more than {most:,} containers and arrays; if you trust the file, pass "
                "limits=export.Limits(arrays=...)"
            )

    def note(self, entry: Entry) -> None:
        self.entries.append(entry)
        few(len(self.entries), self.limits)  # before the next, so that a huge structure ends early


def _is_array(short: object) -> TypeGuard[list[Any]]:
    """Return whether a short form is of an array: no kind of container or node comes first."""
    if not isinstance(short, list):
        return False
    return not short or not isinstance(short[0], str) or short[0] not in KINDS


def _typed(short: list[Any]) -> tuple[str, list[Any]]:
    """Return the dtype and the shape of an array; float32 is left out."""
    if short and isinstance(short[0], str):
        return short[0], short[1:]
    return "float32", short


def _pair(pair: object, where: str) -> tuple[Any, object]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise refuse(where, "in the file's structure, a pair of a key and a node must stand here")
    return pair[0], pair[1]


def _parts(stored: str, where: str) -> tuple[str, list[int]]:
    """Return the dtype that a tensor is stored as, and the axis of parts that comes last."""
    if stored in NATIVE:
        return stored, []
    if stored.startswith(KEY):
        # An unknown one is refused with all that there are, by `grammar`.
        return "uint32", [KEY_WORDS.get(stored.removeprefix(KEY), 1)]
    try:
        return "uint8", [dtype_named(stored).itemsize]
    except ValueError as error:
        raise refuse(where, f"the dtype {stored[:40]!r}: {error}") from error


# The text that a description is compressed against: what descriptions of networks usually say.
# Deflate refers back to it as if it stood in front of the description, so that what it has costs
# two or three bytes. It holds the short forms of this package's reference networks under usual
# compressions, names that Flax gives, and the metadata of a run; what is most common is last.
# It is part of the format: files of version 3 are read with this very text, so it never changes.
# Lines end anywhere; a description has no line ends.
VOCABULARY: bytes = r"""
["dict",[0,["list",["tuple",["int8",["int32",["uint32",["bool",["float16",["bfloat16",["key:threef
ry2x32",["float8_e4m3fn","coded":{"ans":1024,"streams":[0,0,1,null],"tables":["00ff","crc32":"fill
":-0.0,"columns":[1],"stack":[0],"dtype":"bfloat16"}]["LowRank",{"left":[512,2],"right":[2,512],"s
hape":[[2,1]],["Tabled",{"tensor_scale":["float32"],"levels":[[-1.0,-0.6961928009986877,-0.5250730
514526367,-0.39491748809814453,-0.28444138169288635,-0.18477343022823334,-0.09105003625154495,0.0,
0.07958029955625534,0.16093020141124725,0.24611230194568634,0.33791524171829224,0.4407098293304443
4,0.5626170039176941,0.7229568362236023,1.0]],"layout":"kernel":["Clustered",{"codes":["Sparse",{"
values":["Bits",{"bits":4,"shape":[1024]}],"mask":["Gaps",{"runs":["Bits",{"bits":4,"shape":[1200]
}],"shape":[64,300]}],"fill":16}],"codebook":[16]}]},"zero_point":["uint8",1,1,1,64],"mask":["Bits
",{"bits":1}]}],"layout":"kernel":["Quantized",{"codes":["Sparse",{"values":["Bits",{"bits":4,"sha
pe":[960]}],"mask":["Gaps",{"runs":["Bits",{"bits":6,"shape":[992]}]}]}],"layout":[[64,300]]}]},"m
odel":{"layers":{"weight":"blocks":"linear":"Embed_0":{"LayerNorm_0":{"BatchNorm_0":{"mean":[32],"
var":[32]}}},"params":{"BatchNorm_0":{"bias":[32],"scale":[32]},"Conv_0":{"bias":[32],"kernel":["Q
uantized",{"codes":["Bits",{"bits":4}],"layout":[[3,3,3,32],[3]]}]},"Dense_0":{"bias":[256],"Conv_
1":"Dense_1":{"bias":[10],"encoder":{"layer_0_attention":{"key":{"bias":[192],"kernel":["Quantized
",{"codes":["Bits",{"bits":4}],"layout":[[192,192],[1]]}]},"layer_0_attention_norm":{"layer_0_mlp"
:{"layer_0_mlp_norm":{"layer_1_mlp":{"layer_0":{"attention":{"key":{"bias":[128],"kernel":["Quanti
zed",{"codes":["Bits",{"bits":4}],"layout":[[128,128],[1]]}]},"out":{"bias":[128],"kernel":["Quant
ized",{"codes":["Bits",{"bits":4}],"layout":[[128,128],[1]]}]},"query":{"bias":[128],"kernel":["Qu
antized",{"codes":["Bits",{"bits":4}],"layout":[[128,128],[1]]}]},"value":{"bias":[128],"kernel":[
"Quantized",{"codes":["Bits",{"bits":4}],"layout":[[128,128],[1]]}]}},"attention_norm":{"bias":[12
8],"scale":[128]},"mlp":{"down":{"bias":[128],"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"
layout":[[512,128],[1]]}]},"up":{"bias":[512],"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"
layout":[[128,512],[1]]}]}},"mlp_norm":{"bias":[128],"scale":[128]}},"norm":{"bias":[128],"scale":
[128]},"positions":{"embedding":[512,128]},"segments":{"embedding":[2,128]},"tokens":{"embedding":
[30522,128]}},"pooler":{"bias":[128],"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[
[128,2],[1]]}]}}},BertClassifier(encoder=Bert(\n    # attributes\n    vocabulary = 30522\n    widt
h = 128\n    depth = 2\n    heads = 2\n    hidden = None\n    positions = 512\n    segments = 2\
n    gelu = 'exact'\n    epsilon = 1e-12\n    dtype = float32\n))ViT(patch=4, MLP(features=(LeNet5
(hidden=(LeNet300100()ResNet(depth=20, width=16)"model":"DSCNN(classes=8, width=16, blocks=2, dept
hwise='shifts')","config":"/workspace/home/user/work/configs/fashion_mnist.py","arguments":{"teach
er_steps":500,"student_steps":2000,"candidate_steps":1500,"temperature":4.0,"min_ratio":20.0,"spar
sity":0.9,"steps":300,"bits":4,"max_drop":0.02,"seed":0},"left_alone":{"float32 is not a floating-
point dtype":["encoder/norm/scale","encoder/positions/embedding","encoder/segments/embedding","enc
oder/tokens/embedding","head/bias","pooler/bias"]},"layer_0_attention/key/bias","encoder/layer_0_a
ttention/out/bias","encoder/layer_0_attention/query/bias","encoder/layer_0_attention/value/bias","
encoder/layer_0_attention_norm/bias","encoder/layer_0_attention_norm/scale","encoder/layer_0_mlp/d
own/bias","encoder/layer_0_mlp/up/bias","encoder/layer_0_mlp_norm/bias","encoder/layer_0_mlp_norm/
scale","encoder/layer_1_attention/key/bias","BatchNorm_0/bias","BatchNorm_0/scale","Conv_0/bias","
Dense_0/bias""block_0_0/norm_0/bias","block_0_0/norm_0/scale","block_0_0/norm_1/bias","block_0_0/n
orm_1/scale","block_1_0/norm_0/bias","block_1_0/norm_0/scale","block_1_0/norm_1/bias","block_1_0/n
orm_1/scale","block_1_0/projection_norm/bias","block_1_0/projection_norm/scale","block_2_0/norm_0/
bias","block_2_0/norm_0/scale","left_alone":{"no pattern matches":["dense_0/bias","dense_1/bias","
head/bias"]},"data":"cifar10","data_sha256":""left_alone":{"no pattern matches":["depthwise_0/bias
","depthwise_0_norm/bias","depthwise_0_norm/scale","depthwise_1/bias","depthwise_1_norm/bias","dep
thwise_1_norm/scale","depthwise_2/bias","depthwise_2_norm/bias","depthwise_2_norm/scale","depthwis
e_3/bias","depthwise_3_norm/bias","depthwise_3_norm/scale","head/bias","pointwise_0/bias","pointwi
se_0_norm/bias","pointwise_0_norm/scale","pointwise_1/bias","pointwise_1_norm/bias","pointwise_1_n
orm/scale","stem/bias","stem_norm/bias","stem_norm/scale"]},"data":"kws","data_sha256":"","validat
ion":0.9{"batch_stats":{"block_0_0":{"norm_0":{"mean":[16],"var":[16]},"norm_1":{"mean":[16],"var"
:[16]}},"block_0_1":{"norm_0":{"block_1_0":{"norm_0":{"mean":[32],"var":[32]},"norm_1":{"mean":[32
],"var":[32]},"projection_norm":{"mean":[32],"var":[32]}},"block_2_0":{"norm_0":{"mean":[64],"var"
:[64]},"norm_1":{"mean":[64],"var":[64]},"projection_norm":{"mean":[64],"var":[64]}},"stem_norm":{
"mean":[16],"var":[16]}},"params":{"block_0_0":{"conv_0":{"kernel":["Quantized",{"codes":["Bits",{
"bits":4}],"layout":[[3,3,16,16],[3]]}]},"conv_1":{"kernel":["Quantized",{"codes":["Bits",{"bits":
4}],"layout":[[3,3,16,16],[3]]}]},"norm_0":{"bias":[16],"scale":[16]},"norm_1":{"bias":[16],"scale
":[16]}},"block_1_0":{"conv_0":{"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[3,3,
16,32],[3]]}]},"conv_1":{"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[3,3,32,32],
[3]]}]},"norm_0":{"bias":[32],"scale":[32]},"norm_1":{"bias":[32],"scale":[32]},"projection":{"ker
nel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[1,1,16,32],[3]]}]},"projection_norm":{"b
ias":[32],"scale":[32]}},"block_2_0":{"conv_0":{"kernel":["Quantized",{"codes":["Bits",{"bits":4}]
,"layout":[[3,3,32,64],[3]]}]},"conv_1":{"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layou
t":[[3,3,64,64],[3]]}]},"norm_0":{"bias":[64],"scale":[64]},"norm_1":{"bias":[64],"scale":[64]},"p
rojection":{"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[1,1,32,64],[3]]}]},"proj
ection_norm":{"bias":[64],"scale":[64]}},"head":{"bias":[10],"kernel":["Quantized",{"codes":["Bits
",{"bits":4}],"layout":[[64,10],[1]]}]},"stem":{"kernel":["Quantized",{"codes":["Bits",{"bits":4}]
,"layout":[[3,3,3,16],[3]]}]},"stem_norm":{"bias":[16],"scale":[16]}}},"metadata":{"experiment":"c
ifar10","name":"int4","model":"ResNet(depth=8)","config":{"tree":{"params":{"conv_0":{"bias":[6],"
kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[5,5,1,6],[3]]}]},"conv_1":{"bias":[16
],"dense_0":{"bias":[300],"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[64,300],[1
]]}]},"dense_1":{"bias":[100],"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[300,10
0],[1]]}]},"head":{"bias":[10],"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[100,1
0],[1]]}]}}},"metadata":{"experiment":"digits","name":"prune-95-int4","model":"LeNet300100()","con
fig":{"tree":{"batch_stats":{"depthwise_0_norm":{"mean":[16],"var":[16]},"depthwise_1_norm":{"mean
":[16],"var":[16]},"pointwise_0_norm":{"mean":[16],"var":[16]},"pointwise_1_norm":{"mean":[16],"va
r":[16]},"stem_norm":{"mean":[16],"var":[16]}},"params":{"depthwise_0":{"bias":[16],"kernel":["Qua
ntized",{"codes":["Bits",{"bits":4}],"layout":[[3,3,1,16],[3]]}]},"depthwise_0_norm":{"bias":[16],
"scale":[16]},"depthwise_1":{"bias":[16],"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layou
t":[[3,3,1,16],[3]]}]},"depthwise_1_norm":{"bias":[16],"scale":[16]},"head":{"bias":[12],"kernel":
["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[16,12],[1]]}]},"pointwise_0":{"bias":[16],"ke
rnel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[1,1,16,16],[3]]}]},"pointwise_0_norm":{
"bias":[16],"scale":[16]},"pointwise_1":{"bias":[16],"kernel":["Quantized",{"codes":["Bits",{"bits
":4}],"layout":[[1,1,16,16],[3]]}]},"pointwise_1_norm":{"bias":[16],"scale":[16]},"stem":{"bias":[
16],"kernel":["Quantized",{"codes":["Bits",{"bits":4}],"layout":[[10,4,1,16],[3]]}]},"stem_norm":{
"bias":[16],"scale":[16]}}},"metadata":{}}
""".replace("\n", "").encode()
