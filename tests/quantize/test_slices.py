"""Slices at constant indices and joined kernels are solved as each would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.paths import flatten
from compress_jax.prune import n_m, sparsegpt, wanda
from compress_jax.quantize import (
    adaround,
    awq,
    clip,
    correct_bias,
    gptq,
    signround,
    smooth,
    uniform,
)
from compress_jax.trace import calibrate, gram, reducers


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = normal(0, 64, 8) @ normal(1, 8, 8)
W = normal(2, 2, 8, 6)
ALONE = {"0": W[0], "1": W[1]}
STACK = cj.at("w", uniform(bits=3, granularity="channel", axis=(0, -1)))
EACH = uniform(bits=3, granularity="channel")
SOLVERS = {
    "gptq": lambda p, seen, c: gptq(p, seen, c).params,
    "adaround": lambda p, seen, c: adaround(p, seen, c, steps=40).params,
    "signround": lambda p, seen, c: signround(p, seen, c, steps=20).params,
    "clip": lambda p, seen, c: clip(p, seen, c).params,
    "sparsegpt": lambda p, seen, c: sparsegpt(p, seen, 0.5).params,
    "wanda": lambda p, seen, c: wanda(p, seen, 0.5).params,
    "2:4": lambda p, seen, c: sparsegpt(p, seen, None, n_m(2, 4), quantizer=c).params,
}
solvers = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


def alone(p, x):
    return jax.nn.gelu(x @ p["0"]) * jnp.tanh(2 * x @ p["1"])


def fed_apart(p, x):
    """Feed both kernels other data, so that their Gram matrices differ."""
    return (x @ p["0"], (x * x) @ p["1"])


SLICED = {
    "index": lambda w: (w[0], w[1]),
    "negative": lambda w: (w[-2], w[-1]),
    "traced index": lambda w: (
        jax.lax.dynamic_index_in_dim(w, jnp.int32(0), keepdims=False),
        jnp.take(w, 1, 0),
    ),
    "range": lambda w: (w[:1][0], w[1:].reshape(8, 6)),
    "unpacked": lambda w: tuple(w),
}


@pytest.mark.wide(1)
@pytest.mark.parametrize("spelling", SLICED)
def test_every_spelling_of_a_slice_is_solved(spelling):
    fn = lambda p, x: fed_apart(dict(zip("01", SLICED[spelling](p["w"]), strict=True)), x)  # noqa: E731
    solved = gptq({"w": W}, calibrate(fn, gram(), {"w": W}, [X]), STACK)
    expected = gptq(ALONE, calibrate(fed_apart, gram(), ALONE, [X]), EACH).params
    np.testing.assert_array_equal(solved.params["w"], jnp.stack([expected["0"], expected["1"]]))
    assert not solved.skipped and not solved.notes


@pytest.mark.wide(3)
@solvers
def test_slices_come_out_as_each_would_alone(solve):
    fn = lambda p, x: fed_apart({"0": p["w"][0], "1": p["w"][1]}, x)  # noqa: E731
    ours = solve({"w": W}, calibrate(fn, gram(), {"w": W}, [X]), STACK)["w"]
    expected = solve(ALONE, calibrate(fed_apart, gram(), ALONE, [X]), EACH)
    np.testing.assert_allclose(ours, jnp.stack([expected["0"], expected["1"]]), atol=1e-6)


@pytest.mark.slow
def test_a_loop_over_experts_is_solved_expert_by_expert():
    p = {"w": normal(3, 3, 8, 8)}
    loop = lambda p, x: sum(jnp.tanh(x * (i + 1)) @ p["w"][i] for i in range(3))  # noqa: E731
    batched = lambda p, x: jnp.einsum(
        "eti,eio->eto", jnp.stack([jnp.tanh(x * i) for i in (1, 2, 3)]), p["w"]
    )  # noqa: E731
    one, other = (
        gptq(p, calibrate(fn, gram(), p, [X]), STACK).params["w"] for fn in (loop, batched)
    )
    np.testing.assert_allclose(one, other, atol=1e-6)


JOINED = {
    "outputs": (
        lambda p, x: x @ jnp.concatenate([p["0"], p["1"]], -1),
        lambda p, x: (x @ p["0"], x @ p["1"]),
    ),
    "stacked": (
        lambda p, x: jnp.einsum("bi,nio->bno", x, jnp.stack([p["0"], p["1"]])),
        lambda p, x: (x @ p["0"], x @ p["1"]),
    ),
    "transposed": (
        lambda p, x: (jnp.concatenate([p["0"].T, p["1"].T]) @ x.T).T,
        lambda p, x: (x @ p["0"], x @ p["1"]),
    ),
    "experts": (
        lambda p, x: jnp.einsum("nbi,nio->nbo", jnp.stack([x, x * x]), jnp.stack([p["0"], p["1"]])),
        fed_apart,
    ),
    "inputs": (  # each answers for its own inputs
        lambda p, x: jnp.concatenate([x, x * x], -1) @ jnp.concatenate([p["0"], p["1"]]),
        fed_apart,
    ),
    "scanned": (
        lambda p, x: jax.lax.scan(lambda y, w: (y * y, y @ w), x, jnp.stack([p["0"], p["1"]]))[1],
        fed_apart,
    ),
    "padded": (
        lambda p, x: x @ jnp.pad(jnp.concatenate([p["0"], p["1"]], -1), ((0, 0), (1, 2))),
        lambda p, x: (x @ p["0"], x @ p["1"]),
    ),
}


@pytest.mark.wide(3)
@pytest.mark.parametrize("spelling", JOINED)
def test_joined_kernels_are_solved_as_each_would_be_alone(spelling):
    together, apart = JOINED[spelling]
    solved = gptq(ALONE, calibrate(together, gram(), ALONE, [X]), EACH)
    expected = gptq(ALONE, calibrate(apart, gram(), ALONE, [X]), EACH)
    assert not solved.skipped and not solved.notes
    for name in "01":
        np.testing.assert_allclose(solved.params[name], expected.params[name], atol=1e-6)
        assert (solved.params[name] != solved.compression.view(ALONE, solved.state)[name]).any()


@pytest.mark.parametrize(
    "solve", [SOLVERS["sparsegpt"], SOLVERS["wanda"]], ids=["sparsegpt", "wanda"]
)
def test_joined_kernels_are_pruned_as_each_would_be_alone(solve):
    together, apart = JOINED["outputs"]
    ours, expected = (
        solve(ALONE, calibrate(fn, gram(), ALONE, [X]), EACH) for fn in (together, apart)
    )
    assert all(jnp.allclose(ours[name], expected[name], atol=1e-6) for name in "01")


@pytest.mark.slow
def test_every_kernel_of_flax_s_optimized_lstm_is_solved():
    from flax import linen as nn

    model, x = nn.RNN(nn.OptimizedLSTMCell(6)), X[:12].reshape(3, 4, 8)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    c = cj.at("**/kernel", uniform(bits=3, granularity="channel"))
    solved = gptq(variables, calibrate(model.apply, gram(), variables, [x]), c)
    kernels = [path for path in flatten(variables)[0] if path.endswith("kernel")]
    assert len(kernels) == 8 and not set(kernels) & set(solved.skipped)


def used_rows(p, x):
    return (x * p["s"][None])[:, :4] @ p["a"][:4] + p["b"][None]


ROWS = {"s": jnp.ones(6), "a": normal(4, 6, 8), "b": jnp.zeros(8)}
TALL = normal(5, 30, 6) + 1


def test_of_a_kernel_of_which_some_rows_are_used_those_are_solved_and_the_rest_is_listed():
    c = cj.at("a", EACH)
    seen = calibrate(used_rows, gram(), ROWS, [TALL])
    solved = gptq(ROWS, seen, c)
    few = {"a": ROWS["a"][:4]}
    expected = gptq(few, calibrate(lambda p, x: x[:, :4] @ p["a"], gram(), few, [TALL]), EACH)
    scale = np.ravel(solved.state.fixed["0"]["a"]["scale"]) == np.ravel(
        expected.state.fixed["a"]["scale"]
    )
    np.testing.assert_array_equal(solved.params["a"][:4, scale], expected.params["a"][:, scale])
    np.testing.assert_array_equal(
        solved.params["a"][4:], solved.compression.view(ROWS, solved.state)["a"][4:]
    )
    assert (
        "16 of its entries" in solved.skipped["a"]
        and "16 of its entries" in solved.notes["a"]
        and scale.any()
    )


@pytest.mark.wide(1)
@pytest.mark.parametrize("solve", [sparsegpt, wanda])
@pytest.mark.parametrize("groups", [None, n_m(1, 3)])
def test_of_a_kernel_of_which_some_rows_are_used_all_is_pruned_as_much_as_was_asked(solve, groups):
    pruned = solve(
        ROWS,
        calibrate(used_rows, gram(), ROWS, [TALL]),
        None if groups else 0.5,
        groups,
        pattern="a",
    )
    kept = np.asarray(pruned.state.fixed["a"])
    assert (kept.reshape(2, 3, 8).sum(1) <= 1).all() if groups else (~kept).sum() == 24
    np.testing.assert_array_equal(np.asarray(pruned.params["a"]) != 0, kept)


def test_smooth_balances_the_rows_that_are_used_and_the_function_stays():
    p = {**ROWS, "s": jnp.asarray([100.0, 1, 1, 1, 1, 1])}
    result = smooth(used_rows, p, calibrate(used_rows, reducers.absmax("channel"), p, [TALL]), TALL)
    np.testing.assert_allclose(
        used_rows(result.params, TALL), used_rows(p, TALL), rtol=1e-4, atol=1e-4
    )
    assert result.changed == {"a": ("s",)} and float(result.params["s"][0]) < 50
    np.testing.assert_array_equal(result.params["a"][4:], p["a"][4:])
    np.testing.assert_array_equal(result.params["s"][4:], p["s"][4:])


def test_correct_bias_restores_the_means_of_what_the_used_rows_give():
    c = cj.at("a", uniform(bits=2, granularity="channel"))
    view = c.view(ROWS, c.init(ROWS))
    result = correct_bias(
        used_rows, ROWS, view, calibrate(used_rows, reducers.moments(), ROWS, [TALL]), TALL
    )
    means = [used_rows(p, TALL).mean(0) for p in (ROWS, result.params)]
    np.testing.assert_allclose(means[1], means[0], atol=1e-5)
    assert result.changed == {"b": ("a",)}


@pytest.mark.slow
def test_awq_scales_slices_and_keeps_the_function():
    p = {"s": jnp.asarray(np.geomspace(30, 0.1, 8), jnp.float32), "w": W}
    fn = lambda p, x: jnp.tanh(x * p["s"][None] @ p["w"][0]) + x * p["s"][None] @ p["w"][1]  # noqa: E731
    x = normal(6, 64, 8)
    solved = awq(fn, p, calibrate(fn, gram(), p, [x]), STACK, x)
    error = lambda q: float(jnp.abs(fn(q, x) - fn(p, x)).mean())  # noqa: E731
    assert "w" not in solved.skipped and error(solved.params) < error(STACK.view(p, STACK.init(p)))


def test_a_grouped_convolution_s_bias_is_corrected_and_a_joined_one_listed():
    p = {"k": normal(7, 3, 1, 4), "b": jnp.zeros(4), **ALONE, "c": jnp.zeros(12)}
    x = normal(8, 2, 10, 4) + 1

    def fn(p, x):
        names = ("NHC", "HIO", "NHC")
        y = jax.lax.conv_general_dilated(
            x, p["k"], (1,), "VALID", dimension_numbers=names, feature_group_count=4
        )
        both = jnp.concatenate([p["0"], p["1"]], -1)
        return y + p["b"][None, None], jnp.concatenate([x, x], -1) @ both + p["c"][None, None]

    c = cj.at(("k", "0", "1"), uniform(bits=2))
    view = c.view(p, c.init(p))
    result = correct_bias(fn, p, view, calibrate(fn, reducers.moments(), p, [x]), x)
    assert (
        result.changed == {"b": ("k",)}
        and "joined" in result.skipped["0"]
        and "joined" in result.skipped["1"]
    )
    lost = [
        float(jnp.abs((fn(q, x)[0] - fn(p, x)[0]).mean((0, 1))).max())
        for q in (view, result.params)
    ]
    assert lost[1] < 0.5 * lost[0]


def test_activations_of_unreached_experts_and_used_rows_score_channels():
    from compress_jax.prune.importance import Member, activation

    seen = calibrate(used_rows, reducers.moments(), ROWS, [TALL])
    member = Member("a", 0, ROWS["a"], ROWS["a"].shape, jnp.asarray, True)
    score = activation(seen)(member)
    assert score is not None
    np.testing.assert_allclose(score[:4], (TALL[:, :4] ** 2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        score[4:], score[:4].mean(), rtol=1e-5
    )  # never read: as an average one

    def branches(p, x):
        return jax.lax.cond(x.mean() < 1e6, lambda: x @ p["0"], lambda: x @ p["1"])

    scored = activation(calibrate(branches, reducers.moments(), ALONE, [X]))
    assert scored(Member("0", 0, W[0], (8, 6), jnp.asarray, True)) is not None
    assert scored(Member("1", 0, W[1], (8, 6), jnp.asarray, True)) is None
