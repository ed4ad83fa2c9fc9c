"""What `solve` chooses for each leaf, what it measures, and how a stopped run goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import ArgumentError, CheckpointError, NonFiniteError
from compress_jax.core.paths import flatten
from compress_jax.layerwise._candidates import compensated, judged, relative_error
from compress_jax.layerwise._problem import Problem, problems
from compress_jax.layerwise._programs import Programs
from compress_jax.layerwise._restrict import Restricted
from compress_jax.trace import Calibration, calibrate, gram, segments, sites
from compress_jax.trace._statistics.calibration import Gram

INT3 = cj.at("**/kernel", cj.quantize.uniform(3, granularity=8))
DEFAULTS = {"nearest", "gptq, alike", "gptq, plain", "clip + gptq"}


def chain(layers=2, width=16, dtype=jnp.float32):
    """Dense layers, and correlated inputs of very different sizes."""
    rng = np.random.default_rng(0)
    params = {
        f"layer_{i}": {"kernel": jnp.asarray(rng.normal(size=(width, width)) / 4, dtype)}
        for i in range(layers)
    }

    def fn(params, x):
        for i in range(layers):
            x = jnp.tanh(x @ params[f"layer_{i}"]["kernel"])
        return x

    mix = rng.normal(size=(width, width))
    return fn, params, [jnp.asarray(rng.normal(size=(48, width)) @ mix, dtype) for _ in range(8)]


@pytest.fixture(scope="module")
def by_default():
    fn, params, batches = chain()
    return params, batches, cj.layerwise.solve(fn, params, batches, INT3, refit=False)


def test_errors_are_those_of_the_outputs_on_held_out_batches(by_default):
    params, batches, solved = by_default
    x = np.concatenate(batches[6:]).astype(np.float64)
    x /= np.sqrt(np.square(x).mean(1, keepdims=True))
    w, new = (np.asarray(p["layer_0"]["kernel"], np.float64) for p in (params, solved.params))
    measured = solved.measured["layer_0/kernel"]
    expected = np.square(x @ (new - w)).sum() / np.square(x @ w).sum()
    assert measured.error == pytest.approx(expected, rel=1e-4)
    assert set(measured.errors) == DEFAULTS
    assert measured.error == min(measured.errors.values()) == measured.errors[measured.method]
    assert (measured.tokens, measured.inputs, measured.dead) == ((6 * 48, 6 * 48), 16, 0)
    assert measured.damping == 0.01


def test_any_candidate_is_exact_under_the_compression(by_default):
    _, _, solved = by_default
    again = solved.compression.view(solved.params, solved.state)
    jax.tree.map(np.testing.assert_array_equal, again, solved.params)
    packed = solved.compression.pack(solved.params, solved.state)
    jax.tree.map(np.testing.assert_array_equal, cj.unpack(packed), solved.params)


def test_clipped_scales_come_with_the_leaf_that_takes_them():
    """Outliers that the inputs hardly see: a smaller scale serves the other weights better."""
    fn, params, batches = chain(1)
    kernel = params["layer_0"]["kernel"].at[::8].mul(8.0)
    batches = [batch.at[:, ::8].mul(1e-3) for batch in batches]
    params = {"layer_0": {"kernel": kernel}}
    solved = cj.layerwise.solve(fn, params, batches, INT3)
    assert solved.measured["layer_0/kernel"].method == "clip + gptq"
    scales = [
        flatten(state.fixed)[0]["0/layer_0/kernel/scale"].mean()
        for state in (solved.compression.init(params), solved.state)
    ]
    assert scales[1] < 0.9 * scales[0]
    again = solved.compression.view(solved.params, solved.state)
    np.testing.assert_array_equal(again["layer_0"]["kernel"], solved.params["layer_0"]["kernel"])


def test_a_chosen_leaf_is_solved_again_from_all_batches():
    fn, params, batches = chain(1)
    ours = cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq)
    everything = calibrate(fn, gram(normalize=True), params, batches)
    theirs = cj.quantize.gptq(params, everything, cj.bind(INT3, fn, params, batches[0]))
    np.testing.assert_array_equal(
        ours.params["layer_0"]["kernel"], theirs.params["layer_0"]["kernel"]
    )
    assert ours.measured["layer_0/kernel"].tokens == (8 * 48, 8 * 48)


def test_no_leaf_is_worse_than_nearest_on_held_out_batches():
    """Inputs that change from calibration to judging, so that any solution but nearest is worse."""
    fn, params, batches = chain(1)
    rng = np.random.default_rng(1)
    other = [jnp.asarray(rng.normal(size=(48, 16)), jnp.float32) for _ in range(2)]
    narrow = [batch.at[:, 3:].set(0) for batch in batches[:6]]

    def careless(params, calibration, compression, state, *, held_out):
        """Move every weight by a level, whatever that costs."""
        moved = {path: x + 1.0 for path, x in params.items()}
        view = compression.view(moved, state)
        return cj.layerwise.Rewritten(view, state, dict.fromkeys(params, ()))

    nearest = cj.bind(INT3, fn, params, batches[0])
    nearest = nearest.view(params, nearest.init(params))["layer_0"]["kernel"]
    solved = cj.layerwise.solve(fn, params, [*narrow, *other], INT3, careless)
    np.testing.assert_array_equal(solved.params["layer_0"]["kernel"], nearest)
    assert "rounded to nearest" in solved.notes["layer_0/kernel"]
    assert solved.measured["layer_0/kernel"].method == "nearest"
    # The law for solvers that try: never above.
    tried = cj.layerwise.solve(fn, params, [*narrow, *other], INT3)
    measured = tried.measured["layer_0/kernel"]
    assert measured.error <= measured.errors["nearest"]
    assert measured.dead == 0  # once the held-out rows are seen as well


def least_squares(rows=64, k=6, n=3):
    """Inputs of a layer, the exact ones, its weights, and its problem."""
    rng = np.random.default_rng(2)
    exact = rng.normal(size=(rows, k))
    x = exact + 0.3 * rng.normal(size=(rows, k)) + 0.2 * exact[:, ::-1]
    w = rng.normal(size=(k, n))
    site = sites(lambda p, x: x @ p["w"], {"w": jnp.ones((k, n))}, jnp.ones((rows, k)))[0]

    def known(sums) -> Problem:
        statistics = {site.name: {"input": Gram(jnp.float32(sums), jnp.int32(rows))}}
        return problems(Calibration(statistics, {site.name: site}), {"w": jnp.ones((k, n))})[0]["w"]

    missing = x - exact
    return x, exact, w, known(x.T @ x), known(x.T @ missing), known(missing.T @ missing)


def test_compensated_weights_solve_the_least_squares_problem():
    x, exact, w, own, cross, _ = least_squares()
    best = np.linalg.lstsq(x, exact @ w, rcond=None)[0]  # float64
    ours = compensated(jnp.float32(w), own, cross, alpha=1.0, damping=0.0)
    np.testing.assert_allclose(ours, best, rtol=1e-4, atol=1e-5)
    half = compensated(jnp.float32(w), own, cross, alpha=0.5, damping=0.0)
    np.testing.assert_allclose(half, (best + w) / 2, rtol=1e-4, atol=1e-5)
    damped = compensated(jnp.float32(w), own, cross, alpha=1.0, damping=0.1)
    gram = x.T @ x / len(x)
    added = 0.1 * np.trace(gram) / 6 * np.eye(6)
    correction = np.linalg.solve(gram + added, x.T @ (x - exact) @ w / len(x))
    np.testing.assert_allclose(damped, w - correction, rtol=1e-4, atol=1e-5)


def test_errors_are_measured_from_the_exact_outputs():
    x, exact, w, *known = least_squares()
    new = w + 0.1
    judges = judged(known[0], known[0], *known[1:])
    expected = np.square(x @ new - exact @ w).sum() / np.square(x @ w).sum()
    ours = relative_error(jnp.float32(w), jnp.float32(new), judges)
    assert ours == pytest.approx(expected, rel=1e-4)


def test_compensation_brings_the_network_nearer_to_the_original():
    fn, params, batches = chain(3)
    plain = cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq)
    mended = cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq, compensate=1.0)
    new = jnp.concatenate(batches)[:, ::-1][:, ::-1] * 0.95

    def error(solved):
        return float(jnp.square(fn(solved.params, new) - fn(params, new)).mean())

    assert error(mended) < 0.95 * error(plain)
    assert "comp." in mended.measured["layer_2/kernel"].method
    # The first layer has exact inputs: nothing to make up for, and the same solution.
    np.testing.assert_array_equal(
        mended.params["layer_0"]["kernel"], plain.params["layer_0"]["kernel"]
    )


BEGUN = []


def counted(params, *args, **options):
    BEGUN.append(list(params))
    return cj.quantize.gptq(params, *args, **options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_run_that_was_stopped_ends_with_the_same_bits(dtype, tmp_path):
    fn, params, batches = chain(dtype=dtype)
    BEGUN.clear()

    def stop(name, number, count):
        if name == "layer_0":
            raise KeyboardInterrupt

    def run(**options):
        return cj.layerwise.solve(fn, params, batches, INT3, counted, **options)

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path, report=stop)
    BEGUN.clear()
    rest = run(checkpoint=tmp_path)
    assert BEGUN == [["layer_1/kernel"]] * 2  # on three quarters of the batches, then on all
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)
    assert rest.params["layer_0"]["kernel"].dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, rest.state, whole.state)
    assert rest._replace(params=0, state=0, compression=0) == whole._replace(
        params=0, state=0, compression=0
    )


def test_checkpoints_of_other_runs_are_refused_by_name(tmp_path):
    fn, params, batches = chain(1)

    def run(params=params, batches=batches, compression=INT3, **options):
        return cj.layerwise.solve(
            fn, params, batches, compression, cj.quantize.gptq, checkpoint=tmp_path, **options
        )

    run()
    for other, said in (
        ({"batches": batches[1:]}, "other batches;"),
        ({"params": jax.tree.map(lambda x: 2 * x, params)}, "other params, compression;"),
        ({"refit": False}, "other options;"),
    ):
        with pytest.raises(CheckpointError, match=said):
            run(**other)
    file = tmp_path / "block_2.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="block_2.npz"):
        run()


def test_blocks_of_another_function_or_of_no_known_run_are_refused(tmp_path):
    fn, params, batches = chain()
    cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="solved with other function"):
        cj.layerwise.solve(
            lambda p, x: fn(p, 2 * x), params, batches, INT3, cj.quantize.gptq, checkpoint=tmp_path
        )
    for file in tmp_path.glob("block_*.npz"):
        file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read"):
        cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq, checkpoint=tmp_path)
    (tmp_path / "made_of.json").unlink()
    with pytest.raises(CheckpointError, match="has blocks and no made_of.json"):
        cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq, checkpoint=tmp_path)


def experts():
    """Two experts of which one sees few tokens, and an input that is always zero."""
    params = {"layer_0": {"kernel": jax.random.normal(jax.random.key(0), (3, 8, 4))}}

    def fn(params, x):
        return jnp.einsum("eti,eio->eto", x, params["layer_0"]["kernel"])

    x = jax.random.normal(jax.random.key(1), (8, 3, 16, 8)).at[..., 5].set(0).at[:, 2].set(0)
    return fn, params, list(x)


def test_what_calibration_saw_of_experts_is_told():
    fn, params, batches = experts()
    solved = cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq)
    measured = solved.measured["layer_0/kernel"]
    assert (measured.inputs, measured.dead) == (24, 1 + 1 + 8)
    assert "never reached layer_0/kernel[2]" in solved.notes["layer_0/kernel"]
    assert "  10  " in solved.table and "never reached" in solved.table


def test_the_table_fits_the_terminal(by_default):
    _, _, solved = by_default
    lines = solved.table.splitlines()
    assert lines[0].split() == ["leaf", "method", "tokens", "dead", "nearest", "held", "out"]
    assert [line.split()[0] for line in lines[1:]] == ["layer_0/kernel", "layer_1/kernel"]
    long = {f"{'deep/' * 20}{i}": each for i, each in enumerate(solved.measured.values())}
    notes = {"x" * 30: "word " * 40}
    wide = solved._replace(measured=long, notes=notes).table.splitlines()
    assert max(map(len, wide)) <= 80 and len(wide) > 5


GLOBAL = cj.at("**/kernel", cj.prune.magnitude(0.5, scope="global"))
KINDS = {
    "uniform": INT3,
    "mse": cj.at("**/kernel", cj.quantize.uniform(3, scale="mse")),
    "rules": cj.rules(
        [
            ("layer_0/**", cj.chain(cj.prune.magnitude(0.5), cj.quantize.uniform(4))),
            ("layer_1/**", cj.between(0, None, cj.quantize.fp4())),
        ]
    ),
    "global": GLOBAL,
}


@pytest.mark.parametrize("name", KINDS)
def test_a_restricted_compression_is_the_whole_one_leaf_by_leaf(name):
    _, params, _ = chain()
    compression = KINDS[name]
    state = compression.init(params)
    own = {"layer_1/kernel": params["layer_1"]["kernel"] * 1.5}
    changed = {**params, "layer_1": {"kernel": own["layer_1/kernel"]}}
    restricted = Restricted(compression, params, state)
    part = restricted.to(own, state)
    whole = flatten(compression.view(changed, state))[0]
    np.testing.assert_array_equal(part.view(own, state)["layer_1/kernel"], whole["layer_1/kernel"])
    grids = compression.pointwise(changed, state)
    ours = part.pointwise(own, state)
    assert set(ours) == {"layer_1/kernel"} & set(grids)
    for path, grid in ours.items():
        assert grid.fn == grids[path].fn
        jax.tree.map(np.testing.assert_array_equal, grid.operands, grids[path].operands)
    # What a global threshold decides belongs to no leaf, and is held still.
    made = part.init(own)
    expected = state if compression is GLOBAL else compression.init(changed)
    jax.tree.map(np.testing.assert_array_equal, made, expected)


def test_donated_params_leave_one_model_in_memory():
    fn, params, batches = chain()
    kept = cj.layerwise.solve(fn, params, batches, INT3, cj.quantize.gptq)
    given = jax.tree.map(jnp.copy, params)
    there = []

    def report(name, number, count):
        there.append([path for path, x in flatten(given)[0].items() if not x.is_deleted()])

    method = cj.quantize.gptq
    ours = cj.layerwise.solve(fn, given, batches, INT3, method, donate=True, report=report)
    assert there == [["layer_0/kernel", "layer_1/kernel"], ["layer_1/kernel"], []]
    jax.tree.map(np.testing.assert_array_equal, ours.params, kept.params)
    with pytest.raises(ArgumentError, match="donate=True gives up"):
        cj.layerwise.solve(fn, params, batches, every_layer_by_the_largest(), donate=True)


def every_layer_by_the_largest():
    """A compression whose view of one leaf needs the others."""

    def view(params, state):
        largest = jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(params)]).max()
        return jax.tree.map(lambda x: jnp.round(x / largest) * largest, params)

    return cj.identity()._replace(view=view, skipped=lambda params: {})


def test_blocks_that_are_alike_share_one_program():
    _, params, batches = chain(4)

    def fn(params, x):
        for i in range(4):
            x = x @ params[f"layer_{i}"]["kernel"]
            x = jnp.tanh(x) if i != 2 else jnp.tanh(x * 2)
        return x

    parts = segments(fn, params, batches[0])[1:]
    programs = Programs({"plain": gram()})
    leaves = flatten(params)[0]
    made = [programs.of(part, leaves, (batches[0],)) for part in parts]
    assert made[0].compiled is made[1].compiled is made[3].compiled
    assert made[2].compiled is not made[0].compiled
    each = [(batch,) for batch in batches[:2]]
    found = made[3].statistics(leaves, each, made[3].numbers(["layer_3/kernel"]))["plain"]
    x = np.concatenate(batches[:2]).astype(np.float64)
    assert list(found) == ["layer_3/kernel"]
    np.testing.assert_allclose(found["layer_3/kernel"]["input"].gram, x.T @ x, rtol=1e-4, atol=1e-3)


def test_wrong_options_are_refused():
    fn, params, batches = chain(1)
    for options, said in (
        ({"rows": "weighted"}, "rows must be"),
        ({"rows": ()}, "rows must be"),
        ({"compensate": 2.0}, "compensate must be from 0 to 1"),
        ({"reducer": gram()}, "a reducer takes the place"),
    ):
        with pytest.raises(ArgumentError, match=said):
            cj.layerwise.solve(fn, params, batches, INT3, **options)
    broken = {"layer_0": {"kernel": params["layer_0"]["kernel"].at[0, 0].set(jnp.nan)}}
    with pytest.raises(NonFiniteError, match="layer_0/kernel"):
        cj.layerwise.solve(fn, broken, batches, INT3)
