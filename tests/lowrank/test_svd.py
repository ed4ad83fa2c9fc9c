import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from compress_jax.core import LowRank, NonFiniteError, ShapeError, between, coverage, unpack
from compress_jax.lowrank import svd

CONV = (3, 3, 16, 24)


def kernel(shape, seed=0):
    """Return a kernel whose singular values fall off, as those of trained ones do."""
    rng = np.random.default_rng(seed)
    m, n = int(np.prod(shape[:-1])), shape[-1]
    u, v = (
        np.linalg.qr(rng.standard_normal((m, min(m, n))))[0],
        np.linalg.qr(rng.standard_normal((n, min(m, n))))[0],
    )
    return jnp.asarray((u * 0.8 ** np.arange(min(m, n)) @ v.T).reshape(shape), jnp.float32)


def singular_values(x):
    return np.asarray(scipy.linalg.svdvals(np.asarray(x, np.float64).reshape(-1, x.shape[-1])))


@pytest.mark.wide(1)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), CONV])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_error_is_the_tail_of_the_singular_values(shape, rank):
    x = kernel(shape)
    c = svd(rank)
    seen = np.asarray(c.view({"w": x}, c.init({"w": x}))["w"], np.float64)
    assert np.linalg.matrix_rank(seen.reshape(-1, shape[-1]), tol=1e-4) == rank
    error = np.linalg.norm(seen - np.asarray(x, np.float64))
    np.testing.assert_allclose(error, np.linalg.norm(singular_values(x)[rank:]), rtol=1e-4)


def test_a_matrix_of_low_rank_is_reproduced():
    left, right = (
        jax.random.normal(jax.random.key(0), (50, 5)),
        jax.random.normal(jax.random.key(1), (5, 30)),
    )
    x, c = left @ right, svd(5)
    np.testing.assert_allclose(c.view({"w": x}, c.init({"w": x}))["w"], x, atol=1e-5)


def test_factors_are_balanced():
    factors = svd(4).init({"w": kernel((40, 24))}).learned["w"]
    gram_left, gram_right = (
        factors["left"].T @ factors["left"],
        factors["right"] @ factors["right"].T,
    )
    np.testing.assert_allclose(gram_left, gram_right, atol=1e-6)
    np.testing.assert_allclose(
        jnp.diag(gram_left), singular_values(kernel((40, 24)))[:4], rtol=1e-5
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("shape", [(64, 48), CONV])
@pytest.mark.slow
def test_energy_takes_the_least_rank_that_keeps_it(energy, shape):
    x = kernel(shape)
    squares = singular_values(x) ** 2
    expected = 1 + int((np.cumsum(squares) / squares.sum() < energy).sum())
    assert svd(energy=energy).init({"w": x}).learned["w"]["left"].shape[1] == expected


@pytest.mark.slow
def test_energy_of_zeros_and_of_everything():
    c = svd(energy=1.0)
    zeros, full = jnp.zeros((6, 8)), jax.random.normal(jax.random.key(0), (6, 8))
    state = c.init({"zeros": zeros, "full": full})
    assert state.learned["zeros"]["left"].shape == (6, 1) and "full" not in state.learned
    seen = c.view({"zeros": zeros, "full": full}, state)
    np.testing.assert_array_equal(seen["zeros"], 0)
    np.testing.assert_array_equal(seen["full"], full)
    assert (
        "factors of rank 6 take 336 bytes, the 6x8 array itself 192"
        in c.skipped({"full": full})["full"]
    )
    update = c.update({"zeros": zeros, "full": full}, state, step=jnp.array(0))
    assert jax.tree.structure(update) == jax.tree.structure(state)


@pytest.mark.slow
@pytest.mark.parametrize("c", [svd(6), svd(energy=0.95)], ids=["rank", "energy"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_packed_is_what_was_seen(c, dtype):
    params = {
        "dense": {"kernel": kernel((96, 64)).astype(dtype), "bias": jnp.ones(64, dtype)},
        "conv": kernel(CONV),
    }
    state = c.init(params)
    packed = c.pack(params, state)
    assert isinstance(packed["dense"]["kernel"], LowRank) and isinstance(packed["conv"], LowRank)
    seen = jax.jit(c.view)(params, state)
    jax.tree.map(np.testing.assert_array_equal, unpack(packed), seen)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), seen) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    table = coverage(c, params, state)
    rank = state.learned["dense/kernel"]["left"].shape[1]
    assert table["dense/kernel"].nbytes == 4 * rank * (96 + 64)
    assert table["dense/bias"].reason == "it has 1 axes and a factorization needs 2"


def test_leaves_that_would_not_shrink_are_left_alone():
    params = {"square": kernel((10, 10)), "thin": kernel((2, 100)), "big": kernel((100, 100))}
    c = svd(5)
    assert c.skipped(params) == {
        "square": "factors of rank 5 take 400 bytes, the 10x10 array itself 400",
        "thin": "factors of rank 5 take 2,040 bytes, the 2x100 array itself 800",
    }
    state = c.init(params)
    assert list(state.learned) == ["big"]
    assert c.view(params, state)["square"] is params["square"]


@pytest.mark.slow
def test_gradients_flow_to_the_factors_and_not_to_the_params():
    x = kernel((20, 12))
    c = svd(3)
    state = c.init({"w": x})
    weights = jax.random.normal(jax.random.key(2), x.shape)

    def loss(params, learned):
        return (weights * c.view(params, state._replace(learned=learned))["w"]).sum()

    to_params, to_learned = jax.grad(loss, argnums=(0, 1))({"w": x}, state.learned)
    left, right = (np.asarray(state.learned["w"][side], np.float64) for side in ("left", "right"))
    np.testing.assert_allclose(to_learned["w"]["left"], np.asarray(weights) @ right.T, atol=1e-5)
    np.testing.assert_allclose(to_learned["w"]["right"], left.T @ np.asarray(weights), atol=1e-5)
    assert (to_params["w"] == 0).all()


def test_training_the_factors_fits_what_the_truncation_lost():
    target, x, c = kernel((20, 12), seed=1), kernel((20, 12)), svd(4)
    state = c.init({"w": x})

    def error(learned):
        return jnp.square(c.view({"w": x}, state._replace(learned=learned))["w"] - target).sum()

    @jax.jit
    def descend(learned):
        return jax.tree.map(lambda p, g: p - 0.1 * g, learned, jax.grad(error)(learned))

    learned = state.learned
    for _ in range(500):
        learned = descend(learned)
    np.testing.assert_allclose(error(learned), (singular_values(target)[4:] ** 2).sum(), rtol=0.02)


def test_rank_starts_under_jit_and_energy_says_why_it_cannot():
    params = {"w": kernel((20, 12))}
    c = between(1, None, svd(3))
    state = jax.jit(lambda params, state, step: c.update(params, state, step=step))(
        params, c.init(params), jnp.array(1)
    )
    assert jnp.linalg.matrix_rank(c.view(params, state)["w"], rtol=1e-5) == 3
    with pytest.raises(ShapeError, match=r"give svd\(rank"):
        jax.jit(svd(energy=0.9).init)(params)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="exactly one"):
        svd()
    with pytest.raises(ValueError, match="exactly one"):
        svd(2, energy=0.9)
    with pytest.raises(ValueError, match="must be at least 1"):
        svd(0)
    for energy in (0.0, 1.5):
        with pytest.raises(ValueError, match="energy is the share"):
            svd(energy=energy)
    with pytest.raises(NonFiniteError, match="'w'"):
        svd(1).init({"w": jnp.full((4, 4), jnp.nan)})
