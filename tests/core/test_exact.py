import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.exact import (
    Int64,
    add,
    choose,
    count,
    exact_sum,
    from_fixed,
    less,
    multiply,
    prefix_sums,
    scale_exponent,
    subtract,
    to_fixed,
    total,
    uint64,
    widened,
)

prefix_sums, compiled_total = jax.jit(prefix_sums), jax.jit(total)

words64 = st.integers(0, 2**64 - 1) | st.sampled_from(
    [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**64 - 1]
)
words32 = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**16 - 1, 2**16, 2**24, 2**32 - 1])
signed64 = st.integers(-(2**63), 2**63 - 1) | st.sampled_from(
    [-(2**63), -(2**32) - 1, -(2**32), -1, 0, 1, 2**32 - 1, 2**32, 2**63 - 1]
)


def as_int(x: Int64) -> int:
    assert x.high.dtype == x.low.dtype == jnp.uint32
    return int(x.high) * 2**32 + int(x.low)


def int64(value: int) -> Int64:
    return Int64(jnp.int32(value >> 32), jnp.uint32(value & 0xFFFFFFFF))


def as_signed(x: Int64) -> int:
    assert x.high.dtype == jnp.int32 and x.low.dtype == jnp.uint32
    return int(x.high) * 2**32 + int(x.low)


def wrapped(value: int) -> int:
    """The integer modulo 2**64 that lies in [-2**63, 2**63)."""
    return (value + 2**63) % 2**64 - 2**63


@settings(deadline=None)
@given(words64, words64)
@pytest.mark.slow
def test_arithmetic_is_that_of_integers(a, b):
    assert as_int(uint64(a)) == a
    assert as_int(add(uint64(a), uint64(b))) == (a + b) % 2**64
    assert as_int(subtract(uint64(max(a, b)), uint64(min(a, b)))) == abs(a - b)
    assert bool(less(uint64(a), uint64(b))) == (a < b)
    assert as_int(choose(jnp.array(True), uint64(a), uint64(b))) == a
    assert as_int(choose(jnp.array(False), uint64(a), uint64(b))) == b


@settings(deadline=None)
@given(signed64, signed64)
def test_arithmetic_is_that_of_signed_integers(a, b):
    assert as_signed(int64(a)) == a
    assert as_signed(add(int64(a), int64(b))) == wrapped(a + b)
    assert as_signed(subtract(int64(a), int64(b))) == wrapped(a - b)
    assert bool(less(int64(a), int64(b))) == (a < b)
    assert as_signed(choose(jnp.array(True), int64(a), int64(b))) == a


@settings(deadline=None)
@given(words64, signed64)
def test_floats_are_the_nearest_up_to_their_last_bit(a, b):
    for exact, ours in ((a, uint64(a)), (b, int64(b))):
        np.testing.assert_allclose(float(ours.to_float()), exact, rtol=2.0**-22)
        if abs(exact) < 2**24:
            assert float(ours.to_float()) == exact


@settings(deadline=None)
@given(words32, st.integers(-(2**31), 2**31 - 1))
def test_32_bits_become_64_with_their_sign(a, b):
    assert as_int(widened(jnp.uint32(a))) == a
    assert as_signed(widened(jnp.int32(b))) == b


@settings(deadline=None)
@given(words32, words32)
def test_products_keep_all_64_bits(a, b):
    assert as_int(multiply(jnp.uint32(a), b)) == a * b


@pytest.mark.parametrize("shape", [(), (7,), (3, 50), (2, 5, 4, 3)])
def test_count_is_the_number_of_true_entries(shape):
    flags = np.random.default_rng(0).random(shape) < 0.4
    assert as_int(count(jnp.asarray(flags))) == flags.sum()


@pytest.mark.parametrize("shape", [(), (1,), (9, 50), (3, 4, 5)])
def test_row_counts_add_up_beyond_one_word(shape):
    """Rows of arrays too large to make here, of up to 2e12 entries."""
    rows = np.random.default_rng(1).integers(0, 2**32, shape, dtype=np.uint32)
    assert as_int(total(jnp.asarray(rows))) == sum(map(int, rows.ravel()))


def test_an_array_of_more_than_a_word_is_counted_by_rows():
    """Shapes only: nothing of 2**33 entries is made."""
    jaxpr = jax.make_jaxpr(count)(jax.ShapeDtypeStruct((2**3, 2**30), bool))
    sums = [equation for equation in jaxpr.eqns if equation.primitive.name.startswith("reduce")]
    assert [[out.aval.shape for out in equation.outvars] for equation in sums] == [[(8,)], [(), ()]]


TERMS = st.lists(st.integers(-(2**30), 2**30), min_size=20, max_size=20)


@settings(deadline=None)
@given(TERMS)
def test_prefix_sums_are_those_of_int64(terms):
    sums = prefix_sums(jnp.array(terms, jnp.int32))
    exact = np.asarray(sums.high, np.int64) * 2**32 + np.asarray(sums.low, np.int64)
    np.testing.assert_array_equal(exact, np.append(0, np.cumsum(terms)))
    whole = compiled_total(jnp.array(terms, jnp.int32))
    assert int(whole.high) * 2**32 + int(whole.low) == sum(terms)


@settings(deadline=None)
@given(TERMS, st.integers(0, 20), st.integers(0, 20))
def test_differences_become_the_nearest_float(terms, i, j):
    sums = prefix_sums(jnp.array(terms, jnp.int32))
    difference = subtract(sums.map(lambda word: word[j]), sums.map(lambda word: word[i]))
    exact = sum(terms[:j]) - sum(terms[:i])
    np.testing.assert_allclose(float(difference.to_float()), exact, rtol=2.0**-22)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8))
@settings(deadline=None)
@pytest.mark.slow
def test_fixed_point_is_as_fine_as_its_unit(values):
    x = jnp.array(values, jnp.float32)
    e = scale_exponent(x, largest=128)
    back = np.asarray(from_fixed(to_fixed(x, e).astype(jnp.float32), e), np.float64)
    # A subnormal number may count as zero: many backends flush them.
    unit = max(2.0 ** (int(e) - 23), 2.0**-126)
    assert (abs(back - np.asarray(x, np.float64)) <= unit).all()
    largest = abs(np.asarray(x, np.float64)).max()
    assert largest < 2.0 ** int(e) and (e == -124 or largest >= 2.0 ** (int(e) - 1))


@given(st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=8), st.randoms())
@settings(deadline=None)
def test_exact_sums_are_near_and_do_not_depend_on_the_order(values, random):
    x = np.float32(values)
    ours = exact_sum(jnp.asarray(x), (0,))
    scale = max(abs(x.astype(np.float64)).max(), 2.0**-126)
    np.testing.assert_allclose(float(ours), x.astype(np.float64).sum(), rtol=0, atol=scale * 2e-6)
    random.shuffle(values)
    np.testing.assert_array_equal(exact_sum(jnp.asarray(np.float32(values)), (0,)), ours)
