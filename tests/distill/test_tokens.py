import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from compress_jax.core import ShapeError
from compress_jax.distill import (
    Total,
    dist,
    jsd,
    kl,
    masked_mean,
    masked_total,
    reverse_kl,
    token_total,
)
from compress_jax.distill._losses.tokens import takes_mask

SHAPE = (8, 6, 11)  # batch, sequence, vocabulary
S, T = (2 * jax.random.normal(jax.random.key(i), SHAPE) for i in range(2))
MASK = jnp.arange(6)[None] < jnp.array([6, 1, 3, 0, 5, 2, 4, 6])[:, None]


@pytest.mark.wide(2)
@pytest.mark.parametrize("loss", [kl, reverse_kl, jsd])
def test_the_mean_is_over_the_tokens_that_count(loss):
    total = token_total(loss, S, T, MASK, temperature=2.0)
    each = np.asarray(loss(S, T, 2.0), np.float64)[np.asarray(MASK)]
    np.testing.assert_allclose(total.mean, each.mean(), rtol=1e-5)
    assert total.count == each.size == 27
    np.testing.assert_allclose(masked_mean(loss(S, T, 2.0), MASK), each.mean(), rtol=1e-5)


@pytest.mark.slow
def test_microbatches_add_up_to_the_batch_in_value_and_gradient():
    def whole(s):
        return token_total(kl, s, T, MASK).mean

    def part(s, t, mask):
        total = token_total(kl, s, t, mask)
        return total.sum, total

    grad, totals, gradients = jax.grad(part, has_aux=True), [], []
    for i in range(0, 8, 2):
        gradient, total = grad(S[i : i + 2], T[i : i + 2], MASK[i : i + 2])
        totals, gradients = [*totals, total], [*gradients, gradient]
    together = totals[0] + totals[1] + totals[2] + totals[3]
    value, gradient = jax.value_and_grad(whole)(S)
    np.testing.assert_allclose(together.mean, value, rtol=1e-6)
    np.testing.assert_allclose(jnp.concatenate(gradients) / together.count, gradient, atol=1e-7)
    means = np.mean([float(total.mean) for total in totals])
    assert abs(means - value) > 1e-3  # a mean of means is another number


def test_totals_of_devices_add_up_under_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(s, t, mask):
        return jax.lax.psum(token_total(kl, s, t, mask), "data").mean

    data = PartitionSpec("data")
    spread = jax.shard_map(loss, mesh=mesh, in_specs=(data, data, data), out_specs=PartitionSpec())
    np.testing.assert_allclose(
        jax.jit(spread)(S, T, MASK), token_total(kl, S, T, MASK).mean, rtol=1e-6
    )
    placed = [jax.device_put(x, NamedSharding(mesh, data)) for x in (S, T, MASK)]
    np.testing.assert_allclose(
        jax.jit(lambda *x: token_total(kl, *x).mean)(*placed),
        token_total(kl, S, T, MASK).mean,
        rtol=1e-6,
    )


@pytest.mark.parametrize("padding", [jnp.nan, jnp.inf, 1e38])
def test_padding_reaches_neither_value_nor_gradient(padding):
    def loss(s, t):
        return token_total(kl, s, t, MASK).mean

    dirty = [jnp.where(MASK[..., None], x, padding) for x in (S, T)]
    (value, gradient), (clean, clean_gradient) = (
        jax.value_and_grad(loss)(*dirty),
        jax.value_and_grad(loss)(S, T),
    )
    assert value == clean
    np.testing.assert_array_equal(gradient, clean_gradient)
    np.testing.assert_array_equal(jnp.where(MASK[..., None], 0, gradient), 0)
    assert masked_mean(jnp.where(MASK, 1.0, padding), MASK) == 1


def test_nothing_to_learn_from_costs_nothing():
    value, gradient = jax.value_and_grad(
        lambda s: token_total(kl, s, T, jnp.zeros_like(MASK)).mean
    )(S)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_weights_weigh_and_short_masks_count_exactly():
    loss = jnp.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(masked_mean(loss, jnp.array([0.5, 0.0, 1.5])), (0.5 + 6) / 2)
    many = masked_total(jnp.ones(1001, jnp.bfloat16), jnp.ones(1001, jnp.bfloat16))
    assert many.count == 1001 and many.sum == 1001 and many.sum.dtype == jnp.float32


def test_masks_of_another_shape_are_an_error():
    with pytest.raises(ShapeError, match="mask"):
        masked_mean(jnp.ones((2, 3)), jnp.ones((3,)))
    with pytest.raises(ShapeError, match="mask"):
        token_total(kl, S, T, MASK[:, :3])


def test_a_total_is_a_tree_that_goes_through_scans():
    totals = jax.lax.map(lambda x: token_total(kl, *x), (S, T, MASK))
    np.testing.assert_allclose(
        Total(totals.sum.sum(), totals.count.sum()).mean,
        token_total(kl, S, T, MASK).mean,
        rtol=1e-6,
    )


@pytest.mark.parametrize("mask", [np.ones(3), jnp.ones(3), [1, 0, 1]])
def test_a_loss_that_has_its_mask_takes_no_other(mask):
    assert not takes_mask(functools.partial(dist, mask=mask))
    assert takes_mask(functools.partial(dist, mask=None)) and takes_mask(dist)
