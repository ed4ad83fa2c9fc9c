"""Functions in the converter's layouts are the functions themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from compress_jax.export._onnx.convert import live, plain


def same(fn, params, x, close=1e-5):
    made = jax.make_jaxpr(fn)(params, x)
    new = plain(made, [False] * len(jax.tree.leaves(params)) + [True])
    flat = (*jax.tree.leaves(params), x)
    for got, wanted in zip(new(*flat), jax.tree.leaves(fn(params, x)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=close, atol=close)
    return live(jax.make_jaxpr(new)(*flat))


def array(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def primitives(jaxpr):
    return [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]


@pytest.mark.wide(5)
@pytest.mark.parametrize(
    "spec",
    [
        "bi,ij->bj",
        "bi,ji->bj",
        "bti,ihk->bthk",
        "bthk,hkd->btd",
        "bi,i->b",
        "bhi,ikh->bk",
        "ij,jb->ib",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_every_product_has_its_parameter_on_the_right_as_a_matrix(spec, first):
    sizes = dict(zip("bthijkd", (2, 3, 2, 4, 5, 3, 6), strict=True))
    left, right, out = (
        tuple(part) for part in (*spec.split("->")[0].split(","), spec.split("->")[1])
    )
    x, w = array(0, *(sizes[c] for c in left)), array(1, *(sizes[c] for c in right))
    swapped = f"{''.join(right)},{''.join(left)}->{''.join(out)}"
    fn = (
        (lambda w, x: jnp.einsum(swapped, w, x)) if first else (lambda w, x: jnp.einsum(spec, x, w))
    )
    (dot,) = [eqn for eqn in same(fn, w, x).jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert dot.params["dimension_numbers"] == (((dot.invars[0].aval.ndim - 1,), (0,)), ((), ()))
    assert dot.invars[1].aval.ndim == 2 and dot.invars[1].aval.size == w.size


@pytest.mark.wide(2)
@pytest.mark.parametrize("image", ["NHWC", "NCHW", "HWNC", "CHNW"])
@pytest.mark.parametrize("kernel", ["HWIO", "OIHW", "HWOI", "IOHW"])
def test_every_convolution_is_in_a_layout_that_the_converter_knows(image, kernel):
    sizes = {"N": 2, "H": 5, "W": 6, "C": 3}
    x = array(0, *(sizes[c] for c in image))
    w = array(1, *({"H": 3, "W": 2, "I": 3, "O": 4}[c] for c in kernel))
    numbers = (image, kernel, "NWCH")
    made = same(
        lambda w, x: lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=numbers),
        w,
        x,
        1e-4,
    )
    (conv,) = [eqn for eqn in made.jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
    numbers = conv.params["dimension_numbers"]
    assert numbers == lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


@pytest.mark.wide(3)
@pytest.mark.parametrize(
    ("start", "reduce"),
    [(-jnp.inf, lax.max), (jnp.inf, lax.min), (0.25, lax.max), (-0.25, lax.min)],
)
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_every_window_is_a_maximum_from_the_bottom(start, reduce, padding):
    fn = lambda _, x: lax.reduce_window(x, start, reduce, (1, 3, 2), (1, 2, 1), padding)  # noqa: E731
    names = primitives(same(fn, {}, array(0, 2, 7, 5)))
    assert "reduce_window_max" in names and not {"reduce_window", "reduce_window_min"} & set(names)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_a_minimum_of_integers_is_a_maximum_too(dtype):
    """The negative of an unsigned number is none, and int8 has no negative of its lowest."""
    ends = jnp.iinfo(dtype)
    low, high = int(ends.min), int(ends.max)
    x = jnp.asarray([[low, high, 3, low, 0, 7, high, 1]], dtype)
    start = np.asarray(high, dtype)
    same(lambda _, x: lax.reduce_window(x, start, lax.min, (1, 3), (1, 2), "VALID"), 0.0, x)


@pytest.mark.slow
def test_loops_branches_and_calls_stay_what_they_are():
    @jax.custom_jvp
    def twice(x):
        return x + x

    twice.defjvp(lambda primals, tangents: (twice(*primals), 2 * tangents[0]))

    def fn(p, x):
        y, ys = lax.scan(lambda h, w: (jnp.tanh(w @ h), h.sum()), jax.jit(jnp.sin)(x), p["w"])
        y = lax.cond(y.sum() > 0, lambda y: p["b"] @ y, lambda y: -y, y)
        _, y = lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, p["b"] @ s[1]), (jnp.int32(0), y)
        )
        return twice(y), ys, jax.checkpoint(jnp.cos)(y)

    names = primitives(same(fn, {"w": array(0, 3, 4, 4) / 2, "b": array(1, 4, 4) / 2}, array(2, 4)))
    assert {"scan", "while", "cond"} <= set(names) and not {"jit", "pjit", "custom_jvp_call"} & set(
        names
    )


def test_what_no_result_needs_is_dropped_with_what_it_captures():
    key = jax.random.key(0)
    made = jax.make_jaxpr(lambda x: (jax.random.normal(key, (3,)), x + 1)[1])(jnp.ones(3))
    kept = live(made)
    assert primitives(kept) == ["add"] and not kept.consts
