"""A floor under a global threshold, and n:m where it would prune nothing: both are reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import ArgumentError

RNG = np.random.default_rng(0)
P = {
    name: jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)
    for name, scale, shape in (("a", 1, (8, 10)), ("b", 1e-3, (4, 5)))
}


def kept(sparsity, floor):
    """NumPy: the largest of each leaf up to its floor, then the largest of what is left of all."""
    flat = {name: np.abs(np.asarray(x, np.float64)).ravel() for name, x in P.items()}
    masks = {name: np.zeros(x.size, bool) for name, x in flat.items()}
    for name, x in flat.items():
        masks[name][np.argsort(-x, kind="stable")[: max(1, int(np.ceil(floor * x.size)))]] = True
    total = sum(x.size for x in flat.values())
    stay = max(
        total - int(np.floor(sparsity * total + 0.5)), sum(mask.sum() for mask in masks.values())
    )
    rest = sorted(
        ((v, name, i) for name, x in flat.items() for i, v in enumerate(x) if not masks[name][i]),
        reverse=True,
    )
    for _, name, i in rest[: stay - sum(mask.sum() for mask in masks.values())]:
        masks[name][i] = True
    return masks


@pytest.mark.wide(2)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.99])
@pytest.mark.parametrize("floor", [0.001, 0.1, 0.45])
def test_no_leaf_falls_below_its_floor(sparsity, floor):
    c = cj.prune.magnitude(sparsity, scope="global", floor=floor)
    state = c.init(P)
    for name, expected in kept(sparsity, floor).items():
        np.testing.assert_array_equal(np.asarray(state.fixed[name]).ravel(), expected)


def test_without_a_floor_a_leaf_may_be_emptied_and_the_shares_say_so():
    state = cj.prune.magnitude(0.5, scope="global").init(P)
    assert not state.fixed["b"].any()
    with_floor = jax.jit(
        lambda p: cj.prune.magnitude(lambda step: 0.5, scope="global", floor=0.1).init(p)
    )(P)
    assert with_floor.fixed["b"].sum() == 2 and with_floor.fixed["a"].sum() == 48


def test_a_floor_needs_a_global_threshold():
    for wrong in (
        {"floor": 0.1},
        {"floor": 1.0, "scope": "global"},
        {"floor": -0.1, "scope": "global"},
    ):
        with pytest.raises(ArgumentError, match="floor"):
            cj.prune.magnitude(0.5, **wrong)


@pytest.mark.wide(1)
@pytest.mark.parametrize("shape", [(3, 3, 1, 16), (2, 7)])
@pytest.mark.slow
def test_n_m_that_prunes_nothing_is_said(shape):
    c, params = (
        cj.prune.magnitude(None, cj.prune.n_m(2, 4)),
        {"kernel": jnp.ones(shape), "other": jnp.ones((8, 4))},
    )
    assert "prunes nothing" in c.skipped(params)["kernel"] and "other" not in c.skipped(params)
    assert set(c.init(params).fixed) == {"other"}
    along = cj.prune.magnitude(None, cj.prune.n_m(2, 4, axis=-1)).init(
        {"kernel": jnp.ones((3, 3, 1, 16))}
    )
    assert along.fixed["kernel"].mean() == 0.5
