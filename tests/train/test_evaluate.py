"""Evaluation counts every example once and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.train import accuracy, logits


def linear(w, x):
    return x.astype(jnp.float32) @ w


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 23), seed=st.integers(0, 99))
def test_the_result_is_that_of_the_whole_split_at_once(n, seed):
    rng = np.random.default_rng(seed)
    split = {"image": rng.normal(size=(n, 3)).astype(np.float32), "label": rng.integers(0, 4, n)}
    w = rng.normal(size=(3, 4)).astype(np.float32)
    whole = split["image"].astype(np.float64) @ w
    np.testing.assert_allclose(logits(linear, w, split, batch_size=5), whole, atol=1e-5)
    assert (
        accuracy(linear, w, split, batch_size=5) == (whole.argmax(-1) == split["label"]).sum() / n
    )


def test_padding_is_never_counted_even_where_it_would_be_right():
    split = {"image": np.ones((3, 2), np.float32), "label": np.array([1, 1, 1])}
    assert (
        accuracy(lambda w, x: x * w, jnp.array([[1.0, 0.0]]), split, batch_size=8) == 0.0
    )  # a pad's label would be 0


def test_it_compiles_once_though_apply_is_a_new_object_at_every_mention():
    traces = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            traces.append(1)
            return nn.Dense(3)(x)

    split = {"image": np.ones((7, 4), np.float32), "label": np.zeros(7, int)}
    model = Counting()
    variables = model.init(jax.random.key(0), split["image"])
    del traces[:]
    for _ in range(3):
        accuracy(model.apply, variables, split, batch_size=4)
    assert len(traces) == 1


def test_logits_of_a_bfloat16_model_come_as_float32():
    out = logits(
        lambda w, x: x.astype(jnp.bfloat16),
        None,
        {"image": np.ones((3, 2), np.float32)},
        batch_size=2,
    )
    assert out.dtype == np.float32 and out.shape == (3, 2)


@pytest.mark.parametrize("n", [(0, 0), (2, 3)])
def test_an_empty_or_ragged_split_is_refused(n):
    split = {"image": np.ones((n[0], 2), np.float32), "label": np.ones(n[1], int)}
    with pytest.raises(ValueError, match=f"one length, and not 0; got.*{n[1]}"):
        accuracy(linear, np.ones((2, 2), np.float32), split)
