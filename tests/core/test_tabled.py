"""The node of tabled levels: exact values, true sizes, masks; against NumPy arithmetic written out
here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.bits import Bits
from compress_jax.core.codebook import Tabled
from compress_jax.core.layout import Layout
from compress_jax.core.levels import Float, Table
from compress_jax.core.packed import is_packed, nbytes, to_dense, unpack
from compress_jax.core.sparse import Sparse

RANDOM = np.random.default_rng(0)
E2M1, SIGNS = Float(2, 1), Table((-1.0, 1.0))


def node(levels=E2M1, layout=None, scale_dtype=jnp.float32, tensor_scale=None, dtype=jnp.float32):
    codes = RANDOM.integers(0, 2**levels.bits, (6, 4))
    layout = layout or Layout.of((6, 4), "channel")
    scale = jnp.asarray(2.0 ** RANDOM.integers(-2, 3, layout.scale_shape), jnp.float32).astype(
        scale_dtype
    )
    tensor = None if tensor_scale is None else jnp.float32(tensor_scale)
    return codes, Tabled.pack(
        jnp.asarray(codes), scale, tensor, levels=levels, layout=layout, dtype=jnp.dtype(dtype)
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.float8_e8m0fnu, jnp.float8_e4m3fn])
def test_value_is_level_times_scale_in_any_scale_dtype(scale_dtype):
    codes, packed = node(scale_dtype=scale_dtype, tensor_scale=0.3)
    scale = np.asarray(packed.scale.astype(jnp.float32)) * np.float32(0.3)
    expected = np.array(E2M1.values, np.float32)[codes] * scale
    for form in (
        packed.unpack(),
        jax.jit(unpack)(packed),
        unpack({"w": packed})["w"],
        to_dense(packed),
    ):
        np.testing.assert_array_equal(form, expected)
    assert packed.shape == (6, 4) and is_packed(packed)
    assert packed.nbytes == nbytes(packed) == 12 + 4 * packed.scale.dtype.itemsize + 4


@pytest.mark.wide(2)
@pytest.mark.parametrize(
    "layout", [Layout.of((6, 4), *how, pad=True) for how in [(4,), ("tensor",), (4, 0)]]
)
def test_layouts_give_each_code_its_own_scale(layout):
    codes, packed = node(layout=layout)
    spread = np.asarray(layout.spread(packed.scale))
    np.testing.assert_array_equal(
        packed.unpack(), np.array(E2M1.values, np.float32)[codes] * spread
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("levels", [E2M1, SIGNS], ids=["with zero", "without"])
@pytest.mark.slow
def test_keep_zeroes_the_rest_and_never_brings_anything_back(levels):
    _, packed = node(levels)
    first, second = RANDOM.random((6, 4)) < 0.6, RANDOM.random((6, 4)) < 0.6
    once = packed.keep(jnp.asarray(first))
    twice = once.keep(jnp.asarray(second))
    np.testing.assert_array_equal(once.unpack(), np.where(first, packed.unpack(), 0.0))
    np.testing.assert_array_equal(
        jax.jit(unpack)(twice), np.where(first & second, packed.unpack(), 0.0)
    )
    assert not np.signbit(np.asarray(once.unpack())[~first]).any()


@pytest.mark.slow
def test_only_codes_of_levels_other_than_zero_are_stored_where_that_is_smaller():
    codes, layout = np.zeros((32, 8), int), Layout.of((32, 8), "tensor")
    codes[3, 2], codes[5, 5] = 7, 8  # the latter is minus zero in a float, which we decode as 0
    packed = Tabled.pack(
        jnp.asarray(codes),
        jnp.ones((1, 1)),
        None,
        levels=E2M1,
        layout=layout,
        dtype=jnp.dtype(jnp.bfloat16),
    )
    assert (
        isinstance(packed.codes, Sparse)
        and packed.nbytes < 16
        and packed.dtype == packed.unpack().dtype == jnp.bfloat16
    )
    np.testing.assert_array_equal(
        packed.unpack().astype(jnp.float32), np.where(codes == 7, 6.0, 0.0)
    )


def test_it_is_an_ordinary_pytree_whose_levels_are_structure():
    _, packed = node(scale_dtype=jnp.float8_e8m0fnu)
    assert isinstance(packed.codes, Bits) and len(jax.tree.leaves(packed)) == 2
    other = Tabled(packed.codes, packed.scale, None, Float(3, 0), packed.layout)
    assert jax.tree.structure(packed) != jax.tree.structure(other)
    moved = jax.tree.map(lambda x: x, packed)
    np.testing.assert_array_equal(moved.unpack(), packed.unpack())
