import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.exact import Wide, add, choose, count, less, multiply, subtract, total, wide

words64 = st.integers(0, 2**64 - 1) | st.sampled_from(
    [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**64 - 1]
)
words32 = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**16 - 1, 2**16, 2**24, 2**32 - 1])


def as_int(x: Wide) -> int:
    assert x.hi.dtype == x.lo.dtype == jnp.uint32
    return int(x.hi) * 2**32 + int(x.lo)


@settings(deadline=None)
@given(words64, words64)
def test_arithmetic_is_that_of_integers(a, b):
    assert as_int(wide(a)) == a
    assert as_int(add(wide(a), wide(b))) == (a + b) % 2**64
    assert as_int(subtract(wide(max(a, b)), wide(min(a, b)))) == abs(a - b)
    assert bool(less(wide(a), wide(b))) == (a < b)
    assert as_int(choose(jnp.array(True), wide(a), wide(b))) == a
    assert as_int(choose(jnp.array(False), wide(a), wide(b))) == b


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
