"""A rewritten function is the original, bit for bit with a rule that changes nothing.

Where a rule changes operands, the derivatives are those of the new operands.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from compress_jax.core import NoMatchError, ShapeError
from compress_jax.trace import observe, rewrite, sites


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


PARAMS = {"u": normal(6, 6), "w": normal(6, 4)}
X = normal(5, 6)
MESH = jax.make_mesh(
    (min(8, jax.device_count()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
)


@jax.custom_jvp
def scaled_gradient(x, w):
    return x @ w


@scaled_gradient.defjvp
def _(primals, tangents):
    x, w = primals
    return scaled_gradient(x, w), 3 * (tangents[0] @ w + x @ tangents[1])


@jax.custom_vjp
def reversed_gradient(x, w):
    return x @ w


reversed_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (-g @ saved[1].T, -saved[0].T @ g)
)


def saves_some(p, x):
    layer = lambda x: jnp.sin(checkpoint_name(x @ p["u"], "product"))  # noqa: E731
    return jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names("product"))(
        layer(x)
    )


def differentiates_inside(p, x):
    """A gradient step inside: the remat inside the trace is one that was already differentiated."""
    return x - jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ p["u"]))(x)))(x)


def random_inside(p, x):
    keep = jax.random.bernoulli(jax.random.key(3), 0.5, x.shape)
    return jnp.where(keep, x, 0) @ p["u"]


def constrained(p, x):
    x = jax.lax.with_sharding_constraint(x, NamedSharding(MESH, P(None, None)))
    placed = jax.jit(lambda x: x @ p["u"], out_shardings=NamedSharding(MESH, P()))
    return placed(x)


FUNCTIONS = {
    "matmul": lambda p, x: jnp.tanh(x @ p["u"]) @ p["w"],
    "jit": lambda p, x: jax.jit(lambda x: jnp.tanh(x @ p["u"]))(x),
    "scan": lambda p, x: jax.lax.scan(
        lambda x, _: (jnp.tanh(x @ p["u"]), x.sum()), x, None, length=3
    ),
    "scan in reverse": lambda p, x: jax.lax.scan(
        lambda c, x: (jnp.tanh(c @ p["u"]), x @ p["w"]), x[0], x, reverse=True
    ),
    "unrolled scan": lambda p, x: jax.lax.scan(
        lambda x, _: (jnp.tanh(x @ p["u"]), None), x, None, length=4, unroll=2
    )[0],
    "cond": lambda p, x: jax.lax.cond(
        x[0, 0] > 0, lambda: x @ p["u"], lambda: jnp.cos(x) @ p["u"] @ p["u"]
    ),
    "switch": lambda p, x: jax.lax.switch(
        2, [lambda x: x, lambda x: x @ p["u"], lambda x: x @ p["u"] @ p["u"]], x
    ),
    "remat": lambda p, x: jax.checkpoint(lambda x: jnp.sin(x @ p["u"]))(x),
    "remat with a policy": saves_some,
    "gradient inside": differentiates_inside,
    "custom_jvp": lambda p, x: scaled_gradient(x, p["u"]),
    "custom_vjp": lambda p, x: reversed_gradient(jnp.sin(x), p["u"]),
    "relu and silu": lambda p, x: jax.nn.silu(jax.nn.relu(x @ p["u"]) @ p["u"]),
    "random": random_inside,
    "constrained": constrained,
    "ragged": lambda p, x: jax.lax.ragged_dot(
        x, jnp.stack([p["u"], 2 * p["u"]]), jnp.array([2, 3], jnp.int32)
    ),
    "integers": lambda p, x: (
        jnp.round(x).astype(jnp.int8) @ jnp.round(p["u"]).astype(jnp.int8) + jnp.int8(1)
    ),
    "bfloat16": lambda p, x: (x.astype(jnp.bfloat16) @ p["u"].astype(jnp.bfloat16)).astype(
        jnp.float32
    ),
    "nested": lambda p, x: jax.lax.scan(
        lambda x, _: (
            jax.lax.cond(
                x[0, 0] > 0, jax.checkpoint(lambda x: jax.jit(jnp.matmul)(x, p["u"])), jnp.sin, x
            ),
            None,
        ),
        x,
        None,
        length=3,
    )[0],
}
ONLY_FORWARD = {
    "while": lambda p, x: jax.lax.while_loop(
        lambda x: (jnp.abs(x @ p["u"])).sum() < 1e3, lambda x: x @ p["u"] + x, x
    ),
    "fori of unknown length": lambda p, x: jax.lax.fori_loop(
        0, jnp.int32(x[0, 0] ** 2) + 2, lambda i, x: jnp.sin(x @ p["u"]), x
    ),
}
EVERY = {**FUNCTIONS, **ONLY_FORWARD}


def same(site, lhs, rhs):
    return lhs, rhs


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def loss(fn):
    return lambda p, x: sum(
        jnp.sum(jnp.cos(y.astype(jnp.float32))) for y in jax.tree.leaves(fn(p, x))
    )


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", EVERY)
def test_a_rule_that_changes_nothing_changes_nothing(name):
    fn = EVERY[name]
    seen = []
    again = rewrite(fn, lambda site, lhs, rhs: (seen.append(site), (lhs, rhs))[1])
    assert_equal(jax.jit(again)(PARAMS, X), jax.jit(fn)(PARAMS, X))
    assert {site.name for site in seen} == {
        site.name for site in sites(fn, PARAMS, X)
    }  # the rule was reached everywhere
    assert_equal(again(PARAMS, X), fn(PARAMS, X))


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_the_originals(name):
    fn = FUNCTIONS[name]
    again = rewrite(fn, same)
    assert_equal(
        jax.jit(jax.grad(loss(again), (0, 1)))(PARAMS, X),
        jax.jit(jax.grad(loss(fn), (0, 1)))(PARAMS, X),
    )
    if name != "custom_vjp":
        tangents = jax.tree.map(jnp.ones_like, (PARAMS, X))
        run = lambda f: jax.jit(lambda *a: jax.jvp(f, *a))((PARAMS, X), tangents)  # noqa: E731
        assert_equal(run(again), run(fn))


@pytest.mark.wide(4)
@pytest.mark.parametrize("name", sorted(set(EVERY) - {"constrained", "ragged"}))
def test_vmap_is_the_originals(name):
    fn, xs = EVERY[name], jnp.stack([X, -X, 2 * X])
    run = lambda f: jax.jit(jax.vmap(f, (None, 0)))(PARAMS, xs)  # noqa: E731
    assert_equal(run(rewrite(fn, same)), run(fn))


OTHERWISE = {
    "ragged",
    "integers",
    "custom_jvp",
    "custom_vjp",
    "gradient inside",
}  # weights enter not only as one operand


@pytest.mark.wide(2)
@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - OTHERWISE))
def test_a_rule_reaches_every_site_with_its_effect(name):
    """Halving one operand everywhere is halving the weights, which only contractions use."""

    def halve(site, lhs, rhs):
        return (
            (lhs, rhs * jnp.asarray(0.5, rhs.dtype))
            if site.operand == "rhs"
            else (lhs * jnp.asarray(0.5, lhs.dtype), rhs)
        )

    halved = jax.tree.map(lambda w: w * 0.5, PARAMS)
    fn, changed = FUNCTIONS[name], rewrite(FUNCTIONS[name], halve)
    assert_equal(jax.jit(changed)(PARAMS, X), jax.jit(fn)(halved, X))
    ours = jax.jit(jax.grad(loss(changed)))(PARAMS, X)
    by_hand = jax.jit(jax.grad(lambda p, x: loss(fn)(jax.tree.map(lambda w: w * 0.5, p), x)))(
        PARAMS, X
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), ours, by_hand)


@pytest.mark.parametrize(("fn", "factor"), [(scaled_gradient, 3.0), (reversed_gradient, -1.0)])
def test_custom_derivative_rules_stay_the_authors(fn, factor):
    scale = jnp.float32(2.0)

    def total(w, scale):
        doubled = rewrite(lambda p, x: fn(x, p["u"]), lambda site, lhs, rhs: (lhs * scale, rhs))
        return doubled({"u": w}, X).sum()

    value, (gradient, of_scale) = jax.value_and_grad(total, (0, 1))(PARAMS["u"], scale)
    np.testing.assert_allclose(value, 2 * (X @ PARAMS["u"]).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, factor * X.T @ jnp.ones((5, 6)), rtol=1e-5)
    assert of_scale == 0  # the author's rule knows no scale


@pytest.mark.slow
def test_what_a_rule_captures_is_differentiated():
    def total(scale, p, x):
        def fn(p, x):
            layer = jax.checkpoint(lambda x, _: (jnp.sin(x @ p["u"]), None))
            return jax.lax.scan(layer, x, None, length=3)[0]

        return rewrite(fn, lambda site, lhs, rhs: (lhs * scale, rhs))(p, x).sum()

    def by_hand(scale, p, x):
        for _ in range(3):
            x = jnp.sin((x * scale) @ p["u"])
        return x.sum()

    for jit in (jax.jit, lambda f: f):
        np.testing.assert_allclose(
            jit(jax.grad(total))(1.5, PARAMS, X), jax.grad(by_hand)(1.5, PARAMS, X), rtol=1e-4
        )


@pytest.mark.slow
def test_what_is_given_is_sliced_by_the_loops_and_differentiated():
    """Every layer of a scan, or device of a shard_map, has its own scale: a loop by hand."""
    scales = jnp.array([0.5, 1.0, 2.0])

    def fn(p, x):
        return (
            jax.lax.scan(
                jax.checkpoint(lambda x, _: (jnp.sin(x @ p["u"]), None)), x, None, length=3
            )[0]
            @ p["w"]
        )

    def ours(scales, p, x):
        given = {"u": {"scale": scales}, "w": {"scale": jnp.float32(3)}}
        return rewrite(fn, lambda site, lhs, rhs, own: (lhs * own["scale"], rhs), given=given)(
            p, x
        ).sum()

    def by_hand(scales, p, x):
        for scale in scales:
            x = jnp.sin((x * scale) @ p["u"])
        return ((3 * x) @ p["w"]).sum()

    for a, b in zip(
        jax.value_and_grad(ours)(scales, PARAMS, X),
        jax.value_and_grad(by_hand)(scales, PARAMS, X),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    with pytest.raises(ShapeError, match=r"'u'.*leading axes \(3,\)"):
        rewrite(fn, lambda *a: a[1:3], given={"u": scales[:2], "w": scales})(PARAMS, X)
    with pytest.raises(NoMatchError, match="nothing is given for site 'w'"):
        rewrite(fn, lambda *a: a[1:3], given={"u": scales})(PARAMS, X)
    mapped = jax.shard_map(
        lambda p, x: x @ p["w"], mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data")
    )
    each, x = jnp.arange(8.0), normal(8, 6)
    scaled = rewrite(mapped, lambda site, lhs, rhs, own: (lhs * own, rhs), given={"w": each})(
        PARAMS, x
    )
    np.testing.assert_allclose(scaled, (x * each[:, None]) @ PARAMS["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_whole_contraction_can_be_replaced():
    def integers(site, lhs, rhs):
        codes = [jnp.round(x * 8).astype(jnp.int8) for x in (lhs, rhs)]
        return site.contract(*codes, preferred_element_type=jnp.int32).astype(jnp.float32) / 64

    def by_hand(p, x):
        return (
            jnp.round(x * 8).astype(jnp.int32) @ jnp.round(p["w"] * 8).astype(jnp.int32)
        ).astype(jnp.float32) / 64

    assert_equal(rewrite(lambda p, x: x @ p["w"], integers)(PARAMS, X), by_hand(PARAMS, X))
    conv = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    params, x = {"k": normal(3, 3, 2, 6)}, normal(2, 8, 8, 4)
    replaced = rewrite(conv, lambda site, lhs, rhs: site.contract(lhs, rhs))
    assert_equal(replaced(params, x), conv(params, x))


def test_a_rule_may_look_at_the_site_and_at_part_of_the_sites():
    fn = FUNCTIONS["matmul"]
    only_w = rewrite(fn, lambda site, lhs, rhs: (lhs, 0 * rhs), where="w")
    assert_equal(only_w(PARAMS, X), jnp.zeros((5, 4)))
    with pytest.raises(NoMatchError, match=r"nothing.*\n.*u\n.*w"):
        rewrite(fn, same, where="nothing/*")(PARAMS, X)


WRONG = {
    "lhs": lambda lhs, rhs: (lhs[:1], rhs),
    "rhs": lambda lhs, rhs: (lhs, rhs[:, :1]),
    "dtype": lambda lhs, rhs: (lhs, rhs.astype(jnp.bfloat16)),
    "result": lambda lhs, rhs: lhs,
    "values": lambda lhs, rhs: (lhs,),
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_names_the_site(answer):
    with pytest.raises(ShapeError, match="site 'w'"):
        rewrite(lambda p, x: x @ p["w"], lambda site, lhs, rhs: answer(lhs, rhs))(PARAMS, X)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_other_shapes_retrace(jit):
    fn = lambda p, x: x @ p["w"] / x.shape[0]  # noqa: E731
    again = jit(rewrite(fn, same))
    for rows in (5, 3, 5, 1):
        assert_equal(again(PARAMS, normal(rows, 6)), jit(fn)(PARAMS, normal(rows, 6)))
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    assert again(half, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_traced_once_for_a_shape():
    traces = []
    again = rewrite(lambda p, x: (traces.append(1), x @ p["w"])[1], same)
    for _ in range(5):
        again(PARAMS, X)
    assert len(traces) == 1


def test_no_tracer_is_kept_from_one_gradient_to_the_next():
    again = rewrite(lambda p, x: jnp.sin(x @ p["w"]), same)
    with jax.checking_leaks():
        first = jax.jit(jax.grad(loss(again)))(PARAMS, X)
    assert_equal(
        jax.grad(loss(again))(PARAMS, X),
        jax.grad(loss(lambda p, x: jnp.sin(x @ p["w"])))(PARAMS, X),
    )
    assert first["w"].shape == (6, 4)


def test_rewrites_compose_and_are_seen_by_sites():
    fn = FUNCTIONS["scan"]
    twice = rewrite(
        rewrite(fn, lambda s, lhs, rhs: (2 * lhs, rhs)), lambda s, lhs, rhs: (lhs, rhs / 2)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), twice(PARAMS, X), fn(PARAMS, X))
    assert [(s.name, s.loops) for s in sites(twice, PARAMS, X)] == [
        (s.name, s.loops) for s in sites(fn, PARAMS, X)
    ]


@pytest.mark.slow
def test_sharded_arguments_and_shard_map():
    x = jax.device_put(normal(8, 6), NamedSharding(MESH, P("data")))
    fn = FUNCTIONS["matmul"]
    out = jax.jit(rewrite(fn, same))(PARAMS, x)
    assert_equal(out, jax.jit(fn)(PARAMS, x))
    assert out.sharding == jax.jit(fn)(PARAMS, x).sharding

    @partial(jax.shard_map, mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"))
    def mapped(p, x):
        return jnp.tanh(x @ p["u"]) * jax.lax.psum(x, "data")

    assert_equal(jax.jit(rewrite(mapped, same))(PARAMS, x), jax.jit(mapped)(PARAMS, x))
    grad = lambda f: jax.jit(jax.grad(loss(f)))(PARAMS, x)  # noqa: E731
    assert_equal(grad(rewrite(mapped, same)), grad(mapped))
    _, seen = observe(mapped, lambda site, lhs, rhs: jnp.abs(lhs).max())(PARAMS, x)
    np.testing.assert_array_equal(seen["u"], np.abs(x).max(1))
