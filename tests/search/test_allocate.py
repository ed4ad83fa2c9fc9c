"""Budgets shared out by an integer program, against brute force over all assignments."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compress_jax as cj
from compress_jax.core import ConfigError, NoMatchError, identity
from compress_jax.quantize import uniform
from compress_jax.search._allocate import Allocation, allocate, assign
from compress_jax.search._sensitivity import Sensitivities, sensitivities
from compress_jax.trace import cost

SCORES = st.floats(0, 1e3) | st.floats(1e-9, 1e-6) | st.integers(0, 3).map(float)


@st.composite
def tables(draw):
    """Random tables: up to 4 leaves with 1 to 3 options each, and what is left alone."""
    scores, sizes, work = {}, {}, {}
    for path in "abcd"[: draw(st.integers(1, 4))]:
        options = "xyz"[: draw(st.integers(1, 3))]
        scores[path] = {option: draw(SCORES) for option in options}
        sizes[path] = {option: draw(st.integers(0, 30)) for option in options}
        work[path] = {option: draw(st.integers(0, 30)) for option in options}
    return Sensitivities(
        "kl",
        scores,
        sizes,
        work,
        dict.fromkeys(scores, 1),
        {},
        {"bias": "no"},
        draw(st.integers(0, 9)),
        5,
    )


def every(table, max_bytes, max_bitops):
    """Return the score of every assignment within the budgets."""
    paths, found = list(table.scores), []
    for names in product(*(table.scores[path] for path in paths)):
        chosen = list(zip(paths, names, strict=True))
        nbytes = table.left_nbytes + sum(table.nbytes[path][name] for path, name in chosen)
        bitops = table.left_bitops + sum(table.bitops[path][name] for path, name in chosen)
        if nbytes <= max_bytes and bitops <= max_bitops:
            found.append(sum(table.scores[path][name] for path, name in chosen))
    return found


def check_within(table, found, max_bytes, max_bitops):
    assert found.nbytes == table.left_nbytes + sum(
        table.nbytes[path][name] for path, name in found.items()
    )
    assert found.bitops == table.left_bitops + sum(
        table.bitops[path][name] for path, name in found.items()
    )
    assert found.nbytes <= max_bytes and found.bitops <= max_bitops


@settings(max_examples=120, deadline=None)
@given(tables(), st.integers(0, 130), st.integers(0, 130))
def test_it_finds_what_brute_force_finds(table, max_bytes, max_bitops):
    scores = every(table, max_bytes, max_bitops)
    if not scores:
        with pytest.raises(ConfigError, match="cannot be met"):
            allocate(table, max_bytes, max_bitops)
        return
    found = allocate(table, max_bytes, max_bitops)
    check_within(table, found, max_bytes, max_bitops)
    assert found.score == pytest.approx(min(scores), rel=1e-6, abs=1e-14)


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(0, 130), st.integers(0, 40))
def test_a_larger_budget_is_never_worse(table, budget, more):
    try:
        less = allocate(table, max_bytes=budget)
    except ConfigError:
        return
    assert allocate(table, max_bytes=budget + more).score <= less.score * (1 + 1e-6) + 1e-14


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(0, 130))
@pytest.mark.slow
def test_the_refusal_names_what_can_be_reached(table, max_bitops):
    least = table.left_nbytes + sum(min(sizes.values()) for sizes in table.nbytes.values())
    with pytest.raises(
        ConfigError,
        match=rf"max_bytes={least - 1} .* is {least} bytes, {table.left_nbytes} of them",
    ):
        allocate(table, max_bytes=least - 1)
    assert allocate(table, max_bytes=least).nbytes == least
    try:
        most = allocate(table, max_bitops=max_bitops)
    except ConfigError:
        return
    together = [n for n in range(least, most.nbytes + 1) if every(table, n, max_bitops)]
    if together[0] > least:  # each budget can be met, but not both
        with pytest.raises(
            ConfigError, match=rf"together with max_bitops={max_bitops}: .* is {together[0]} bytes"
        ):
            allocate(table, least, max_bitops)


def test_scores_of_very_different_sizes_are_told_apart():
    """Once the impossible option is gone, the rest is decided at its own scale."""
    values = [[1e9, 3e-9, 1e-9], [1e9, 2e-9, 1e-9]]
    assert assign(values, [[[0, 1, 3], [0, 1, 3]]], [4]) == [2, 1]


def test_limits_hold_to_the_last_byte():
    """One byte in ten billion is less than the solver's tolerance."""
    size = 5 * 10**9
    values, weights = [[0.0, 1.0], [0.0, 1.0]], [[size, 1], [size, 2]]
    assert assign(values, [weights], [2 * size]) == [0, 0]
    assert assign(values, [weights], [2 * size - 1]) in ([0, 1], [1, 0])


def test_nothing_to_decide():
    table = Sensitivities("kl", {}, {}, {}, {}, {}, {"w": "no"}, 8, 0)
    assert dict(allocate(table, max_bytes=8)) == {}
    with pytest.raises(ConfigError, match="is 8 bytes, 8 of them"):
        allocate(table, max_bytes=7)


OPTIONS = {
    "int2": uniform(2, granularity="channel"),
    "int4": uniform(4, granularity=8),
    "int8": uniform(8),
    "float32": identity(),
}


def model():
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 24), "b[0]": (24, 20), "c*": (20, 4), "bias": (1, 4)}
    params = {
        path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()
    }

    def fn(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b[0]"]) @ p["c*"] + p["bias"]

    return fn, params, jnp.asarray(rng.normal(size=(5, 16)), jnp.float32)


@pytest.mark.slow
def test_the_compression_has_exactly_the_predicted_bytes_and_bit_operations():
    fn, params, x = model()
    table = sensitivities(fn, params, [x], OPTIONS, "mse", activation_bits=8)
    assert set(table.refused) == {"c*"}  # groups of 8 do not divide its 20 rows
    seen = set()
    for budget in range(900, 4200, 800):
        mixed = allocate(table, max_bytes=budget)
        c = mixed.compression(OPTIONS)
        assert cj.coverage(c, params).nbytes == mixed.nbytes <= budget
        assert cost(fn, params, x, compression=c, activation_bits=8).bit_operations == mixed.bitops
        seen.add(tuple(mixed.values()))
    assert len(seen) > 3
    total = allocate(table).bitops
    assert allocate(table, max_bitops=total // 4).bitops <= total // 4


def test_what_is_not_there_is_said():
    mixed = Allocation({"w": "int4"}, 0.0, 0, 0, {"bias": "no product uses it"})
    with pytest.raises(ConfigError, match="uses int4, but only int2 is given"):
        mixed.compression({"int2": uniform(2)})
    with pytest.raises(NoMatchError, match="no product uses it"):
        mixed["bias"]
    assert "stays: no product uses it" in str(mixed)


@pytest.mark.slow
def test_a_budget_out_of_reach_fails_before_anything_is_measured():
    fn, params, x = model()

    def batches():
        yield x
        raise AssertionError("the second batch was asked for")

    for budget in ({"max_bytes": 10}, {"max_bitops": 10}):
        with pytest.raises(ConfigError, match="the least that the options reach is"):
            sensitivities(fn, params, batches(), OPTIONS, "mse", **budget)
