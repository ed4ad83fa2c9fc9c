"""Collectives are read off real programs, whatever the compiler joins."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from compress_jax.search._plan import _collectives


@pytest.mark.parametrize("leaves", [1, 3, 12])
def test_every_gradient_that_is_added_up_counts(leaves):
    """XLA joins many sums into one of a tuple, which it writes with comments between."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {f"w{i}": jnp.ones((64, 32)) for i in range(leaves)}

    def loss(params, x):
        return sum(jnp.square(x @ w).sum() for w in params.values())

    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(jax.grad(loss), in_shardings=(whole, rows), out_shardings=whole)
    text = step.lower(params, jnp.ones((16, 64))).compile().as_text() or ""
    sizes, numbers = _collectives(text)
    assert sizes == {"all-reduce": leaves * 64 * 32 * 4}
    assert 1 <= numbers["all-reduce"] <= leaves
