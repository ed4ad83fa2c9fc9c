"""The constants of the formats against their definitions."""

import ml_dtypes
import numpy as np
import pytest
from scipy import stats

from compress_jax import quantize
from compress_jax.quantize import float_format
from compress_jax.quantize._weights.binary import BINARY
from compress_jax.quantize._weights.floats import E2M1, E4M3, E5M2, NF4
from compress_jax.quantize._weights.ternary import TERNARY


@pytest.mark.parametrize(
    ("levels", "dtype"), [(E4M3, "float8_e4m3fn"), (E5M2, "float8_e5m2"), (E2M1, "float4_e2m1fn")]
)
def test_the_named_floats_have_the_range_of_the_dtypes(levels, dtype):
    info = ml_dtypes.finfo(dtype)
    assert (levels.bits, levels.largest) == (info.bits, float(info.max))
    assert min(v for v in levels.values if v > 0) == float(info.smallest_subnormal)


def test_nf4_is_what_the_paper_constructs():
    """Quantiles of a normal, 8 above zero and 7 below, over the largest: QLoRA, equation 4."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    quantiles = np.sort(np.concatenate([above, [0], below])) / above.max()
    np.testing.assert_allclose(NF4.values, quantiles, atol=2e-7)
    assert NF4.bits == 4 and np.array_equal(np.array(NF4.values, np.float32), NF4.values)


def test_bits_of_the_smallest():
    assert (TERNARY.bits, BINARY.bits) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "1 to 7 exponent and 0 to 8 mantissa bits, got 0 and 3"),
        ((8, 1), "got 8 and 1"),
        ((4, 9), "got 4 and 9"),
    ],
)
def test_floats_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        float_format(*arguments)


@pytest.mark.parametrize("reserved", [-1, 7])
def test_a_float_keeps_a_number_above_zero(reserved):
    assert float_format(2, 1, reserved=6).largest == 0.5
    with pytest.raises(ValueError, match=f"among 8 magnitudes, got {reserved}"):
        float_format(2, 1, reserved=reserved)


@pytest.mark.parametrize(
    ("old", "new"),
    [("tabled", "codebook"), ("signed", "signround"), ("spanning", "scale_from_range")],
)
def test_old_names_warn_and_mean_the_new_ones(old, new):
    with pytest.warns(DeprecationWarning, match=f"quantize.{old} is now .*quantize.{new}"):
        assert getattr(quantize, old) is getattr(quantize, new)
    assert old not in dir(quantize)


@pytest.mark.parametrize(("old", "new"), [("see", "quantize_fn"), ("place", "scale_fn")])
def test_old_names_of_a_quantizers_functions_warn(old, new):
    quantizer = quantize.dynamic()
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        assert getattr(quantizer, old) is getattr(quantizer, new)


@pytest.mark.parametrize(
    ("compression", "call"),
    [
        (
            quantize.uniform(4, granularity="channel"),
            "uniform(granularity='channel', grid=Grid(bits=4, symmetric=True, narrow=False), "
            "pad=False, rule=absmax, "
            "see=_on_grid(Grid(bits=4, symmetric=True, narrow=False)))",
        ),
        (
            quantize.fp4(),
            "on_levels(clip=None, granularity='tensor', "
            "levels=Float(exponent_bits=2, mantissa_bits=1, reserved=0), "
            "pad=False, rule=absmax, scale_dtype=float32)",
        ),
        (
            quantize.lsq(3),
            "lsq(granularity='tensor', grid=Grid(bits=3, symmetric=True, narrow=False), pad=False)",
        ),
    ],
)
def test_the_call_in_checkpoints_keeps_its_text(compression, call):
    """A checkpoint whose text differs is refused, so a renamed variable would cost old runs."""
    assert compression.call == call
