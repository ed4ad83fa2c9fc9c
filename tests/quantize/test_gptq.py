"""GPTQ against an independent float64 implementation, and on layers of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core import NonFiniteError
from compress_jax.core.paths import flatten
from compress_jax.layerwise._problem import problems
from compress_jax.quantize import gptq, output_error, uniform
from compress_jax.trace import calibrate, gram
from tests.trace.zoo import ZOO


def layer(k=32, n=16, rows=200, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, k)) @ rng.normal(size=(k, k))
    return {"kernel": jnp.asarray(rng.normal(size=(k, n)), jnp.float32)}, jnp.asarray(
        x, jnp.float32
    )


def fn(p, x):
    return x @ p["kernel"]


def solve(params, x, c, **options):
    return gptq(params, calibrate(fn, gram(), params, [x]), c, **options)


def by_the_paper(w, x, scale, zero, top, damping=0.01, act_order=False):
    """Algorithm 1 of the paper in float64: inverse Hessian, its Cholesky factor, one input after
    the other."""
    w, x = np.asarray(w, np.float64).copy(), np.asarray(x, np.float64)
    h = 2 * x.T @ x / len(x)
    dead = np.diag(h) == 0
    h[dead, dead] = 0
    h += np.diag(np.where(dead, 1, damping * np.diag(h).mean()))
    order = np.argsort(-np.diag(x.T @ x), kind="stable") if act_order else np.arange(len(w))
    w, h, scale, zero = w[order], h[order][:, order], scale[order], zero[order]
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    q = np.zeros_like(w)
    for i in range(len(w)):
        q[i] = (np.clip(np.round(w[i] / scale[i]) + zero[i], 0, top) - zero[i]) * scale[i]
        w[i:] -= np.outer(u[i, i:], (w[i] - q[i]) / u[i, i])
    out = np.zeros_like(q)
    out[order] = q
    return out


@pytest.mark.wide(1)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "granularity": "channel"},
        {"bits": 3, "granularity": 8},
        {"bits": 4, "symmetric": False},
    ],
)
@pytest.mark.parametrize("k", [32, 200])
@pytest.mark.slow
def test_it_is_the_papers_algorithm(options, act_order, k):
    if k % 8:
        k += -k % 8
    params, x = layer(k=k)
    x = x.at[:, 5].set(0)  # an input that is always zero
    c = uniform(**options)
    solved = solve(params, x, c, act_order=act_order, block=16)
    (how,) = c.pointwise(params, solved.state).values()
    scale, zero = (np.asarray(each, np.float64) for each in how.operands)
    expected = by_the_paper(
        params["kernel"], x, scale, zero, 2 ** options["bits"] - 1, act_order=act_order
    )
    ours = np.asarray(solved.params["kernel"])
    wrong = (
        np.abs(ours - expected) > 1e-4 * scale
    )  # a tie that float32 decides otherwise changes what comes after it
    assert wrong.mean() < 0.02
    moment = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    error = lambda q: np.einsum("kn,kl,ln", q - params["kernel"], moment, q - params["kernel"])  # noqa: E731
    np.testing.assert_allclose(error(ours), error(expected), rtol=0.02)


@pytest.mark.wide(1)
@pytest.mark.parametrize("block", [1, 7, 16, 128])
def test_the_block_size_is_only_a_matter_of_speed(block):
    params, x = layer()
    c = uniform(bits=4, granularity="channel")
    one, other = (solve(params, x, c, block=b).params["kernel"] for b in (32, block))
    assert (np.abs(one - other) > 1e-4).mean() < 0.02


@pytest.mark.slow
def test_large_layers_are_solved_in_halves(monkeypatch):

    params, x = layer(k=96)
    c = uniform(bits=4, granularity="channel")
    whole = solve(params, x, c, block=8).params["kernel"]
    monkeypatch.setattr("compress_jax.layerwise._error_feedback.TILE", 16)
    jax.clear_caches()
    assert (np.abs(solve(params, x, c, block=8).params["kernel"] - whole) > 1e-4).mean() < 0.02


CHAIN = cj.chain(cj.prune.magnitude(0.5), uniform(bits=4, granularity="channel"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "c",
    [uniform(bits=2, granularity="channel"), uniform(bits=4, granularity=8, scale="mse"), CHAIN],
)
def test_the_view_of_what_is_solved_is_exact_and_its_error_lower(c):
    params, x = layer()
    solved = solve(params, x, c)
    seen = c.view(solved.params, solved.state)["kernel"]
    assert np.asarray(seen).tobytes() == np.asarray(solved.params["kernel"]).tobytes()
    packed = cj.unpack(c.pack(solved.params, solved.state))["kernel"]
    assert np.asarray(packed).tobytes() == np.asarray(seen).tobytes()
    nearest = c.view(params, solved.state)["kernel"]
    moment = x.T @ x / len(x)
    assert output_error(params["kernel"], seen, moment) < 0.95 * output_error(
        params["kernel"], nearest, moment
    )


def test_pruned_weights_stay_pruned():
    params, x = layer()
    solved = solve(params, x, CHAIN)
    mask = np.asarray(solved.state.fixed["0"]["kernel"])
    assert not np.asarray(solved.params["kernel"])[~mask].any() and mask.mean() == 0.5


MODELS = (
    "mlp/nnx",
    "lenet/linen",
    "vit/linen",
    "llama/nnx",
    "moe/linen",
    "mobilenet/nnx",
    "recurrent/linen",
    "plain/nested_scan",
)


def fresh(inputs, seed):
    rng = np.random.default_rng(seed)

    def like(x):
        return jnp.asarray(
            rng.normal(size=x.shape) if x.dtype == jnp.float32 else rng.permuted(np.asarray(x)),
            x.dtype,
        )

    return jax.tree.map(like, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in ZOO if e.name in MODELS], ids=lambda e: e.name)
def test_every_layer_of_a_model_is_solved_or_listed(entry):
    model, variables, inputs = entry.make()
    leaves = flatten(variables)[0]
    kernels = tuple(entry.contracted)
    c = cj.at(kernels, uniform(bits=4, granularity="channel"))
    seen = calibrate(model, gram(), variables, [fresh(inputs, seed) for seed in range(12)])
    solved = gptq(variables, seen, c)
    assert set(solved.skipped) | set(kernels) == set(leaves)
    tasks, reasons = problems(seen, {path: leaves[path] for path in kernels})
    assert set(reasons) == set(solved.skipped) & set(kernels)
    nearest, new = (
        flatten(tree)[0]
        for tree in (solved.compression.view(variables, solved.state), solved.params)
    )
    totals = np.zeros(2)
    for path, task in ((path, task) for path, own in tasks.items() for task in own):
        w, rounded, ours = (
            task.form.matrices(task.box.take(each[path])) for each in (leaves, nearest, new)
        )
        errors = [output_error(w, each, task.gram) for each in (rounded, ours)]
        assert (errors[1] <= errors[0] * (1 + 1e-6)).all(), path
        totals += [float(each.sum()) for each in errors]
    assert not tasks or totals[1] < totals[0]
    assert all((new[path] == nearest[path]).all() for path in reasons)


def test_what_cannot_be_solved_is_said():
    params, x = layer()
    seen = calibrate(fn, gram(), params, [x])
    both = {**params, "other": params["kernel"]}
    solved = gptq(both, seen, uniform(bits=4))
    assert solved.skipped == {"other": "no calibrated site uses it"}
    with pytest.raises(NonFiniteError, match="'kernel'"):
        gptq(params, calibrate(fn, gram(), params, [x.at[0, 0].set(jnp.nan)]), uniform(bits=4))


def test_a_damping_that_had_to_be_raised_is_noted():
    params, x = layer(rows=3)  # three rows for 32 inputs: singular
    solved = solve(params, 1e3 * x, uniform(bits=4), damping=0.0)
    assert "raised" in solved.notes["kernel"] and np.isfinite(solved.params["kernel"]).all()
