"""Units and groups against NumPy: which are pruned and how many, with remainders and ties."""

import itertools
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import compress_jax as cj
from compress_jax.core import NoMatchError
from compress_jax.core.exact import exact_sum
from compress_jax.prune import block, channel, head, magnitude, n_m

WHOLE = st.integers(-4, 4)  # few values, many ties; sums of integers are exact in both
REDUCE = {
    "sum": np.sum,
    "mean": np.mean,
    "l2": lambda x: np.sqrt(np.square(x).sum()),
    "max": np.max,
}


@cache
def masker(structure):
    """Compile the mask of a structure once for all sparsities of a shape."""
    if hasattr(structure, "m"):
        return jax.jit(lambda x, sparsity: magnitude(None, structure).init({"w": x}).fixed["w"])
    return jax.jit(
        lambda x, sparsity: magnitude(lambda step: sparsity, structure).init({"w": x}).fixed["w"]
    )


def mask_of(values, structure, sparsity=0.0):
    return np.asarray(masker(structure)(jnp.asarray(values, jnp.float32), jnp.float32(sparsity)))


def units_pruned(values, window, reduce, sparsity):
    """The mask by loops: score units in float64, sort by score and position, prune the first."""
    values = np.abs(np.asarray(values, np.float64))
    starts = [range(0, n, w) for n, w in zip(values.shape, window, strict=True)]
    units = [
        tuple(slice(i, i + w) for i, w in zip(corner, window, strict=True))
        for corner in itertools.product(*starts)
    ]
    scores = [REDUCE[reduce](values[unit]) for unit in units]
    mask = np.ones(values.shape, bool)
    for index in np.argsort(scores, kind="stable")[: math.floor(sparsity * len(units) + 0.5)]:
        mask[units[index]] = False
    return mask


@pytest.mark.wide(3)
@pytest.mark.parametrize("reduce", REDUCE)
@settings(max_examples=15, deadline=None)
@given(
    hnp.arrays(np.int8, (5, 7), elements=WHOLE), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
)
def test_blocks_with_remainders_are_chosen_as_by_loops(reduce, values, sparsity):
    expected = units_pruned(values, (2, 3), reduce, sparsity)
    np.testing.assert_array_equal(mask_of(values, block((2, 3), reduce), sparsity), expected)


@pytest.mark.wide(2)
@pytest.mark.parametrize(
    ("structure", "window"),
    [
        (block((3,)), (1, 1, 3)),
        (block((4, 5, 6)), (4, 5, 6)),
        (block((9, 9, 12)), (4, 6, 10)),
        (channel(), (4, 6, 1)),
        (channel(0, "l2"), (1, 6, 10)),
        (channel((0, -1)), (1, 6, 1)),
        (head(), (4, 1, 10)),
        (head(-1, heads=5, reduce="max"), (4, 6, 2)),
    ],
    ids=str,
)
def test_every_structure_prunes_its_units(structure, window):
    values = np.random.default_rng(0).integers(-9, 10, (4, 6, 10))
    for sparsity in (0.3, 0.5):
        expected = units_pruned(values, window, structure.reduce, sparsity)
        np.testing.assert_array_equal(mask_of(values, structure, sparsity), expected)


def groups_kept(values, n, m):
    """The mask of n:m along axis 0 by loops: the n largest of every m, the later of equals."""
    mask = np.zeros(values.shape, bool)
    for column in range(values.shape[1]):
        for start in range(0, len(values), m):
            group = np.abs(values[start : start + m, column].astype(np.float64))
            mask[start + np.argsort(group, kind="stable")[-n:], column] = True
    return mask


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 4), (3, 8)])
@settings(max_examples=15, deadline=None)
@given(hnp.arrays(np.int8, (10, 3), elements=WHOLE))
def test_n_of_m_keeps_the_largest_of_every_group(n, m, values):
    np.testing.assert_array_equal(mask_of(values, n_m(n, m)), groups_kept(values, n, m))


def test_n_of_m_runs_along_the_contracting_axis():
    values = np.random.default_rng(1).normal(size=(3, 3, 8, 5)).astype(np.float32)
    kept = mask_of(values, n_m(2, 4)).reshape(3, 3, 2, 4, 5)
    assert (kept.sum(3) == 2).all()
    output = (
        np.random.default_rng(2).normal(size=(3, 4, 6)).astype(np.float32)
    )  # an attention's [heads, head_dim, out]
    joined = mask_of(output, n_m(1, 6, axis=(0, 1))).reshape(2, 6, 6)
    np.testing.assert_array_equal(joined, groups_kept(output.reshape(12, 6), 1, 6).reshape(2, 6, 6))
    assert (mask_of(output, n_m(2, 4, axis=1)).sum(1) == 2).all()


def test_a_sparsity_beside_n_of_m_must_agree():
    assert magnitude(0.5, n_m(2, 4)).init({"w": jnp.ones((4, 1))}).fixed["w"].sum() == 2
    for other in (0.6, lambda step: 0.5, {"**": 0.5}):
        with pytest.raises(ValueError, match="2:4 sets the sparsity to 0.5"):
            magnitude(other, n_m(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "structure", [block((2, 3)), channel(), head(0), n_m(2, 4, axis=0)], ids=str
)
def test_sharded_masks_are_the_unsharded_ones(structure):
    x = {
        "w": jax.random.normal(jax.random.key(0), (8, 24))
    }  # not integers: sums must not depend on their order
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    c = magnitude(None if hasattr(structure, "m") else 0.6, structure)
    make = jax.jit(c.init)
    expected = np.asarray(make(x).fixed["w"])
    assert 0 < expected.sum() < expected.size
    for spec in [("a", "b"), ("b", None), (None, ("a", "b"))]:
        np.testing.assert_array_equal(
            make(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))).fixed["w"], expected
        )


def test_sums_do_not_depend_on_the_order_and_are_close():
    x = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)
    total = np.asarray(exact_sum(jnp.asarray(x), (1,)))
    shuffled = np.random.default_rng(1).permutation(5000)
    np.testing.assert_array_equal(exact_sum(jnp.asarray(x[:, shuffled]), (1,)), total)
    np.testing.assert_allclose(total, x.astype(np.float64).sum(1), atol=5000 * 2.0**-27, rtol=1e-6)


@pytest.mark.slow
def test_blocks_of_huge_and_tiny_numbers_are_ordered():
    for unit in (1e-38, 1e-20, 1.0, 1e20, 1e37):
        values = np.array([[3, 3, 1, 1, 2, 2]]) * unit
        for reduce in REDUCE:
            assert mask_of(values, block((1, 2), reduce), 1 / 3).tolist() == [
                [True, True, False, False, True, True]
            ]


@pytest.mark.slow
def test_leaves_without_such_units_are_left_alone_and_say_why():
    params = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4), "scale": jnp.float32(1.0)}
    reasons = magnitude(None, n_m(2, 4)).skipped(params)
    assert reasons == {
        "bias": "it has no axis -2, only 1",
        "scale": "it is a scalar and has no axis -2",
    }
    assert set(magnitude(0.5, block((2, 2))).init(params).fixed) == {"kernel"}
    odd = magnitude(0.5, head(0, heads=4)).skipped(params)
    assert odd["kernel"] == "4 heads do not divide the 6 entries of axis 0"
    assert (
        cj.coverage(magnitude(0.5, channel(1)), params)["bias"].reason == "it has no axis 1, only 1"
    )
    assert "same one" in magnitude(0.5, channel((0, -2))).skipped(params)["kernel"]


def test_a_map_gives_each_leaf_its_own_sparsity():
    params = {"a": jnp.arange(1.0, 11.0), "b": jnp.arange(1.0, 11.0), "c": jnp.ones(10)}
    c = magnitude({"a": 0.2, "b": lambda step: 0.1 * step})
    pruned = {
        path: int((~mask).sum())
        for path, mask in c.update(params, c.init(params), step=7).fixed.items()
    }
    assert pruned == {"a": 2, "b": 7} and c.skipped(params) == {"c": "no sparsity is given for it"}
    with pytest.raises(NoMatchError, match="'d'"):
        magnitude({"d": 0.5}).init(params)
    with pytest.raises(ValueError, match="one threshold is shared"):
        magnitude({"a": 0.5}, scope="global")


@pytest.mark.slow
def test_global_units_are_compared_across_leaves():
    params = {"a": jnp.array([[1.0, 5.0]]), "b": jnp.array([[2.0, 3.0, 4.0], [2.0, 3.0, 4.0]])}
    masks = magnitude(0.4, channel(), scope="global").init(params).fixed
    assert masks["a"].tolist() == [[False, True]] and masks["b"][0].tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: n_m(5, 4), "n=5, m=4"),
        (lambda: n_m(0, 4), "n=0"),
        (lambda: block(()), "tuple of sizes"),
        (lambda: block((2, 0)), "tuple of sizes"),
        (lambda: block((2,), "median"), "sum, mean, l2, max, got 'median'"),
        (lambda: channel((1, 1)), "different ones"),
        (lambda: head(heads=0), "heads=0"),
        (lambda: magnitude(None), "give a sparsity"),
        (lambda: magnitude(0.5, every=0), "every=0"),
        (lambda: magnitude(0.5, n_m(2, 4), scope="global"), "no n:m structure"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
