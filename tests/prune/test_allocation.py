"""The allocation of a sparsity to layers: ERK and LAMP against their papers in NumPy, budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compress_jax as cj
from compress_jax.core import ConfigError, NoMatchError
from compress_jax.core.amount import amount_exact
from compress_jax.prune import (
    block,
    channel,
    erk,
    for_bytes,
    for_flops,
    gains,
    lamp,
    magnitude,
    n_m,
    random,
    rigl,
    shares,
)
from compress_jax.trace import cost


def shapes(*each):
    return {f"l{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(each)}


KERNEL = st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(KERNEL, min_size=1, max_size=5), st.floats(0, 1))
def test_erk_reaches_the_total_exactly_in_proportion(kernels, sparsity):
    params = shapes(*kernels)
    share = erk(params, sparsity)
    kept = {path: round(x.size * (1 - share[path])) for path, x in params.items()}
    total = sum(x.size for x in params.values())
    assert sum(kept.values()) == total - amount_exact(sparsity, total)
    full = [path for path, x in params.items() if kept[path] == x.size]
    ratio = {path: kept[path] / sum(x.shape) for path, x in params.items()}
    for (
        path,
        x,
    ) in params.items():  # all but the full ones in proportion, and the full ones would get no less
        for other, y in params.items():
            if other not in full:
                assert ratio[path] <= ratio[other] + 1.01 / sum(x.shape) + 1.01 / sum(y.shape)


def test_erk_of_a_resnet_layer_is_the_papers():
    """By hand: eps (3+3+16+16)/(3*3*16*16) and eps (1+1+64+10)/640 are 30 % of all weights."""
    params = {
        "conv": jnp.ones((3, 3, 16, 16)),
        "head": jnp.ones((1, 1, 64, 10)),
        "bias": jnp.ones(10),
    }
    eps = 0.3 * (2304 + 640) / (38 + 76)
    found = erk(params, 0.7)
    np.testing.assert_allclose(
        [found["conv"], found["head"]], [1 - eps * 38 / 2304, 1 - eps * 76 / 640], atol=1e-3
    )
    assert "bias" not in found
    plain = erk(params, 0.7, kernel=False)
    share = 0.3 * (2304 + 640) / (9 * (16 + 16) + 74)
    np.testing.assert_allclose(
        [plain["conv"], plain["head"]], [1 - share * 32 / 256, 1 - share * 74 / 640], atol=1e-3
    )


@pytest.mark.parametrize("kernel", [True, False])
def test_erk_gives_a_stack_what_its_layers_get_alone(kernel):
    apart = {**{f"layer{i}": jnp.ones((10, 20)) for i in range(5)}, "head": jnp.ones((20, 30))}
    stacked = {"layers": jnp.ones((5, 20, 10)), "head": jnp.ones((20, 30))}  # [layers, out, in]

    def fn(params, x):
        x, _ = jax.lax.scan(lambda x, w: ((x @ w.T)[:, :10], None), x, params["layers"])
        return jnp.pad(x, ((0, 0), (0, 10))) @ params["head"]

    layouts = cj.trace.layouts(fn, stacked, jnp.ones((2, 10)))
    alone, found = erk(apart, 0.6, kernel=kernel), erk(stacked, 0.6, kernel=kernel, layouts=layouts)
    assert found["layers"] == pytest.approx(alone["layer0"], abs=2 / 200)
    assert found["head"] == pytest.approx(alone["head"], abs=5 / 600)
    if kernel:  # as one kernel with three axes it would get more
        assert erk(stacked, 0.6)["layers"] > found["layers"] + 0.05


def test_erk_refuses_layouts_of_other_params():
    params = {"a": jnp.ones((4, 8))}
    other = cj.trace.layouts(lambda p, x: x @ p["a"], {"a": jnp.ones((4, 6))}, jnp.ones((1, 4)))
    for layouts in ({}, other):
        with pytest.raises(cj.core.ArgumentError, match="none fits a"):
            erk(params, 0.5, layouts=layouts)


@pytest.mark.slow
def test_erk_masks_have_that_total():
    params = {
        "a": jax.random.normal(jax.random.key(0), (10, 30)),
        "b": jax.random.normal(jax.random.key(1), (30, 20)),
    }
    state = magnitude(erk(params, 0.8)).init(params)
    assert sum(int(mask.sum()) for mask in state.fixed.values()) == 180
    with pytest.raises(NoMatchError):
        erk(params, 0.5, "c")
    with pytest.raises(ValueError, match="no kernel of rank 2"):
        erk({"bias": jnp.ones(3)}, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        erk(params, 1.5)


def lamp_scores(x):
    flat = np.abs(np.asarray(x, np.float64)).ravel()
    order = np.argsort(flat, kind="stable")
    scores = np.empty(flat.size)
    for rank, index in enumerate(order):
        scores[index] = flat[index] ** 2 / (flat[order[rank:]] ** 2).sum()
    return scores


@pytest.mark.slow
def test_lamp_is_its_formula_and_never_empties_a_layer():
    params = {f"l{i}": 10.0**-i * jax.random.normal(jax.random.key(i), (6, 5)) for i in range(3)}
    flat = np.concatenate([lamp_scores(x) for x in params.values()])
    for sparsity in (0.5, 0.9, 87 / 90):
        kept = np.ones(90, bool)
        kept[np.argsort(flat, kind="stable")[: round(sparsity * 90)]] = False
        masks = lamp(sparsity).init(params).fixed
        np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in masks.values()]), kept)
    assert [int(m.sum()) for m in masks.values()] == [1, 1, 1]


@pytest.mark.slow
def test_an_allocation_is_handed_on_exactly():
    params = {
        "a": jax.random.normal(jax.random.key(0), (7, 11)),
        "b": 3 * jax.random.normal(jax.random.key(1), (5, 3)),
    }
    c = cj.chain(cj.between(0, None, lamp(0.6)), cj.quantize.uniform(bits=8))
    state = c.init(params)
    wanted = {path: int((~mask).sum()) for path, mask in state.fixed["0"]["of"].items()}
    found = shares(params, state)
    for other in (random(found, jax.random.key(0)), magnitude(found)):
        assert {
            path: int((~mask).sum()) for path, mask in other.init(params).fixed.items()
        } == wanted
    grown = rigl(found, 10, jax.random.key(0)).init(params)
    assert shares(params, grown) == found


def network(params, x):
    x = jax.nn.relu(jax.lax.conv(x, params["conv"], (1, 1), "SAME")).mean((2, 3))
    return x @ params["head"]


NETWORK = {
    "conv": jax.random.normal(jax.random.key(0), (8, 3, 3, 3)),
    "head": jax.random.normal(jax.random.key(1), (8, 10)),
}
IMAGE = jnp.ones((2, 3, 6, 6))


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    "rule", [lambda s: {"conv": s}, lambda s: {"conv": s, "head": s}, lambda s: erk(NETWORK, s)]
)
@pytest.mark.slow
def test_a_budget_of_operations_is_just_met(rule):
    c = magnitude(for_flops(0.3, rule, network, NETWORK, IMAGE))
    after = cost(network, NETWORK, IMAGE, compression=c, state=c.init(NETWORK))
    assert (
        0.28
        < after.effective_macs / after.macs
        <= 0.3 + 0.5 * after.by_site["conv"].macs / NETWORK["conv"].size / after.macs
    )
    with pytest.raises(ConfigError, match="no sparsity meets the budget 0.3"):
        for_flops(0.3, lambda s: {"head": s}, network, NETWORK, IMAGE)
    assert for_flops(1.0, rule, network, NETWORK, IMAGE) == rule(0.0)


@pytest.mark.slow
def test_a_budget_of_bytes_is_just_met():
    params = {
        "a": jax.random.normal(jax.random.key(0), (64, 64)),
        "b": jax.random.normal(jax.random.key(1), (16, 16)),
    }
    c = magnitude(for_bytes(0.2, lambda s: {"a": s}, params, iterations=7))
    share = cj.nbytes(c.pack(params, c.init(params))) / cj.nbytes(params)
    assert 0.19 < share <= 0.2
    with pytest.raises(ConfigError, match="no sparsity meets"):
        for_bytes(0.2, lambda s: {"b": s}, params, iterations=2)


@pytest.mark.slow
def test_what_zeros_buy_depends_on_their_pattern():
    params = {"w": jax.random.normal(jax.random.key(0), (32, 32))}
    made = {
        "unstructured": magnitude(0.5),
        "2:4": magnitude(None, n_m(2, 4)),
        "blocks": magnitude(0.5, block((8, 8))),
        "channels": magnitude(0.5, channel(-2)),
        "dense": magnitude(0.0),
    }
    for pattern, c in made.items():
        (row,) = gains(params, c.init(params)).rows
        assert row.pattern == pattern and row.stored <= row.dense == 4096
        assert row.stored == cj.nbytes(c.pack(params, c.init(params)))
    text = str(gains(params, made["unstructured"].init(params)))
    assert "50.0%" in text and "bytes only" in text
    assert (
        gains({"w": jnp.ones(9)}, magnitude(0.5).init({"w": jnp.ones(9)})).rows[0].pattern
        == "unstructured"
    )
