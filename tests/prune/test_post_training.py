"""SparseGPT and Wanda against independent float64 implementations, and on layers of every kind."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.core import ConfigError, NoMatchError, NonFiniteError
from compress_jax.core.amount import amount_exact
from compress_jax.core.paths import flatten
from compress_jax.layerwise._problem import problems
from compress_jax.models import LeNet300100
from compress_jax.prune import block, magnitude, n_m, sparsegpt, wanda
from compress_jax.quantize import binary, output_error, uniform
from compress_jax.trace import calibrate, gram
from tests.trace.zoo import ZOO

INT4 = uniform(bits=4, granularity="channel")


def layer(k=61, n=16, rows=300, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, k)) @ rng.normal(size=(k, k))
    return {"kernel": jnp.asarray(rng.normal(size=(k, n)), jnp.float32)}, jnp.asarray(
        x, jnp.float32
    )


def fn(p, x):
    return x @ p["kernel"]


def calibrated(params, x):
    return calibrate(fn, gram(), params, [x])


def by_the_paper(w, x, share, n, m, size, scale=None, damping=0.01):
    """Algorithm 1 of the paper in float64, outputs as rows, errors compensated at once."""
    w, x = np.asarray(w, np.float64).T.copy(), np.asarray(x, np.float64)
    h = 2 * x.T @ x / len(x)
    dead = np.diag(h) == 0
    h[dead, dead] = np.diag(h)[~dead].mean()  # nothing is known of them: they count as average ones
    h += damping * np.diag(h).mean() * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    masks = np.ones(w.shape, bool)
    for start in range(0, w.shape[1], size):
        end = min(start + size, w.shape[1])
        errors = np.zeros((len(w), end - start))
        if share is not None:
            scores = w[:, start:end] ** 2 / np.diag(u)[start:end] ** 2
            pruned = amount_exact(share, end * len(w)) - amount_exact(share, start * len(w))
            worst = np.argsort(scores.T.ravel(), kind="stable")[:pruned]
            masks[:, start:end].T[np.unravel_index(worst, scores.T.shape)] = False
        for i in range(start, end):
            if share is None and i % m == 0:
                scores = w[:, i : i + m] ** 2 / np.diag(u)[i : i + m] ** 2
                worst = np.argsort(scores, axis=1, kind="stable")[:, : max(scores.shape[1] - n, 0)]
                np.put_along_axis(masks[:, i : i + m], worst, False, axis=1)
            q = np.where(masks[:, i], w[:, i], 0)
            if scale is not None:
                q = np.clip(np.round(q / scale), -8, 7) * scale
            error = (w[:, i] - q) / u[i, i]
            w[:, i:end] -= np.outer(error, u[i, i:end])
            w[:, i], errors[:, i - start] = q, error
        w[:, end:] -= errors @ u[start:end, end:]
    return w.T, masks.T


CASES = {"60 %": (0.6, None), "2:4": (None, n_m(2, 4)), "1:3": (None, n_m(1, 3))}


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    ("case", "quantizer"),
    [("60 %", None), ("2:4", None), ("1:3", None), ("60 %", INT4), ("2:4", INT4)],
)
@pytest.mark.slow
def test_sparsegpt_is_the_papers_algorithm(case, quantizer):
    (share, groups), (params, x) = CASES[case], layer()
    x = x.at[:, 5].set(0)  # an input that is always zero
    size = 15 if case == "1:3" else 16
    solved = sparsegpt(
        params, calibrated(params, x), share, groups, quantizer=quantizer, block=size
    )
    n, m = (groups.n, groups.m) if groups else (0, 1)
    scale = None
    if quantizer is not None:
        (how,) = quantizer.pointwise(params, quantizer.init(params)).values()
        scale = np.asarray(how.operands[0], np.float64)[0]
    expected, mask = by_the_paper(params["kernel"], x, share, n, m, size, scale)
    ours = np.asarray(solved.params["kernel"])
    masks = solved.state.fixed["0"]["kernel"] if quantizer else solved.state.fixed["kernel"]
    assert (np.asarray(masks) != mask).mean() < 0.01  # scores or ties that float32 orders otherwise
    assert (np.abs(ours - expected) > 1e-3).mean() < 0.03
    moment = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    error = lambda q: np.einsum("kn,kl,ln", q - params["kernel"], moment, q - params["kernel"])  # noqa: E731
    np.testing.assert_allclose(error(ours), error(expected), rtol=0.02)


@pytest.mark.wide(2)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_exactly_as_many_weights_are_pruned_as_asked(share):
    params, x = layer()
    seen = calibrated(params, x)
    solved = sparsegpt(params, seen, share, block=16)
    assert int((~solved.state.fixed["kernel"]).sum()) == amount_exact(share, 61 * 16)
    each = (~wanda(params, seen, share).state.fixed["kernel"]).sum(0)
    assert (each == amount_exact(share, 61)).all()
    if share == 0:
        assert jnp.allclose(solved.params["kernel"], params["kernel"], atol=1e-6)


@pytest.mark.wide(1)
@pytest.mark.parametrize("groups", [None, n_m(2, 4), n_m(1, 3)])
@pytest.mark.slow
def test_wanda_is_a_sort_of_each_output(groups):
    params, x = layer(k=22, n=5)
    scores = np.abs(np.asarray(params["kernel"])) * np.linalg.norm(np.asarray(x), axis=0)[:, None]
    mask = np.ones(scores.shape, bool)
    size, keep = (groups.m, groups.n) if groups else (22, 11)
    for start in range(0, 22, size):
        part = scores[start : start + size]
        worst = np.argsort(part, axis=0)[: max(len(part) - keep, 0)]
        np.put_along_axis(mask[start : start + size], worst, False, axis=0)
    pruned = wanda(params, calibrated(params, x), None if groups else 0.5, groups)
    np.testing.assert_array_equal(pruned.params["kernel"], np.where(mask, params["kernel"], 0))


@pytest.mark.wide(1)
@pytest.mark.parametrize("solve", [wanda, sparsegpt])
@pytest.mark.slow
def test_groups_of_a_convolution_run_along_its_channels(solve):
    rng, shape = np.random.default_rng(0), (3, 3, 6, 5)
    kernel, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (8, 6, 6, shape[2])))

    def conv(p, x):
        return jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    pruned = solve(
        {"kernel": kernel}, calibrate(conv, gram(), {"kernel": kernel}, [x]), None, n_m(2, 4)
    )
    kept = np.asarray(pruned.state.fixed["kernel"])
    for start in range(0, shape[2], 4):
        group = kept[:, :, start : start + 4]
        assert (group.sum(2) == min(2, group.shape[2])).all()
    assert not pruned.notes


@pytest.mark.wide(1)
@pytest.mark.parametrize("solve", [wanda, sparsegpt])
def test_groups_run_along_what_is_summed_and_the_note_says_so(solve):
    rng = np.random.default_rng(0)
    params = {"query": jnp.asarray(rng.normal(size=(8, 2, 3)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(30, 8)), jnp.float32)
    seen = calibrate(lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["query"]), gram(), params, [x])
    pruned = solve(params, seen, None, n_m(2, 4))
    assert (np.asarray(pruned.state.fixed["query"]).reshape(2, 4, 6).sum(1) == 2).all()
    assert (
        "(0,)" in pruned.notes["query"] and not solve(params, seen, None, n_m(2, 4, axis=0)).notes
    )


@pytest.mark.slow
@pytest.mark.parametrize("solve", [sparsegpt, wanda])
def test_layers_under_a_scan_are_solved_as_if_each_stood_alone(solve):
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 16, 16), (64, 16)))

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]

    def one_by_one(p, x):
        return jnp.tanh(jnp.tanh(x @ p["0"]) @ p["1"])

    together, alone = {"layers": w}, {"0": w[0], "1": w[1]}
    stacked = solve(together, calibrate(scanned, gram(), together, [x]), 0.5)
    single = solve(alone, calibrate(one_by_one, gram(), alone, [x]), 0.5)
    for i in range(2):
        np.testing.assert_allclose(stacked.params["layers"][i], single.params[str(i)], atol=1e-4)


MODELS = ("plain/nested_scan", "lenet/linen", "vit/linen", "moe/linen")


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in ZOO if e.name in MODELS], ids=lambda e: e.name)
def test_every_layer_of_a_model_is_pruned_or_listed(entry):
    model, variables, inputs = entry.make()
    rng = np.random.default_rng(0)

    def fresh(x):
        return jnp.asarray(
            rng.normal(size=x.shape) if x.dtype == jnp.float32 else rng.permuted(np.asarray(x)),
            x.dtype,
        )

    seen = calibrate(model, gram(), variables, [jax.tree.map(fresh, inputs) for _ in range(6)])
    kernels = tuple(entry.contracted)
    solved, quick = (solve(variables, seen, 0.5, pattern=kernels) for solve in (sparsegpt, wanda))
    leaves, smallest = flatten(variables)[0], cj.at(kernels, magnitude(0.5))
    tasks, reasons = problems(seen, {path: leaves[path] for path in kernels})
    assert set(solved.skipped) == set(quick.skipped) == set(leaves) - set(tasks)
    assert all(solved.skipped[path] == why for path, why in reasons.items())
    three = [smallest.view(variables, smallest.init(variables)), quick.params, solved.params]
    totals = np.zeros(3)
    for path, task in ((path, task) for path, own in tasks.items() for task in own):
        w, *pruned = (
            task.form.matrices(task.box.take(flatten(tree)[0][path]))
            for tree in (variables, *three)
        )
        totals += [float(output_error(w, each, task.gram).sum()) for each in pruned]
        assert (pruned[2] == 0).mean() >= 0.49
    assert not tasks or totals[2] < 0.9 * totals[0]
    assert exact(solved) and exact(quick)


def exact(pruned):
    """Tell whether the view and the packed form of a result are its params, bit for bit."""
    seen = pruned.compression.view(pruned.params, pruned.state)
    unpacked = cj.unpack(pruned.compression.pack(pruned.params, pruned.state))

    def same(*arrays):
        return len({np.asarray(x).tobytes() for x in arrays}) == 1

    return all(jax.tree.leaves(jax.tree.map(same, pruned.params, seen, unpacked)))


@pytest.mark.slow
def test_the_result_is_exact_and_its_masks_hold():
    params, x = layer()
    solved = sparsegpt(
        {**params, "bias": jnp.ones(16)},
        calibrated(params, x),
        0.5,
        quantizer=cj.at("kernel", INT4),
        block=16,
    )
    assert exact(solved) and "no calibrated site uses it" in solved.skipped["bias"]
    c, other = solved.compression, jax.tree.map(lambda w: w + 1, solved.params)
    state = c.update(other, solved.state, step=3)
    assert (state.fixed["0"]["kernel"] == solved.state.fixed["0"]["kernel"]).all()
    assert (c.view(other, state)["kernel"] == 0).sum() >= 61 * 8
    assert c.init(params).fixed["0"] == state.fixed["0"]
    alone = sparsegpt(params, calibrated(params, x), 0.5, block=16)
    assert exact(alone)


@pytest.mark.slow
def test_wanda_then_gptq_rounds_what_is_kept():
    params, x = layer()
    seen = calibrated(params, x)
    half = wanda(params, seen, 0.5)
    rounded = cj.quantize.gptq(params, seen, cj.chain(half.compression, INT4))
    assert (
        (rounded.params["kernel"] != 0) <= half.state.fixed["kernel"]
    ).all() and not rounded.skipped


@pytest.mark.slow
def test_a_share_for_each_leaf_and_leaves_that_only_the_quantizer_covers():
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.normal(size=(16, 16)), jnp.float32) for name in "abc"}
    x = jnp.asarray(rng.normal(size=(99, 16)), jnp.float32)
    seen = calibrate(lambda p, x: x @ p["a"] @ p["b"], gram(), params, [x])
    solved = sparsegpt(params, seen, {"a": 0.25}, quantizer=INT4)
    assert int((~solved.state.fixed["0"]["a"]).sum()) == 64 and set(solved.skipped) == {"b", "c"}
    assert (solved.params["b"] == cj.quantize.gptq(params, seen, INT4).params["b"]).mean() > 0.98
    assert (solved.params["c"] == INT4.view(params, INT4.init(params))["c"]).all()


@pytest.mark.slow
def test_what_cannot_be_done_is_said():
    params, x = layer()
    solver = partial(sparsegpt, block=16)
    seen = calibrated(params, x)
    with pytest.raises(ConfigError, match="magnitude"):
        solver(params, seen, 0.5, block((4, 4)))
    with pytest.raises(ConfigError, match="'kernel' entry by entry"):
        solver(
            params,
            seen,
            0.5,
            quantizer=INT4._replace(pointwise=lambda params, state: {}, bind=None),
        )  # as k-means
    with pytest.raises(ConfigError, match="no zero for 'kernel'"):
        solver(params, seen, 0.5, quantizer=binary())
    with pytest.raises(NoMatchError, match="nothing"):
        wanda(params, seen, 0.5, pattern="nothing")
    for solve in (solver, wanda):
        with pytest.raises(NonFiniteError, match="'kernel'"):
            solve(params, calibrated(params, x.at[0, 0].set(jnp.nan)), 0.5)
        with pytest.raises(NonFiniteError, match="'kernel'"):
            solve({"kernel": params["kernel"].at[0, 0].set(jnp.nan)}, seen, 0.5)
    singular = solver(params, calibrated(params, 1e3 * x[:3]), 0.5, damping=0.0)
    assert "raised" in singular.notes["kernel"] and np.isfinite(singular.params["kernel"]).all()


@pytest.mark.slow
def test_on_a_network_that_learned_real_digits_every_solver_beats_magnitude(tmp_path):
    data = cj.data.load("digits", data_dir=tmp_path)
    model, (images, labels) = (
        LeNet300100(),
        map(jnp.asarray, (data.train["image"], data.train["label"])),
    )
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    optimizer = optax.sgd(0.1, 0.9)

    def forward(params, x):
        return model.apply({"params": params}, x)

    @jax.jit
    def trained(params):
        def step(carry, chosen):
            params, moments = carry

            def loss(p):
                return optax.softmax_cross_entropy_with_integer_labels(
                    forward(p, images[chosen]), labels[chosen]
                ).mean()

            updates, moments = optimizer.update(jax.grad(loss)(params), moments)
            return (optax.apply_updates(params, updates), moments), None

        batches = jax.random.randint(jax.random.key(1), (300, 64), 0, len(images))
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[0][0]

    params = trained(params)
    name = "dense_1/kernel"
    seen, held_out = (
        calibrate(forward, gram(), params, [x], where=name)
        for x in (images[:512], jnp.asarray(data.validation["image"]))
    )
    kernel, gram_ = (
        flatten(params)[0][name],
        problems(held_out, flatten(params)[0])[0][name][0].gram[0],
    )
    for sparsity, structure in ((0.7, None), (None, n_m(2, 4))):
        smallest = cj.at(name, magnitude(sparsity, structure))
        by_magnitude = smallest.view(params, smallest.init(params))
        ours = [
            solve(params, seen, sparsity, structure, pattern=name).params
            for solve in (sparsegpt, wanda)
        ]
        errors = [
            float(output_error(kernel, flatten(tree)[0][name], gram_))
            for tree in (*ours, by_magnitude)
        ]
        assert errors[0] < 0.8 * errors[1] and errors[1] < 0.95 * errors[2], (sparsity, errors)
