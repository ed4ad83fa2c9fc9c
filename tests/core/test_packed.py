"""Packed nodes: exact values, true sizes, ordinary pytrees; against NumPy arithmetic written out
here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from compress_jax.core.bits import Bits, Gaps
from compress_jax.core.layout import Layout
from compress_jax.core.packed import (
    Clustered,
    LowRank,
    Quantized,
    Sparse,
    Sum,
    is_packed,
    nbytes,
    to_dense,
    unpack,
)

RANDOM = np.random.default_rng(0)


def dense(shape, dtype=np.float32):
    return jnp.asarray(RANDOM.normal(size=shape).astype(np.float32)).astype(dtype)


def quantized(shape=(6, 4), zero=4, bits=3, layout=None):
    codes = jnp.asarray(RANDOM.integers(0, 2**bits, shape))
    layout = layout or Layout.of(shape, "channel")
    scale = jnp.asarray(RANDOM.uniform(0.1, 1, layout.scale_shape).astype(np.float32))
    return (
        codes,
        scale,
        Quantized.pack(codes, bits, scale, jnp.uint8(zero), layout, jnp.dtype(jnp.float32)),
    )


@pytest.mark.wide(2)
@pytest.mark.parametrize("shape", [(), (5,), (4, 5), (2, 3, 4), (2, 2, 3, 3)])
@pytest.mark.parametrize("kept", ["none", "some", "all"])
def test_sparse_holds_any_mask_in_any_rank(shape, kept):
    x = dense(shape)
    mask = {
        "none": np.zeros(shape, bool),
        "some": RANDOM.random(shape) < 0.4,
        "all": np.ones(shape, bool),
    }[kept]
    node = Sparse.pack(x, jnp.asarray(mask), fill=-2.5)
    assert node.shape == shape and node.dtype == jnp.float32
    assert np.array_equal(node.unpack(), np.where(mask, x, np.float32(-2.5)))
    assert node.values.size == mask.sum()
    assert node.nbytes == nbytes(node) == 4 * mask.sum() + node.mask.nbytes


@pytest.mark.wide(2)
@pytest.mark.parametrize(
    ("ones", "form"), [(range(0, 512, 2), Bits), ([40, 300], Gaps), ([], Gaps)]
)
def test_sparse_takes_the_smaller_mask(ones, form):
    mask = np.isin(np.arange(512), list(ones))
    node = Sparse.pack(jnp.asarray(mask.astype(np.float32)), jnp.asarray(mask))
    assert isinstance(node.mask, form)
    assert node.mask.nbytes <= 64
    assert np.array_equal(node.unpack(), mask)


def test_sparse_of_codes_may_fill_with_one_more_than_their_width_holds():
    codes = jnp.array([[3, 4, 0], [4, 1, 2]])
    node = Sparse.pack(codes, codes != 4, fill=4, bits=2)
    assert (
        node.unpack().tolist() == codes.tolist() and node.unpack().dtype == node.dtype == jnp.int32
    )
    assert isinstance(node.values, Bits) and node.values.nbytes == 1


def test_sparse_keeps_signed_zeros_and_bfloat16():
    x = jnp.array([-0.0, 1.5, 0.0], jnp.bfloat16)
    node = Sparse.pack(x, jnp.array([1, 1, 0]))
    assert node.unpack().dtype == jnp.bfloat16
    assert np.signbit(np.asarray(node.unpack(), np.float32)).tolist() == [True, False, False]


def test_quantized_is_code_minus_zero_times_scale():
    codes, scale, node = quantized()
    assert np.array_equal(
        node.unpack(), (np.asarray(codes) - 4).astype(np.float32) * np.asarray(scale)
    )
    assert node.shape == (6, 4) and node.dtype == jnp.float32
    assert node.nbytes == 9 + 16 + 1  # 24 codes of 3 bits, 4 scales, a zero point


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    "layout", [Layout.of((5, 4), *how, pad=True) for how in [(2,), ("tensor",), (5, 0)]]
)
@pytest.mark.slow
def test_quantized_layouts_give_each_code_its_own_scale(layout):
    codes, scale, node = quantized((5, 4), layout=layout)
    spread = layout.restore(jnp.broadcast_to(scale, layout.arrange(jnp.zeros((5, 4))).shape))
    assert np.array_equal(
        node.unpack(), (np.asarray(codes) - 4).astype(np.float32) * np.asarray(spread)
    )


@pytest.mark.slow
def test_quantized_stores_only_nonzero_codes_where_that_is_smaller():
    codes = jnp.full((32, 8), 4).at[3, 2].set(7)
    layout = Layout.of((32, 8), "tensor")
    node = Quantized.pack(
        codes, 3, jnp.full((1, 1), 0.5), jnp.uint8(4), layout, jnp.dtype(jnp.float32)
    )
    assert isinstance(node.codes, Sparse) and node.nbytes < 16
    assert np.array_equal(node.unpack(), np.where(np.asarray(codes) == 7, 1.5, 0.0))


@pytest.mark.slow
def test_keep_zeroes_the_rest_and_never_brings_anything_back():
    _, _, node = quantized()
    first, second = RANDOM.random((6, 4)) < 0.6, RANDOM.random((6, 4)) < 0.6
    once = node.keep(jnp.asarray(first))
    twice = once.keep(jnp.asarray(second))
    assert np.array_equal(once.unpack(), np.where(first, node.unpack(), 0.0))
    assert np.array_equal(twice.unpack(), np.where(first & second, node.unpack(), 0.0))
    assert not np.signbit(np.asarray(once.unpack())[~first]).any()


@pytest.mark.slow
def test_clustered_looks_up_its_codebook_and_keeps_a_code_for_zero():
    codes, book = jnp.array([[0, 1, 2, 3], [3, 2, 1, 0]]), jnp.array([0.5, -0.5, 2.0])
    node = Clustered.pack(codes, book, jnp.dtype(jnp.bfloat16))
    assert node.unpack().dtype == jnp.bfloat16 and node.shape == (2, 4)
    assert node.unpack().astype(jnp.float32).tolist() == [
        [0.5, -0.5, 2.0, 0.0],
        [0.0, 2.0, -0.5, 0.5],
    ]
    assert node.nbytes == 2 + 12  # 8 codes of 2 bits, 3 centroids
    kept = node.keep(jnp.array([[True, False, True, True]] * 2))
    assert kept.unpack().astype(jnp.float32).tolist() == [
        [0.5, 0.0, 2.0, 0.0],
        [0.0, 0.0, -0.5, 0.5],
    ]


@pytest.mark.slow
def test_clustered_needs_no_code_for_zero_where_there_is_none():
    node = Clustered.pack(jnp.array([0, 1] * 8), jnp.array([1.0, 2.0]), jnp.dtype(jnp.float32))
    assert isinstance(node.codes, Bits) and node.codes.bits == 1
    full = Clustered.pack(
        jnp.full((64,), 2).at[0].set(1), jnp.array([1.0, 2.0]), jnp.dtype(jnp.float32)
    )
    assert isinstance(full.codes, Sparse) and full.unpack().sum() == 2.0


@pytest.mark.slow
def test_low_rank_multiplies_its_factors_packed_or_not():
    left, right = dense((6, 2)), dense((2, 4))
    node = LowRank(left, right, (2, 3, 4))
    expected = (np.asarray(left, np.float64) @ np.asarray(right, np.float64)).reshape(2, 3, 4)
    np.testing.assert_allclose(node.unpack(), expected, rtol=1e-5, atol=1e-6)
    _, _, q = quantized((6, 2))
    nested = LowRank(q, Sparse.pack(right, right > 0), (6, 4), jnp.dtype(jnp.bfloat16))
    expected = np.asarray(q.unpack(), np.float64) @ np.where(np.asarray(right) > 0, right, 0)
    np.testing.assert_allclose(
        np.asarray(nested.unpack(), np.float64), expected, rtol=1e-2, atol=1e-2
    )
    assert nested.nbytes == q.nbytes + nested.right.nbytes and nested.unpack().dtype == jnp.bfloat16


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sum_is_rounded_alike_inside_a_program_and_outside(rank, dtype):
    """A product fused with the sum would be rounded once, and the same node be two arrays."""
    _, _, q = quantized((6, 8))
    left, right = dense((6, rank)), dense((rank, 8))
    node = Sum(q, LowRank(left, right, (6, 8)), jnp.dtype(dtype))
    product = np.asarray(left, np.float64) @ np.asarray(right, np.float64)
    expected = np.asarray(q.unpack(), np.float64) + product
    found = node.unpack()
    rtol = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=rtol, atol=1e-5)
    inside = jax.jit(Sum.unpack)(node)
    assert found.dtype == dtype and np.asarray(found).tobytes() == np.asarray(inside).tobytes()
    assert node.nbytes == q.nbytes + left.nbytes + right.nbytes and node.shape == (6, 8)


def tree():
    x = dense((8, 8))
    _, _, q = quantized()
    sparse = Sparse.pack(x, x > 1)
    shared = Clustered.pack(
        jnp.asarray(RANDOM.integers(0, 4, (4, 4))), dense(3), jnp.dtype(jnp.float32)
    )
    thin = LowRank(q.keep(q.unpack() > 0), dense((4, 3)), (6, 3))
    return {"a": {"q": q, "s": sparse}, "b": [shared, thin], "c": (x, jnp.arange(3)), "n": None}


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


@pytest.mark.slow
def test_unpack_is_the_same_under_jit_and_leaves_arrays_alone():
    packed = tree()
    plain = unpack(packed)
    assert not any(map(is_packed, jax.tree.leaves(plain, is_leaf=is_packed)))
    same(jax.jit(unpack)(packed), plain)
    assert plain["c"][0] is packed["c"][0] and plain["n"] is None
    assert plain["b"][1].shape == (6, 3)


@pytest.mark.slow
def test_nodes_are_pytrees_that_map_flatten_and_compare():
    packed = tree()
    leaves, treedef = jax.tree.flatten(packed)
    same(treedef.unflatten(leaves), packed)
    copied = jax.tree.map(lambda x: x + jnp.zeros((), x.dtype), packed)
    same(copied, packed)
    same(unpack(copied), unpack(packed))
    doubled = jax.tree.map(lambda x: 2 * x if x.dtype == jnp.float32 else x, packed)
    np.testing.assert_allclose(to_dense(doubled["a"]["q"]), 2 * to_dense(packed["a"]["q"]))


@pytest.mark.slow
def test_nbytes_counts_every_array_once():
    packed = tree()
    assert nbytes(packed) == sum(np.asarray(x).nbytes for x in jax.tree.leaves(packed))
    assert nbytes({"a": 1.0, "b": jnp.zeros((3, 2), jnp.bfloat16), "c": None}) == 4 + 12
    assert nbytes(packed["a"]["q"]) == packed["a"]["q"].nbytes < 24 * 4


@pytest.mark.slow
def test_orbax_restores_packed_params(tmp_path):
    packed = tree()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", packed)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(
            tmp_path / "packed", jax.tree.map(ocp.utils.to_shape_dtype_struct, packed)
        )
    same(back, packed)
    same(unpack(back), unpack(packed))


@pytest.mark.slow
def test_nodes_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantized()[2].scale = jnp.ones(1)
