import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.amount import MOST, amount

sizes = st.integers(1, MOST) | st.sampled_from(
    [1, 2, 3, 2**24 + 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, MOST]
)


def as_int(pruned):
    return int(pruned.high) * 2**32 + int(pruned.low)


def half_up(share: Fraction, size: int) -> int:
    return (2 * share.numerator * size + share.denominator) // (2 * share.denominator)


@settings(deadline=None)
@given(st.integers(0, 10**9), sizes)
def test_a_python_number_is_the_decimal_it_prints_as(billionths, size):
    share = Fraction(billionths, 10**9)
    assert as_int(amount(billionths / 10**9, size)) == half_up(share, size)


@settings(deadline=None)
@given(st.integers(0, 2**24), sizes)
@pytest.mark.slow
def test_a_float32_array_is_exact_in_integers(t, size):
    assert as_int(amount(jnp.float32(t / 2**24), size)) == half_up(Fraction(t, 2**24), size)


@settings(deadline=None)
@given(st.floats(0, 1, width=32), st.integers(1, 2**30))
def test_any_float32_is_within_one_part_in_2_to_the_25(s, size):
    assert abs(as_int(amount(jnp.float32(s), size)) - Fraction(s) * size) <= Fraction(
        1, 2
    ) + Fraction(size, 2**25)


@pytest.mark.parametrize("size", [1, 10, 999, 2**33 + 7])
def test_halves_round_up(size):
    expected = (size + 1) // 2
    assert as_int(amount(0.5, size)) == as_int(amount(jnp.float32(0.5), size)) == expected


@pytest.mark.parametrize("kind", [float, jnp.float32, np.float64, jnp.bfloat16])
def test_what_lies_outside_is_clipped_and_nan_prunes_nothing(kind):
    values = [-0.5, 0.0, 1.0, 1.5, math.inf, -math.inf, math.nan]
    assert [as_int(amount(kind(v), 2**35)) for v in values] == [0, 0, 2**35, 2**35, 2**35, 0, 0]


def test_tracing_changes_nothing():
    traced = jax.jit(amount, static_argnums=1)
    for s in np.linspace(0, 1, 23, dtype=np.float32):
        assert as_int(traced(jnp.asarray(s), 3_000_000_019)) == as_int(
            amount(jnp.asarray(s), 3_000_000_019)
        )


def test_more_than_it_can_rank_is_refused():
    with pytest.raises(ValueError, match="prune them in several parts"):
        amount(0.5, MOST + 1)
