"""The ready reducers against float64, and their laws over batches, loops and devices."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.lax import ConvDimensionNumbers
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compress_jax.core.exact import Int64, add
from compress_jax.trace import observe, sites
from compress_jax.trace._jaxpr.site import Site
from compress_jax.trace.reducers import (
    Histogram,
    absmax,
    absmean,
    edges,
    gram,
    histogram,
    magnitudes,
    minmax,
    moments,
    norm,
    outliers,
    percentile,
)

REDUCERS = {
    "absmax": absmax(),
    "absmax channel": absmax("channel"),
    "minmax": minmax(),
    "minmax channel": minmax(granularity="channel"),
    "minmax moving": minmax(momentum=0.75),
    "moments": moments(),
    "absmean": absmean(),
    "norm": norm(),
    "gram": gram(),
    "histogram": histogram(16),
    "outliers": outliers(2.0),
}
ROUNDED = {"moments", "absmean"}  # divide, so that another order of the batches rounds differently
every = pytest.mark.parametrize("name", REDUCERS)
commutative = pytest.mark.parametrize(
    "name", [name for name in REDUCERS if name != "minmax moving"]
)


def dot_site(lhs, rhs, contracting, batch=((), ()), operand="rhs", kind="dot"):
    return Site(
        "w", kind, operand and "w", operand, lhs, rhs, (), *["float32"] * 3, contracting, batch
    )


def conv_site(lhs, rhs, numbers, operand="rhs", **params):
    spatial = len(lhs) - 2
    same = {
        "precision": None,
        "padding": ((0, 0),) * spatial,
        "feature_group_count": 1,
        "batch_group_count": 1,
    }
    same |= {name: (1,) * spatial for name in ("window_strides", "lhs_dilation", "rhs_dilation")}
    contracting = ((numbers.lhs_spec[1],), tuple(sorted(numbers.rhs_spec[1:])))
    params = same | {"dimension_numbers": numbers} | params
    return Site(
        "w",
        "conv",
        operand and "w",
        operand,
        lhs,
        rhs,
        (),
        *["float32"] * 3,
        contracting,
        params=params,
    )


NCHW = ConvDimensionNumbers(*[(0, 1, 2, 3)] * 3)
DENSE = dot_site((6, 3), (3, 4), ((1,), (0,)))
KERNEL = jnp.zeros((3, 4))


def whole(*shape, seed=0, low=-4, high=5):
    """Whole numbers: every sum of products of them is exact."""
    return np.random.default_rng(seed).integers(low, high, size=shape).astype(np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def measured(name, x, site=DENSE, other=KERNEL):
    return REDUCERS[name].reduce(site, jnp.asarray(x), other)


def same(a, b, tolerance=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance)


def unseen(statistics):
    """What a branch of cond that was not taken leaves."""
    return jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0),
        statistics,
    )


# --- The laws, for every reducer.


@pytest.mark.wide(2)
@commutative
def test_two_batches_are_one_large_batch(name):
    a, b = whole(6, 3), 3 * whole(6, 3, seed=1)
    merged = REDUCERS[name].merge(measured(name, a), measured(name, b))
    same(merged, measured(name, np.concatenate([a, b])), 1e-6 if name in ROUNDED else 0)


@commutative
def test_merging_is_associative(name):
    merge, (a, b, c) = (
        REDUCERS[name].merge,
        [measured(name, 5.0**i * whole(6, 3, seed=i)) for i in range(3)],
    )
    same(merge(merge(a, b), c), merge(a, merge(b, c)), 1e-6 if name in ROUNDED else 0)


@pytest.mark.wide(8)
@every
def test_what_did_not_run_is_neutral(name):
    merge, seen = REDUCERS[name].merge, measured(name, normal(6, 3))
    none_at_all = measured(name, normal(0, 3))
    for empty in (unseen(seen), none_at_all):
        same(merge(seen, empty), seen)
        same(merge(empty, seen), seen)
    same(jax.tree.map(lambda x: x, merge(unseen(seen), unseen(seen))), unseen(seen))


@every
def test_nothing_seen_finishes_as_nan(name):
    finished = REDUCERS[name].finish(unseen(measured(name, normal(6, 3))))["input"]
    floats = [x for x in jax.tree.leaves(finished) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(np.isnan(x).all() for x in floats) and (
        floats or (np.array(finished.count) == 0).all()
    )


@pytest.mark.wide(3)
@every
def test_statistics_of_loops_merge_and_finish_turn_by_turn(name):
    reducer = REDUCERS[name]
    olds, news = (
        [measured(name, 3.0**i * normal(6, 3, seed=seed + i)) for i in range(6)] for seed in (0, 10)
    )
    olds[4], news[2] = unseen(olds[4]), unseen(news[2])
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 3, *x[0].shape), *trees)  # noqa: E731
    merged = [reducer.merge(old, new) for old, new in zip(olds, news, strict=True)]
    together = jax.jit(reducer.merge)(stack(olds), stack(news))
    same(together, stack(merged), 1e-6)
    same(reducer.finish(together), stack([reducer.finish(each) for each in merged]), 1e-6)


@pytest.mark.wide(6)
@every
def test_jit_and_lower_precision_and_integers(name):
    x = whole(6, 3)
    seen = measured(name, x)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(seen)} <= {"float32", "int32", "uint32"}
    same(jax.jit(partial(measured, name))(x), seen, 1e-6 if name in ROUNDED else 0)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int8):
        same(measured(name, jnp.asarray(x, dtype)), seen)


@every
def test_zeros_have_finite_statistics(name):
    reducer, zeros = REDUCERS[name], measured(name, np.zeros((6, 3)))
    assert all(
        np.isfinite(leaf).all()
        for leaf in jax.tree.leaves(reducer.finish(reducer.merge(zeros, zeros)))
    )


@pytest.mark.wide(8)
@every
@pytest.mark.parametrize(
    "axis, kind",
    [(0, AxisType.Auto), (1, AxisType.Auto), (2, AxisType.Auto), (0, AxisType.Explicit)],
)
def test_sharded_input(name, axis, kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x, site = normal(8, 8, 16), dot_site((8, 8, 16), (16, 4), ((2,), (0,)))
    run = jax.jit(lambda x: REDUCERS[name].reduce(site, x, jnp.zeros((16, 4))))
    sharded = jax.device_put(x, NamedSharding(mesh, P(*[None] * axis, "data")))
    tolerance = 1e-5 if name == "gram" else 1e-6 if name in ROUNDED | {"norm"} else 0
    same(jax.device_get(run(sharded)), jax.device_get(run(x)), tolerance)
    if axis < 2 or name != "gram":  # whose products need all channels
        assert (
            "all-gather" not in run.lower(sharded).compile().as_text()
        )  # memory: activations stay where they are


@pytest.mark.wide(3)
@every
def test_two_activations_are_measured_each(name):
    site = dot_site((2, 6, 3), (2, 3, 5), ((2,), (1,)), ((0,), (0,)), operand=None)
    scores = REDUCERS[name].reduce(
        site, jnp.asarray(normal(2, 6, 3)), jnp.asarray(normal(2, 3, 5, seed=1))
    )
    assert list(scores) == ["lhs", "rhs"]
    mirrored = dot_site((2, 3, 5), (2, 6, 3), ((1,), (2,)), ((0,), (0,)), operand=None)
    swapped = REDUCERS[name].reduce(
        mirrored, jnp.asarray(normal(2, 3, 5, seed=1)), jnp.asarray(normal(2, 6, 3))
    )
    same(scores, {"lhs": swapped["rhs"], "rhs": swapped["lhs"]}, 1e-6)


# --- Ranges and channels against float64.

PAIRED = ((2, 0), (0, 1))
CHANNELS = {
    "dense": (DENSE, (6, 3), lambda x: x),
    "two axes, the last first": (
        dot_site((2, 3, 4), (4, 2, 5), PAIRED),
        (2, 3, 4),
        lambda x: x.transpose(1, 2, 0),
    ),
    "kernel on the left": (
        dot_site((4, 3), (3, 6), ((1,), (0,)), operand="lhs"),
        (3, 6),
        lambda x: x.T,
    ),
    "experts": (
        dot_site((5, 2, 3), (2, 3, 4), ((2,), (1,)), ((1,), (0,))),
        (5, 2, 3),
        lambda x: x.swapaxes(0, 1),
    ),
    "ragged": (dot_site((7, 3), (2, 3, 4), ((1,), (1,)), kind="ragged_dot"), (7, 3), lambda x: x),
    "NCHW": (
        conv_site((2, 3, 4, 5), (6, 3, 2, 2), NCHW),
        (2, 3, 4, 5),
        lambda x: x.transpose(0, 2, 3, 1),
    ),
    "hypernetwork": (
        conv_site((2, 3, 4, 5), (6, 3, 2, 2), NCHW, operand="lhs"),
        (6, 3, 2, 2),
        lambda x: x,
    ),
}
WIDTHS = {"two axes, the last first": 8, "hypernetwork": 12}


@pytest.fixture(params=CHANNELS)
def case(request):
    """What a reducer returns at a site, and its input ``[*batch, rows, channels]`` in float64."""
    site, shape, arrange = CHANNELS[request.param]
    x, width = 3 * normal(*shape), WIDTHS.get(request.param, 3)
    batch = (2,) if request.param == "experts" else ()
    table = np.asarray(arrange(x), np.float64).reshape(*batch, -1, width)

    def result(reducer):
        operands = [jnp.zeros(site.lhs_shape), jnp.zeros(site.rhs_shape)]
        operands[site.inputs["input"]] = jnp.asarray(x)
        statistics = reducer(site, *operands)
        assert int(statistics["input"].count) == table.shape[-2]
        return reducer.finish(statistics)["input"]

    return result, table


@pytest.mark.wide(3)
def test_per_channel_statistics(case):
    result, x = case
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    close(result(absmax("channel")), np.abs(x).max(-2))
    close(result(minmax(granularity="channel"))[:2], [x.min(-2), x.max(-2)])
    close(result(moments())[:2], [x.mean(-2), x.var(-2)])
    close(result(absmean()), np.abs(x).mean(-2))
    close(result(norm()), np.sqrt((x**2).sum(-2)))
    close(result(outliers(3.0)).entries, (np.abs(x) >= 3).sum(-2))


@pytest.mark.wide(2)
def test_per_tensor_statistics(case):
    result, x = case
    np.testing.assert_array_equal(result(absmax()), np.abs(x).max())
    np.testing.assert_array_equal(result(minmax())[:2], [x.min(), x.max()])
    assert result(histogram(64)).counts.to_float().sum() == x.size


def test_moving_range():
    reducer, batches = minmax(momentum=0.9), [normal(6, 3, seed=i) for i in range(5)]
    statistics, low, high = None, None, None
    for x in batches:
        new = reducer(DENSE, jnp.asarray(x), KERNEL)
        statistics = new if statistics is None else reducer.merge(statistics, new)
        low, high = (
            (x.min(), x.max())
            if low is None
            else (0.9 * low + 0.1 * x.min(), 0.9 * high + 0.1 * x.max())
        )
    np.testing.assert_allclose(reducer.finish(statistics)["input"][:2], [low, high], rtol=1e-6)


def test_variance_survives_a_large_mean():
    """A sum of squares in float32 would leave nothing of it."""
    x = 1e4 + normal(64, 3)
    merge, parts = moments().merge, [measured("moments", part) for part in np.split(x, 16)]
    seen = moments().finish(list(itertools.accumulate(parts, merge))[-1])["input"]
    np.testing.assert_allclose(seen.variance, x.astype(np.float64).var(0), rtol=1e-3)
    np.testing.assert_allclose(seen.mean, x.astype(np.float64).mean(0), rtol=1e-6)


@pytest.mark.slow
def test_nan_is_not_hidden():
    x = normal(6, 3)
    x[2, 1] = np.nan
    for name in ("absmax", "minmax", "moments", "norm", "gram"):
        assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(measured(name, x)))
    assert measured("outliers", x)["input"].entries[1] == (~(np.abs(x[:, 1]) < 2)).sum()
    for bad in (np.nan, np.inf):
        merged = histogram().merge(
            histogram()(DENSE, jnp.asarray(x) * 0 + bad, KERNEL), histogram()(DENSE, KERNEL, KERNEL)
        )
        assert np.isnan(percentile(merged["input"], 99.0)) and np.isnan(
            percentile(magnitudes(merged["input"]), 50.0)
        )


def test_counts_stay_at_the_most_rather_than_turn_negative():
    old = {
        "input": measured("outliers", np.full((6, 3), 9.0))["input"]._replace(
            count=jnp.int32(2**31 - 3)
        )
    }
    seen = outliers().merge(old, measured("outliers", np.full((6, 3), 9.0)))["input"]
    assert int(seen.count) == 2**31 - 1 and seen.entries.tolist() == [12] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: absmax("row"),
        lambda: minmax(granularity=4),
        lambda: minmax(momentum=1.0),
        lambda: outliers(0.0),
        lambda: histogram(100),
        lambda: percentile(None, 101.0),
    ],
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        wrong()


# --- Gram matrices.


def squared_error(gram, matrices):
    """The sum of squares of ``rows @ matrix`` from the Gram matrix of the rows, for each group."""
    gram = np.asarray(gram, np.float64).reshape(len(matrices), *gram.shape[-2:])
    return np.einsum("gkn,gkl,gln->", matrices, gram, matrices)


@st.composite
def products(draw):
    """A general product: any batch, contracting and other axes in any order, on either side."""
    sizes = [st.lists(st.integers(least, 3), max_size=2) for least in (1, 2, 1, 1)]
    batch, summed, rows, columns = (tuple(draw(each)) for each in sizes)
    places = [draw(st.permutations(range(len(batch + summed + free)))) for free in (rows, columns)]
    shapes = [np.zeros(len(at), int) for at in places]
    for shape, at, free in zip(shapes, places, (rows, columns), strict=True):
        shape[list(at)] = batch + summed + free
    axes = [[tuple(at[: len(batch)]), tuple(at[len(batch) : len(batch + summed)])] for at in places]
    flip = draw(st.booleans())
    order = slice(None, None, -1 if flip else 1)
    (left_batch, left), (right_batch, right) = axes[order]
    lhs, rhs = (tuple(map(int, shape)) for shape in shapes[order])
    return dot_site(
        lhs, rhs, (left, right), (left_batch, right_batch), operand="lhs" if flip else "rhs"
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@example(CHANNELS["two axes, the last first"][0], 0)
@given(products(), st.integers(0, 99))
def test_gram_of_any_product(site, seed):
    lhs, rhs = (
        jnp.asarray(whole(*site.lhs_shape, seed=seed)),
        jnp.asarray(whole(*site.rhs_shape, seed=seed + 1)),
    )
    product = partial(jax.lax.dot_general, dimension_numbers=(site.contracting, site.batch))
    seen, out = jax.jit(lambda lhs, rhs: (gram()(site, lhs, rhs)["input"], product(lhs, rhs)))(
        lhs, rhs
    )
    which = 1 - site.inputs["input"]
    kernel, axes, batch = (
        np.asarray((lhs, rhs)[which], np.float64),
        site.contracting[which],
        site.batch[which],
    )
    batches, width = (
        tuple(kernel.shape[axis] for axis in batch),
        math.prod(kernel.shape[axis] for axis in axes),
    )
    assert seen.gram.shape == (*batches, width, width)
    assert int(seen.count) * math.prod(batches) * width == (rhs, lhs)[which].size
    matrices = np.moveaxis(kernel, (*batch, *axes), range(len(batch + axes))).reshape(
        math.prod(batches), width, -1
    )
    assert squared_error(seen.gram, matrices) == (np.asarray(out, np.float64) ** 2).sum()


@st.composite
def convolutions(draw):
    """A convolution of one or two dimensions in any layout, grouped by channels or by examples."""
    spatial = draw(st.integers(1, 2))
    per = partial(lambda elements: tuple(draw(elements) for _ in range(spatial)))
    features, examples = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 1), (1, 2)]))
    channels, width = (
        features * draw(st.integers(1, 2)),
        features * examples * draw(st.integers(1, 2)),
    )
    window, gaps, holes = per(st.integers(1, 3)), per(st.integers(1, 2)), per(st.integers(1, 2))
    padding = tuple((draw(st.integers(-1, 2)), draw(st.integers(-1, 2))) for _ in range(spatial))
    sizes = tuple(
        draw(st.integers(2, 4)) + gap * (wide - 1) + max(0, -low) + max(0, -high)
        for gap, wide, (low, high) in zip(gaps, window, padding, strict=True)
    )
    specs = [tuple(draw(st.permutations(range(spatial + 2)))) for _ in range(3)]
    numbers = ConvDimensionNumbers(*specs)
    lhs, rhs = np.zeros(spatial + 2, int), np.zeros(spatial + 2, int)
    lhs[list(specs[0])] = (2 * examples, channels, *sizes)
    rhs[list(specs[1])] = (width, channels // features, *window)
    params = dict(
        padding=padding,
        window_strides=per(st.integers(1, 3)),
        lhs_dilation=holes,
        rhs_dilation=gaps,
    )
    groups = dict(feature_group_count=features, batch_group_count=examples)
    return conv_site(tuple(map(int, lhs)), tuple(map(int, rhs)), numbers, **params, **groups)


def unfolded(site, x):
    """``[groups, rows, k]`` by walking over every position of every window, in float64."""
    p, numbers = site.params, site.params["dimension_numbers"]
    x = np.asarray(x, np.float64).transpose(numbers.lhs_spec)
    kernel = [site.rhs_shape[axis] for axis in numbers.rhs_spec[2:]]
    spread = np.zeros(
        (
            *x.shape[:2],
            *((n - 1) * hole + 1 for n, hole in zip(x.shape[2:], p["lhs_dilation"], strict=True)),
        )
    )
    spread[(..., *(slice(None, None, hole) for hole in p["lhs_dilation"]))] = x
    reach = [(wide - 1) * gap + 1 for wide, gap in zip(kernel, p["rhs_dilation"], strict=True)]
    lengths = [
        n + low + high for n, (low, high) in zip(spread.shape[2:], p["padding"], strict=True)
    ]
    positions = [
        range(0, n - r + 1, stride)
        for n, r, stride in zip(lengths, reach, p["window_strides"], strict=True)
    ]
    order = [
        numbers.rhs_spec.index(axis) - 1 for axis in site.contracting[1]
    ]  # 0: channel, then the window's axes

    def entry(example, channels, start, offsets):
        at = [
            s + o * gap - low
            for s, o, gap, (low, _) in zip(
                start, offsets, p["rhs_dilation"], p["padding"], strict=True
            )
        ]
        inside = all(0 <= a < n for a, n in zip(at, spread.shape[2:], strict=True))
        return (
            spread[(example, channels, *at)] if inside else np.zeros(channels.stop - channels.start)
        )

    def row(example, channels, start):
        cells = [entry(example, channels, start, offsets) for offsets in np.ndindex(*kernel)]
        return np.stack(cells, -1).reshape(-1, *kernel).transpose(order).ravel()

    per_group, batch = x.shape[1] // site.groups, x.shape[0] // p["batch_group_count"]
    return np.array(
        [
            [
                row(example, slice(f * per_group, (f + 1) * per_group), start)
                for example in range(b * batch, (b + 1) * batch)
                for start in itertools.product(*positions)
            ]
            for b in range(p["batch_group_count"])
            for f in range(site.groups)
        ]
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(convolutions(), st.integers(0, 99))
def test_gram_of_any_convolution(site, seed):
    lhs, rhs = (
        jnp.asarray(whole(*site.lhs_shape, seed=seed)),
        jnp.asarray(whole(*site.rhs_shape, seed=seed + 1)),
    )
    seen, out = jax.jit(
        lambda lhs, rhs: (gram()(site, lhs, rhs)["input"], site.contract(lhs, rhs))
    )(lhs, rhs)
    rows, out = unfolded(site, lhs), np.asarray(out, np.float64)
    groups = len(rows)
    assert (
        seen.gram.shape == ((groups,) if groups > 1 else ()) + 2 * rows.shape[2:]
        and seen.count == rows.shape[1]
    )
    np.testing.assert_array_equal(
        seen.gram.reshape(groups, *seen.gram.shape[-2:]), rows.swapaxes(1, 2) @ rows
    )
    axes = (site.params["dimension_numbers"].rhs_spec[0], *site.contracting[1])
    matrices = np.moveaxis(np.asarray(rhs, np.float64), axes, range(len(axes))).reshape(
        groups, -1, rows.shape[2]
    )
    assert squared_error(seen.gram, matrices.swapaxes(1, 2)) == (out**2).sum()


@pytest.mark.wide(1)
@pytest.mark.parametrize("features, examples", [(1, 1), (2, 1), (1, 2)])
def test_gram_of_a_kernel_that_is_data(features, examples):
    """A kernel that another network made: rows are output channels, with the same windows."""
    shapes = (2, 3 * features, 4, 5), (4, 3, 2, 2)
    site = conv_site(
        *shapes, NCHW, operand=None, feature_group_count=features, batch_group_count=examples
    )
    lhs, rhs = (jnp.asarray(whole(*shape)) for shape in shapes)
    seen, count = gram()(site, lhs, rhs), features * examples
    images, kernels = (np.asarray(seen[key].gram).reshape(count, 12, 12) for key in ("lhs", "rhs"))
    np.testing.assert_array_equal(
        kernels, np.einsum("gnk,gnl->gkl", *[np.asarray(rhs).reshape(count, -1, 12)] * 2)
    )
    assert (images * kernels).sum() == (np.asarray(site.contract(lhs, rhs), np.float64) ** 2).sum()
    assert int(seen["rhs"].count) == 4 // count


def test_gram_of_a_ragged_product_is_over_all_rows():
    site, x = dot_site((7, 3), (2, 3, 4), ((1,), (1,)), kind="ragged_dot"), whole(7, 3)
    np.testing.assert_array_equal(
        gram()(site, jnp.asarray(x), jnp.zeros((2, 3, 4)))["input"].gram, x.T @ x
    )


def test_gram_is_summed_in_float32():
    x = (
        1 + np.arange(768).reshape(256, 3) % 128 / 128
    )  # exact in bfloat16; its products and sums are only in float32
    seen = gram()(DENSE, jnp.asarray(x, jnp.bfloat16), KERNEL)["input"]
    np.testing.assert_array_equal(seen.gram, x.T @ x)


# --- Histograms.


def counted(x, bins=2048):
    return histogram(bins)(DENSE, jnp.asarray(x, jnp.float32), KERNEL)["input"]


def exact(counts):
    return np.asarray(counts.high, np.uint64) * 2**32 + np.asarray(counts.low, np.uint64)


normalized = partial(st.floats, width=32, allow_subnormal=False)
values = normalized(-(2.0**100), 2.0**100) | normalized(-2, 2)
MERGE = jax.jit(histogram(16).merge)
samples = st.lists(values, min_size=6, max_size=6).map(lambda xs: np.float32(xs).reshape(2, 3))


@settings(max_examples=60, deadline=None)
@given(samples)
@pytest.mark.slow
def test_histogram_counts_what_numpy_counts(x):
    seen, largest = counted(x, 16), np.abs(x.astype(np.float64)).max()
    top = 2.0 ** int(seen.exponent)
    assert largest < top and (top / 2 <= largest or top == 2.0**-96)
    ends = np.arange(9) / 8 * top
    np.testing.assert_array_equal(edges(seen), np.concatenate([-ends[:0:-1], ends]))
    above, below = (
        np.histogram(part.astype(np.float64), ends)[0] for part in (x[x >= 0], -x[x < 0])
    )
    np.testing.assert_array_equal(exact(seen.counts), [*below[::-1], *above])
    np.testing.assert_array_equal(exact(magnitudes(seen).counts), [*[0] * 8, *above + below])


@settings(max_examples=60, deadline=None)
@given(samples, samples, samples)
@pytest.mark.slow
def test_histograms_merge_exactly_at_any_range(a, b, c):
    merge = lambda *parts: MERGE(*({"input": part} for part in parts))["input"]  # noqa: E731
    one, two, three = (counted(x, 16) for x in (a, b, c))
    together = counted(np.concatenate([a, b, c]), 16)
    same(merge(merge(one, two), three), together)
    same(merge(one, merge(three, two)), together)


def test_counts_go_on_past_32_bits():
    half = Int64(jnp.uint32([0, 7]), jnp.uint32([2**31, 5]))
    assert exact(add(add(half, half), half)).tolist() == [3 * 2**31, 3 * (7 * 2**32 + 5)]
    np.testing.assert_array_equal(
        add(half, half).to_float(), [2.0**32, np.float32(14 * 2**32 + 10)]
    )


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@example([1.0, -1.0], 0)
@given(
    st.lists(values, min_size=2, max_size=40),
    st.sampled_from([0, 0.1, 1, 25, 50, 50.1, 90, 99, 99.9, 100]),
)
def test_percentile_is_within_a_bin_of_that_rank(x, percent):
    padded = np.float32(x + x[:1] * (40 - len(x)))  # one shape, one compilation
    seen, x = counted(padded[:, None], 256), np.sort(padded).astype(np.float64)
    for of, ordered in ((seen, x), (magnitudes(seen), np.sort(np.abs(x)))):
        rank, width = percent / 100 * len(x), 2.0 ** (int(seen.exponent) + 1) / 256
        lower, upper = (
            ordered[max(math.ceil(rank - 1e-4) - 1, 0)],
            ordered[min(math.floor(rank + 1e-4), len(x) - 1)],
        )
        assert lower - width <= float(percentile(of, percent)) <= upper + width
    assert float(percentile(seen, 0)) == x[0] and float(percentile(seen, 100)) == x[-1]
    assert float(percentile(magnitudes(seen), 100)) == np.abs(x).max()


@pytest.mark.slow
def test_percentile_of_normal_values_and_of_stacked_histograms():
    xs = [normal(4000, 1, seed=i) * 3.0**i for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(counted, xs))
    for percent in (0.5, 30, 99.5):
        found = jax.jit(percentile, static_argnums=1)(stacked, percent)
        np.testing.assert_allclose(found, [np.percentile(x, percent) for x in xs], rtol=0.02)
        np.testing.assert_allclose(found, [percentile(counted(x), percent) for x in xs], rtol=1e-6)
    np.testing.assert_array_equal(edges(stacked)[1], edges(counted(xs[1])))


@pytest.mark.slow
def test_the_last_entries_of_very_many_are_resolved():
    """A few of 2**33 entries lie far out: counted from the other end, float32 would miss them."""
    upper, lower = np.zeros(16, np.uint32), np.zeros(16, np.uint32)
    upper[8], lower[15] = 2, 1024
    seen = Histogram(
        Int64(jnp.asarray(upper), jnp.asarray(lower)),
        jnp.int32(0),
        *jnp.float32([0, 0.99]),
        jnp.int32(1),
    )
    assert 0.875 <= float(percentile(seen, 100 * (1 - 2**-24))) <= 0.99
    assert 0 <= float(percentile(seen, 100 * (1 - 2**-22))) <= 0.125


# --- Through the interpreter.


def test_observed_through_loops_and_branches():
    """Sites of a trace: a grouped convolution in a scan, and a product in a rare branch."""
    params, x = (
        {"conv": jnp.asarray(whole(2, 2, 2, 4)), "w": jnp.asarray(whole(4, 3))},
        jnp.asarray(whole(3, 2, 5, 4, 4)),
    )
    sums = sorted(float(image.sum()) for image in x)
    rare = (sums[1] + sums[2]) / 2

    def fn(params, x):
        def turn(carry, image):
            options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2)
            y = jax.lax.conv_general_dilated(image, params["conv"], (2, 1), "SAME", **options)
            return carry, jax.lax.cond(
                image.sum() > rare, lambda y: y @ params["w"], lambda y: 0 * y[..., :3], y
            )

        return jax.lax.scan(turn, 0.0, x)[1]

    seen = jax.jit(observe(fn, gram()))(params, x)[1]
    site = {site.name: site for site in sites(fn, params, x)}
    assert seen["conv"]["input"].gram.shape == (3, 2, 8, 8)
    for image, turned in zip(x, seen["conv"]["input"].gram, strict=True):
        rows = unfolded(site["conv"], image)
        np.testing.assert_array_equal(turned, rows.swapaxes(1, 2) @ rows)
    counts = np.asarray(seen["w"]["input"].count)
    assert sorted(counts.tolist()) == [0, 0, 2 * 3 * 4]
    merged = gram().merge(seen["w"], jax.tree.map(lambda leaf: leaf[::-1], seen["w"]))["input"]
    assert np.isfinite(merged.gram[counts > 0]).all()


@pytest.mark.wide(9)
@every
def test_observed_in_a_while_loop(name):
    """Its turns are merged by the reducer, and a loop without any turn has seen nothing."""
    reducer, w, x = REDUCERS[name], whole(3, 3, low=0, high=2), whole(6, 3)

    def fn(params, x, turns):
        step = lambda state: (state[0] + 1, jnp.clip(state[1] @ params["w"], -9, 9))  # noqa: E731
        return jax.lax.while_loop(lambda state: state[0] < turns, step, (0, x))[1]

    seen = jax.jit(lambda *args: observe(fn, reducer)(*args)[1]["w"])
    turns = list(itertools.accumulate(range(2), lambda y, _: np.clip(y @ w, -9, 9), initial=x))
    expected = list(itertools.accumulate((measured(name, y) for y in turns), reducer.merge))[-1]
    same(seen({"w": w}, x, 3), expected, 1e-6)
    assert int(seen({"w": w}, x, 0)["input"].count) == 0
