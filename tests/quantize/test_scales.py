"""Scale rules against independent NumPy and SciPy statistics in float64."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

from compress_jax.core.layout import Layout
from compress_jax.quantize import Grid, absmax, minmax, normal_clip, percentile, rms

RNG = np.random.default_rng(0)
W = RNG.normal(size=(24, 6)).astype(np.float32) + np.float32(0.3)
CHANNEL = Layout.of(W.shape, "channel")
PADDED = Layout.of(W.shape, 10, pad=True)


def scale_of(rule, grid, layout=CHANNEL):
    scale, zero = rule(layout.arrange(jnp.asarray(W)), layout, grid)
    return np.asarray(scale, np.float64), np.asarray(zero)


def groups():
    return [W[0:10], W[10:20], W[20:24]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_absmax_puts_the_extreme_on_the_last_level_and_never_on_a_tie(bits):
    scale, zero = scale_of(absmax, Grid(bits))
    np.testing.assert_allclose(
        scale, np.abs(W).max(0, keepdims=True) / (2 ** (bits - 1) - 1), rtol=1e-6
    )
    levels = np.abs(W / scale).max(0)
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert zero == 2 ** (bits - 1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_minmax_spans_exactly_the_range_with_zero(bits):
    scale, zero = scale_of(minmax, Grid(bits, symmetric=False))
    low, high = np.minimum(W.min(0), 0), np.maximum(W.max(0), 0)
    np.testing.assert_allclose(scale[0], (high - low) / (2**bits - 1), rtol=1e-6)
    np.testing.assert_array_equal(zero[0], np.round(-low / scale[0]))


def test_minmax_of_positive_weights_starts_at_zero():
    scale, zero = minmax(jnp.array([1.0, 3.0]), Layout.of((2,), "tensor"), Grid(2, symmetric=False))
    assert (float(scale[0]), int(zero[0])) == (1.0, 0)


@pytest.mark.wide(2)
@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 100.0])
def test_percentile_is_that_of_numpy_even_where_a_group_is_padded(percent):
    rule = partial(percentile, percent=percent)
    scale, _ = scale_of(rule, Grid(4))
    np.testing.assert_allclose(7 * scale[0], np.percentile(np.abs(W), percent, axis=0), rtol=1e-5)
    scale, _ = scale_of(rule, Grid(4), PADDED)
    for got, group in zip(scale, groups(), strict=True):
        np.testing.assert_allclose(
            7 * got[0], np.percentile(np.abs(group), percent, axis=0), rtol=1e-5
        )


def test_asymmetric_percentile_cuts_half_on_either_side():
    scale, _ = scale_of(partial(percentile, percent=90.0), Grid(4, symmetric=False))
    low, high = np.percentile(W, [5, 95], axis=0)
    np.testing.assert_allclose(15 * scale[0], np.maximum(high, 0) - np.minimum(low, 0), rtol=1e-5)


def test_default_percentile_is_the_share_of_a_normal_within_its_optimal_range():
    for bits in (2, 4, 8):
        share = 100 * (1 - 2 * stats.norm.sf(normal_clip(Grid(bits))))
        default, _ = scale_of(percentile, Grid(bits))
        explicit, _ = scale_of(partial(percentile, percent=float(share)), Grid(bits))
        np.testing.assert_allclose(default, explicit, rtol=1e-5)


@pytest.mark.parametrize("percent", [0, -1.0, 100.1, float("nan")])
def test_percentile_refuses_what_is_no_percentage(percent):
    with pytest.raises(ValueError, match="at most 100"):
        scale_of(partial(percentile, percent=percent), Grid(4))


def test_rms_is_the_root_mean_square_and_ignores_padding():
    for got, group in zip(scale_of(rms, Grid(2), PADDED)[0], groups(), strict=True):
        reach = normal_clip(Grid(2)) * np.sqrt((group.astype(np.float64) ** 2).mean(0))
        np.testing.assert_allclose(got[0], np.minimum(reach, np.abs(group).max(0)), rtol=1e-5)


def test_asymmetric_rms_is_mean_and_standard_deviation_and_ignores_padding():
    grid = Grid(2, symmetric=False)
    for got, group in zip(scale_of(rms, grid, PADDED)[0], groups(), strict=True):
        mean, reach = group.mean(0), normal_clip(grid) * group.std(0)
        low, high = np.maximum(mean - reach, group.min(0)), np.minimum(mean + reach, group.max(0))
        np.testing.assert_allclose(3 * got[0], np.maximum(high, 0) - np.minimum(low, 0), rtol=1e-4)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_table_of_optimal_steps_minimises_the_error_of_a_unit_normal(bits, narrow):
    levels = np.arange(-(2 ** (bits - 1)) + narrow, 2 ** (bits - 1))

    def expected_error(step: float) -> float:
        edges = np.concatenate([[-12.0], (levels[:-1] + 0.5) * step, [12.0]])
        nodes, weights = np.polynomial.legendre.leggauss(16)
        pieces = max(
            1, 512 // len(levels)
        )  # refine wide cells so that Gauss-Legendre is exact to rounding
        fine = np.unique(
            np.concatenate(
                [np.linspace(a, b, pieces) for a, b in zip(edges, edges[1:], strict=False)]
            )
        )
        half, mid = np.diff(fine) / 2, (fine[1:] + fine[:-1]) / 2
        x = mid[:, None] + half[:, None] * nodes
        rounded = step * np.clip(np.round(x / step), levels[0], levels[-1])
        return float((half[:, None] * weights * (x - rounded) ** 2 * stats.norm.pdf(x)).sum())

    step = normal_clip(Grid(bits, narrow=narrow)) / (2 ** (bits - 1) - 1)
    best = optimize.minimize_scalar(
        expected_error, bounds=(step / 2, step * 2), method="bounded", options={"xatol": 1e-9}
    )
    assert step == pytest.approx(best.x, rel=1e-4)


@pytest.mark.wide(11)
@pytest.mark.parametrize("rule", [absmax, minmax, percentile, rms])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-42, 2e-38, 1e-30, 1e37])
def test_no_size_of_weights_gives_an_unusable_scale(rule, symmetric, size):
    w, grid = (
        jnp.asarray(np.float32(size) * np.array([1, -0.5, 0.25], np.float32)),
        Grid(8, symmetric),
    )
    scale, zero = rule(w, Layout.of((3,), "tensor"), grid)
    assert np.isfinite(float(1 / scale[0])) and float(scale[0]) > 0
    back = grid.decode(grid.encode(w, scale, zero), scale, zero)
    assert float(jnp.abs(back - w).max()) <= max(
        0.51 * float(scale[0]) if size else 0.0, 0.1 * size
    )
