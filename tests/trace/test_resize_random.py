"""Random networks: removing zero channels of all groups changes no output and no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from compress_jax.trace import groups, resize
from tests.trace.test_groups_random import STEPS, _normalise, _table, networks
from tests.trace.test_resize import zeroed

ZERO_STAYS_ZERO = tuple(
    step for step in STEPS if step not in (_normalise, _table)
)  # a mean sees zeros, a table fills them
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
drawn = networks(choice=ZERO_STAYS_ZERO, last=jnp.asarray)


def check(network, seed):
    fn, shapes = network
    rng = np.random.default_rng(seed)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    found = groups(fn, params, X)
    kept = {
        group.name: rng.permutation(group.size)[: rng.integers(1, group.size)] for group in found
    }
    zeros = zeroed(params, found, kept)
    short, smaller = found.keep(zeros, kept), resize(fn, params, found, kept)

    def both(fn, params):
        out, pull = jax.vjp(lambda p: fn(p, X), params)
        return out, pull(jnp.cos(out))[0]

    (got, slope), (expected, full) = (
        jax.jit(lambda p: both(smaller, p))(short),
        jax.jit(lambda p: both(fn, p))(zeros),
    )
    scale = max(1.0, float(jnp.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * scale)
    for path, slow in found.keep(full, kept).items():
        size = max(1.0, float(jnp.abs(slow).max(initial=0.0)))
        np.testing.assert_allclose(slope[path], slow, rtol=1e-3, atol=1e-4 * size, err_msg=path)


options = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow],
    "phases": [Phase.explicit, Phase.generate],
}


@pytest.mark.slow
@settings(max_examples=4, **options)
@given(drawn, st.integers(0, 99))
def test_channels_of_zeros_go_without_a_change(network, seed):
    check(network, seed)


@pytest.mark.slow
@settings(max_examples=40, **options)
@given(drawn, st.integers(0, 99))
def test_channels_of_zeros_go_without_a_change_in_more_networks(network, seed):
    check(network, seed)
