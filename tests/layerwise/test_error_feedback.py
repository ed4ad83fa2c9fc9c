"""The loop over blocks and rows against its formula in float64, whatever the blocks and tiles."""

import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.layerwise import _error_feedback
from compress_jax.layerwise._error_feedback import (
    Block,
    by_blocks,
    by_rows,
    damped_factor,
    raise_damping,
)

K, N = 23, 5
RNG = np.random.default_rng(0)
W = RNG.normal(size=(K, N)).astype(np.float32)
X = RNG.normal(size=(60, K)).astype(np.float32)
SCALES = RNG.uniform(0.2, 0.4, size=(K, N)).astype(np.float32)
FACTOR, _ = damped_factor(jnp.asarray(X.T @ X / 60), 0.01, K)


def round_row(row, scale):
    return jnp.round(row / scale) * scale


def by_the_formula():
    """Equation 3, row by row in float64."""
    a, new = np.asarray(FACTOR, np.float64), np.zeros((K, N))
    for j in range(K):
        row = W[j] + a[:j, j] @ (W[:j] - new[:j]) / a[j, j]
        new[j] = np.round(row / SCALES[j]) * SCALES[j]
    return new


@pytest.mark.wide(4)
@pytest.mark.parametrize("size", [1, 4, 7, 23])
@pytest.mark.parametrize("tile", [8, 1024])
def test_blocks_and_tiles_are_only_a_matter_of_speed(size, tile, monkeypatch):
    monkeypatch.setattr(_error_feedback, "TILE", tile)

    def treat(block):
        return by_rows(block, round_row), block.start + jnp.arange(len(block.w))

    rows = Block(jnp.asarray(W), FACTOR, jnp.asarray(SCALES))
    new, indices = by_blocks(rows, treat, size)
    assert (np.abs(new - by_the_formula()) > 1e-4).mean() < 0.02
    assert indices.tolist() == list(range(K))


def test_blocks_nest():
    def treat(block):
        return by_rows(block, round_row), None

    rows = Block(jnp.asarray(W), FACTOR, jnp.asarray(SCALES))
    new, _ = by_blocks(rows, lambda block: by_blocks(block, treat, 2), 8)
    assert (np.abs(new - by_the_formula()) > 1e-4).mean() < 0.02


def test_damping_is_raised_only_for_matrices_that_need_it():
    tried = []

    def attempt(damping):
        tried.append(damping)
        factored = jnp.array([True, damping > 0.05, False])
        return jnp.full((3, 1, 1), damping), factored

    solution, failed, notes = raise_damping(attempt, jnp.zeros((3, 1, 1)), 0.0)
    np.testing.assert_allclose(solution.ravel(), [0.0, 0.1, 0.0])
    np.testing.assert_allclose(tried, [0, 1e-3, 1e-2, 1e-1, 1, 10])
    assert failed.tolist() == [False, False, True]
    assert notes == ["damping was raised from 0 to 10 to factor the Hessian"]
