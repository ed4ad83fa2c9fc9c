"""Trellis-coded quantization: the cheapest path, the theory's gain, files that know the path."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core import ArgumentError
from compress_jax.export._artifact import structure
from compress_jax.export._coding.streams import code
from compress_jax.quantize._solvers.trellis import NEXT, PREVIOUS, _path, _Rates

RATES = _Rates(*(jnp.array([[a], [b]]) for a, b in ((0.5, 1.0), (2.5, 2.0), (1.5, 1.2))))


def normal(rows: int, columns: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, columns)), jnp.float32)


def indices(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of levels and their grids, by the definition; no path is an error."""
    k, grids = np.zeros_like(levels), np.zeros_like(levels)
    for j in range(levels.shape[1]):
        state = 0
        for i, m in enumerate(levels[:, j]):
            grid = state // 2
            assert m == 0 or m % 2 == grid
            k[i, j] = (abs(m) + grid * (m != 0)) // 2
            grids[i, j] = grid
            state = NEXT[state][k[i, j] % 2]
    return k, grids


def bits(k: np.ndarray, grids: np.ndarray, nonzero: int) -> float:
    """Return the entropy of indices, of each grid its own, with a bit for each sign."""
    total = float(nonzero)
    for grid in (0, 1):
        counts = np.unique(k[grids == grid], return_counts=True)[1]
        total -= float((counts * np.log2(counts / counts.sum())).sum())
    return total


def test_every_state_is_reached_from_two():
    for state, parity in itertools.product(range(4), (0, 1)):
        assert (state, parity) in PREVIOUS[NEXT[state][parity]]


def test_the_path_is_the_cheapest_of_all():
    """All paths of five weights, in float64."""
    v = np.abs(np.random.default_rng(0).normal(size=(5, 12))).astype(np.float32) * 3
    k, grid = _path(jnp.asarray(v), RATES, jnp.float32(0.4))
    r0, r1, more = (np.asarray(x)[:, 0] for x in RATES)

    def cost(ks, column):
        state = total = 0
        for value, index in zip(v[:, column], ks, strict=True):
            g = state // 2
            rate = r0[g] if index == 0 else r1[g] + (index - 1) * more[g]
            total += (float(value) - (2 * index - g * (index > 0))) ** 2 + 0.4 * rate
            state = NEXT[state][index % 2]
        return total

    for column in range(v.shape[1]):
        least = min(cost(ks, column) for ks in itertools.product(range(6), repeat=5))
        found = cost([int(x) for x in k[:, column]], column)
        assert found == pytest.approx(least, rel=1e-5)
    assert set(np.unique(grid)) == {0, 1}


@pytest.mark.parametrize(("step", "gain"), [(0.3, 0.13), (0.7, 0.10)])
def test_it_gains_what_the_theory_says_on_normal_weights(step, gain):
    w = normal(64, 300)
    result = cj.quantize.trellis({"w": w}, step=step)
    levels = np.round(np.asarray(result.params["w"]) / step).astype(int)
    k, grids = indices(levels)
    rate = bits(k, grids, int((levels != 0).sum())) / w.size
    error = float(jnp.square(result.params["w"] - w).mean())
    # Above the rate-distortion function: a scalar quantizer .255 bits at high rates, .257 at these.
    assert rate + np.log2(error) / 2 < 0.255 - gain


def tree() -> dict:
    return {"a": {"kernel": normal(64, 40), "bias": normal(1, 40)[0]}, "b": normal(40, 10, 1)}


def test_what_it_returns_is_exact_under_its_compression_and_in_a_coded_file(tmp_path):
    params = tree()
    result = cj.quantize.trellis(params, error=0.2)
    view = result.compression.view(result.params, result.state)
    jax.tree.map(np.testing.assert_array_equal, view, result.params)
    lost = sum(
        float(jnp.square(x - y).sum())
        for x, y in zip(*map(jax.tree.leaves, (view, params)), strict=True)
    )
    size = sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(params))
    assert float(lost / size) ** 0.5 == pytest.approx(0.2, rel=2e-3)
    packed = result.compression.pack(result.params, result.state)
    entries = code(*structure.encode(packed)).index["tensors"]
    assert any(isinstance(each, list) and len(each) == 3 and each[1] >= 2 for each in entries)
    cj.save(tmp_path / "f", packed, coded=True)
    back = cj.unpack(cj.load(tmp_path / "f")[0])
    jax.tree.map(np.testing.assert_array_equal, back, result.params)


def test_a_leaf_beyond_the_last_level_gets_a_larger_step():
    params = {"w": normal(64, 8).at[3, 2].set(100.0), "x": normal(16, 8)}
    result = cj.quantize.trellis(params, step=0.25)
    view = result.compression.view(result.params, result.state)
    jax.tree.map(np.testing.assert_array_equal, view, result.params)
    assert abs(result.params["w"][3, 2] - 100) < 2


def test_it_is_smaller_than_the_plain_grid_at_the_same_error(tmp_path):
    params = {"w": normal(256, 128)}
    step = cj.quantize.step_for_error(params, 0.15)
    c = cj.quantize.rate_distortion(step=step, relative=False)
    plain = cj.save(tmp_path / "a", c.pack(params, c.init(params)), coded=True)
    result = cj.quantize.trellis(params, error=0.15)
    packed = result.compression.pack(result.params, result.state)
    assert cj.save(tmp_path / "b", packed, coded=True) < 0.97 * plain


def test_a_step_or_an_error_is_needed():
    for step, error in ((None, None), (0.1, 0.1)):
        with pytest.raises(ArgumentError, match="one of step and error"):
            cj.quantize.trellis(tree(), step, error)
