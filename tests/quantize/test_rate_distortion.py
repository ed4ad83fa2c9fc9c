"""Codes of least error plus rate, against a search over all levels in NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compress_jax as cj
from compress_jax.core import ArgumentError

SOURCES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "laplace": lambda rng, n: rng.laplace(size=n) / 2**0.5,
}


def sample(source: str, n: int = 40_000) -> np.ndarray:
    return SOURCES[source](np.random.default_rng(0), n).astype(np.float32)


def quantized(w, **options):
    c = cj.quantize.rate_distortion(**options)
    state = c.init({"w": jnp.asarray(w)})
    return np.asarray(c.view({"w": jnp.asarray(w)}, state)["w"]), state.fixed["w"]


def entropy(codes) -> float:
    """Return bits a symbol under the symbols' own frequencies."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts / counts.sum() * np.log2(counts / counts.sum())).sum())


def searched(v: np.ndarray, lam: float, qmax: int, passes: int = 5) -> np.ndarray:
    """Return levels of v: rates of a geometric law and the cheapest of all levels, in turn."""
    levels = np.arange(-qmax, qmax + 1)
    codes = np.round(v)
    for _ in range(passes):
        nonzero, size = (codes != 0).sum(), np.abs(codes).sum()
        share, mean = (nonzero + 0.5) / (v.size + 1), (size + 0.5) / (nonzero + 0.5)
        gain = -np.log2(max(1 - 1 / mean, 2.0**-24))
        rates = 1 - np.log2(share / mean) + (np.abs(levels) - 1) * gain
        rates[qmax] = -np.log2(1 - share)
        costs = (v[:, None] - levels) ** 2 + lam * rates
        codes = levels[costs.argmin(1)]
    return codes


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("lam", "step"), [(0.1, 0.3), (0.1, 1.0), (0.25, 0.5), (0.5, 1.5)])
def test_codes_are_the_cheapest_of_all_levels(source, lam, step):
    w = sample(source, 4000)
    view, _ = quantized(w, lam=lam, step=step, relative=False, bits=6)
    scale = max(step, float(np.abs(w).max()) / 31)
    wanted = searched(w.astype(np.float64) / scale, lam, 31)
    # Entries that lie within float32's error of a threshold may differ.
    assert (np.round(view / scale) != wanted).mean() < 1e-3


@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.floats(0.01, 10))
@settings(max_examples=20, deadline=None)
def test_without_a_price_it_is_rounding_to_the_nearest(n, seed, step):
    w = np.random.default_rng(seed).normal(size=256).astype(np.float32)
    w[n:] = 0
    view, fixed = quantized(w, lam=0, step=step, relative=False)
    scale = np.float32(fixed["scale"].item())
    np.testing.assert_array_equal(view, np.round(w * (1 / scale)) * scale)


@pytest.mark.parametrize("source", SOURCES)
def test_with_its_price_bits_and_sizes_fall_and_errors_grow(source):
    w = sample(source)
    rates, errors, sizes = [], [], []
    for lam in (0, 0.05, 0.1, 0.2, 0.4):
        view, _ = quantized(w, lam=lam, step=0.7)
        rates.append(entropy(view))
        errors.append(((view - w) ** 2).mean())
        sizes.append(np.abs(view).mean())
    assert (np.diff(rates) < 0).all() and (np.diff(sizes) < 0).all() and (np.diff(errors) > 0).all()


def least(w: np.ndarray, slope: float) -> float:
    """Return bits + log2(error)/2 of an entropy-constrained scalar quantizer of any levels.

    Chou, Lookabaugh and Gray's iteration: the cheapest level by error and rate, then the levels'
    centroids and the rates of their frequencies.
    """
    levels = np.linspace(w.min(), w.max(), 128)
    share = np.full(128, 1 / 128)
    for _ in range(60):
        costs = (w[:, None] - levels) ** 2 - slope * np.log2(share)
        which = costs.argmin(1)
        counts = np.bincount(which, minlength=levels.size)
        sums = np.bincount(which, w, minlength=levels.size)
        kept = counts > 0
        levels, share = sums[kept] / counts[kept], counts[kept] / w.size
    error = (
        (w - levels[(((w[:, None] - levels) ** 2 - slope * np.log2(share)).argmin(1))]) ** 2
    ).mean()
    return float(-(share * np.log2(share)).sum() + np.log2(error) / 2)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("step", [0.4, 0.8, 1.2])
def test_it_is_within_hundredths_of_a_bit_of_the_best_scalar_quantizer(source, step):
    w = sample(source, 20_000)
    view, _ = quantized(w, step=step, relative=False)
    error = ((view - w) ** 2).mean()
    ours = entropy(view) + np.log2(error) / 2
    # The same slope of the curve, -d error / d bits, as the price of a bit.
    assert ours < least(w.astype(np.float64), 0.1 * step**2) + 0.03


def test_high_rates_cost_a_quarter_of_a_bit_more_than_the_rate_distortion_function():
    w = sample("normal", 200_000)
    view, _ = quantized(w, step=0.25)
    excess = entropy(view) + np.log2(((view - w) ** 2).mean()) / 2
    assert abs(excess - np.log2(2 * np.pi * np.e / 12) / 2) < 0.01


def test_one_step_for_all_leaves_costs_fewest_bits_at_an_error():
    rng = np.random.default_rng(0)
    params = {
        "wide": jnp.asarray(rng.normal(size=(64, 256)) * 3, jnp.float32),
        "narrow": jnp.asarray(rng.normal(size=(256, 64)) * 0.2, jnp.float32),
    }
    step = cj.quantize.step_for_error(params, 0.1)
    found = {}
    for name, c in {
        "one": cj.quantize.rate_distortion(step=step, relative=False),
        "relative": cj.quantize.rate_distortion(step=0.345),
    }.items():
        view = c.view(params, c.init(params))
        lost = sum(float(jnp.square(view[k] - params[k]).sum()) for k in params)
        size = sum(float(jnp.square(x).sum()) for x in params.values())
        found[name] = (lost / size) ** 0.5, sum(entropy(x) for x in view.values()) / 2
    np.testing.assert_allclose([error for error, _ in found.values()], 0.1, rtol=0.02)
    assert found["one"][1] < found["relative"][1] - 1


def test_pruned_weights_stay_zero_and_the_rates_know_them():
    w = {"w": jnp.asarray(sample("normal", 4096).reshape(64, 64))}
    c = cj.chain(cj.prune.magnitude(0.8), cj.quantize.rate_distortion())
    state = c.init(w)
    view = c.view(w, state)["w"]
    assert (view == 0).mean() >= 0.8
    np.testing.assert_array_equal(cj.unpack(c.pack(w, state))["w"], view)
    dense = cj.quantize.rate_distortion().init(w).fixed["w"]
    assert state.fixed["1"]["w"]["threshold"] > dense["threshold"]


def test_codes_are_packed_in_as_many_bits_as_the_largest_needs():
    w = {"w": jnp.asarray(sample("normal", 4096).reshape(64, 64))}
    c = cj.quantize.rate_distortion(step=0.5)
    packed = c.pack(w, c.init(w))["w"]
    assert packed.codes.bits == 5 and packed.zero_point == 16  # four deviations are 8 steps


def test_a_leaf_of_zeros_and_one_of_a_single_entry_stay_as_they_are():
    params = {"zeros": jnp.zeros((4, 4)), "one": jnp.full((1,), 3.0)}
    c = cj.quantize.rate_distortion()
    view = c.view(params, c.init(params))
    assert not view["zeros"].any() and view["one"] == 3


@pytest.mark.parametrize(
    "options", [{"lam": -1}, {"step": 0}, {"bits": 9}, {"relative": 1}, {"lam": "0.1"}]
)
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        cj.quantize.rate_distortion(**options)


def test_an_error_that_no_codes_reach_is_refused():
    params = {"w": jnp.asarray(sample("normal", 4096))}
    with pytest.raises(ArgumentError, match="more bits"):
        cj.quantize.step_for_error(params, 0.01, bits=4)
    with pytest.raises(ArgumentError, match="zero"):
        cj.quantize.step_for_error({"w": jnp.zeros(3)}, 0.1)
