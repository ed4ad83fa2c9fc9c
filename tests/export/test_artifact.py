"""What is written is read, or an error says why; a failed write leaves the old file."""

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import compress_jax as cj
from compress_jax.core import ArtifactError
from compress_jax.export import write_atomically
from compress_jax.export._artifact.artifact import with_names
from compress_jax.export._artifact.structure import encode

MODEL = """
import jax, jax.numpy as jnp
import compress_jax as cj

def model():
    params = {name: jax.random.normal(jax.random.key(i), (8, 6)) for i, name in enumerate("abc")}
    params |= {"bias": jnp.arange(6.0), "half": jnp.ones(3, jnp.bfloat16)}
    small = cj.chain(cj.prune.magnitude(0.6), cj.quantize.uniform(4))
    c = cj.rules([("a", small), ("b", cj.cluster.kmeans(4)), ("c", cj.lowrank.svd(2))])
    return c.pack(params, c.init(params)), {"model": "three", "who": {"z": 1, "a": [2.5, None]},
        "ü": "\\u00fc\\ud800"}
"""
scope: dict = {}
exec(MODEL, scope)
PACKED, METADATA = scope["model"]()


@pytest.fixture(scope="module", params=["named", "compact"])
def file(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """An artifact that tests only read, as large models are written or as small ones are."""
    file = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    if request.param == "named":
        file.write_bytes(with_names(*encode(PACKED), METADATA))
    else:
        cj.save(file, PACKED, METADATA)
    return file


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact whose tensors have names."""
    file = tmp_path_factory.mktemp("artifact") / "model.safetensors"
    file.write_bytes(with_names(*encode(PACKED), METADATA))
    return file


def bits(tree) -> list:
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_it_comes_back_from_disk_and_its_size_is_what_was_said(tmp_path):
    file = tmp_path / "new" / "folder" / "model.safetensors"
    assert cj.save(str(file), PACKED, METADATA) == file.stat().st_size
    packed, metadata = cj.load(str(file))
    assert metadata == METADATA and jax.tree.structure(packed) == jax.tree.structure(PACKED)
    assert bits(packed) == bits(PACKED) and bits(cj.unpack(packed)) == bits(cj.unpack(PACKED))
    assert os.listdir(file.parent) == [file.name]


def test_a_file_of_either_form_is_read(file):
    packed, metadata = cj.load(file)
    assert metadata == METADATA and bits(packed) == bits(PACKED)


@pytest.mark.slow
def test_the_container_is_small(tmp_path):
    params, two_bits = {"w": jnp.ones((256, 256))}, cj.quantize.uniform(2)
    written = cj.save(tmp_path / "f", two_bits.pack(params, two_bits.init(params)))
    assert written < 256 * 256 * 2 / 8 + 200


def test_metadata_may_be_left_out(tmp_path):
    cj.save(tmp_path / "f", {})
    assert cj.load(tmp_path / "f") == ({}, {})


def test_plain_safetensors_reads_names(named):
    with safetensors.safe_open(named, "numpy") as opened:
        assert {"format": "compress_jax", "version": "1"}.items() <= opened.metadata().items()
        assert json.loads(opened.metadata()["content"])["metadata"] == METADATA
        assert {"bias", "a.scale", "b.codebook", "half"} <= set(opened.keys())
        assert (opened.get_tensor("bias") == np.arange(6)).all()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_flipped_byte_is_an_error(file, data):
    content = bytearray(file.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    start, stop = data.draw(st.sampled_from([(0, 8), (8, size), (size, len(content))]))
    content[data.draw(st.integers(start, stop - 1))] ^= data.draw(st.integers(1, 255))
    assert_refused(file, bytes(content))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"dtype":"F32"', '"dtype":"I32"'),
        ('"dtype":"U8"', '"dtype":"I8"'),
        (":[8,2]", ":[2,8]"),
        (",", ", "),
    ],
)
def test_a_header_that_reads_the_bytes_otherwise_is_an_error(old, new, named):
    """What safetensors itself takes for good: the digest has to be of the header too."""
    content = named.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = content[8:size].decode().replace(old, new, 1).rstrip().encode()
    header += b" " * (-len(header) % 8)
    assert header != content[8:size]
    changed = len(header).to_bytes(8, "little") + header + content[size:]
    assert len(safetensors.numpy.load(changed)) == len(safetensors.numpy.load(content))
    assert_refused(named, changed)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_truncation_or_extension_is_an_error(file, data):
    content = file.read_bytes()
    assert_refused(file, content[: data.draw(st.integers(0, len(content) - 1))])
    assert_refused(file, content + data.draw(st.binary(min_size=1, max_size=9)))


@given(st.binary(max_size=300), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_a_foreign_file_is_an_error(file, content, size):
    assert_refused(file, content)
    assert_refused(file, size.to_bytes(8, "little") + content)


HEADERS = [
    "{}", "[]", "3", "null", '"x"', '{"__metadata__":3}', '{"__metadata__":[]}',
    '{"__metadata__":{"format":"pt"}}',
    '{"__metadata__":{"format":"compress_jax"}}',
    '{"__metadata__":{"format":"compress_jax","version":1}}',
    '{"__metadata__":{"format":"compress_jax","version":["3"]}}',
    '{"__metadata__":{"format":"compress_jax","version":"3"}}',
    '{"__metadata__":{"format":"compress_jax","version":"²"}}',
    '{"__metadata__":{"format":"compress_jax","version":""}}',
    '{"__metadata__":{"format":"compress_jax","version":"1","sha256":null}}', "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header[:60])
def test_a_strange_header_is_an_error(file, header):
    assert_refused(file, len(header.encode()).to_bytes(8, "little") + header.encode())


def assert_refused(file: Path, content: bytes) -> None:
    bad = file.with_name("bad")
    bad.write_bytes(content)
    with pytest.raises(ArtifactError, match=str(bad)):
        cj.load(bad)


def test_other_peoples_safetensors_are_named_as_such(tmp_path):
    for dtype in (np.float32, jnp.bfloat16, jnp.float8_e4m3fn):
        safetensors.numpy.save_file({"x": np.ones(3, dtype)}, tmp_path / "f", {"format": "pt"})
        with pytest.raises(ArtifactError, match="not one that compress_jax wrote"):
            cj.load(tmp_path / "f")


def test_a_missing_file_and_a_directory_are_errors(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "none"):
        with pytest.raises(ArtifactError, match=f"cannot read {path}"):
            cj.load(path)


def test_a_newer_version_says_to_upgrade(file):
    bad = file.with_name("newer")
    bad.write_bytes(re.sub(b'"version":"[13]"', b'"version":"9"', file.read_bytes()))
    with pytest.raises(ArtifactError, match="version 9.*upgrade"):
        cj.load(bad)


@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), float("inf"), {1, 2}, {(1, 2): 3}, jnp.ones(2), b"x"],
    ids=lambda v: type(v).__name__,
)
def test_metadata_that_json_cannot_hold_is_an_error_and_writes_nothing(value, tmp_path):
    with pytest.raises(ArtifactError, match="JSON"):
        cj.save(tmp_path / "f", {"x": jnp.ones(1)}, {"value": value})
    assert not os.listdir(tmp_path)


def test_a_key_that_is_no_unicode_is_an_error(tmp_path):
    with pytest.raises(ArtifactError):
        cj.save(tmp_path / "f", {"\ud800": jnp.ones(1)})
    assert not os.listdir(tmp_path)


@contextlib.contextmanager
def full_disk(bytes_left: int):
    """Limit the size of files: a true error of the operating system in the midst of writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1, 4096, 100_000])
def test_a_write_that_stops_midway_leaves_the_old_file_and_nothing_else(size, tmp_path):
    file = tmp_path / "model.safetensors"
    cj.save(file, PACKED, METADATA)
    before = file.read_bytes()
    with (
        full_disk(size),
        pytest.raises(ArtifactError, match=r"cannot write .*too large.*unchanged"),
    ):
        cj.save(file, {"x": jnp.zeros(50_000)})
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]
    with full_disk(size), pytest.raises(ArtifactError) as error:
        cj.save(tmp_path / "new", {"x": jnp.zeros(50_000)})
    assert "unchanged" not in str(error.value) and os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota")]
)
@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_is_said_to_be_full(where, error, tmp_path, monkeypatch):
    file = tmp_path / "f"
    write_atomically(file, b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(
        ArtifactError, match="the disk is full; the file that was there is unchanged"
    ):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_an_exception_that_is_no_error_leaves_no_litter_either(tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "f", b"new")
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    for path in (tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(ArtifactError, match=f"cannot write {path}"):
            cj.save(path, {"x": jnp.ones(1)})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_nothing_in_a_file_is_run(tmp_path):
    """A pickle stream is but a foreign file, and so is one inside the metadata."""
    program = b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(tmp_path / "ran")
    (tmp_path / "f").write_bytes(program)
    with pytest.raises(ArtifactError):
        cj.load(tmp_path / "f")
    cj.save(tmp_path / "g", {"x": np.frombuffer(program, np.uint8)}, {"code": program.decode()})
    assert cj.load(tmp_path / "g")[1] == {"code": program.decode()}
    assert not (tmp_path / "ran").exists()


def test_a_file_written_by_hand_from_the_documentation_is_read(tmp_path):
    """Version 1 as it is described; were this test to change, old files would be lost."""
    codes, layout = {"Bits": {"data": True, "bits": 4, "shape": [2, 2]}}, [[2, 2], [1], None]
    kernel = {
        "Quantized": {
            "codes": codes,
            "scale": True,
            "zero_point": True,
            "layout": layout,
            "dtype": "float16",
        }
    }
    tree = {
        "dict": [
            ["k", kernel],
            ["n", {"dict": [[7, {"list": ["bfloat16", None, {"tuple": [True]}]}]]}],
        ]
    }
    tensors = {
        "k.codes": np.array(
            [0x81, 0x9F], np.uint8
        ),  # 1, 8, 15, 9, the first in the lower half of its byte
        "k.scale": np.array([[0.5, 2.0]], np.float32),
        "k.zero_point": np.array(8, np.uint8),
        "n/7/0": np.array([[0x80, 0x3F], [0x00, 0xC0]], np.uint8),  # 1.0 and -2.0, lower byte first
        "n/7/2/0": np.array([True, False]),
    }
    content = json.dumps({"tree": tree, "metadata": {"by": "hand"}})
    strings = {"format": "compress_jax", "version": "1", "content": content, "sha256": "0" * 64}
    data = safetensors.numpy.save(tensors, strings)
    (tmp_path / "f").write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode()))
    packed, metadata = cj.load(tmp_path / "f")
    kernel, (half, none, (bools,)) = cj.unpack(packed["k"]), packed["n"][7]
    assert metadata == {"by": "hand"} and kernel.dtype == jnp.float16 and half.dtype == jnp.bfloat16
    assert kernel.tolist() == [[-3.5, 0.0], [3.5, 2.0]] and half.tolist() == [1.0, -2.0]
    assert none is None and bools.tolist() == [True, False]
