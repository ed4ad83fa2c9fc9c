"""The least-squares scale against brute force in float64 and against published figures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax import quantize
from compress_jax.core.layout import Layout
from compress_jax.quantize import Grid, fit, mse


def samples(name: str, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    draw = {
        "normal": lambda: rng.normal(size=n),
        "laplace": lambda: rng.laplace(size=n),
        "heavy": lambda: rng.standard_t(2, size=n),
        "uniform": lambda: rng.uniform(-1, 1, size=n),
        "skewed": lambda: rng.exponential(size=n) - 0.2,
        "few": lambda: rng.choice([-2.0, -1.0, 0.0, 1.0, 3.0], size=n),
    }
    return draw[name]().astype(np.float32)


def error(w: np.ndarray, scale: float | np.ndarray, low: int, high: int) -> np.ndarray:
    w, scale = w.astype(np.float64), np.asarray(scale, np.float64)[..., None]
    return ((w - scale * np.clip(np.round(w / scale), low, high)) ** 2).sum(-1)


def ours(w: np.ndarray, grid: Grid) -> float:
    scale, zero = mse(jnp.asarray(w), Layout.of(w.shape, "tensor"), grid)
    z = int(zero.ravel()[0])
    return float(error(w, float(scale[0]), -z, grid.top - z))


@pytest.mark.wide(7)
@pytest.mark.parametrize("n", [16, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["normal", "laplace", "heavy", "uniform", "skewed", "few"])
def test_no_worse_than_the_best_of_4000_scales(name, bits, n):
    w, q = samples(name, n), 2 ** (bits - 1)
    dense = error(w, np.abs(w).max() * np.linspace(1e-3, 1.0, 4000), -q, q - 1)
    assert ours(w, Grid(bits)) <= dense.min() * (1 + 1e-4) + 1e-10


@pytest.mark.wide(2)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", ["normal", "heavy", "skewed", "few"])
def test_asymmetric_is_within_a_percent_of_brute_force_over_scale_and_zero_point(name, bits):
    w, top = samples(name, 128), 2**bits - 1
    scales = np.abs(w).max() * np.geomspace(1e-2, 1.0, 800)
    dense = min(error(w, scales, -z, top - z).min() for z in range(top + 1))
    assert ours(w, Grid(bits, symmetric=False)) <= dense * 1.01 + 1e-10


@pytest.mark.slow
def test_one_outlier_among_a_million_does_not_hold_the_scale():
    w = np.append(samples("normal", 2**20 - 1), np.float32(1000))
    dense = error(w, np.array([0.3, 0.6, 1.2, 2.4, 4.8, 9.6, 143.0]), -8, 7)
    assert ours(w, Grid(4)) <= dense.min()


@pytest.mark.wide(1)
@pytest.mark.parametrize(("bits", "figure"), [(8, 0.00773), (4, 0.1077), (3, 0.2008), (2, 0.3860)])
@pytest.mark.slow
def test_figures_for_a_normal_matrix_per_channel(bits, figure):
    assert frobenius(quantize.uniform(bits, granularity="channel", scale="mse")) < figure + 5e-5


@pytest.mark.slow
@pytest.mark.parametrize(("group", "figure"), [(128, 0.1106), (64, 0.1027), (32, 0.0948)])
def test_figures_for_a_normal_matrix_in_groups(group, figure):
    assert frobenius(quantize.uniform(4, granularity=group, scale="mse")) < 0.93 * figure


@pytest.mark.parametrize(
    ("symmetric", "scale", "figure"), [(True, "absmax", 0.00784), (False, "minmax", 0.00738)]
)
def test_figures_of_the_plain_ranges_at_8_bits(symmetric, scale, figure):
    assert frobenius(quantize.uniform(8, symmetric, "channel", scale)) == pytest.approx(
        figure, rel=2e-3
    )


def frobenius(c) -> float:
    """Relative error on N(0, 1) 1024x1024."""
    w = jax.random.normal(jax.random.key(0), (1024, 1024))
    view = jax.jit(lambda w: c.view({"w": w}, c.init({"w": w}))["w"])(w)
    return float(jnp.linalg.norm(view - w) / jnp.linalg.norm(w))


@pytest.mark.parametrize("grid", [Grid(4), Grid(3, symmetric=False)])
def test_weights_of_any_size_give_the_same_scale_times_that_size(grid):
    w, layout = samples("normal", 64), Layout.of((64,), "tensor")
    scale, zero = mse(jnp.asarray(w), layout, grid)
    for size in (2.0**-100, 2.0**100):
        scaled, z = mse(jnp.asarray(w * np.float32(size)), layout, grid)
        np.testing.assert_array_equal(scaled, scale * np.float32(size))
        np.testing.assert_array_equal(z, zero)


def test_a_grid_that_was_quantized_before_is_found_again():
    w = 0.37 * np.array([-8, 5, 3, 2, -1, 0, 6, 7, 1, -4], np.float32)
    assert ours(w, Grid(4)) < 1e-10


def test_padding_does_not_count():
    w, grid = jnp.asarray(samples("laplace", 40)), Grid(3)
    padded, _ = mse(Layout.of((40,), 32, pad=True).arrange(w), Layout.of((40,), 32, pad=True), grid)
    alone, _ = mse(w[32:], Layout.of((8,), "tensor"), grid)
    np.testing.assert_allclose(padded[1, 0, 0], alone[0], rtol=1e-5)


def test_fit_is_the_least_squares_solution():
    rng = np.random.default_rng(0)
    w, c = rng.normal(size=(2, 50))
    scale, left = fit(jnp.asarray(w, jnp.float32), jnp.asarray(c, jnp.float32), jnp.ones(1))
    (expected,), (residual,), *_ = np.linalg.lstsq(c[:, None], w, rcond=None)
    np.testing.assert_allclose([scale[0], left[0]], [expected, residual], rtol=1e-5)


@pytest.mark.slow
def test_a_larger_norm_lowers_the_error_in_that_norm():
    w, layout, grid = jnp.asarray(samples("heavy", 256)), Layout.of((256,), "tensor"), Grid(4)

    def error_in(norm: float, scale: jax.Array) -> float:
        return float((jnp.abs(w - grid.levels(w, scale, grid.middle) * scale) ** norm).sum())

    square, other = (partial(mse, norm=norm)(w, layout, grid)[0] for norm in (2.0, 4.0))
    assert error_in(4.0, other) < error_in(4.0, square)
    assert error_in(2.0, square) < error_in(2.0, other)
