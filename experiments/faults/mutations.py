"""Artifacts of every kind of node, and ways to damage them behind a repaired checksum.

`samples` writes small files; `mutate` changes one of them, by its structure or by its bytes, and
seals it again, so that only what `cj.load` knows about the content can refuse it.
"""

import copy
import hashlib
import json
import re
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zstandard

import compress_jax as cj
from compress_jax.core.bits import Bits, Gaps
from compress_jax.core.packed import LowRank, Sparse, Sum
from compress_jax.export._artifact import compact
from compress_jax.export._artifact.artifact import with_names
from compress_jax.export._artifact.compact import VOCABULARY
from compress_jax.export._artifact.container import DIGEST, DTYPES, ROW, as_json, named, rowed
from compress_jax.export._artifact.structure import encode
from compress_jax.export._coding.streams import code, squeezed

X = jax.random.normal(jax.random.key(0), (12, 10))
SCARCE = jnp.where(X > 1.5, X, 0)
SIZES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
# What stands in the place of a value: types that are not meant, edges of ranges, sizes that no
# machine has.
WORST: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    15,
    16,
    17,
    255,
    2**31,
    10**9,
    10**12,
    2**53,
    2**63,
    10**30,
]
WORST += [
    0.5,
    -0.0,
    1e300,
    "",
    "Bits",
    "float32",
    "bfloat16",
    "int4",
    "float64",
    "object",
    "\ud800",
    [],
    {},
    [[]],
    [0],
]
WORST += [[1, 0], [10**12, 0], [3, 10**12], [2] * 40, {"dict": []}, {"list": [True]}, {"Gaps": {}}]
WORST += [["list", [2]], ["dict", [1, [2]]], ["Bits", {}], ["int4", 3], ["key:rbg", 2]]
NODES = "Bits Gaps Sparse Quantized Tabled Clustered LowRank Sum dict list tuple shape fill".split()


def packed(compression: Any, x: jax.Array = X) -> Any:
    """Return an array as a compression packs it."""
    return compression.pack({"w": x}, compression.init({"w": x}))["w"]


def nodes() -> dict[str, Any]:
    """Return a packed node of every kind and nesting, by name."""
    quantize, prune, cluster = cj.quantize, cj.prune, cj.cluster
    factors = packed(quantize.uniform(4), X[:, :2]), packed(cluster.kmeans(3), X[:2])
    return {
        "bits": Bits.pack(jnp.arange(77).reshape(7, 11) % 8, 3),
        "gaps": Gaps.pack(SCARCE != 0, 3),
        "sparse, gaps": Sparse.pack(SCARCE, SCARCE != 0),
        "sparse, mask": Sparse.pack(X.astype(jnp.bfloat16), X > -0.5, fill=0.25),
        "quantized": packed(quantize.uniform(5, symmetric=False, granularity="channel")),
        "quantized, groups": packed(quantize.uniform(4, granularity=4)),
        "quantized, pruned": packed(cj.chain(prune.magnitude(0.9), quantize.uniform(4))),
        "tabled": packed(quantize.nf4("channel")),
        "tabled, own levels": packed(quantize.codebook(quantize.Table((-1.0, 0.1, 0.3)))),
        "tabled, two scales": packed(quantize.nvfp4(pad=True), X.astype(jnp.bfloat16)),
        "tabled, pruned": packed(cj.chain(prune.magnitude(0.9), quantize.fp8("e5m2"))),
        "clustered": packed(cluster.kmeans(6)),
        "clustered, pruned": packed(cj.chain(prune.magnitude(0.8), cluster.kmeans(4))),
        "low rank": packed(cj.lowrank.svd(2)),
        "low rank, packed": LowRank(*factors, (2, 6, 10), jnp.dtype(jnp.bfloat16)),
        "sum": Sum(packed(quantize.uniform(4)), packed(cj.lowrank.svd(2))),
    }


def samples() -> dict[str, bytes]:
    """Return small files by name, of every form: one for each node, and one of all nodes."""
    trees = beside_arrays(nodes())
    trees["all"] = {
        **nodes(),
        "four": jnp.arange(5).astype(jnp.int4),
        "tuple": (jnp.float32(1), {7: jnp.ones((0, 3))}),
    }
    trees["long"] = {
        "codes": Bits.pack(jnp.asarray(np.random.default_rng(0).geometric(0.7, 4000) % 16), 4)
    }
    return written(trees)


def beside_arrays(nodes: dict[str, Any]) -> dict[str, Any]:
    """Return a tree for each node, with plain arrays of several dtypes in it."""
    plain = {
        "bias": jnp.arange(6.0),
        "half": jnp.ones(3, jnp.bfloat16),
        "mask": jnp.arange(5) > 2,
        "list": [jnp.ones(2), None],
    }
    return {name: {"dense": {"kernel": node}, **plain} for name, node in nodes.items()}


def as_named(file: Path, tree: Any, metadata: Any) -> None:
    """Write version 1, as `save` does for large models."""
    file.write_bytes(with_names(*encode(tree), metadata))


def as_old_coded(file: Path, tree: Any, metadata: Any) -> None:
    """Write version 2, as earlier versions of this package did."""
    structure, tensors = encode(tree)
    made = code(structure, tensors, adaptively=False)
    content = as_json({"tree": structure, "metadata": metadata, "index": made.index})
    pieces = {"ans": made.ans, "content": squeezed(content.encode()), "rest": made.rest}
    rows = {name: np.frombuffer(piece, np.uint8) for name, piece in pieces.items()}
    file.write_bytes(named(rows, {"version": "2"}))


def as_compact(file: Path, tree: Any, metadata: Any) -> None:
    """Write version 3, its tensors as they are, as `save` does for small models."""
    file.write_bytes(rowed(compact.written(*encode(tree), metadata)))


def as_coded(file: Path, tree: Any, metadata: Any) -> None:
    """Write version 3, coded."""
    file.write_bytes(rowed(compact.written_coded(*encode(tree), metadata).data))


FORMS: dict[str, Callable[[Path, Any, Any], None]] = {
    "named": as_named,
    "old coded": as_old_coded,
    "compact": as_compact,
    "coded": as_coded,
}


def written(trees: dict[str, Any]) -> dict[str, bytes]:
    """Return each tree as a file of every form."""
    files = {}
    metadata = {"model": "three", "n": [1, 2.5, None], "sha256": "0f" * 32}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        for name, tree in trees.items():
            for form, write in FORMS.items():
                write(file, tree, metadata)
                files[f"{name}, {form}"] = file.read_bytes()
    return files


def version(data: bytes) -> int:
    """Return the version in a header that nothing has damaged."""
    found = re.search(rb'"version":"([0-9])"', data)
    assert found
    return int(found[1])


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and tensors of a file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def sealed(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    """Return a file whose digest is right."""
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":")).encode()
    if b'"version":"3"' in header:
        data = len(header).to_bytes(8, "little") + header + body[:-DIGEST]
        return data + hashlib.sha256(data).digest()[:DIGEST]
    header = re.sub(rb'"sha256":"[0-9a-f]{64}"', b'"sha256":"%s"' % (b"0" * 64), header, count=1)
    header += b" " * (-len(header) % 8)
    data = len(header).to_bytes(8, "little") + header + body
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


def mutate(data: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Return a changed file, sealed, and what was done to it."""
    ways = WAYS[version(data)]
    way = ways[rng.integers(len(ways))]
    return way(data, rng), way.__name__


def flip_header(data: bytes, rng: np.random.Generator) -> bytes:
    """Change some bytes of the header."""
    end = 8 + int.from_bytes(data[:8], "little")
    return sealed(_flipped(data[8:end], rng), data[end:])


def flip_body(data: bytes, rng: np.random.Generator) -> bytes:
    """Change some bytes of the tensors."""
    header, body = parts(data)
    return sealed(header, _flipped(body, rng))


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut the tensors, or add to them."""
    header, body = parts(data)
    at = int(rng.integers(len(body) + 1))
    return sealed(header, body[:at] if rng.random() < 0.5 else body + bytes(at))


def edit_content(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a few values of the structure."""
    return with_content(data, lambda content: _edited(content, rng))


def edit_tree(data: bytes, rng: np.random.Generator) -> bytes:
    """Change one value of a packed node: its kind, a field of it, a number."""
    return with_content(data, lambda content: {**content, "tree": _edited(content["tree"], rng, 1)})


def edit_index(data: bytes, rng: np.random.Generator) -> bytes:
    """Change values of the index of a coded file."""
    index = "index" if version(data) == 2 else "coded"
    return with_content(
        data, lambda content: {**content, index: _edited(content.get(index, {"ans": 0}), rng, 1)}
    )


def edit_header(data: bytes, rng: np.random.Generator) -> bytes:
    """Change values of the header's entries."""
    header, body = parts(data)
    return sealed(_edited(header, rng, 1), body)


def resize(data: bytes, rng: np.random.Generator) -> bytes:
    """Make a tensor longer, shorter or of another shape or dtype, in a container that is right."""
    header, body = parts(data)
    names = [name for name in header if name != "__metadata__"]
    tensors = {name: _tensor(header[name], body) for name in names}
    if names:
        name = names[rng.integers(len(names))]
        dtype, shape, content = tensors[name]
        how = int(rng.integers(5))
        if how == 0:
            tensors[name] = dtype, [len(content) // SIZES[dtype]], content
        elif how == 1:
            size = SIZES[dtype] * int(rng.integers(0, len(content) // SIZES[dtype] + 2))
            tensors[name] = dtype, [size // SIZES[dtype]], (content + bytes(SIZES[dtype]))[:size]
        elif how == 2:
            other = list(SIZES)[rng.integers(len(SIZES))]
            tensors[name] = (
                other,
                [len(content) // SIZES[other]],
                content[: len(content) // SIZES[other] * SIZES[other]],
            )
        elif how == 3:
            second = names[rng.integers(len(names))]
            tensors[name], tensors[second] = tensors[second], tensors[name]
        else:
            tensors[f"{name}2" if rng.random() < 0.5 else "extra"] = tensors[name]
            if rng.random() < 0.5:
                del tensors[name]
    return _contained(header["__metadata__"], tensors)


def set_values(data: bytes, rng: np.random.Generator) -> bytes:
    """Fill a tensor with ones, zeros or noise: codes beyond a codebook, full or empty masks."""
    header, body = parts(data)
    names = [name for name in header if name != "__metadata__"]
    begin, end = header[names[rng.integers(len(names))]]["data_offsets"]
    if version(data) == 3:  # some of the tensors in the row
        first = len(body) - len(undescribed(row_of(data))[1]) - DIGEST
        begin, end = sorted(int(at) for at in rng.integers(first, end - DIGEST + 1, 2))
    filled = [bytes([255]) * (end - begin), bytes(end - begin), rng.bytes(end - begin)][
        rng.integers(3)
    ]
    return sealed(header, body[:begin] + filled + body[end:])


def edit_row(data: bytes, rng: np.random.Generator) -> bytes:
    """Change the sizes before a description, or bytes of it or behind it."""
    row = bytearray(row_of(data))
    how = rng.integers(3)
    if how < 2:
        size = int.from_bytes(row[4 * how : 4 * how + 4], "little")
        wrong = [0, 1, size - 1, size + 1, 2 * size, 2**24, 2**32 - 1][rng.integers(7)]
        row[4 * how : 4 * how + 4] = wrong.to_bytes(4, "little")
        return with_row(data, bytes(row))
    end = 8 + int.from_bytes(row[:4], "little")
    at = int(rng.integers(8, min(end + 40, len(row) + 1)))
    return with_row(data, bytes(row[:at]) + rng.bytes(int(rng.integers(40))) + bytes(row[at:]))


def bomb(data: bytes, rng: np.random.Generator) -> bytes:
    """Claim much in little.

    Shapes of 1e12 entries agree with each other, or content unpacks to gigabytes.
    """
    size = int(10.0 ** rng.uniform(6, 13))
    how = int(rng.integers(5))
    kind = version(data)
    if how == 0 and kind == 2:
        zeros = zstandard.ZstdCompressor(level=1).compress(bytes(min(size, 2**28)))
        return with_pieces(data, {["rest", "content", "ans"][rng.integers(3)]: zeros})
    if how == 0 and kind == 3:
        full = min(size, 2**26)
        named = [full, 100, 2**24][rng.integers(3)]
        return with_row(data, described([b" ", b"\0", b"["][rng.integers(3)] * full, named))
    tree = _huge(size, how, kind, rng)
    if tree is not None:
        return with_content(data, lambda content: {**content, "tree": tree})
    table = bytes([0, 254 if rng.random() < 0.5 else 255]).hex()
    if kind == 3:
        bits = ["Bits", {"bits": 1, "shape": [size]}]
        coded = {"ans": 0, "streams": [0], "tables": [table], "crc32": 0}
        return with_content(data, lambda content: {**content, "tree": bits, "coded": coded})
    scaled = {"Bits": {"bits": 1, "shape": [size], "data": True}}
    if kind == 1:
        return with_content(data, lambda content: {**content, "tree": scaled})
    index = {"tensors": [0], "tables": [table], "crc32": 0}
    return with_content(data, lambda content: {**content, "tree": scaled, "index": index})


def _huge(size: int, how: int, kind: int, rng: np.random.Generator) -> Any:
    """Return a tree that is deep, wide, or of long names."""
    one: Any = [2] if kind == 3 else True
    if how == 1:
        for _ in range(int(10 ** rng.uniform(1, 2.9))):
            if rng.random() < 0.5:
                one = ["list", one] if kind == 3 else {"list": [one]}
            else:
                one = {"a": one} if kind == 3 else {"dict": [["a", one]]}
        return one
    count = min(size // 10, 300_000)
    if how == 2:
        each = [one, None, {}][rng.integers(3)] if kind == 3 else one
        return ["list", *[each] * count] if kind == 3 else {"list": [one] * count}
    if how == 3:
        name = "k" * min(size, 10**6)
        if kind == 3:
            return {name: ["list", *[one] * count]}
        return {"dict": [[name, {"list": [one] * count}]]}
    return None


def with_content(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """Return a file whose content is changed; what is no JSON any more stays as it was."""
    header, body = parts(data)
    strings = header["__metadata__"]
    if strings["version"] == "1":
        content = change(json.loads(strings["content"]))
        text = json.dumps(content, separators=(",", ":"))
        return sealed({**header, "__metadata__": {**strings, "content": text}}, body)
    if strings["version"] == "2":
        begin, end = header["content"]["data_offsets"]
        content = change(json.loads(zstandard.decompress(body[begin:end])))
        text = json.dumps(content, separators=(",", ":"))
        return with_pieces(data, {"content": zstandard.compress(text.encode())})
    text, rest = undescribed(row_of(data))
    content = change(json.loads(text))
    return with_row(data, described(json.dumps(content, separators=(",", ":")).encode()) + rest)


def row_of(data: bytes) -> bytes:
    """Return the row of bytes of a compact file."""
    return parts(data)[1][:-DIGEST]


def with_row(data: bytes, row: bytes) -> bytes:
    """Return a compact file of another row."""
    entry = {"dtype": "U8", "shape": [len(row) + DIGEST], "data_offsets": [0, len(row) + DIGEST]}
    return sealed({**parts(data)[0], ROW: entry}, row + bytes(DIGEST))


def undescribed(row: bytes) -> tuple[bytes, bytes]:
    """Return the JSON of a row and the tensors behind it."""
    end = 8 + int.from_bytes(row[:4], "little")
    first, *others = zlib.decompressobj(-15, zdict=VOCABULARY).decompress(row[8:end]).split(b"\0")
    for other in others:
        first += row[end : end + 32].hex().encode() + other
        end += 32
    return first, row[end:]


def described(text: bytes, size: int | None = None) -> bytes:
    """Return the description of a row: JSON as it is, and the size that it claims to have."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, VOCABULARY)
    data = coder.compress(text) + coder.flush()
    size = len(text) if size is None else size
    return len(data).to_bytes(4, "little") + size.to_bytes(4, "little") + data


def with_pieces(data: bytes, pieces: dict[str, bytes]) -> bytes:
    """Return a coded file with other byte strings."""
    header, body = parts(data)
    tensors = {name: _tensor(header[name], body) for name in header if name != "__metadata__"}
    return _contained(
        header["__metadata__"], tensors | {name: ("U8", [len(x)], x) for name, x in pieces.items()}
    )


def _tensor(entry: Any, body: bytes) -> tuple[str, list[int], bytes]:
    begin, end = entry["data_offsets"]
    return entry["dtype"], entry["shape"], body[begin:end]


def _contained(strings: Any, tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": strings}
    at = 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    return sealed(header, b"".join(content for *_, content in tensors.values()))


def _flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if changed:
            at = rng.integers(len(changed))
            changed[at] = (
                changed[at] ^ (1 << rng.integers(8)) if rng.random() < 0.5 else rng.integers(256)
            )
    return bytes(changed)


def _edited(content: Any, rng: np.random.Generator, edits: int = 3) -> Any:
    """Return JSON with a few of its values changed."""
    content = copy.deepcopy(content)
    for _ in range(int(rng.integers(1, edits + 1))):
        places = list(_places(content))
        if places:
            container, key = places[rng.integers(len(places))]
            _edit(container, key, rng)
    return content


def _places(value: Any) -> Any:
    """Yield every container with every key of it."""
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in entries:
        yield value, key
        yield from _places(inner)


def _edit(container: Any, key: Any, rng: np.random.Generator) -> None:
    value, how = container[key], rng.integers(8)
    if how < 3:
        container[key] = copy.deepcopy(WORST[rng.integers(len(WORST))])
    elif how == 3 and isinstance(value, int):
        container[key] = value + int(rng.integers(-3, 4))
    elif how == 3 and isinstance(value, str) and value:
        at = int(rng.integers(len(value)))
        container[key] = (
            value[:at] + value[at + 1 :]
            if rng.random() < 0.5
            else value[:at] + "0" + value[at + 1 :]
        )
    elif how == 4:
        del container[key]
    elif how == 5 and isinstance(container, list):
        container.insert(int(rng.integers(len(container) + 1)), copy.deepcopy(value))
    elif how == 5:
        container[NODES[rng.integers(len(NODES))]] = container.pop(key)
    elif how == 6 and isinstance(value, list):
        rng.shuffle(value)
    elif how == 6 and isinstance(value, int):
        container[key] = value * 2
    else:
        container[key] = {"list": [value]} if rng.random() < 0.5 else [value]


ANY = (flip_header, flip_body, cut, edit_content, edit_tree, edit_tree, set_values, bomb)
# How files of a version may be damaged; what is there twice is done twice as often.
WAYS = {
    1: (*ANY, edit_tree, edit_header, resize, resize),
    2: (*ANY, edit_index, edit_index, resize),
    3: (*ANY, edit_tree, edit_index, edit_header, edit_row),
}
