import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress_jax.core.exact import multiply, uint64
from compress_jax.prune._masks.select import bisect, first, magnitude_bits, smallest

SHAPES = [(), (1,), (13,), (5, 7), (2, 3, 5), (3, 2, 2, 4)]
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn"]


def by_argsort(arrays, k):
    """Masks of the first k of a stable argsort of the concatenated magnitudes, in NumPy float64."""
    sizes = [x.size for x in arrays]
    flat = np.concatenate([np.abs(np.asarray(x, np.float64)).ravel() for x in arrays])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(flat, kind="stable")[:k]] = True
    pieces = np.split(chosen, np.cumsum(sizes)[:-1])
    return [piece.reshape(x.shape) for piece, x in zip(pieces, arrays, strict=True)]


def assert_same(arrays, k):
    for ours, expected in zip(smallest(arrays, uint64(k)), by_argsort(arrays, k), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.wide(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_stable_argsort_at_every_count(shape, dtype):
    x = jax.random.normal(jax.random.key(len(shape)), shape).astype(dtype)
    for k in range(x.size + 1):
        assert_same([x], k)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SHAPES).flatmap(lambda s: hnp.arrays(np.int8, s, elements=st.integers(-2, 2))),
    st.floats(0, 1),
)
@pytest.mark.slow
def test_equals_stable_argsort_among_ties(values, share):
    assert_same([jnp.asarray(values, jnp.float32)], round(share * values.size))


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32, (4, 6), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    ),
    st.integers(0, 24),
)
def test_equals_stable_argsort_for_any_floats(values, k):
    """Subnormals and infinities included; both sides read bits, so no flush to zero matters."""
    assert_same([jnp.asarray(values)], k)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
def test_several_arrays_are_one_sequence(seed, k):
    rng = np.random.default_rng(seed)
    assert_same(
        [
            jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)
            for shape in [(4, 5), (), (3, 3, 3), (12,)]
        ],
        k,
    )


def test_arrays_of_different_dtypes_compare_by_value():
    arrays = [
        jax.random.normal(jax.random.key(i), (9,)).astype(dtype) for i, dtype in enumerate(DTYPES)
    ]
    arrays.append(arrays[1].astype(jnp.float32))  # ties across dtypes
    for k in range(46):
        assert_same(arrays, k)


def test_float64_is_compared_in_float64():
    with jax.enable_x64(True):
        x = 1.0 + np.random.default_rng(0).permutation(50).reshape(5, 10) * 2.0**-50
        for k in (0, 1, 17, 49, 50):
            assert_same([jnp.asarray(x)], k)
            assert_same([jnp.asarray(x), jnp.ones(3, jnp.float32)], k)


def test_signed_zeros_tie():
    x = jnp.array([0.0, -0.0, 1.0, -0.0, 0.0])
    np.testing.assert_array_equal(smallest([x], uint64(2))[0], [True, True, False, False, False])
    assert set(magnitude_bits(x).tolist()) == {0, int(np.float32(1).view(np.uint32))}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SHAPES).flatmap(lambda s: hnp.arrays(bool, s)), st.integers(0, 70))
@pytest.mark.slow
def test_first_takes_the_first_true_ones(flags, k):
    expected = flags & (np.cumsum(flags).reshape(flags.shape) <= k)
    np.testing.assert_array_equal(jax.jit(first)(jnp.asarray(flags), uint64(k)), expected)


@jax.jit
def multiples_below(k):
    """Bisect the counts of a model of 2**62 weights, of which t * EACH lie below t."""
    return bisect(lambda t: multiply(t, EACH), k, jnp.uint32(2**31))


EACH = 2**31 + 12345


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_bisection_reaches_counts_that_need_two_words(k):
    found, reached = multiples_below(uint64(k))
    assert int(found) == min(k // EACH, 2**31 - 1)
    assert int(reached.high) * 2**32 + int(reached.low) == int(found) * EACH
