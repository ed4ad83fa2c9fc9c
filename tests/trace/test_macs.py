"""Multiply-accumulates of a site: as many as multiplying ones and adding up gives."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from compress_jax.trace._cost import cost


def ones(*shape):
    return jnp.ones(shape)


def products(fn, *operands):
    """Multiply ones and add up: what comes out is how many products there were."""
    return int(np.sum(np.asarray(fn(*operands), np.float64)))


WAYS = {
    "product": (lambda w, x: x @ w, (6, 4), (5, 6)),
    "weights on the left": (lambda w, x: w @ x, (4, 6), (6, 5)),
    "batched": (lambda w, x: jnp.einsum("bhij,bhjk->bhik", w, x), (2, 3, 5, 4), (2, 3, 4, 6)),
    "batch last": (lambda w, x: jnp.einsum("ijb,jkb->bik", w, x), (5, 4, 3), (4, 6, 3)),
    "two axes": (lambda w, x: jnp.einsum("xhd,hdo->xo", x, w), (3, 2, 7), (5, 3, 2)),
    "vector": (lambda w, x: w @ x, (7,), (7,)),
    "outer": (lambda w, x: jnp.einsum("i,j->ij", w, x), (7,), (5,)),
    "vmapped both": (jax.vmap(jnp.matmul), (3, 4, 5), (3, 5, 2)),
    "ragged": (
        lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 3, 2], jnp.int32)),
        (3, 4, 5),
        (6, 4),
    ),
    "scanned": (lambda w, x: lax.scan(lambda c, row: (c, row @ w), 0, x)[1], (4, 5), (7, 2, 4)),
    "nested scans": (
        lambda w, x: lax.map(lambda rows: lax.map(lambda row: row @ w, rows), x),
        (4, 5),
        (3, 2, 4),
    ),
    "fori_loop": (
        lambda w, x: lax.fori_loop(0, 3, lambda i, y: y + x @ w, jnp.zeros((2, 5))),
        (4, 5),
        (2, 4),
    ),
}


@pytest.mark.wide(7)
@pytest.mark.parametrize("name", WAYS)
def test_macs_are_the_products(name):
    fn, w, x = WAYS[name]
    assert cost(fn, ones(*w), ones(*x)).macs == products(fn, ones(*w), ones(*x))


def test_gradients_of_a_ragged_product_multiply_each_row_once():
    sizes = jnp.array([1, 3, 2], jnp.int32)

    def gradients(args, out):
        return jax.vjp(lambda x, w: lax.ragged_dot(x, w, sizes), *args)[1](out)

    args = (ones(6, 4), ones(3, 4, 5)), ones(6, 5)
    total = cost(gradients, *args)
    assert [each.macs for each in total.by_site.values()] == [6 * 4 * 5] * 3, (
        "itself, for the input, for the weights"
    )
    assert {each.site.out_shape for each in total.by_site.values()} == {(6, 5), (6, 4), (3, 4, 5)}
    assert [products(lambda *a, i=i: gradients(*a)[i], *args) for i in range(2)] == [6 * 4 * 5] * 2


def pairs(size, window, stride, spread, apart, low, high):
    """Slide a window along a line of ones; padding is ones too, zeros if it is transposed."""
    line = np.zeros((size - 1) * apart + 1)
    line[::apart] = 1
    reach = (window - 1) * spread
    line = np.pad(line, (low, high), constant_values=int(low + high <= reach))
    return int(
        sum(
            line[start : start + reach + 1 : spread].sum()
            for start in range(0, len(line) - reach, stride)
        )
    )


small = st.integers(1, 3)


@st.composite
def axes(draw):
    """Draw one axis of a convolution; a transposed one is padded for the whole window."""
    window, spread = draw(st.integers(1, 4)), draw(small)
    reach = (window - 1) * spread
    if draw(st.booleans()):
        return draw(st.integers(1, 6)), window, 1, spread, draw(small), reach, reach
    low = draw(st.integers(0, reach))
    return (
        draw(st.integers(1, 5)) + reach,
        window,
        draw(small),
        spread,
        1,
        low,
        draw(st.integers(0, reach - low)),
    )


@settings(deadline=None)
@given(
    shape=st.lists(axes(), min_size=1, max_size=3),
    groups=small,
    grouped=st.sampled_from(["feature", "batch"]),
)
def test_macs_of_any_convolution_are_its_products(shape, groups, grouped):
    size, window, stride, spread, apart, low, high = zip(*shape, strict=True)
    batch, features = (2 * groups, 5) if grouped == "batch" else (2, 5 * groups)
    x = jax.ShapeDtypeStruct((batch, features, *size), jnp.float32)
    w = jax.ShapeDtypeStruct((3 * groups, 5, *window), jnp.float32)
    run = partial(
        lax.conv_general_dilated, window_strides=stride, padding=list(zip(low, high, strict=True))
    )
    options = {"rhs_dilation": spread, "lhs_dilation": apart, f"{grouped}_group_count": groups}
    total = cost(lambda w, x: run(x, w, **options), w, x)
    assert total.macs == 2 * (3 * groups) * 5 * math.prod(pairs(*axis) for axis in shape)


GROUPS = [{}, {"feature_group_count": 3}, {"feature_group_count": 6}, {"batch_group_count": 2}]


@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_macs_of_a_grouped_convolution(options):
    w = ones(6, 6 // options.get("feature_group_count", 1), 3, 2)
    args = w, ones(4, 6, 5, 7)

    def fn(w, x):
        return lax.conv_general_dilated(x, w, (2, 1), "VALID", rhs_dilation=(1, 2), **options)

    assert cost(fn, *args).macs == products(fn, *args)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 7), window=st.integers(1, 5), stride=st.integers(2, 3), same=st.booleans())
def test_a_transposed_convolution_meets_each_input_with_its_whole_kernel(n, window, stride, same):
    """As fvcore counts ``ConvTranspose``, also where ``SAME`` crops the result."""
    if same and n * stride < window:
        n = window
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, n, n, 3), (window, window, 3, 2))
    )
    fn = partial(lax.conv_transpose, strides=(stride, stride), padding="SAME" if same else "VALID")
    assert cost(lambda w, x: fn(x, w), w, x).macs == n**2 * window**2 * 3 * 2


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize(("transposed", "stride"), [(False, 1), (False, 2), (True, 2)])
def test_gradients_of_a_convolution_have_as_many_products_as_itself(transposed, padding, stride):
    numbers = ("NHWC", "HWIO", "NHWC")
    run = (
        lax.conv_transpose
        if transposed
        else partial(lax.conv_general_dilated, dimension_numbers=numbers)
    )
    fn = lambda w, x: run(x, w, (stride, stride), padding)  # noqa: E731
    args = ones(3, 3, 4, 8), ones(2, 9, 9, 4)
    forward = cost(fn, *args)
    backward = cost(lambda args, out: jax.vjp(fn, *args)[1](out), args, fn(*args))
    assert [each.macs for each in backward.by_site.values()] == [forward.macs] * 3, (
        "itself, for the input, for the kernel"
    )
    assert padding == "SAME" or forward.macs == products(fn, *args)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=6, max_size=6))
def test_macs_of_any_product_are_the_sizes_of_its_letters(sizes):
    letters = dict(zip("bcijkl", sizes, strict=True))

    def array(names):
        return jax.ShapeDtypeStruct(tuple(letters[name] for name in names), jnp.float32)

    total = cost(lambda w, x: jnp.einsum("ibkjc,lcjkb->bcil", w, x), array("ibkjc"), array("lcjkb"))
    assert total.macs == math.prod(sizes)
