"""Entropy coding: every tensor comes back, and its bytes are those information theory asks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import compress_jax as cj
from compress_jax.core import ArtifactError
from compress_jax.core.bits import Bits
from compress_jax.export._artifact import structure
from compress_jax.export._coding.entropy import Stream, decode, encode, probabilities, quantized
from compress_jax.export._coding.streams import code, cost, share, uncode, unpacked
from compress_jax.models import LeNet5, LeNet300100, ResNet
from tests.export.test_artifact import METADATA, PACKED, bits


def entropy(symbols) -> float:
    """Return the bits of all symbols under their own frequencies."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


@given(hnp.arrays(np.int64, st.integers(1, 300), elements=st.integers(0, 10**9)).filter(np.any))
def test_a_table_costs_next_to_nothing_beside_the_entropy(counts):
    table = quantized(counts)
    p, used = probabilities(table), counts > 0
    assert np.isclose(p.sum(), 1) and (p[used] > 0).all() and (p[~used] == 0).all()
    share = counts / counts.sum()
    loss = (share[used] * np.log2(share[used] / p[used])).sum()
    assert (
        loss < 1e-3 + 2.0**-14 * counts.size
    )  # half a sixteenth of a bit either way; what is rarer than 2^-15.9 costs more


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 200), st.integers(0, 2**32 - 1)), max_size=5
    )
)
@settings(deadline=None)
def test_streams_come_back_in_order(sizes):
    streams = []
    for width, size, seed in sizes:
        symbols = np.random.default_rng(seed).geometric(0.3, size).astype(np.int32) % 2**width
        streams.append(Stream(symbols, quantized(np.bincount(symbols, minlength=2**width))))
    back = decode(encode(streams), [(stream.table, stream.symbols.size) for stream in streams])
    for stream, symbols in zip(streams, back, strict=True):
        np.testing.assert_array_equal(symbols, stream.symbols)


def test_tables_are_shared_where_that_saves_bytes():
    normal = np.random.default_rng(0).normal(size=(4, 200)) * 20 + 128
    small = [np.bincount(row.astype(int), minlength=256) for row in normal]
    other = np.bincount(np.arange(10**5) % 5, minlength=256)
    groups = share([*small, other, other[:16]], [8, 8, 8, 8, 8, 4])
    assert groups == [0, 0, 0, 0, 1, 2]
    apart = sum(cost(each) for each in small)
    assert cost(np.sum(small, axis=0)) < 0.75 * apart


TREES = st.recursive(
    st.one_of(
        hnp.arrays(
            st.sampled_from([np.float32, np.int8, np.bool_, np.uint16]),
            hnp.array_shapes(min_dims=0, min_side=0),
        ),
        st.tuples(st.integers(1, 16), st.integers(0, 40)).map(
            lambda of: Bits.pack(jnp.arange(of[1]) * 7919 % 2 ** of[0], of[0])
        ),
    ),
    lambda leaves: (
        st.dictionaries(st.sampled_from("abcd"), leaves, max_size=3) | st.lists(leaves, max_size=3)
    ),
    max_leaves=6,
)


@given(TREES)
@settings(max_examples=30, deadline=None)
@pytest.mark.slow
def test_any_tree_comes_back(tree):
    described, tensors = structure.encode(tree)
    back = uncode(described, code(described, tensors))
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert back[name].tobytes() == tensor.tobytes()


def test_a_coded_file_is_read_like_a_plain_one(tmp_path):
    assert cj.save(tmp_path / "f", PACKED, METADATA, coded=True) == (tmp_path / "f").stat().st_size
    packed, metadata = cj.load(tmp_path / "f")
    assert metadata == METADATA and jax.tree.structure(packed) == jax.tree.structure(PACKED)
    assert bits(packed) == bits(PACKED)


def test_a_changed_byte_of_a_coded_file_is_an_error(tmp_path):
    cj.save(tmp_path / "f", PACKED, METADATA, coded=True)
    content = (tmp_path / "f").read_bytes()
    for at in np.random.default_rng(0).integers(0, len(content), 100):
        (tmp_path / "bad").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ArtifactError, match="bad"):
            cj.load(tmp_path / "bad")


def test_a_coder_that_decodes_otherwise_is_noticed():
    described, tensors = structure.encode(
        {"k": Bits.pack(jax.random.bits(jax.random.key(0), (999,)) % 5 // 2, 2)}
    )
    coded = code(described, tensors)
    words = np.frombuffer(coded.ans, "<u4").copy()
    words[-1] ^= 2**20
    with pytest.raises(ArtifactError, match="constriction"):
        uncode(described, coded._replace(ans=words.tobytes()))


def clustered():
    """A million normal weights, a tenth of them kept and shared among 15 values."""
    w = jax.random.normal(jax.random.key(0), (1024, 1024))
    c = cj.chain(cj.prune.magnitude(0.9), cj.cluster.kmeans(15, iterations=20))
    state = c.init({"w": w})
    codes = c.pack({"w": w}, state)
    return codes, np.asarray(c.view({"w": w}, state)["w"])


@pytest.mark.slow
def test_the_file_of_the_reference_tensor_is_its_entropy(tmp_path):
    packed, seen = clustered()
    written = cj.save(tmp_path / "f", packed, coded=True)
    assert written * 8 < 1.01 * entropy(seen)
    np.testing.assert_array_equal(cj.unpack(cj.load(tmp_path / "f")[0])["w"], seen)


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    ("model", "shape", "compression"),
    [
        (LeNet300100(), (28, 28, 1), cj.quantize.uniform(4, granularity="channel")),
        (
            LeNet300100(),
            (28, 28, 1),
            cj.chain(cj.prune.magnitude(0.9), cj.cluster.kmeans(16, iterations=5)),
        ),
        (
            LeNet5(features=(20, 50), hidden=(500,)),
            (28, 28, 1),
            cj.quantize.uniform(8, granularity="channel"),
        ),
        (
            ResNet(depth=20),
            (32, 32, 3),
            cj.chain(cj.prune.magnitude(0.8), cj.quantize.uniform(4, granularity="channel")),
        ),
    ],
    ids=["int4", "pruned and shared", "int8", "pruned int4"],
)
@pytest.mark.slow
def test_a_whole_model_is_within_two_percent_of_its_entropy(model, shape, compression, tmp_path):
    """The entropy of each leaf's codes, the bytes of all else, the header counted as loss."""
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    compression = cj.at("**/kernel", compression)
    packed = compression.pack(params, compression.init(params))
    written = cj.save(tmp_path / "f", packed, coded=True)
    described, tensors = structure.encode(packed)
    held = dict(structure.places(described))
    symbols = {name: unpacked(tensors[name], *of) for name, of in held.items() if of}
    least = sum(
        entropy(symbols[name]) / 8 if name in symbols else x.nbytes for name, x in tensors.items()
    )
    assert written < 1.02 * least
    assert written < cj.save(tmp_path / "plain", packed)
