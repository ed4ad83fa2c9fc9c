"""A model of any framework is the same pure functions: trained, stored, traced alike."""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType

import compress_jax as cj
from compress_jax.core import CompressError, ConfigError
from compress_jax.core.paths import flatten

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def promotion(request):
    """Keras itself promotes ranks; everything else is held to the tests' strictness."""
    if "keras" not in request.node.name:
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        x = nn.Dropout(0.5)(nn.Dense(8)(x), deterministic=deterministic)
        return nn.Dense(2)(nn.BatchNorm(use_running_average=deterministic)(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.norm(self.layers[0](x))))


class Equinox(eqx.Module):
    mlp: eqx.nn.MLP
    drop: eqx.nn.Dropout

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(4, 2, 8, 1, key=key)
        self.drop = eqx.nn.Dropout(0.5)

    def __call__(self, x, key=None):
        return self.drop(self.mlp(x), key=key)


class EquinoxWithState(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        self.first = eqx.nn.Linear(4, 8, key=key)
        self.norm = eqx.nn.BatchNorm(8, axis_name="examples", mode="ema")
        self.drop = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(8, 2, key=jax.random.fold_in(key, 1))

    def __call__(self, x, state, *, key=None):
        x, state = self.norm(self.first(x), state)
        return self.head(self.drop(x, key=key)), state


def with_state(key):
    return eqx.nn.make_with_state(EquinoxWithState)(key)


def import_keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return pytest.importorskip("keras", reason="needs keras")


def keras_model():
    layers = import_keras().layers
    inside = [layers.Dense(8, name="first"), layers.BatchNormalization(name="norm")]
    inside += [layers.Dropout(0.5), layers.Dense(2, name="head")]
    return import_keras().Sequential([layers.Input((4,)), *inside])


def haiku(x, is_training):
    import haiku as hk

    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(8)(x), is_training)
    if is_training:
        x = x * jax.random.bernoulli(hk.next_rng_key(), 0.5, x.shape).astype(x.dtype)
    return hk.Linear(2)(x)


def transformed():
    return pytest.importorskip("haiku", reason="needs dm-haiku").transform_with_state(haiku)


MODELS = {
    "linen": Linen,
    "nnx": lambda: Nnx(nnx.Rngs(0)),
    "nnx from a function": lambda: lambda rngs: Nnx(rngs),
    "equinox": lambda: Equinox(KEY),
    "equinox from a function": lambda: lambda key: Equinox(key),
    "equinox with state": lambda: with_state(KEY),
    "equinox with state from a function": lambda: lambda key: with_state(key),
    "keras": keras_model,
    "haiku": transformed,
}


def parts(variables):
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


@pytest.mark.parametrize("kind", MODELS)
def test_every_framework_is_the_same_functions(kind, tmp_path):
    model = cj.tasks.pure(MODELS[kind]())
    variables = model.init(KEY, X)
    params, state = parts(variables)
    out = model.apply(variables, X)
    assert out.shape == (6, 2) and out.dtype == jnp.float32
    # Evaluation draws nothing; training draws by its key, and by nothing else.
    assert (model.apply(variables, X) == out).all()
    drawn = [model.train(params, state, (X,), jax.random.key(i), None)[0] for i in (1, 1, 2)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    new = model.train(params, state, (X,), KEY, None)[2]
    assert jax.tree.structure(new) == jax.tree.structure(state)
    if state:
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (new, state)), strict=True))
    # What is stored comes back, and the tracer sees every kernel.
    cj.save(tmp_path / "file", variables)
    assert (model.apply(cj.unpack(cj.load(tmp_path / "file")[0]), X) == out).all()
    sites = cj.trace.sites(lambda p, x: model.apply({"params": p, **state}, x), params, X)
    assert {site.param for site in sites} == {
        p for p, x in flatten(params)[0].items() if x.ndim > 1 and 1 not in x.shape
    }


DRAWN = ["linen", *(kind for kind in MODELS if kind.endswith("from a function"))]


@pytest.mark.parametrize("kind", DRAWN)
def test_weights_are_drawn_from_the_seed(kind):
    model = cj.tasks.pure(MODELS[kind]())
    one, same, other = (jax.tree.leaves(model.init(jax.random.key(i), X)) for i in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


def test_an_nnx_model_is_the_module_itself():
    module = Nnx(nnx.Rngs(3))
    model = cj.tasks.pure(module)
    module.eval()
    np.testing.assert_array_equal(model.apply(model.init(KEY, X), X), module(X))


def test_batch_norm_of_equinox_averages_over_the_batch():
    """By hand: the running mean moves to the mean of what the first layer gives."""
    module, state = with_state(KEY)
    model = cj.tasks.pure((module, state))
    params, rest = parts(model.init(KEY, X))
    after = model.train(params, rest, (X,), KEY, None)[2]
    inside = np.asarray(X) @ np.asarray(module.first.weight).T + np.asarray(module.first.bias)
    means = [np.asarray(x) for x in jax.tree.leaves(after) if np.shape(x) == (8,)]
    assert any(np.allclose(x, inside.mean(0), atol=1e-5) for x in means)
    own = eqx.nn.inference_mode(module)
    run = jax.vmap(own, axis_name="examples", in_axes=(0, None), out_axes=(0, None))
    np.testing.assert_allclose(model.apply(model.init(KEY, X), X), run(X, state)[0], atol=1e-6)


def test_a_keras_model_is_the_model_itself():
    made = keras_model()
    model = cj.tasks.pure(made)
    variables = model.init(KEY, X)
    np.testing.assert_allclose(model.apply(variables, X), made(X, training=False), atol=1e-6)
    params, state = parts(variables)
    assert set(params) == {"first", "norm", "head"} and set(state["state"]) == {"norm"}
    moving = model.train(params, state, (X,), KEY, None)[2]["state"]["norm"]["moving_mean"]
    inside = X @ params["first"]["kernel"] + params["first"]["bias"]
    np.testing.assert_allclose(moving, 0.01 * inside.mean(0), atol=1e-6)


def test_what_such_models_lack_is_said():
    with pytest.raises(ConfigError, match="keeps state.*make_with_state"):
        cj.tasks.pure(with_state(KEY)[0])
    with pytest.raises(ConfigError, match="keeps state.*make_with_state"):
        cj.tasks.pure(lambda key: EquinoxWithState(key))
    norm = eqx.nn.BatchNorm(8, "rows", mode="ema")
    other = eqx.tree_at(lambda net: net.norm, EquinoxWithState(KEY), norm)
    both = eqx.nn.make_with_state(lambda: eqx.nn.Sequential([EquinoxWithState(KEY), other]))()
    with pytest.raises(ConfigError, match="give all of them the same axis_name"):
        cj.tasks.pure(both)
    with pytest.raises(ConfigError, match="has no weights yet"):
        cj.tasks.pure(import_keras().Sequential([import_keras().layers.Dense(2)]))
    keras = import_keras()

    class Silent(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization()

        def call(self, x):
            return self.norm(x)

    silent = Silent()
    silent(X)
    with pytest.raises(ConfigError, match="its call needs an argument training"):
        cj.tasks.pure(silent)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equinox with state from a function", "keras"])
def test_such_a_model_is_trained_compressed_and_restored(kind, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 4)).astype(np.float32)
    data = cj.data.Data.from_arrays({"x": x, "y": (x[:, 0] > 0).astype(np.int32)}, classes=2)
    training = cj.search.Training(optax.adam(0.02), 40, 16)
    student = cj.search.Network(MODELS[kind](), training)
    int8 = cj.at(("**/kernel", "**/weight"), cj.quantize.uniform(8))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    made = cj.search.Experiment(
        "half", data, student, (cj.search.Candidate("int8", int8, training),),
        cj.search.Requirement(max_drop=0.9, min_ratio=0.1), task=cj.tasks.classification("x", "y"),
        mesh=mesh,
    )  # fmt: skip
    result = cj.search.compress(made, tmp_path)
    assert result is not None
    restored = cj.search.Network(MODELS[kind](), artifact=tmp_path / "artifact.safetensors")
    found = cj.tasks.measure(made.task, restored.pure.apply, restored.restore(), data.train)
    assert found.values["accuracy"] > 0.7


def test_a_pair_of_functions_takes_several_inputs():
    def init(key, x, scale):
        return {"w": jnp.ones((x.shape[-1], 2))}

    model = cj.tasks.pure((init, lambda p, x, scale: x @ p["w"] * scale))
    variables = model.init(KEY, X, jnp.float32(2.0))
    np.testing.assert_allclose(
        model.apply(variables, X, jnp.float32(2.0))[:, 0], 2 * X.sum(-1), rtol=1e-6
    )


def test_features_come_from_linen_and_nnx_alone():
    model = cj.tasks.pure(MODELS["nnx"](), ("norm",))
    params, state = parts(model.init(KEY, X))
    _, features, new = model.train(params, state, (X,), KEY, None)
    assert features["norm"].shape == (6, 8)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    with pytest.raises(ConfigError, match="captured in Linen and NNX"):
        cj.tasks.pure(Equinox(KEY), ("mlp",))


@pytest.mark.parametrize("wrong", [Linen, Nnx, 3, None, "net", (1, 2), lambda x: x])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(CompressError, match="model must be a Linen, NNX or Equinox module"):
        cj.tasks.pure(wrong)
