"""The searched ranges against the published procedures, written out in NumPy float64."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.core.layout import Layout
from compress_jax.quantize import Grid, entropy, mse, pnorm
from compress_jax.quantize._scales.search import kl_clip_ratio


def divergence(counts: np.ndarray, zero: int, share: float, groups: int) -> float:
    """KL(P || Q) as in Migacz' slides, with loops."""
    start, stop = round(zero * (1 - share)), round(zero + (len(counts) - zero) * share)
    if stop - start < groups:
        return np.inf
    p, q = counts[start:stop].astype(np.float64), np.zeros(stop - start)
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    edges = [(stop - start) * g // groups for g in range(groups + 1)]
    for a, b in zip(edges, edges[1:], strict=False):
        filled = p[a:b] > 0
        if filled.any():
            q[a:b][filled] = counts[start + a : start + b].sum() / filled.sum()
    p, q = p / p.sum(), q / max(q.sum(), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(p > 0, p * np.log(p / q), 0).sum())


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 999),
    st.sampled_from([0, 11, 32, 64]),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 3]),
)
def test_the_share_has_the_least_divergence_of_all_tried(seed, zero, groups, stride):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.choice([0.3, 3, 300], 64) * rng.random(64)).astype(np.int32)
    shares = [1 - i * stride / 64 for i in range((64 - groups) // stride + 1)]
    least = min(divergence(counts, zero, share, groups) for share in shares)
    got = float(kl_clip_ratio(jnp.asarray(counts), jnp.int32(zero), groups, stride))
    assert min(abs(got - share) for share in shares) < 1e-6
    got = min(shares, key=lambda share: abs(share - got))
    np.testing.assert_allclose(divergence(counts, zero, got, groups), least, atol=1e-5)


def test_of_equal_shares_the_larger_is_taken_and_many_histograms_are_searched_at_once():
    counts = jnp.array([[4, 4, 4, 4, 0, 0, 0, 4], [30, 30, 10, 9, 0, 2, 0, 1], [0] * 8])
    assert kl_clip_ratio(counts, jnp.zeros(3, jnp.int32), 2).tolist() == [1.0, 0.5, 1.0]


@pytest.mark.wide(2)
@pytest.mark.parametrize("grid", [Grid(8), Grid(4), Grid(4, symmetric=False)], ids=str)
def test_entropy_is_the_kl_clip_ratio_range_of_a_histogram(grid):
    w = np.append(np.random.default_rng(0).normal(size=60_000), [30, -20]).astype(np.float32)
    w[:20_000] = 0  # exact on any grid, and not counted
    scale, _ = entropy(jnp.asarray(w), Layout(w.shape), grid)
    low, high = (0.0, np.abs(w).max()) if grid.symmetric else (w.min(), w.max())
    counts, _ = np.histogram((np.abs(w) if grid.symmetric else w)[w != 0], 2048, (low, high))
    zero, groups = round(float(-low / (high - low) * 2048)), 2 ** (grid.bits - grid.symmetric)
    shares = [1 - i * 8 / 2048 for i in range((2048 - groups) // 8 + 1)]
    divergences = [divergence(counts, zero, share, groups) for share in shares]
    reach = float(scale[0]) * (grid.qmax if grid.symmetric else grid.top) / (high - low)
    nearest = int(np.argmin(np.abs(np.array(shares) - reach)))
    np.testing.assert_allclose(reach, shares[nearest], rtol=1e-4)
    assert (
        divergences[nearest] <= min(divergences) * 1.02
    )  # an entry may fall into the next bin in float32
    assert shares[nearest] < 0.5


@pytest.mark.slow
def test_entropy_of_channels_is_that_of_each_and_padding_does_not_count():
    w = jnp.asarray(np.random.default_rng(1).laplace(size=(400, 3)), jnp.float32)
    rule = partial(entropy, bins=128, stride=1)
    scale, _ = rule(w, Layout.of(w.shape, "channel"), Grid(4))
    alone = [rule(w[:, j], Layout((400,)), Grid(4))[0] for j in range(3)]
    np.testing.assert_allclose(scale[0], np.concatenate(alone), rtol=1e-6)
    layout = Layout.of(w.shape, 256, pad=True)
    padded, _ = rule(layout.arrange(w), layout, Grid(4))
    np.testing.assert_allclose(
        padded[1, 0, 0], rule(w[256:, 0], Layout((144,)), Grid(4))[0][0], rtol=1e-6
    )


def shrunk(
    w: np.ndarray, p: float, maxshrink: float, points: int, patience: int, bits: int
) -> float:
    """The search of llm-compressor's MSE observer over one set, symmetric; returns the scale."""
    top, best, least, waited = np.abs(w).max(), 1.0, np.inf, 0
    for i in range(round(maxshrink * points)):
        scale = top * (1 - i / points) / (2 ** (bits - 1) - 1)
        error = (
            np.abs(
                w - scale * np.clip(np.round(w / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            )
            ** p
        ).sum()
        if error < least:
            least, best, waited = error, 1 - i / points, 0
        else:
            waited += 1
            if waited >= patience:
                break
    return top * best / (2 ** (bits - 1) - 1)


@pytest.mark.parametrize(
    ("options", "bits"), [({}, 4), ({}, 8), ({"p": 2.0, "maxshrink": 0.8, "patience": 50}, 3)]
)
def test_pnorm_is_the_published_search(options, bits):
    w = np.random.default_rng(0).normal(size=(256, 12)).astype(np.float32)
    settings_ = {"p": 2.4, "maxshrink": 0.2, "points": 100, "patience": 5, **options}
    scale, _ = pnorm(jnp.asarray(w), Layout.of(w.shape, "channel"), Grid(bits), **options)
    expected = [shrunk(w[:, j].astype(np.float64), **settings_, bits=bits) for j in range(12)]
    np.testing.assert_allclose(scale[0], expected, rtol=1e-5)


def test_pnorm_shrinks_both_ends_of_an_asymmetric_range():
    w, grid = (
        jnp.asarray(np.random.default_rng(0).exponential(size=500) - 0.2, jnp.float32),
        Grid(3, symmetric=False),
    )
    layout = Layout((500,))
    full, _ = pnorm(w, layout, grid, maxshrink=0.01)
    scale, zero = pnorm(w, layout, grid, maxshrink=1.0, patience=100)
    left = lambda s, z: float((jnp.abs(w - grid.levels(w, s, z) * s) ** 2.4).sum())  # noqa: E731
    assert float(scale[0]) < 0.9 * float(full[0])
    np.testing.assert_allclose(full[0], (w.max() - w.min()) / 7, rtol=1e-5)
    assert left(scale, zero) < left(*mse(w, layout, grid)) < left(full, zero)


@pytest.mark.wide(6)
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e37])
@pytest.mark.parametrize("rule", [pnorm, entropy])
def test_no_size_of_weights_gives_an_unusable_scale(rule, size):
    w = jnp.asarray(np.float32(size) * np.array([1, -0.5, 0.25], np.float32))
    scale, _ = rule(w, Layout((3,)), Grid(8))
    assert float(scale[0]) > 0 and np.isfinite(float(1 / scale[0]))


def test_what_cannot_be_searched_is_refused():
    w, layout = jnp.ones(3), Layout((3,))
    with pytest.raises(ValueError, match="0 < maxshrink <= 1"):
        pnorm(w, layout, Grid(4), maxshrink=0.0)
    with pytest.raises(ValueError, match="at least 128 bins"):
        entropy(w, layout, Grid(8), bins=100)
