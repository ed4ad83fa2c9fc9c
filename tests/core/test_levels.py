"""Small floats and tables against ml_dtypes' own casts and against the nearest level in NumPy
float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.levels import Float, Table, exponent_of, power_of_two

# Every format ml_dtypes has whose numbers are laid out as ours.
FORMATS = {
    "float8_e4m3fn": Float(4, 3, reserved=1),
    "float8_e5m2": Float(5, 2, reserved=4),
    "float8_e4m3": Float(4, 3, reserved=8),
    "float8_e3m4": Float(3, 4, reserved=16),
    "float6_e3m2fn": Float(3, 2),
    "float6_e2m3fn": Float(2, 3),
    "float4_e2m1fn": Float(2, 1),
}
each_format = pytest.mark.parametrize("name", FORMATS)


def hard(format: Float) -> np.ndarray:
    """All numbers, all midpoints, both neighbours of those, and random numbers over the whole
    range, all in range."""
    numbers = np.unique(np.array(format.values, np.float32))
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(far)) for far in (-1e9, 1e9)]
    rng = np.random.default_rng(0)
    spread = format.largest * rng.choice([-1, 1], 5000) * 2.0 ** rng.uniform(-40, 0, 5000)
    return np.concatenate([numbers, ties, *beside, spread]).astype(np.float32)


@pytest.mark.wide(1)
@each_format
def test_rounding_is_that_of_ml_dtypes_bit_for_bit(name):
    format, x = FORMATS[name], hard(FORMATS[name])
    cast = x.astype(getattr(ml_dtypes, name))
    np.testing.assert_array_equal(jax.jit(format.round)(x), cast.astype(np.float32))
    codes = np.asarray(format.encode(jnp.asarray(x)))
    zero = cast.astype(np.float32) == 0
    np.testing.assert_array_equal(codes[~zero], cast.view(np.uint8)[~zero])
    assert (codes[zero] == 0).all()  # never minus zero


@each_format
def test_the_table_of_values_is_that_of_ml_dtypes(name):
    format = FORMATS[name]
    cast = (
        np.arange(2**format.bits).astype(np.uint8).view(getattr(ml_dtypes, name)).astype(np.float32)
    )
    finite = np.isfinite(cast)
    np.testing.assert_array_equal(np.array(format.values, np.float32)[finite], cast[finite])
    assert format.largest == cast[finite].max() and format.reserved == (~finite).sum() / 2


@pytest.mark.wide(3)
@each_format
def test_decode_undoes_encode_and_round_is_both(name):
    format, x = FORMATS[name], jnp.asarray(hard(FORMATS[name]))
    rounded = np.asarray(format.round(x))
    np.testing.assert_array_equal(format.decode(format.encode(x)), rounded)
    np.testing.assert_array_equal(format.round(format.round(x)), rounded)
    assert not np.signbit(rounded[rounded == 0]).any()


@pytest.mark.wide(16)
@each_format
@pytest.mark.parametrize("x", [3.4e38, -3.4e38, np.inf, -np.inf, 1e-42, -1e-42, -0.0])
def test_nothing_finite_or_infinite_is_rounded_to_what_is_no_number(name, x):
    format, x = FORMATS[name], jnp.float32(x)
    rounded = float(format.round(x))
    assert rounded == (np.sign(float(x)) * format.largest if abs(x) > 1 else 0)
    assert float(format.decode(format.encode(x))) == rounded


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 8), st.integers(0, 2), st.integers(0, 99))
def test_any_float_rounds_to_a_nearest_number(exponent_bits, mantissa_bits, reserved, seed):
    format = Float(
        exponent_bits, mantissa_bits, min(reserved, 2 ** (exponent_bits + mantissa_bits) - 2)
    )
    x = (np.random.default_rng(seed).normal(size=50) * format.largest / 2).astype(np.float32)
    numbers, x64 = np.unique(np.array(format.values)), x.astype(np.float64)
    place = np.clip(np.searchsorted(numbers, x64), 1, len(numbers) - 1)
    distance = np.minimum(np.abs(x64 - numbers[place - 1]), np.abs(x64 - numbers[place]))
    rounded = np.asarray(format.round(jnp.asarray(x)), np.float64)
    assert np.isin(rounded, numbers).all()
    np.testing.assert_array_equal(np.abs(rounded - x64), distance)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=40, unique=True), st.integers(0, 99))
def test_any_table_rounds_to_the_nearest_level_and_ties_go_up(levels, seed):
    table = Table(tuple(np.sort(np.array(levels, np.float32) / 7).tolist()))
    numbers, rng = np.array(table.values), np.random.default_rng(seed)
    midpoints = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(midpoints, np.float32(far)) for far in (-1e9, 1e9)]
    x = np.concatenate([rng.uniform(-200, 200, 50).astype(np.float32), midpoints, *beside])
    distance = np.abs(x.astype(np.float64)[:, None] - numbers)
    nearest = len(numbers) - 1 - distance[:, ::-1].argmin(1)  # the last of equals
    np.testing.assert_array_equal(table.encode(jnp.asarray(x)), nearest)
    np.testing.assert_array_equal(table.round(jnp.asarray(x)), numbers[nearest].astype(np.float32))


def test_bits_and_largest_of_tables():
    assert [Table(tuple(map(float, range(n)))).bits for n in (2, 3, 4, 5, 16, 17)] == [
        1,
        2,
        2,
        3,
        4,
        5,
    ]
    assert Table((-5.0, 1.0)).largest == 5.0


def test_exponents_and_powers_are_exact():
    exponents = np.arange(-126, 128)
    powers = np.ldexp(np.float32(1), exponents)
    np.testing.assert_array_equal(power_of_two(jnp.asarray(exponents, jnp.int32)), powers)
    np.testing.assert_array_equal(exponent_of(jnp.asarray(-powers)), exponents)
    np.testing.assert_array_equal(
        exponent_of(jnp.asarray(np.nextafter(powers[1:], np.float32(0)))), exponents[:-1]
    )
