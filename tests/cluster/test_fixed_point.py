import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.cluster._fixed_point import exponent, from_fixed, prefix_sums, to_fixed, total

prefix_sums, total = jax.jit(prefix_sums), jax.jit(total)

TERMS = st.lists(st.integers(-(2**30), 2**30), min_size=20, max_size=20)


@settings(deadline=None)
@given(TERMS)
def test_prefix_sums_are_those_of_int64(terms):
    sums = prefix_sums(jnp.array(terms, jnp.int32))
    exact = np.asarray(sums.high, np.int64) * 2**32 + np.asarray(sums.low, np.int64)
    np.testing.assert_array_equal(exact, np.append(0, np.cumsum(terms)))
    whole = total(jnp.array(terms, jnp.int32))
    assert int(whole.high) * 2**32 + int(whole.low) == sum(terms)


@settings(deadline=None)
@given(TERMS, st.integers(0, 20), st.integers(0, 20))
def test_differences_become_the_nearest_float(terms, i, j):
    sums = prefix_sums(jnp.array(terms, jnp.int32))
    difference = sums.at(jnp.array(j)) - sums.at(jnp.array(i))
    exact = sum(terms[:j]) - sum(terms[:i])
    np.testing.assert_allclose(float(difference.to_float()), exact, rtol=2.0**-22)


@given(st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=8, max_size=8))
@settings(deadline=None)
def test_fixed_point_is_as_fine_as_its_unit(values):
    x = jnp.array(values, jnp.float32)
    e = exponent(x)
    back = from_fixed(to_fixed(x, e).astype(jnp.float32), e)
    assert (jnp.abs(back - x) <= jnp.ldexp(jnp.float32(1), e - 23)).all()
    assert jnp.abs(x).max() == 0 or bool(jnp.abs(x).max() >= jnp.ldexp(jnp.float32(1), e - 1))
