"""The axis algebra: unified axes have the same coordinates, and moved data keeps them."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jax.trace._groups.analyze import Walk
from compress_jax.trace._groups.axes import (
    MISALIGNED,
    UNIT,
    Axes,
    concatenation,
    pieces,
    product,
    unify,
)
from compress_jax.trace._jaxpr.interpret import interpret


def free(axes, axis):
    """Return the coordinates in every leaf that nothing freezes."""
    return {
        leaf: places for leaf, places in axes.coordinates(axis).items() if axes.reason(leaf) is None
    }


def same(axes, a, b):
    first, second = free(axes, a), free(axes, b)
    return first.keys() == second.keys() and all(
        (first[leaf] == second[leaf]).all() for leaf in first
    )


@st.composite
def trees(draw, axes, known, size, depth=3):
    """Draw an axis of a given size: a leaf, new or known, or a product or a sum of smaller ones."""
    divisors = [n for n in range(2, size) if size % n == 0]
    kinds = (
        ["leaf"]
        + (["product"] if divisors and depth else [])
        + (["sum"] if size > 1 and depth else [])
    )
    kind = draw(st.sampled_from(kinds))
    if kind == "leaf":
        new = axes.leaf(size, draw(st.sampled_from([None, None, None, "why"])))
        known.append(draw(st.sampled_from([new, *(leaf for leaf in known if leaf.size == size)])))
        return known[-1]
    first = draw(st.sampled_from(divisors)) if kind == "product" else draw(st.integers(1, size - 1))
    second = size // first if kind == "product" else size - first
    build = product if kind == "product" else concatenation
    return build([draw(trees(axes, known, part, depth - 1)) for part in (first, second)])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, 2, 4, 6, 12, 16, 24, 30]))
@pytest.mark.slow
def test_unified_axes_have_the_same_coordinates_and_stay_so(data, size):
    axes, known = Axes(), []
    chain = [data.draw(trees(axes, known, size)) for _ in range(4)]
    for a, b in zip(chain, chain[1:], strict=False):
        unify(axes, a, b)
    for a, b in zip(chain, chain[1:], strict=False):
        assert same(axes, a, b)
    if not axes.reasons:  # and saying it again says nothing new
        before = dict(axes.bound)
        for a, b in zip(chain, chain[1:], strict=False):
            unify(axes, a, b)
        assert before == axes.bound and not axes.reasons


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.sampled_from([4, 6, 12, 24]))
@pytest.mark.slow
def test_the_kth_occurrences_of_all_coordinates_correspond(data, size):
    """Moving k-th occurrence to k-th occurrence is the permutation of the tree, leaf by leaf."""
    axes = Axes()
    axis = data.draw(trees(axes, [], size))
    for leaf in set(axes.leaves(axis)) - axes.repeated(axis):
        permutation = np.random.default_rng(0).permutation(leaf.size)
        place = axes.coordinates(axis)[leaf]
        order = np.arange(size)
        for i in range(leaf.size):
            order[np.flatnonzero(place == i)] = np.flatnonzero(place == permutation[i])
        assert order.tolist() == moved(axes, axis, leaf, permutation).tolist()


def moved(axes, axis, leaf, permutation):
    """Return which old index each index takes over, from the tree itself."""
    axis = axes.find(axis)
    if axis == leaf:
        return permutation
    if not hasattr(axis, "parts"):
        return np.arange(axis.size)
    parts = [moved(axes, part, leaf, permutation) for part in axis.parts]
    sizes = [len(part) for part in parts]
    if sum(sizes) == axis.size and type(axis).__name__ == "Sum":
        return np.concatenate([part + sum(sizes[:i]) for i, part in enumerate(parts)])
    return np.ravel_multi_index(np.ix_(*parts), sizes).reshape(-1)


def leaves(axes, *sizes):
    return [axes.leaf(size) for size in sizes]


def sizes(axes, axis):
    return [leaf.size for leaf in axes.leaves(axis)]


def test_a_product_is_cut_into_common_factors():
    axes = Axes()
    a, b, c = leaves(axes, 4, 6, 24)
    unify(axes, c, product([a, b]))
    d, e = leaves(axes, 8, 3)
    unify(axes, c, product([d, e]))
    assert sizes(axes, c) == [4, 2, 3] and not axes.reasons


def test_a_sum_is_cut_where_either_is():
    axes = Axes()
    a, b, c, d = leaves(axes, 3, 5, 4, 4)
    unify(axes, concatenation([a, b]), concatenation([c, d]))
    assert (
        sizes(axes, a) == [3] and sizes(axes, b) == [4] and not axes.reasons
    )  # 3 + 1 + 4; 1 is no leaf


def test_a_product_that_meets_a_sum_is_cut_into_rows():
    axes = Axes()
    three, heads, dim = leaves(axes, 3, 4, 5)
    fused = product([three, heads, dim])
    query, key, value = pieces(axes, fused, [20, 20, 20])
    assert sizes(axes, query) == sizes(axes, key) == [4, 5] and same(axes, query, value)
    assert sizes(axes, three) == [] and not axes.reasons


def test_a_product_with_a_sum_in_front_is_a_sum():
    axes = Axes()
    left, right, dim = leaves(axes, 2, 4, 3)
    first, second = pieces(axes, product([concatenation([left, right]), dim]), [6, 12])
    assert (
        same(axes, first, product([left, dim]))
        and same(axes, second, product([right, dim]))
        and not axes.reasons
    )


def test_rows_that_are_cut_inside_are_matched_as_a_whole():
    axes = Axes()
    rows, row, a, b, rest = leaves(axes, 4, 6, 2, 4, 18)
    unify(axes, product([rows, row]), concatenation([a, b, rest]))
    assert sizes(axes, row) == [2, 4] and sizes(axes, rest) == [3, 2, 4] and not axes.reasons


def test_what_does_not_fit_is_frozen():
    axes = Axes()
    a, b, c, d = leaves(axes, 4, 6, 6, 4)
    unify(axes, product([a, b]), product([c, d]))
    assert {axes.reason(leaf) for leaf in (a, b, c, d)} == {MISALIGNED}
    e, f, g = leaves(axes, 2, 5, 5)
    unify(
        axes, product([e, f]), concatenation([axes.leaf(3), axes.leaf(7)])
    )  # 3 lies inside a row of 5
    assert axes.reason(e) == axes.reason(f) == MISALIGNED
    unify(axes, g, axes.leaf(7))
    assert axes.reason(g) == MISALIGNED


def test_what_freezes_a_leaf_freezes_what_it_turns_out_to_be():
    axes = Axes()
    a, b = leaves(axes, 2, 3)
    unify(axes, axes.leaf(6, "input"), product([a, b]))
    assert axes.reason(a) == axes.reason(b) == "input"
    axes.freeze(a, "output")
    assert axes.reason(a) == "input"  # the first reason is kept


def test_a_shift_leaves_nothing_to_permute():
    axes = Axes()
    (x,) = leaves(axes, 8)
    first, second = pieces(axes, x, [3, 5])
    unify(axes, x, concatenation([second, first]))
    assert sizes(axes, x) == []


def test_repeated_leaves():
    axes = Axes()
    a, b = leaves(axes, 2, 3)
    assert axes.repeated(product([a, b, a])) == {a}
    assert axes.repeated(concatenation([a, b, a])) == set()
    assert axes.repeated(product([concatenation([a, b]), concatenation([b, UNIT])])) == {b}
    assert product([UNIT, UNIT]) == UNIT and product([UNIT, a]) == a


SHAPES = (
    st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)
    .map(tuple)
    .filter(lambda s: 1 < math.prod(s) <= 48)
)


@st.composite
def programs(draw):
    """Draw the shapes of two arrays and steps ``f(xp, values) -> values`` that move entries."""
    shape = draw(SHAPES)
    steps, shapes = [], [shape, shape]
    for _ in range(draw(st.integers(1, 6))):
        step = draw(st.sampled_from([_reshape, _transpose, _concatenate, _split, _slice, _stack]))(
            draw, shapes
        )
        steps.append(step)
        shapes = [value.shape for value in step(np, [np.zeros(each) for each in shapes])]
        if math.prod(shapes[-1]) > 400:
            break
    return shape, steps


def _reshape(draw, shapes):
    i = draw(st.integers(0, len(shapes) - 1))
    total, new = math.prod(shapes[i]), []
    while total > 1 and len(new) < 4:
        new.append(draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0])))
        total //= new[-1]
    return lambda xp, values: [*values, xp.reshape(values[i], (*new, total))]


def _transpose(draw, shapes):
    i = draw(st.integers(0, len(shapes) - 1))
    order = draw(st.permutations(range(len(shapes[i]))))
    return lambda xp, values: [*values, xp.transpose(values[i], order)]


def _concatenate(draw, shapes):
    i = draw(st.integers(0, len(shapes) - 1))
    axis = draw(st.integers(0, len(shapes[i]) - 1))
    fits = [
        j
        for j, s in enumerate(shapes)
        if len(s) == len(shapes[i]) and _without(s, axis) == _without(shapes[i], axis)
    ]
    j = draw(st.sampled_from(fits))
    return lambda xp, values: [*values, xp.concatenate([values[i], values[j]], axis)]


def _without(shape, axis):
    return (*shape[:axis], *shape[axis + 1 :])


def _split(draw, shapes):
    i = draw(st.integers(0, len(shapes) - 1))
    axis = draw(st.integers(0, len(shapes[i]) - 1))
    at = draw(st.integers(1, max(1, shapes[i][axis] - 1)))
    return lambda xp, values: [
        *values,
        *xp.split(values[i], [at], axis)[: 2 if at < shapes[i][axis] else 1],
    ]


def _slice(draw, shapes):
    i = draw(st.integers(0, len(shapes) - 1))
    starts = [draw(st.integers(0, n - 1)) for n in shapes[i]]
    stops = [draw(st.integers(start + 1, n)) for start, n in zip(starts, shapes[i], strict=True)]
    cut = tuple(map(slice, starts, stops))
    return lambda xp, values: [*values, values[i][cut]]


def _stack(draw, shapes):
    i = draw(st.integers(0, len(shapes) - 1))
    j = draw(st.sampled_from([j for j, shape in enumerate(shapes) if shape == shapes[i]]))
    axis = draw(st.integers(0, len(shapes[i])))
    return lambda xp, values: [*values, xp.stack([values[i], values[j]], axis)]


@settings(max_examples=150, deadline=None)
@given(programs())
@pytest.mark.slow
def test_data_that_is_moved_keeps_its_coordinates(program):
    """Labels that run through the program in NumPy tell where each entry was: same coordinates."""
    shape, steps = program

    def run(xp, values):
        for step in steps:
            values = step(xp, values)
        return values

    walk, array, size = Walk(), jax.ShapeDtypeStruct(shape, jnp.float32), math.prod(shape)
    inputs = [walk.fresh(array), walk.fresh(array)]
    outputs = interpret(walk, jax.make_jaxpr(lambda a, b: run(jnp, [a, b]))(array, array), inputs)
    for leaf in {leaf for dims in outputs for axis in dims for leaf in walk.axes.repeated(axis)}:
        walk.axes.freeze(leaf, "has no coordinates")
    made_of = [places for dims in inputs for places in place(walk.axes, dims, shape)]
    labels = run(np, [np.arange(size).reshape(shape), size + np.arange(size).reshape(shape)])
    assert not walk.unknown
    for label, dims in zip(labels, outputs, strict=True):
        assert [made_of[origin] for origin in label.flat] == place(walk.axes, dims, label.shape)


def place(axes, dims, shape):
    """Return for every entry, in C order, the coordinates in all free leaves along its axes."""
    along = [free(axes, axis) for axis in dims]
    return [
        Counter(
            (leaf, int(c[i]))
            for i, each in zip(index, along, strict=True)
            for leaf, c in each.items()
            if c[i] >= 0
        )
        for index in np.ndindex(*shape)
    ]
