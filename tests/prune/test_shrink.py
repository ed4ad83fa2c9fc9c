"""Smaller models: which channels are removed, what happens to their states, and that they work."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import compress_jax as cj
from compress_jax.core.errors import ConfigError, NoMatchError, NonFiniteError, ShapeError
from compress_jax.core.paths import flatten
from compress_jax.prune._channels.result import narrow
from compress_jax.prune._channels.shrink import shrink

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32)
WIDTHS = (5, 8, 4, 3)
PARAMS = {
    f"w{i}": jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for i, shape in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False))
} | {"b0": jnp.asarray(RNG.normal(size=8), jnp.float32)}
W0, W1, W2 = (np.asarray(PARAMS[f"w{i}"], np.float64) for i in range(3))


def mlp(p, x):
    return jax.nn.relu(jax.nn.relu(x @ p["w0"] + p["b0"][None]) @ p["w1"]) @ p["w2"]


class Net(nn.Module):
    width: int = 8
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.relu(
            nn.BatchNorm(not self.train, name="norm")(
                nn.Conv(self.width, (3, 3), use_bias=False, name="conv")(x)
            )
        )
        x = x + nn.Conv(self.width, (1, 1), name="mix")(x)
        x = nn.relu(nn.LayerNorm(name="layer_norm")(x))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


IMAGES = jnp.asarray(RNG.normal(size=(2, 4, 4, 2)), jnp.float32)


def variables():
    leaves, rebuild = flatten(jax.eval_shape(Net().init, jax.random.key(0), IMAGES))
    rng = np.random.default_rng(3)
    return rebuild(
        {path: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), "float32") for path, x in leaves.items()}
    )


def lowest(score, count):
    """Return what stays when the lowest go."""
    return sorted(np.argsort(score, kind="stable")[count:].tolist())


def lists(kept):
    return {name: left.tolist() for name, left in kept.items()}


def moments(p, x):
    """Return the mean squares of what each kernel reads, in float64."""
    h = np.maximum(np.asarray(x, np.float64) @ W0 + np.asarray(p["b0"], np.float64), 0)
    return (h**2).mean(0), (np.maximum(h @ W1, 0) ** 2).mean(0)


@pytest.mark.slow
def test_criteria_against_numpy():
    """Scores of the first hidden layer, in which w0's columns and w1's rows lie, and b0."""
    loss = lambda p, x: jnp.square(mlp(p, x)).mean()  # noqa: E731
    g = {path: np.asarray(each, np.float64) for path, each in jax.grad(loss)(PARAMS, X).items()}
    b = np.asarray(PARAMS["b0"], np.float64)
    rows = [W0.T, W1]
    apart = [np.linalg.norm(r[:, None] - r[None], axis=-1).sum(1) for r in rows]
    square = moments(PARAMS, X)[0]
    given = cj.prune.importance.gradients(loss, PARAMS, [X])
    squared = cj.prune.importance.squared_gradients(loss, PARAMS, [X])
    seen = cj.trace.calibrate(mlp, cj.trace.reducers.moments(), PARAMS, [X])
    importance = cj.prune.importance
    expected = {
        "L1": (importance.magnitude(1), [np.abs(r).sum(1) for r in rows]),
        "L2": (importance.magnitude(2), [(r**2).sum(1) for r in rows]),
        "taylor": (
            importance.taylor(given),
            [np.abs(W0 * g["w0"]).sum(0), np.abs(W1 * g["w1"]).sum(1), np.abs(b * g["b0"])],
        ),
        "joint": (
            importance.taylor(PARAMS | given, joint=True),
            [np.abs((W0 * g["w0"]).sum(0)), np.abs((W1 * g["w1"]).sum(1)), np.abs(b * g["b0"])],
        ),
        "fisher": (
            importance.second_order(squared),
            [
                ((W0 * g["w0"]) ** 2).sum(0) / 2,
                ((W1 * g["w1"]) ** 2).sum(1) / 2,
                (b * g["b0"]) ** 2 / 2,
            ],
        ),
        "fpgm": (importance.fpgm(), apart),
        "scale": (importance.norm_scale("b*"), [np.abs(b)]),
        "activation": (importance.activation(seen), [square]),
        "wanda": (importance.activation(seen, weighted=True), [(W1**2 * square[:, None]).sum(1)]),
    }
    from compress_jax.prune._channels.scores import channel_scores

    found = cj.trace.groups(mlp, PARAMS, X)
    for name, (criterion, members) in expected.items():
        for reduction, reduce in (("mean", np.mean), ("sum", np.sum), ("max", np.max)):
            scores = channel_scores(found, PARAMS, {"w0", "w1", "w2"}, criterion, reduction, "none")
            np.testing.assert_allclose(
                scores["w0:1"], reduce(members, axis=0), rtol=2e-4, err_msg=f"{name} {reduction}"
            )
    scores = channel_scores(found, PARAMS, {"w0", "w1", "w2"}, importance.magnitude(), "sum", "l2")
    np.testing.assert_allclose([np.square(score).sum() for score in scores.values()], 1, rtol=1e-12)


@pytest.fixture(scope="module")
def half():
    return shrink(mlp, PARAMS, X, ratio=0.5, reduction="sum")


@pytest.fixture(scope="module")
def few():
    return shrink(mlp, PARAMS, X, ratio={"w0:1": 0.25})


@pytest.mark.slow
def test_local_takes_the_lowest_of_each_group(half):
    small = half
    first, second = (W0**2).sum(0) + (W1**2).sum(1), (W1**2).sum(0) + (W2**2).sum(1)
    assert {name: left.tolist() for name, left in small.kept.items()} == {
        "w0:1": lowest(first, 4),
        "w1:1": lowest(second, 2),
    }
    i, j = small.kept["w0:1"], small.kept["w1:1"]
    expected = {"w0": W0[:, i], "w1": W1[i][:, j], "w2": W2[j], "b0": np.asarray(PARAMS["b0"])[i]}
    for path, array in expected.items():
        np.testing.assert_array_equal(small.params[path], array.astype("float32"))
    h = (
        np.maximum(
            np.maximum(np.asarray(X, np.float64) @ W0[:, i] + expected["b0"], 0) @ expected["w1"], 0
        )
        @ W2[j]
    )
    np.testing.assert_allclose(small.fn(small.params, X), h, rtol=1e-4, atol=1e-5)


def test_global_takes_the_lowest_of_all():
    scores = [(W0**2).sum(0) + (W1**2).sum(1), (W1**2).sum(0) + (W2**2).sum(1)]
    small = shrink(mlp, PARAMS, X, ratio=0.5, reduction="sum", normalize="none", scope="global")
    bound = np.sort(np.concatenate(scores))[6]
    assert [left.tolist() for left in small.kept.values()] == [
        np.flatnonzero(each >= bound).tolist() for each in scores
    ]
    capped = shrink(mlp, PARAMS, X, ratio=0.9, scope="global", max_ratio=0.75)
    assert [len(left) for left in capped.kept.values()] == [2, 1]


def test_isomorphic_groups_compete():
    """Two hidden layers of one kind, one a hundred times larger, and a layer of another kind."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    p = {f"{i}": {"up": 10.0**i * draw(4, 6), "down": draw(6, 4)} for i in range(2)} | {
        "mid": draw(4, 6),
        "head": draw(6, 2),
    }

    def fn(p, x):
        for i in range(2):
            x = x + jax.nn.relu(x @ p[f"{i}"]["up"]) @ p[f"{i}"]["down"]
        return jax.nn.relu(x @ p["mid"]) @ p["head"]

    small = shrink(fn, p, jnp.ones((1, 4)), ratio=0.5, scope="isomorphic", normalize="none")
    assert [len(left) for left in small.kept.values()] == [1, 5, 3]


def test_ratios_exclusions_and_multiples_are_in_the_table():
    table = str(shrink(mlp, PARAMS, X, ratio={"w0*": 0.5}).table)
    assert (
        "w0:1      8      4\n" in table
        and "w1:1      4      4  ratio 0" in table
        and "frozen (output): w2:1" in table
    )
    assert f"macs: {6 * (40 + 32 + 12)} -> {6 * (20 + 16 + 12)}" in table
    small = shrink(mlp, PARAMS, X, ratio=0.5, exclude="w1*", round_to=3)
    assert [tuple(row[1:]) for row in small.table.rows] == [(8, 6, ""), (4, 4, "excluded")]
    small = shrink(mlp, PARAMS, X, ratio=0.5, round_to=4)
    assert small.table.rows[1].reason == "not wider than the multiple 4"
    small = shrink(mlp, PARAMS, X, ratio=0.5, importance=cj.prune.importance.norm_scale("b0"))
    assert small.table.rows[1].reason == "the importance has no score for it"


@pytest.mark.wide(2)
@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_a_target_is_met_by_the_smallest_removal(share):
    """Against all ratios at which anything changes."""
    full = 40 + 32 + 12
    ratios = sorted({(2 * k + 1) / (2 * n) for n in (8, 4) for k in range(n)})
    macs = []
    for ratio in ratios:
        a, b = (max(1, n - int(np.floor(ratio * n + 0.5))) for n in (8, 4))
        macs.append(5 * a + a * b + 3 * b)
    expected = next(each for each in macs if each <= share * full)
    small = shrink(mlp, PARAMS, X, macs=share)
    assert small.table.after.macs == 6 * expected


def test_channels_of_zeros_go_without_a_change():
    dead = [0, 2, 3, 7]
    p = PARAMS | {
        "w0": PARAMS["w0"].at[:, jnp.array(dead)].set(0),
        "b0": PARAMS["b0"].at[jnp.array(dead)].set(0),
    }
    p["w1"] = p["w1"].at[jnp.array(dead)].set(0)
    small = shrink(mlp, p, X, ratio={"w0:1": 0.5})
    assert small.kept["w0:1"].tolist() == [1, 4, 5, 6]
    np.testing.assert_allclose(small.fn(small.params, X), mlp(p, X), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_each_call_is_one_step(half):
    """Twice a half is a quarter, of the indices of what was left; with training between."""
    once = half
    gradient = jax.grad(lambda p: jnp.square(once.fn(p, X)).mean())(once.params)
    trained = jax.tree.map(lambda w, g: w - 0.01 * g, once.params, gradient)
    twice = shrink(once.fn, trained, X, ratio=0.5)
    assert [len(left) for left in twice.kept.values()] == [2, 1]
    both = {name: once.kept[name][left] for name, left in twice.kept.items()}
    direct = narrow(mlp, PARAMS, X, kept=both)
    np.testing.assert_allclose(twice.fn(twice.params, X), direct.fn(twice.params, X), rtol=1e-6)
    assert jax.tree.map(jnp.shape, direct.params) == jax.tree.map(jnp.shape, twice.params)


@pytest.mark.slow
def test_a_module_made_with_the_new_width_is_the_same_model():
    """So is, in training mode, the function with the same channels, statistics included."""
    full = variables()
    small = shrink(Net().apply, full, IMAGES, ratio=0.5)
    assert [len(left) for left in small.kept.values()] == [4]
    np.testing.assert_allclose(
        small.fn(small.params, IMAGES), Net(4).apply(small.params, IMAGES), rtol=1e-5, atol=1e-5
    )

    def learn(width):
        return lambda v, x: Net(width, train=True).apply(v, x, mutable=["batch_stats"])

    got = narrow(learn(8), full, IMAGES, kept=json.loads(json.dumps(lists(small.kept))))
    expected = jax.jit(learn(4))(small.params, IMAGES)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        got.fn(small.params, IMAGES),
        expected,
    )


def test_nnx_states_shrink():
    graph, state = nnx.split(nnx.Linear(5, 8, rngs=nnx.Rngs(0)))
    params = {"first": state, "last": jnp.ones((8, 2))}

    def fn(p, x):
        return jax.nn.relu(nnx.merge(graph, p["first"])(x)) @ p["last"]

    small = shrink(fn, params, X, ratio=0.25)
    assert {path: x.shape for path, x in flatten(small.params)[0].items()} == {
        "first/bias": (6,),
        "first/kernel": (5, 6),
        "last": (6, 2),
    }
    np.testing.assert_allclose(small.fn(small.params, X), fn(small.params, X), rtol=1e-6)


OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "adamw, clipped, accumulated": optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 2
    ),
    "two of them": optax.partition(
        {"a": optax.adam(1e-3), "b": optax.lion(1e-3)}, lambda p: {k: "ab"[k > "b0"] for k in p}
    ),
    "hyperparameters": optax.inject_hyperparams(optax.rmsprop)(learning_rate=1e-3),
    "averaged": optax.contrib.schedule_free_adamw(1e-3),
    "factored": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "lbfgs": optax.scale_by_lbfgs(memory_size=7),
}


QUICK = ["adam", "factored", "lbfgs"]
REST = [name for name in OPTIMIZERS if name not in QUICK]


@pytest.mark.parametrize(
    "name",
    ["adam", "factored", "lbfgs", *(pytest.param(name, marks=pytest.mark.slow) for name in REST)],
)
def test_optimizer_states_are_carried_over(name, half, few):
    """They have the shapes of a fresh state, and their updates are those of the kept channels."""
    with jax.numpy_dtype_promotion("standard"):
        optimizer, small = (
            OPTIMIZERS[name],
            few if name == "factored" else half,
        )  # 5 by 8 must not become 5 by 4
        state = optimizer.init(PARAMS)
        carried = small.slice_state(state)
        fresh = optimizer.init(small.params)
        assert jax.tree.structure(carried) == jax.tree.structure(fresh)
        assert jax.tree.map(jnp.shape, carried) == jax.tree.map(jnp.shape, fresh)
        if name in ("adam", "sgd", "hyperparameters"):
            gradient = jax.tree.map(jnp.sin, PARAMS)
            _, state = optimizer.update(gradient, state, PARAMS)
            updates, _ = optimizer.update(gradient, state, PARAMS)
            short, _ = optimizer.update(
                small.slice_state(gradient), small.slice_state(state), small.params
            )
            jax.tree.map(np.testing.assert_array_equal, short, small.slice_state(updates))


@pytest.mark.slow
def test_states_of_params_alone_are_carried_too():
    full = variables()
    small = shrink(Net().apply, full, IMAGES, ratio=0.5)
    state = small.slice_state(optax.adam(1e-3).init(full["params"]))
    assert jax.tree.map(jnp.shape, state[0].mu) == jax.tree.map(jnp.shape, small.params["params"])
    jax.tree.map(np.testing.assert_array_equal, small.slice_state(full), small.params)


@pytest.mark.slow
def test_what_is_left_is_a_model_like_any_other(tmp_path, half):
    """It trains, quantizes, is saved and exported."""
    small = half
    target, loss = jnp.ones((6, 3)), lambda p: jnp.square(small.fn(p, X) - target).mean()  # noqa: E731
    p, before = small.params, loss(small.params)
    slope = jax.jit(jax.grad(loss))
    for _ in range(20):
        p = jax.tree.map(lambda w, g: w - 0.02 * g, p, slope(p))
    assert loss(p) < 0.9 * before
    quantizer = cj.at("w*", cj.quantize.uniform(bits=4))
    state = quantizer.init(p)
    seen = quantizer.view(p, state)
    cj.save(tmp_path / "model", quantizer.pack(p, state), {"kept": lists(small.kept)})
    packed, metadata = cj.load(tmp_path / "model")
    again = narrow(mlp, PARAMS, X, kept=metadata["kept"])
    np.testing.assert_array_equal(again.fn(cj.unpack(packed), X), small.fn(seen, X))
    exported = jax.export.export(small.fn)(seen, X)
    np.testing.assert_array_equal(exported.call(seen, X), small.fn(seen, X))
    assert cj.trace.cost(small.fn, p, X).macs == small.table.after.macs == 6 * (20 + 8 + 6)


def test_ties_keep_the_first():
    small = shrink(mlp, jax.tree.map(jnp.ones_like, PARAMS), X, ratio=0.5)
    assert [left.tolist() for left in small.kept.values()] == [[0, 1, 2, 3], [0, 1]]


def test_an_error_says_what_is_wrong():
    with pytest.raises(ConfigError, match="say how much"):
        shrink(mlp, PARAMS, X)
    with pytest.raises(ConfigError, match="lies between 0 and 1"):
        shrink(mlp, PARAMS, X, ratio=1.5)
    with pytest.raises(ConfigError, match="macs=1.5"):
        shrink(mlp, PARAMS, X, macs=1.5)
    with pytest.raises(NoMatchError, match="w0:1"):
        shrink(mlp, PARAMS, X, ratio={"conv*": 0.5})
    with pytest.raises(NoMatchError, match="w0:1"):
        shrink(mlp, PARAMS, X, ratio=0.5, exclude="conv*")
    for wrong in ({"scope": "layer"}, {"reduction": "median"}, {"normalize": "std"}):
        with pytest.raises(ConfigError, match="not known"):
            shrink(mlp, PARAMS, X, ratio=0.5, **wrong)
    with pytest.raises(NonFiniteError, match="'w1' along axis 0"):
        shrink(mlp, PARAMS | {"w1": PARAMS["w1"].at[0, 0].set(jnp.nan)}, X, ratio=0.5)
    with pytest.raises(ConfigError, match="cannot be reached"):
        shrink(mlp, PARAMS, X, macs=0.5, exclude="w0:1")
    with pytest.raises(ConfigError, match="nothing is removed at ratio=0.05.* w1:1 has 4 channels"):
        shrink(mlp, PARAMS, X, ratio=0.05)
    with pytest.raises(ConfigError, match="w0:1: ratio 0"):
        shrink(mlp, PARAMS, X, ratio={"**": 0.0}, macs=0.5)
    with pytest.raises(ShapeError, match="coordinates 0 to 7"):
        narrow(mlp, PARAMS, X, kept={"w0:1": [*range(8), 99]})
    with pytest.raises(ConfigError, match="frozen .output.: w:1"):
        shrink(lambda p, x: x @ p["w"], {"w": jnp.ones((5, 2))}, X, ratio=0.5)
    with pytest.raises(NoMatchError, match="reducers.moments"):
        seen = cj.trace.calibrate(mlp, cj.trace.reducers.absmax(), PARAMS, [X])
        shrink(mlp, PARAMS, X, ratio=0.5, importance=cj.prune.importance.activation(seen))
    with pytest.raises(ShapeError, match="'w0' has shape"):
        shrink(
            mlp, PARAMS, X, ratio=0.5, importance=cj.prune.importance.taylor({"w0": jnp.ones(3)})
        )


@pytest.mark.slow
def test_the_old_names_work_and_warn():
    with pytest.warns(DeprecationWarning, match="most= is now max_ratio="):
        small = shrink(mlp, PARAMS, X, ratio=0.9, scope="global", most=0.75)
    assert [len(left) for left in small.kept.values()] == [2, 1]
    with pytest.warns(DeprecationWarning, match="slice_state"):
        jax.tree.map(np.testing.assert_array_equal, small.carry(PARAMS), small.params)
