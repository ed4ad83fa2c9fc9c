"""What is observed is what a run by hand sees, stacked where the function loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from compress_jax.core import DataError, NoMatchError
from compress_jax.trace import calibrate, observe
from compress_jax.trace.reducers import absmax


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).normal(size=shape), jnp.float32)


PARAMS = {"u": normal(6, 6), "w": normal(6, 4)}
X = normal(5, 6)


def largest(site, lhs, rhs):
    return jnp.abs(lhs).max()


def by_hand(x):
    return float(jnp.abs(x).max())


def test_values_and_output():
    fn = lambda p, x: jnp.tanh(x @ p["u"]) @ p["w"]  # noqa: E731
    out, seen = jax.jit(observe(fn, largest))(PARAMS, X)
    np.testing.assert_array_equal(out, jax.jit(fn)(PARAMS, X))
    assert float(seen["u"]) == by_hand(X)
    np.testing.assert_allclose(seen["w"], by_hand(jnp.tanh(X @ PARAMS["u"])), rtol=1e-6)
    assert set(observe(fn, largest, where="w")(PARAMS, X)[1]) == {"w"}
    with pytest.raises(NoMatchError, match="nowhere"):
        observe(fn, largest, where="nowhere")(PARAMS, X)


@pytest.mark.parametrize("remat", [jax.checkpoint, lambda f: f])
def test_a_scan_stacks_its_turns(remat):
    def fn(p, x):
        return jax.lax.scan(remat(lambda x, _: (jnp.sin(x @ p["u"]), None)), x, None, length=4)[0]

    _, seen = observe(fn, largest)(PARAMS, X)
    x, expected = X, []
    for _ in range(4):
        expected.append(by_hand(x))
        x = jnp.sin(x @ PARAMS["u"])
    np.testing.assert_allclose(seen["u"], expected, rtol=1e-5)


def test_nested_scans_stack_outermost_first():
    def fn(p, x):
        inner = lambda x, row: (x + row, row @ p["u"])  # noqa: E731
        return jax.lax.scan(lambda x, rows: jax.lax.scan(inner, x, rows), jnp.zeros(6), x)

    x = normal(2, 3, 6)
    _, seen = observe(
        fn, lambda site, lhs, rhs: {"largest": jnp.abs(lhs).max(), "row": lhs, "loops": site.count}
    )(PARAMS, x)
    np.testing.assert_array_equal(seen["u"]["row"], x)
    np.testing.assert_array_equal(seen["u"]["largest"], jnp.abs(x).max(-1))
    assert (seen["u"]["loops"] == 6).all() and seen["u"]["loops"].shape == (2, 3)


def test_a_scan_in_reverse_keeps_the_order_of_its_slices():
    x = normal(3, 6)
    _, seen = observe(
        lambda p, x: jax.lax.scan(lambda c, x: (c, x @ p["w"]), 0, x, reverse=True), largest
    )(PARAMS, x)
    np.testing.assert_array_equal(seen["w"], jnp.abs(x).max(1))


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_branches_not_taken_are_unobserved(taken):
    def fn(p, i, x):
        return jax.lax.switch(
            i, [lambda x: x[:, :4], lambda x: x @ p["w"], lambda x: jnp.sin(x) @ p["u"] @ p["w"]], x
        )

    reduce = lambda site, lhs, rhs: (jnp.abs(lhs).max(), lhs.size)  # noqa: E731
    for i in (taken, jnp.int32(taken)):
        _, seen = jax.jit(observe(fn, reduce))(PARAMS, i, X)
        assert set(seen) == {"w", "u", "w#2"}
        ran = {0: set(), 1: {"w"}, 2: {"u", "w#2"}}[taken]
        for name, (value, size) in seen.items():
            assert (np.isfinite(value), int(size)) == ((True, 30) if name in ran else (False, 0))
    assert taken != 1 or float(seen["w"][0]) == by_hand(X)


def test_a_while_loop_keeps_the_last_turn_or_merges():
    def fn(p, n, x):
        return jax.lax.while_loop(
            lambda c: c[0] < n, lambda c: (c[0] + 1, 2 * jnp.sin(c[1] @ p["u"])), (0, x)
        )[1]

    inputs, x = [], X
    for _ in range(5):
        inputs.append(by_hand(x))
        x = 2 * jnp.sin(x @ PARAMS["u"])
    run = lambda reduce, n: jax.jit(observe(fn, reduce))(PARAMS, n, X)[1]["u"]  # noqa: E731
    np.testing.assert_allclose(run(largest, 5), inputs[-1], rtol=1e-5)
    np.testing.assert_allclose(absmax().finish(run(absmax(), 5))["input"], max(inputs), rtol=1e-5)
    assert np.isnan(run(largest, 0)) and int(run(absmax(), 0)["input"].count) == 0


def test_a_condition_that_contracts_is_observed_too():
    def fn(p, x):
        return jax.lax.while_loop(lambda x: jnp.abs(x @ p["u"]).sum() > 1, lambda x: x / 2, x)

    out, seen = observe(fn, absmax())(PARAMS, X)
    np.testing.assert_array_equal(out, fn(PARAMS, X))
    assert float(absmax().finish(seen["u"])["input"]) == by_hand(X)


def test_under_gradients_statistics_are_values_only():
    fn = observe(
        lambda p, x: jnp.sin(x @ p["w"]).sum(), lambda site, lhs, rhs: jnp.linalg.norm(0 * rhs)
    )  # its gradient is NaN
    (_, seen), gradient = jax.jit(jax.value_and_grad(fn, has_aux=True))(PARAMS, X)
    assert np.isfinite(gradient["w"]).all() and float(seen["w"]) == 0
    through = jax.grad(lambda p, x: fn(p, x)[1]["w"])(PARAMS, X)
    assert not np.asarray(through["w"]).any()


def test_custom_derivatives_and_vmap():
    silu = jax.custom_jvp(lambda x, w: x @ w)
    silu.defjvp(lambda primals, tangents: (silu(*primals), tangents[0] @ primals[1]))
    cube = jax.custom_vjp(lambda x, w: x @ w)
    cube.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, 0 * saved[1]))
    fn = lambda p, x: cube(silu(x, p["u"]), p["w"])  # noqa: E731
    _, seen = observe(fn, largest)(PARAMS, X)
    assert float(seen["u"]) == by_hand(X)
    np.testing.assert_allclose(seen["w"], by_hand(X @ PARAMS["u"]), rtol=1e-6)
    grad = lambda f: jax.jit(jax.grad(lambda p, x: f(p, x).sum(), (0, 1)))(PARAMS, X)  # noqa: E731
    jax.tree.map(
        np.testing.assert_array_equal, grad(lambda p, x: observe(fn, largest)(p, x)[0]), grad(fn)
    )
    xs = jnp.stack([X, 3 * X])
    _, each = jax.vmap(observe(fn, largest), (None, 0))(PARAMS, xs)
    np.testing.assert_array_equal(each["u"], jnp.abs(xs).max((1, 2)))


def test_sharded_batches_give_the_single_device_statistics():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = normal(16, 6)
    fn = lambda p, x: jnp.tanh(x @ p["u"]) @ p["w"]  # noqa: E731
    alone = jax.jit(observe(fn, largest))(PARAMS, x)
    sharded = jax.jit(observe(fn, largest))(
        PARAMS, jax.device_put(x, NamedSharding(mesh, P("data")))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), alone, sharded)
    assert sharded[0].sharding.spec == P("data")


@pytest.mark.slow
def test_calibration_over_batches_is_one_pass_over_all():
    fn = lambda p, x: jnp.tanh(x @ p["u"]) @ p["w"]  # noqa: E731
    batches = [normal(8, 6, seed=seed) for seed in range(5)]
    traces = []
    counted = lambda p, x: (traces.append(1), fn(p, x))[1]  # noqa: E731
    ranges = calibrate(counted, absmax(), PARAMS, iter(batches))
    whole = calibrate(fn, absmax(), PARAMS, [jnp.concatenate(batches)])
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-6), ranges.statistics, whole.statistics
    )
    assert len(traces) == 1  # one trace for all batches
    pairs = calibrate(lambda p, x, y: (x + y) @ p["w"], absmax(), PARAMS, [(X, X)])
    assert float(pairs["w"]["input"]) == by_hand(2 * X)
    with pytest.raises(DataError, match="no batch"):
        calibrate(fn, absmax(), PARAMS, [])
