import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress_jax.core.errors import ArgumentError
from compress_jax.data import mixup

IMAGES = jnp.arange(512.0).reshape(64, 4, 2)
BATCH = {"image": IMAGES, "label": jnp.arange(64), "index": jnp.arange(64)}


@pytest.mark.slow
def test_images_and_labels_are_mixed_by_the_same_shares():
    mixed = jax.jit(mixup(64))(jax.random.key(0), BATCH)
    np.testing.assert_allclose(mixed["label"].sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        mixed["image"], jnp.tensordot(mixed["label"], IMAGES, axes=1), rtol=1e-5, atol=1e-3
    )
    assert (mixed["index"] == BATCH["index"]).all()
    first = jax.vmap(lambda row, at: row[at])(mixed["label"], BATCH["label"])
    assert first.std() > 0.15 and 0.4 < first.mean() < 0.65  # each its own share, uniform


@pytest.mark.slow
def test_a_small_alpha_leaves_examples_nearly_whole_and_the_key_decides():
    mixed = [
        mixup(64, alpha)(jax.random.key(seed), BATCH)["label"]
        for alpha, seed in ((0.01, 0), (1.0, 0), (1.0, 1), (1.0, 0))
    ]
    assert (mixed[0].max(1) > 0.99).mean() > 0.9 > (mixed[1].max(1) > 0.99).mean()
    assert (mixed[1] != mixed[2]).any() and (mixed[1] == mixed[3]).all()


def test_the_next_example_is_the_partner_where_it_is_asked_for():
    mixed = mixup(64, partner="next")(jax.random.key(0), BATCH)["label"]
    assert all(set(np.flatnonzero(row)) <= {i, (i + 1) % 64} for i, row in enumerate(mixed))
    np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-6)
    with pytest.raises(ArgumentError, match="partner"):
        mixup(64, partner="previous")
