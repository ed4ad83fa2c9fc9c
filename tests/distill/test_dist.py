import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from compress_jax.distill import dist


def logits(seed, shape=(16, 10), scale=2.0):
    x = np.random.default_rng(seed).normal(size=shape)  # nothing to compile for each shape
    return jnp.asarray(scale * x, jnp.float32)


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    "temperature, beta, gamma", [(1.0, 1.0, 1.0), (4.0, 2.0, 2.0), (1.0, 0.0, 1.0), (2.0, 1.0, 0.0)]
)
@pytest.mark.slow
def test_it_is_pearsons_correlation_of_rows_and_columns(temperature, beta, gamma):
    s, t = logits(0), logits(1)
    p_s, p_t = (
        scipy.special.softmax(np.asarray(z, np.float64) / temperature, axis=-1) for z in (s, t)
    )
    rows = np.array(
        [1 - scipy.stats.pearsonr(a, b).statistic for a, b in zip(p_s, p_t, strict=True)]
    )
    columns = np.mean(
        [1 - scipy.stats.pearsonr(a, b).statistic for a, b in zip(p_s.T, p_t.T, strict=True)]
    )
    expected = temperature**2 * (beta * rows + gamma * columns)
    np.testing.assert_allclose(dist(s, t, beta, gamma, temperature), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_it_vanishes_only_where_correlation_is_full():
    s = logits(0)
    np.testing.assert_allclose(dist(s, s), 0, atol=1e-6)
    assert (dist(logits(1), s) > 0.1).all()


def test_rows_may_be_any_increasing_line_of_the_teachers():
    p = jax.nn.softmax(logits(0))
    milder = jnp.log(0.5 * p + 0.05)  # the same rows, shrunk towards uniform: fully correlated
    np.testing.assert_allclose(dist(milder, jnp.log(p)), 0, atol=1e-5)


def test_columns_of_rare_classes_count_as_much_as_others():
    p = np.asarray(jax.nn.softmax(logits(0)), np.float64)
    rare = np.concatenate([1e-9 * p[:, :1], p[:, 1:]], axis=1)
    rare /= rare.sum(-1, keepdims=True)
    opposite = rare.copy()
    opposite[:, 0] = 2e-9 - rare[:, 0]
    s, t = (jnp.log(jnp.asarray(x, jnp.float32)) for x in (opposite, rare))
    np.testing.assert_allclose(
        dist(s, t, beta=0.0), 2 / 10, rtol=1e-3
    )  # one of ten columns has correlation -1, not 1


@pytest.mark.slow
def test_uniform_students_have_bounded_gradients():
    t = logits(0)
    gradient = jax.grad(lambda s: dist(s, t).mean())(jnp.zeros((16, 10)))
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() < 1e4
    np.testing.assert_allclose(dist(jnp.zeros((16, 10)), t), 2.0)


@pytest.mark.slow
def test_tokens_are_one_batch():
    s, t = logits(0), logits(1)
    np.testing.assert_allclose(
        dist(s.reshape(4, 4, 10), t.reshape(4, 4, 10)), dist(s, t).reshape(4, 4), rtol=1e-6
    )
    assert (
        jnp.abs(dist(s[:4], t[:4]) - dist(s, t)[:4]).max() > 1e-3
    )  # other columns: they belong to the batch


def test_a_sharded_batch_has_the_columns_of_the_whole():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    s, t = logits(0), logits(1)
    spread = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in (s, t)]
    np.testing.assert_allclose(jax.jit(dist)(*spread), dist(s, t), rtol=1e-5)
