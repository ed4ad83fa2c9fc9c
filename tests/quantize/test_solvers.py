"""The layer-wise solvers on real data, against independent float64 implementations, and their
promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from sklearn.datasets import load_digits

import compress_jax as cj
from compress_jax.core import NonFiniteError, StateError
from compress_jax.layerwise._clip import clip
from compress_jax.layerwise._gptq import gptq
from compress_jax.layerwise._problem import problems
from compress_jax.layerwise._solve import neighboring_levels
from compress_jax.quantize import output_error, uniform
from compress_jax.quantize._rewrites.awq import awq
from compress_jax.quantize._scales.hqq import hqq
from compress_jax.quantize._solvers.adaround import adaround
from compress_jax.quantize._solvers.signround import signround
from compress_jax.trace import calibrate, gram, reducers


def fn(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"][None]) @ p["down"]


@pytest.fixture(scope="module")
def digits():
    """Return a network of random features and a ridge regression on the digits, its data, and its
    calibration."""
    images, labels = load_digits(return_X_y=True)
    x, rng = images / 16, np.random.default_rng(0)
    up = rng.normal(size=(64, 32)) / 4
    hidden = np.maximum(x @ up, 0)
    down = np.linalg.solve(hidden.T @ hidden + np.eye(32), hidden.T @ np.eye(10)[labels])
    params = {"up": up, "bias": np.zeros(32), "down": down}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    x = jnp.asarray(x, jnp.float32)
    return params, x, calibrate(fn, gram(), params, [x[:800], x[800:]])


KERNELS = ("up", "down")
C3 = cj.at(KERNELS, uniform(bits=3, granularity="channel"))
CHAIN = cj.at(KERNELS, cj.chain(cj.prune.magnitude(0.3), uniform(bits=3, granularity=16)))
SOLVERS = {
    "gptq": (lambda p, seen, c: gptq(p, seen, c), 0.8),
    "adaround": (lambda p, seen, c: adaround(p, seen, c, steps=600), 0.8),
    "signround": (lambda p, seen, c: signround(p, seen, c), 0.8),
    "clip": (lambda p, seen, c: clip(p, seen, c), 0.95),
}


def errors(params, new, seen):
    tasks, _ = problems(seen, params)
    return {
        path: float(output_error(params[path], new[path], tasks[path][0].gram[0]))
        for path in KERNELS
    }


# Their own tests and tests/layerwise/test_result.py run the others by default.
QUICK = {"gptq", "signround"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in SOLVERS],
)
@pytest.mark.parametrize(
    "c", [C3, pytest.param(CHAIN, marks=pytest.mark.slow)], ids=["3 bits", "pruned"]
)
def test_a_solver_beats_rounding_to_nearest_on_real_data_and_is_exact(digits, name, c):
    params, _, seen = digits
    solve, share = SOLVERS[name]
    solved = solve(params, seen, c)
    view = c.view(solved.params, solved.state)
    assert all((view[path] == solved.params[path]).all() for path in params)
    assert all(
        (cj.unpack(c.pack(solved.params, solved.state))[path] == view[path]).all()
        for path in params
    )
    nearest, ours = (
        errors(params, new, seen) for new in (c.view(params, c.init(params)), solved.params)
    )
    assert all(ours[path] <= share * nearest[path] for path in KERNELS), (nearest, ours)
    assert (solved.params["bias"] == params["bias"]).all()


@pytest.mark.slow
def test_awq_beats_rounding_to_nearest_on_the_outputs_of_the_network(digits):
    params, x, seen = digits
    solved = awq(fn, params, seen, C3, x[:2])
    assert (C3.view(solved.params, solved.state)["down"] == solved.params["down"]).all()
    assert (
        solved.notes["up"].startswith("not scaled: nothing before it can make up")
        and "bias" in solved.notes["down"]
    )
    exact, nearest = fn(params, x), fn(C3.view(params, C3.init(params)), x)
    distance = lambda y: float(((y - exact) ** 2).mean())  # noqa: E731
    assert distance(fn(solved.params, x)) < 0.8 * distance(nearest)


def awq_by_the_paper(w, x, bits, points):
    """Scale search in float64 for one kernel whose inputs a diagonal makes: the scale that wins,
    by the output error."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)

    def rounded(v):
        s = np.abs(v).max(0) / (2 ** (bits - 1) - 1)
        return np.clip(np.round(v / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s

    size, weight = np.sqrt((x**2).mean(0)), (np.abs(w) / np.abs(w).max(0)).mean(1)
    best = np.ones(len(w)), ((x @ (rounded(w) - w)) ** 2).sum()
    for r in np.arange(points) / points:
        s = size**r / (weight ** (1 - r) + 1e-4)
        s /= np.sqrt(s.max() * s.min())
        error = ((x @ (rounded(w * s[:, None]) / s[:, None] - w)) ** 2).sum()
        best = min(best, (s, error), key=lambda pair: pair[1])
    return rounded(w * best[0][:, None]), best[0]


@pytest.mark.slow
def test_awq_is_the_float64_search():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 12)) * np.exp(rng.normal(size=12))
    params = {"scale": jnp.ones(12), "kernel": jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)}
    run = lambda p, x: (x * p["scale"][None]) @ p["kernel"]  # noqa: E731
    x = jnp.asarray(x, jnp.float32)
    c = cj.at("kernel", uniform(bits=4, granularity="channel"))
    solved = awq(run, params, calibrate(run, gram(), params, [x]), c, x, clipped=False)
    kernel, scale = awq_by_the_paper(params["kernel"], x, 4, 20)
    np.testing.assert_allclose(1 / solved.params["scale"], scale, rtol=1e-4)
    np.testing.assert_allclose(solved.params["kernel"], kernel, rtol=1e-4, atol=1e-5)


def adaround_by_the_paper(w, moment, steps, rate=0.01):
    """AdaRound in float64 on integers (scale 1), with Adam and the gradient written out."""
    low = np.floor(w)
    v = np.log((w - low + 0.1) / (1.1 - (w - low)))
    m, s = np.zeros_like(v), np.zeros_like(v)
    near = np.round(w) - w
    unit = np.einsum("kn,kl,ln", near, moment, near) / w.size
    start = 0.2 * steps
    for t in range(steps):
        sig = expit(v)
        h = np.clip(1.2 * sig - 0.1, 0, 1)
        inner = (1.2 * sig - 0.1 > 0) & (1.2 * sig - 0.1 < 1)
        slope = 2 * moment @ (low + h - w) / unit
        if t >= start:
            power = 2 + 18 * (1 - (t - start) / (steps - start))
            even = 2 * h - 1
            slope = slope - 2 * power * np.sign(even) * np.abs(even) ** (power - 1)
        g = slope * inner * 1.2 * sig * (1 - sig)
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        v = v - rate * (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(s / (1 - 0.999 ** (t + 1))) + 1e-8)
    up = low + (expit(v) * 1.2 - 0.1 >= 0.5)
    cost = [np.einsum("kn,kl,ln->n", q - w, moment, q - w) for q in (np.round(w), up)]
    return np.where(cost[1] < cost[0], up, np.round(w)), cost


def test_adaround_is_the_float64_descent():
    rng = np.random.default_rng(2)
    w, x = rng.uniform(-3, 3, size=(10, 6)), rng.normal(size=(50, 10)) @ rng.normal(size=(10, 10))
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    seen = calibrate(lambda p, x: x @ p["kernel"], gram(), params, [jnp.asarray(x, jnp.float32)])
    c = uniform(bits=3, scale=lambda w, layout, grid: (jnp.ones(layout.scale_shape), grid.middle))
    ours = np.asarray(adaround(params, seen, c, steps=300).params["kernel"])
    expected, cost = adaround_by_the_paper(w, x.T @ x / 50, 300)
    assert (ours != expected).mean() < 0.04 and cost[1].sum() < cost[0].sum()


def hqq_by_numpy(w, bits, steps=20, p=0.7, beta=10.0):
    """Half-quadratic splitting in float64, one channel a column, zero points whole numbers."""
    top = 2**bits - 1
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    unit = s = (high - low) / top
    z = np.clip(np.round(-low / s), 0, top)
    levels = lambda s, z: np.clip(np.round(w / s), -z, top - z)  # noqa: E731
    loss = lambda s, z: (np.abs(w - s * levels(s, z)) / unit) ** p  # noqa: E731
    best = s, z, loss(s, z).sum(0)
    for i in range(steps):
        q = levels(s, z)
        left = (w - s * q) / unit
        size = np.maximum(np.abs(left), 1e-12)
        target = w - unit * np.sign(left) * np.maximum(size - size ** (p - 1) / (beta * 1.01**i), 0)
        z = np.clip(np.round((q + z - target / s).mean(0)), 0, top)
        q = levels(s, z)
        s = np.abs((target * q).sum(0) / (q * q).sum(0))
        now = loss(s, z).sum(0)
        best = tuple(np.where(now < best[2], a, b) for a, b in zip((s, z, now), best, strict=True))
    return best


@pytest.mark.wide(1)
@pytest.mark.parametrize("bits", [2, 4])
def test_hqq_is_the_float64_splitting(bits):
    w = np.random.default_rng(3).laplace(size=(40, 6)).astype(np.float32)
    c = uniform(bits, symmetric=False, granularity="channel", scale=hqq)
    state = c.init({"w": jnp.asarray(w)}).fixed["w"]
    scale, zero, least = hqq_by_numpy(w.astype(np.float64), bits)
    seen = np.asarray(c.view({"w": jnp.asarray(w)}, c.init({"w": jnp.asarray(w)}))["w"], np.float64)
    start = (np.maximum(w.max(0), 0) - np.minimum(w.min(0), 0)) / (2**bits - 1)
    ours = ((np.abs(w - seen) / start) ** 0.7).sum(0)
    np.testing.assert_allclose(
        ours, least, rtol=0.02
    )  # a tie that float32 rounds otherwise leads elsewhere
    close = np.isclose(np.ravel(state["scale"]), scale, rtol=1e-3) & (
        np.ravel(state["zero_point"]) == zero
    )
    assert close.mean() >= 0.8


@pytest.mark.wide(1)
@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_lowers_its_norm_also_in_groups_that_are_not_full(symmetric):
    w = jnp.asarray(np.random.default_rng(4).laplace(size=(50, 4)), jnp.float32)
    options = {"bits": 3, "symmetric": symmetric, "granularity": 16, "pad": True}
    views = [c.view(w, c.init(w)) for c in (uniform(**options), uniform(**options, scale=hqq))]
    norms = [float((jnp.abs(view - w) ** 0.7).sum()) for view in views]
    assert norms[1] < 0.97 * norms[0]


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    "c",
    [
        uniform(bits=3),
        uniform(bits=4, symmetric=False, granularity=8),
        cj.quantize.nf4(8),
        cj.quantize.fp8(),
    ],
)
def test_neighboring_levels_are_the_two_levels_around_a_weight(c):
    w = jnp.asarray(np.random.default_rng(5).normal(size=(16, 4)), jnp.float32)
    (how,) = c.pointwise({"w": w}, c.init({"w": w})).values()
    low, high = (np.asarray(each) for each in neighboring_levels(w, how.fn, how.operands))
    small = jnp.geomspace(1e-5, 6, 2000)
    fine = jnp.concatenate([-small, small, jnp.zeros(1)])[None, None]
    operands = [jnp.broadcast_to(x[..., None], (16, 4, 4001)) for x in how.operands]
    every = np.asarray(how.fn(jnp.broadcast_to(fine, (16, 4, 4001)), *operands))
    for i in np.ndindex(16, 4):  # all levels of an entry, by brute force
        below, above = every[i][every[i] <= w[i]], every[i][every[i] >= w[i]]
        assert low[i] == (below.max() if len(below) else every[i].min())
        assert high[i] == (above.min() if len(above) else every[i].max())


@pytest.mark.parametrize("solve", [SOLVERS["signround"][0], SOLVERS["adaround"][0]])
def test_bad_calibration_is_refused_and_missing_one_listed(digits, solve):
    params, x, seen = digits
    with pytest.raises(NonFiniteError, match="'(up|down)'"):
        solve(params, calibrate(fn, gram(), params, [x[:8].at[0, 0].set(jnp.nan)]), C3)
    partial = calibrate(fn, gram(), params, [x], where="down")
    solved = solve(params, partial, C3)
    assert solved.skipped["up"] == "no calibrated site uses it"
    assert (solved.params["up"] == C3.view(params, solved.state)["up"]).all()


def test_statistics_of_another_kind_are_refused(digits):
    params, x, grams = digits
    means, c = calibrate(fn, reducers.moments(), params, [x[:8]]), uniform(4)
    for solve in (gptq, signround, adaround, clip):
        with pytest.raises(StateError, match=r"site 'up' are Moments.*trace.gram\(\)"):
            solve(params, means, c)
    with pytest.raises(StateError, match="calibration is a dict"):
        gptq(params, dict(grams), c)
    with pytest.raises(StateError, match=r"are Gram.*absmax"):
        cj.quantize.smooth(fn, params, grams, x[:8])
    with pytest.raises(StateError, match=r"are Gram, and Moments is needed"):
        cj.quantize.correct_bias(fn, params, params, grams, x[:8])
