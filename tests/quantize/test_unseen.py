"""No evidence is not taken for no importance, and no solver is worse than plain rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.amount import amount_exact
from compress_jax.layerwise._problem import problems
from compress_jax.prune import n_m, sparsegpt, wanda
from compress_jax.quantize import adaround, awq, clip, gptq, output_error, signround, uniform
from compress_jax.trace import calibrate, gram

C3 = uniform(bits=3, granularity="channel")
ROUNDERS = {
    "gptq": gptq,
    "act_order": lambda *args, **options: gptq(*args, act_order=True, **options),
    "adaround": lambda *args, **options: adaround(*args, steps=60, **options),
    "signround": lambda *args, **options: signround(*args, steps=20, **options),
}
PRUNERS = {"sparsegpt": sparsegpt, "wanda": wanda}
rounders = pytest.mark.parametrize("solve", ROUNDERS.values(), ids=ROUNDERS)
pruners = pytest.mark.parametrize("solve", PRUNERS.values(), ids=PRUNERS)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def experts(p, x):
    """Feed expert e the rows x[e]."""
    return jnp.einsum("eti,eio->eto", x, p["w"])


W = {"w": normal(0, 4, 8, 6)}
X = normal(1, 4, 32, 8) @ normal(2, 8, 8)
X = X.at[3].set(0).at[1, :, 2].set(0)  # nothing reaches expert 3, nor input 2 of expert 1
SEEN = calibrate(experts, gram(), W, [X])
STACKED = cj.at("w", uniform(bits=3, granularity="channel", axis=(0, -1)))


@pytest.mark.wide(1)
@rounders
@pytest.mark.slow
def test_an_expert_that_was_never_reached_is_rounded_to_nearest_and_so_are_dead_inputs(solve):
    solved = solve(W, SEEN, STACKED)
    nearest = solved.compression.view(W, solved.state)["w"]
    np.testing.assert_array_equal(solved.params["w"][3], nearest[3])
    np.testing.assert_array_equal(solved.params["w"][1, 2], nearest[1, 2])
    assert "never reached w[3]" in solved.notes["w"] and "1 of 8 of w[1]" in solved.notes["w"]
    assert (solved.params["w"][0] != nearest[0]).any()


def test_clipping_leaves_what_was_never_reached_and_counts_dead_inputs():
    solved, plain = clip(W, SEEN, STACKED), STACKED.init(W)
    scale = lambda state: np.ravel(state.fixed["0"]["w"]["scale"]).reshape(4, 6)  # noqa: E731
    np.testing.assert_array_equal(scale(solved.state)[3], scale(plain)[3])
    assert "w[3]" in solved.notes["w"]
    big = {
        "w": W["w"].at[1, 2].set(9.0)
    }  # only a dead input has large weights: they are not cut off as if they were none
    assert (clip(big, SEEN, STACKED).params["w"][1, 2] > 4).all()


@pytest.mark.wide(1)
@pruners
@pytest.mark.parametrize("groups", [None, n_m(2, 4)])
def test_what_was_never_reached_is_pruned_by_magnitude_as_much_as_was_asked(solve, groups):
    pruned = solve(W, SEEN, None if groups else 0.4, groups)
    mask, new = np.asarray(pruned.state.fixed["w"]), np.asarray(pruned.params["w"])
    size = np.abs(np.asarray(W["w"][3]))
    if groups:
        lowest = np.sort(size.reshape(2, 4, 6), 1)[:, 2:3].repeat(4, 1).reshape(8, 6)
        assert (mask.reshape(4, 2, 4, 6).sum(2) == 2).all()
    elif solve is wanda:
        lowest = np.sort(size, 0)[amount_exact(0.4, 8)][None]
        assert (mask.sum(1) == 8 - amount_exact(0.4, 8)).all()
    else:
        lowest = np.sort(size, None)[amount_exact(0.4, 48)]
        assert ((~mask).sum((1, 2)) == amount_exact(0.4, 48)).all()
    np.testing.assert_array_equal(new[3], np.where(size >= lowest, W["w"][3], 0))
    assert "never reached w[3]" in pruned.notes["w"] and "1 of 8 of w[1]" in pruned.notes["w"]
    assert 0 < mask[1, 2].sum()  # nor are the weights of a dead input all gone


def test_nothing_is_pruned_at_sparsity_0_and_with_a_quantizer_it_is_rounded():
    np.testing.assert_allclose(sparsegpt(W, SEEN, 0.0).params["w"], W["w"], atol=1e-5)
    both = sparsegpt(W, SEEN, 0.25, quantizer=STACKED)
    kept = both.state.fixed["0"]["w"][3]
    np.testing.assert_array_equal(
        both.params["w"][3], jnp.where(kept, STACKED.view(W, STACKED.init(W))["w"][3], 0)
    )


@pytest.mark.slow
@rounders
def test_a_branch_that_never_ran_and_rows_of_a_table_that_no_token_hit(solve):
    p = {"yes": normal(3, 8, 4), "no": normal(4, 8, 4), "table": normal(5, 12, 8)}

    def fn(p, tokens):
        x = jax.nn.one_hot(tokens, 12) @ p["table"]
        return jax.lax.cond(x.mean() < 1e6, lambda: x @ p["yes"], lambda: x @ p["no"])

    tokens = jnp.arange(40) % 7
    solved = solve(p, calibrate(fn, gram(), p, [tokens]), C3)
    nearest = solved.compression.view(p, solved.state)
    np.testing.assert_array_equal(solved.params["no"], nearest["no"])
    np.testing.assert_array_equal(solved.params["table"][7:], nearest["table"][7:])
    assert "never reached no" in solved.notes["no"] and "5 of 12" in solved.notes["table"]
    assert (solved.params["yes"] != nearest["yes"]).any() or solve is ROUNDERS[
        "adaround"
    ]  # few steps


def spread(x):
    return x * jnp.asarray(10.0 ** np.linspace(-16, 16, 8), jnp.float32)[None]


HARD = {
    "one row": normal(6, 1, 8),
    "rank 2": normal(7, 64, 2) @ normal(8, 2, 8),
    "duplicates": normal(9, 64, 4)[:, jnp.array([0, 0, 1, 1, 2, 2, 3, 3])],
    "nearly dead": normal(10, 64, 8).at[:, 3].mul(1e-18).at[:, 4].mul(1e-30),
    "huge range": spread(normal(11, 64, 8)),
    "tiny": 1e-19 * normal(12, 64, 8),
    "dead": jnp.zeros((64, 8)),
    "one input": jnp.zeros((64, 8)).at[:, 5].set(1.0),
}


@pytest.fixture(scope="module")
def hard():
    p = {"w": normal(13, 8, 5)}
    seen = {name: calibrate(lambda p, x: x @ p["w"], gram(), p, [x]) for name, x in HARD.items()}
    return p, seen


def error(p, new, x):
    x = np.asarray(x, np.float64)
    return (
        ((x @ (np.asarray(new["w"], np.float64) - np.asarray(p["w"], np.float64))) ** 2).mean(0)
    ).sum()


@pytest.mark.wide(2)
@rounders
@pytest.mark.parametrize("case", HARD)
def test_no_input_makes_a_solver_worse_than_rounding_to_nearest(hard, solve, case):
    p, seen = hard
    solved = solve(p, seen[case], C3)
    nearest = solved.compression.view(p, solved.state)
    assert np.isfinite(solved.params["w"]).all()
    assert error(p, solved.params, HARD[case]) <= error(p, nearest, HARD[case]) * (1 + 1e-4)
    if case == "dead":
        np.testing.assert_array_equal(solved.params["w"], nearest["w"])


@pytest.mark.wide(2)
@pruners
@pytest.mark.parametrize("case", HARD)
def test_no_input_makes_sparsegpt_worse_than_magnitude_or_less_sparse(hard, solve, case):
    p, seen = hard
    pruned = solve(p, seen[case], 0.5)
    assert np.isfinite(pruned.params["w"]).all() and int((~pruned.state.fixed["w"]).sum()) == 20
    smallest = cj.prune.magnitude(0.5).view(p, cj.prune.magnitude(0.5).init(p))
    if solve is sparsegpt and case not in (
        "nearly dead",
        "one input",
    ):  # there some inputs count as average ones
        assert error(p, pruned.params, HARD[case]) <= error(p, smallest, HARD[case]) * (1 + 1e-4)


@pytest.mark.wide(2)
@rounders
def test_held_out_data_decide_between_the_solution_and_rounding_to_nearest(solve):
    """Two rows say nothing of 16 inputs: on other data rounding to nearest is better, and then it
    is kept."""
    p, x = {"w": normal(14, 16, 8)}, normal(15, 512, 16)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    few, many = (calibrate(fn, gram(), p, [rows]) for rows in (x[:2], x))
    misled, judged, well = (
        solve(p, few, C3),
        solve(p, few, C3, held_out=many),
        solve(p, many, C3, held_out=many),
    )
    nearest = misled.compression.view(p, misled.state)
    errors = [error(p, each, x) for each in (misled.params, judged.params, well.params, nearest)]
    assert errors[0] > errors[3] and errors[1] == errors[3] >= errors[2], errors
    assert "solved no better" in judged.notes["w"] and "w" not in well.notes
    np.testing.assert_array_equal(judged.params["w"], nearest["w"])


@pytest.mark.slow
def test_each_layer_of_a_stack_is_judged_by_itself():
    """Layer 0 is calibrated well, layer 1 by two rows: only layer 1 keeps rounding to nearest."""
    p, x = {"w": normal(16, 2, 16, 8)}, normal(17, 2, 512, 16)
    few = x.at[1, 2:].set(0)
    fn = lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"])  # noqa: E731
    c = cj.at("w", uniform(bits=3, granularity="channel", axis=(0, -1)))
    solved = gptq(p, calibrate(fn, gram(), p, [few]), c, held_out=calibrate(fn, gram(), p, [x]))
    nearest = solved.compression.view(p, solved.state)["w"]
    assert (solved.params["w"][0] != nearest[0]).any() and (
        solved.params["w"][1] == nearest[1]
    ).all()
    assert "w[1]" in solved.notes["w"] and "w[0]" not in solved.notes["w"]


def test_held_out_data_that_never_reach_an_expert_leave_its_solution():
    solved = gptq(W, SEEN, STACKED, held_out=calibrate(experts, gram(), W, [X.at[0].set(0)]))
    assert (solved.params["w"][0] == gptq(W, SEEN, STACKED).params["w"][0]).all()


@pytest.mark.slow
def test_sparsegpt_and_wanda_are_judged_by_held_out_data():
    p, x = {"w": normal(18, 16, 8)}, normal(19, 512, 16)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    few, many = (calibrate(fn, gram(), p, [rows]) for rows in (x[:2], x))
    smallest = cj.prune.magnitude(0.5).view(p, cj.prune.magnitude(0.5).init(p))
    for solve in PRUNERS.values():
        judged = solve(p, few, 0.5, held_out=many)
        assert (
            error(p, judged.params, x) <= 1.3 * error(p, smallest, x)
            and "solved no better" in judged.notes["w"]
        )
    assert error(p, sparsegpt(p, few, 0.5).params, x) > error(p, smallest, x)


@pytest.mark.slow
def test_awq_does_not_let_an_unreached_expert_decide():
    p = {"scale": jnp.ones(8), **W}
    fn = lambda p, x: experts(p, x * p["scale"][None, None])  # noqa: E731
    solved = awq(fn, p, calibrate(fn, gram(), p, [X]), STACKED, X, clipped=False)
    assert "never reached w[3]" in solved.notes["w"] and np.isfinite(solved.params["w"]).all()
    np.testing.assert_array_equal(
        solved.compression.view(solved.params, solved.state)["w"], solved.params["w"]
    )
    task = problems(SEEN, W)[0]["w"][0]
    before = [
        output_error(W["w"], each, task.filled).sum()
        for each in (STACKED.view(W, STACKED.init(W))["w"],)
    ]
    after = output_error(
        W["w"], solved.params["w"] * solved.params["scale"][None, :, None], task.filled
    ).sum()
    assert float(after) <= float(before[0]) * (1 + 1e-5)


@pytest.mark.slow
def test_a_channel_that_calibration_never_saw_is_not_clipped_to_nothing():
    p = {"w": jnp.eye(4)}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    quantized = cj.quantize.activations(fn, cj.quantize.static(granularity="channel"))
    ranges = quantized.init(p, [normal(20, 30, 4).at[:, 2].set(0)])
    out = quantized.apply(p, ranges, jnp.full((1, 4), 1.5))
    assert abs(float(out[0, 2]) - 1.5) < 0.02
