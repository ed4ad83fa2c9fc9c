"""Integers and masks stored without gaps, against Python's own big integers and a decoder written
from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import compress_jax as cj
from compress_jax.core.bits import Bits, Gaps, bits_for
from compress_jax.core.sparse import Sparse


def little_endian(values: list[int], bits: int) -> bytes:
    """Concatenate the integers in one big one, the first lowest."""
    total = sum(value << (i * bits) for i, value in enumerate(values))
    return total.to_bytes(-(-len(values) * bits // 8), "little")


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 16),
    st.sampled_from([(), (1,), (0, 3), (7,), (2, 5), (3, 1, 3)]),
    st.randoms(use_true_random=False),
)
def test_round_trip_and_the_very_bytes(bits, shape, random):
    values = [random.randrange(2**bits) for _ in range(int(np.prod(shape)))]
    packed = Bits.pack(jnp.asarray(np.array(values, np.uint16).reshape(shape)), bits)
    assert np.asarray(packed.data).tobytes() == little_endian(values, bits)
    assert packed.nbytes == -(-len(values) * bits // 8)
    out = packed.unpack()
    assert out.shape == shape and out.dtype == packed.dtype == (
        jnp.uint8 if bits <= 8 else jnp.uint16
    )
    assert np.ravel(out).tolist() == values


@pytest.mark.wide(2)
@pytest.mark.parametrize("bits", [1, 3, 8, 11, 16])
def test_round_trip_under_jit(bits):
    values = jax.random.randint(jax.random.key(bits), (5, 3), 0, 2**bits)
    packed = jax.jit(Bits.pack, static_argnums=1)(values, bits)
    assert packed.nbytes == -(-15 * bits // 8)
    assert (jax.jit(Bits.unpack)(packed).astype(jnp.int32) == values).all()


@pytest.mark.parametrize("bits", [0, 17])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 16"):
        Bits.pack(jnp.zeros(1, jnp.uint8), bits)


@given(st.integers(1, 70000))
@example(1)
@example(2)
@example(2**16)
def test_bits_for_is_the_least_width_that_suffices(levels):
    bits = bits_for(levels)
    assert 2**bits >= levels and (bits == 1 or 2 ** (bits - 1) < levels)


def decoded(symbols: list[int], longest: int, n: int) -> list[int]:
    mask, position = [0] * n, 0
    for symbol in symbols:
        position += symbol
        if symbol < longest:
            mask[position] = 1
            position += 1
    return mask


masks = st.one_of(
    st.lists(st.booleans(), min_size=24, max_size=24),
    st.sets(st.integers(0, 63), max_size=4).map(lambda ones: [i in ones for i in range(64)]),
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(masks, st.sampled_from([2, 3, 5]))
@example([False] * 24, 2)
@example([True] * 24, 2)
@example([False] * 3 + [True] + [False] * 20, 2)  # a run as long as the filler symbol
@example([False] * 6 + [True] + [False] * 17, 2)  # and twice as long
@example([False] * 63 + [True], 3)  # many fillers in a row
def test_gaps_hold_any_mask(mask, bits):
    gaps = Gaps.pack(jnp.asarray(np.array(mask)), bits)
    assert decoded(gaps.runs.unpack().tolist(), 2**bits - 1, len(mask)) == [
        int(kept) for kept in mask
    ]
    assert gaps.unpack().tolist() == [int(kept) for kept in mask]
    assert gaps.nbytes == -(-gaps.runs.shape[0] * bits // 8)


def test_filler_symbols_are_as_in_deep_compression():
    gaps = Gaps.pack(jnp.array([0, 0, 0, 0, 0, 0, 0, 1, 1], bool), bits=2)
    assert gaps.runs.unpack().tolist() == [3, 3, 1, 0]


@pytest.mark.wide(3)
@pytest.mark.parametrize(
    "ones", [[], [0], [63], [5, 6, 40], list(range(64)), list(range(0, 64, 9))]
)
def test_best_width_is_the_smallest_of_all_widths(ones):
    mask = jnp.asarray(np.isin(np.arange(64), ones))
    best = Gaps.best_width(mask)
    lengths = {bits: bits * Gaps.pack(mask, bits).runs.shape[0] for bits in (2, 3, 4, 5, 6, 7, 12)}
    assert bits_in(Gaps.pack(mask, best)) == min(
        [*lengths.values(), bits_in(Gaps.pack(mask, best))]
    )


def bits_in(gaps: Gaps) -> int:
    return gaps.runs.bits * gaps.runs.shape[0]


def test_gaps_unpack_under_jit_in_any_shape():
    mask = jax.random.bernoulli(jax.random.key(0), 0.2, (3, 4, 5))
    assert (jax.jit(Gaps.unpack)(Gaps.pack(mask, 3)) == mask.astype(jnp.uint8)).all()


@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8, 9, 12, 16])
def test_on_the_host_and_traced_the_bits_are_the_same(bits, monkeypatch):
    monkeypatch.setattr("compress_jax.core.bits.BLOCK", 64)  # several blocks, the last not full
    values = np.random.default_rng(bits).integers(0, 2**bits, (11, 17)).astype(np.uint16)
    host = Bits.pack(values, bits)
    traced = jax.jit(lambda x: Bits.pack(x, bits).data)(values)
    assert host.data.tolist() == traced.tolist()
    unpacked = jax.jit(lambda node: node.unpack())(host)
    assert unpacked.dtype == host.unpack().dtype and unpacked.shape == (11, 17)
    np.testing.assert_array_equal(host.unpack(), values)
    np.testing.assert_array_equal(unpacked, values)


def test_sparse_nodes_unpack_on_the_host_as_they_do_traced():
    dense = jax.random.normal(jax.random.key(0), (13, 9))
    for share in (0.05, 0.5):
        mask = jax.random.bernoulli(jax.random.key(1), share, dense.shape)  # gaps, then bits
        for node in (
            Sparse.pack(dense, mask),
            Sparse.pack((dense > 0).astype(jnp.int32), mask, fill=2, bits=1),
        ):
            traced = jax.jit(lambda node: node.unpack())(node)
            assert traced.dtype == node.unpack().dtype
            np.testing.assert_array_equal(node.unpack(), traced)


def test_a_program_holds_its_packed_constants_packed():
    node = Bits.pack(np.arange(4096) % 8, 3)
    sparse = Sparse.pack(jnp.ones(4096), jnp.arange(4096) % 64 == 0)
    for packed in (node, sparse):
        jaxpr = jax.make_jaxpr(lambda packed=packed: packed.unpack())()
        assert sum(x.nbytes for x in jaxpr.consts) <= packed.nbytes + 16


def test_packing_compiles_once_for_a_shape_however_many_entries_are_left(caplog):
    """How many weights a leaf keeps depends on its values: it must be no part of a program."""
    method = cj.chain(cj.prune.magnitude(0.5, scope="global"), cj.quantize.uniform(4))
    keys = jax.random.split(jax.random.key(0), 9)

    def params(keys):
        scales = 1.0 + np.arange(
            len(keys), dtype=np.float32
        )  # under one threshold, each keeps another share
        return {f"{i}": jax.random.normal(key, (24, 16)) * scales[i] for i, key in enumerate(keys)}

    with jax.log_compiles():
        for own in (params(keys[:1]), params(keys)):
            state = method.init(own)
            caplog.clear()
            packed = method.pack(own, state)
            cj.unpack(packed)
            if len(own) == 1:
                assert any(r.getMessage().startswith("Compiling") for r in caplog.records)
    kept = {int((np.asarray(x) != 0).sum()) for x in cj.unpack(packed).values()}
    assert len(kept) > 5
    # The one leaf compiled all there is; eight more with other counts compile nothing.
    messages = [record.getMessage() for record in caplog.records]
    assert not [each for each in messages if each.startswith("Compiling")]
