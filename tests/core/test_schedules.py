"""Schedules arrive: whatever thins, delays or freezes the updates of a compression, its schedules
start and end on time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compress_jax as cj
from compress_jax.core import Compression, CompressionState
from compress_jax.prune import cubic, magnitude

PARAMS = {"w": jax.random.normal(jax.random.key(0), (1000,))}
GRADS = {"w": jax.random.normal(jax.random.key(1), (1000,))}
KEY = jax.random.key(2)


def sparsities(c, steps, init=None):
    """Return the share of zeros that is seen after the update of each step, by a scan that
    compiles once."""

    def step(state, t):
        state = c.update(PARAMS, state, step=t, grads=GRADS)
        return state, (c.view(PARAMS, state)["w"] == 0).mean()

    return np.asarray(jax.lax.scan(step, init or c.init(PARAMS), jnp.arange(steps))[1])


THINNED = {
    "magnitude": lambda s, n, end: magnitude(s, every=n),
    "every of it": lambda s, n, end: cj.every(n, magnitude(s)),
    "every of at": lambda s, n, end: cj.every(n, cj.at("*", magnitude(s))),
    "at of every of a chain": lambda s, n, end: cj.at(
        "*", cj.every(n, cj.chain(magnitude(s), cj.quantize.uniform(8)))
    ),
    "both": lambda s, n, end: cj.every(n, magnitude(s, every=n + 1)),
    "by name": lambda s, n, end: cj.every(n, magnitude({"w": s})),
    "saliency": lambda s, n, end: cj.prune.saliency(s, every=n),
    "movement": lambda s, n, end: cj.prune.movement(s, every=n),
    "fisher": lambda s, n, end: cj.prune.fisher(s, every=n),
    "random": lambda s, n, end: cj.prune.random(s, KEY, every=n),
    "scored": lambda s, n, end: cj.prune.scored(GRADS, s, every=n),
    "lamp": lambda s, n, end: cj.prune.lamp(s, every=n),
    "nested": lambda s, n, end: cj.every(n, cj.prune.nested(magnitude(s))),
    "ste": lambda s, n, end: cj.every(n, cj.prune.straight_through(magnitude(s))),
    "top kast": lambda s, n, end: cj.prune.top_kast(s, 0.0, every=n),
    "rigl": lambda s, n, end: cj.prune.rigl(s, 4 * end, KEY, every=n),
    "set, whose mask stays before": lambda s, n, end: cj.prune.sparse_evolution(
        s, end, KEY, every=n, end_fraction=0.5
    ),
}


FEW = ("at of every of a chain", "movement", "top kast", "set, whose mask stays before")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW)) for name in THINNED]
RAMP = optax.linear_schedule(0.0, 0.9, 10)


@pytest.mark.wide(1)
@pytest.mark.parametrize("name", NAMES)
def test_a_thinned_schedule_has_arrived_when_it_ends_and_ever_after(name):
    seen = sparsities(THINNED[name](RAMP, 7, 10), 13)
    np.testing.assert_allclose(seen[9:], 0.9, atol=2e-3)


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", NAMES)
def test_what_freezes_it_makes_a_last_update_first(name):
    c = cj.every(9, cj.between(0, 8, THINNED[name](RAMP, 5, 10)))  # whatever thins that
    np.testing.assert_allclose(sparsities(c, 12)[7:], 0.72, atol=2e-3)


@pytest.mark.wide(2)
@pytest.mark.parametrize(
    "name", [each for each in NAMES if each.values[0] not in ("saliency", "movement", "fisher")]
)
def test_what_starts_later_starts_where_the_schedule_is(name):
    seen = sparsities(cj.between(5, None, THINNED[name](RAMP, 100, 10)), 12)
    np.testing.assert_allclose(seen[[4, 5, 10, 11]], [0, 0.45, 0.9, 0.9], atol=2e-3)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 20), st.integers(1, 25))
def test_a_thinned_schedule_is_never_ahead_and_arrives(end, n, start, length):
    """Between start and stop, the sparsity is one the schedule has had since, and at the end that
    of the end."""
    ramp, stop = optax.linear_schedule(0.0, 0.8, end), start + length
    c = cj.between(start, stop, magnitude(ramp, every=n))
    seen = sparsities(c, stop + 3)
    at = np.minimum(np.arange(stop + 4) / end, 1) * 0.8
    assert (seen[:start] == 0).all()
    assert (seen[start:] <= at[start + 1 :] + 1e-3).all() and (
        seen[start:] >= at[start] - 1e-3
    ).all()
    np.testing.assert_allclose(seen[stop - 1 :], at[stop], atol=1e-3)


@pytest.mark.slow
def test_the_last_update_is_made_even_if_its_step_is_not_seen():
    c = cj.between(0, 10, magnitude(RAMP))
    state = c.init(PARAMS)
    for step, share in ((0, 0.0), (4, 0.36), (13, 0.9), (14, 0.9)):
        state = c.update(PARAMS, state, step=step)
        assert abs(float((c.view(PARAMS, state)["w"] == 0).mean()) - share) < 2e-3
    back = c.update(PARAMS, state, step=5)  # a training that goes back goes on
    assert abs(float((c.view(PARAMS, back)["w"] == 0).mean()) - 0.45) < 2e-3


def test_thinned_updates_stay_thin():
    """Of a hundred steps an update of every 20 acts at five and at the two around the end of the
    schedule."""
    calls = []

    def update(params, state, *, step, **_):
        jax.debug.callback(lambda step: calls.append(int(step)), step)
        return state

    plain = magnitude(cubic(0.5, 0, 50))
    counted = plain._replace(
        update=cj.core.schedules.Scheduled(update, cj.core.schedules.schedules_of(plain))
    )
    sparsities(cj.every(20, counted), 100)
    jax.effects_barrier()
    assert sorted(calls) == [0, 20, 40, 50, 50, 60, 80]


def test_a_compression_of_ones_own_needs_to_know_nothing_of_steps():
    def init(params):
        return CompressionState({}, {"start": params["w"]})

    own = Compression(
        init, lambda p, s: s.fixed["start"] and p, lambda p, s, *, step, **_: s, lambda p, s: p
    )
    for c in (
        cj.between(2, 5, own),
        cj.every(3, own),
        cj.chain(own, cj.identity()),
        cj.at("*", own),
    ):
        params = {"w": jnp.float32(1.0)}
        state = c.init(params)
        for step in range(7):
            state = c.update(params, state, step=step)
        assert jax.tree.leaves(state.fixed)


def test_a_state_begins_at_the_step_it_is_told():
    for c in (
        magnitude(RAMP),
        cj.at("*", cj.chain(magnitude(RAMP), cj.identity())),
        cj.every(4, magnitude(RAMP)),
    ):
        seen = c.view(PARAMS, c.init(PARAMS, step=5))["w"]
        assert abs(float((seen == 0).mean()) - 0.45) < 2e-3


def test_a_schedule_may_be_a_dataclass_without_fields():
    @dataclasses.dataclass(frozen=True)
    class Half:
        def __call__(self, step):
            return step * 0.0 + 0.5

    c = cj.prune.magnitude(Half())
    params = {"kernel": jnp.arange(1.0, 9.0)}
    assert (c.view(params, c.init(params))["kernel"] == 0).sum() == 4
