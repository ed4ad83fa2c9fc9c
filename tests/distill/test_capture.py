"""Features by path, under any transformation of the model, at no cost where none is captured."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from compress_jax.core.errors import ConfigError, NoMatchError
from compress_jax.distill import attention, capture
from compress_jax.models import ResNet


class Net(linen.Module):
    """A shared layer, a nested module, a method, a sown value and an output that is no array."""

    def setup(self):
        self.shared, self.cell, self.inner = (
            linen.Dense(4),
            linen.RNN(linen.LSTMCell(4), return_carry=True),
            Inner(),
        )
        self.head = linen.Dense(3)

    def encode(self, x):
        return self.shared(self.shared(x))

    def __call__(self, x, train=False):
        x = self.inner(self.encode(x), train)
        (carry, _), x = self.cell(x[:, None])
        self.sow("intermediates", "pooled", x.mean(1))
        return self.head(x[:, 0])


class Inner(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        return linen.Dropout(0.5, deterministic=not train)(linen.Dense(4, name="dense")(x))


X = jax.random.normal(jax.random.key(0), (5, 4))
NAMES = "cell encode head inner inner/Dropout_0 inner/dense inner/norm pooled shared".split()


@pytest.fixture(scope="module")
def net():
    with jax.numpy_dtype_promotion("standard"):
        model = Net()
        yield model, model.init(jax.random.key(1), X)


def run(model, variables, *args, **kwargs):
    return jax.jit(lambda v: model.apply(v, *args, **kwargs))(variables)


@pytest.mark.slow
def test_linen_features_are_what_the_modules_return(net):
    model, variables = net
    out, features = jax.jit(capture(model, ("inner/*", "shared", "encode")))(variables, X)
    np.testing.assert_allclose(out, run(model, variables, X), rtol=1e-6)
    params = variables["params"]
    assert not params["shared"]["bias"].any()
    first = X @ params["shared"]["kernel"]
    second = first @ params["shared"]["kernel"]
    np.testing.assert_allclose(features["shared"], first, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features["shared:1"], second, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features["encode"], second, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        features["inner/norm"], second / np.sqrt(1 + 1e-5), rtol=1e-4, atol=1e-5
    )
    dense = features["inner/norm"] @ params["inner"]["dense"]["kernel"]
    np.testing.assert_allclose(features["inner/dense"], dense, rtol=1e-5, atol=1e-6)
    assert set(features) == {
        "inner/norm",
        "inner/dense",
        "inner/Dropout_0",
        "shared",
        "shared:1",
        "encode",
    }


@pytest.mark.slow
def test_linen_outputs_that_are_no_arrays_and_sown_values_have_names(net):
    model, variables = net
    _, features = capture(model, ("cell", "pooled"))(variables, X)
    assert {name: value.shape for name, value in features.items()} == {
        "cell/0/0": (5, 4),
        "cell/0/1": (5, 4),
        "cell/1": (5, 1, 4),
        "pooled": (5, 4),
    }


def test_linen_collections_come_back_as_apply_returns_them(net):
    model, variables = net
    kwargs = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
    (out, state), features = jax.jit(lambda v: capture(model, "inner/norm")(v, X, **kwargs))(
        variables
    )
    expected, expected_state = run(model, variables, X, **kwargs)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert set(state) == {"batch_stats"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, expected_state)
    np.testing.assert_allclose(features["inner/norm"].mean(0), 0, atol=1e-5)


def test_a_pattern_that_matches_nothing_lists_what_there_is(net):
    model, variables = net
    with pytest.raises(NoMatchError) as error:
        capture(model, ("shared", "backbone/*"))(variables, X)
    assert "'backbone/*'" in str(error.value)
    assert re.findall(r"\n  (\S+)", str(error.value)) != []
    assert set(NAMES) <= set(re.findall(r"\n  (\S+)", str(error.value)))


def program(fn, *args):
    """Return the program given to XLA, and what XLA says that it costs."""
    lowered = jax.jit(fn).lower(*args)
    costs = lowered.compile().cost_analysis()
    return lowered.as_text(), costs["flops"], costs["bytes accessed"]


@pytest.mark.slow
def test_captures_that_nobody_uses_cost_nothing():
    model = ResNet(depth=8, width=4)
    x = jnp.ones((2, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    plain = program(lambda v, x: model.apply(v, x), variables, x)
    unused = program(lambda v, x: capture(model, "**")(v, x)[0], variables, x)
    assert unused == plain and plain[1] > 1e5

    early = program(lambda v, x: capture(model, "**")(v, x)[1]["block_0_0"], variables, x)
    assert early[1] < 0.6 * plain[1]


def test_only_what_matches_leaves_the_model():
    model = ResNet(depth=8, width=4)
    x = jnp.ones((2, 8, 8, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    _, features = jax.eval_shape(capture(model, "block_?_0"), variables, x)
    assert {name: value.shape for name, value in features.items()} == {
        "block_0_0": (2, 8, 8, 4),
        "block_1_0": (2, 4, 4, 8),
        "block_2_0": (2, 2, 2, 16),
    }


@pytest.mark.slow
def test_a_student_learns_its_teachers_attention():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    teacher, student = ResNet(depth=8, width=8), ResNet(depth=8, width=4)
    theirs, ours = (
        jax.jit(model.init)(jax.random.key(i), x) for i, model in enumerate((teacher, student))
    )
    _, target = jax.jit(capture(teacher, "block_?_0"))(theirs, x)

    def loss(params):
        _, features = capture(student, "block_?_0")({**ours, "params": params}, x)
        return sum(1000 * attention(features[path], target[path]).mean() for path in target)

    step, params = jax.jit(jax.value_and_grad(loss)), ours["params"]
    first, gradient = step(params)
    assert (gradient["stem"]["kernel"] != 0).any() and (gradient["head"]["kernel"] == 0).all()
    for _ in range(10):
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, step(params)[1])
    assert step(params)[0] < 0.9 * first


class Layers(linen.Module):
    kept: bool

    @linen.compact
    def __call__(self, x):
        axes = {"params": 0, **({"intermediates": 0} if self.kept else {})}
        scan = linen.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=3)
        x, _ = scan(name="layers")(x, None)
        return linen.remat(linen.Dense)(2, name="last")(x)


class Body(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return linen.Dense(4, name="dense")(x), None


@pytest.mark.slow
def test_linen_loops_and_remat():
    variables = Layers(True).init(jax.random.key(0), X)
    out, features = jax.jit(capture(Layers(True), ("layers/dense", "last")))(variables, X)
    assert features["layers/dense"].shape == (3, 5, 4)
    np.testing.assert_allclose(features["last"], out, rtol=1e-6)
    gradient = jax.grad(
        lambda v: capture(Layers(True), "layers/dense")(v, X)[1]["layers/dense"][1].sum()
    )(variables)
    assert [bool((row != 0).any()) for row in gradient["params"]["layers"]["dense"]["kernel"]] == [
        True,
        True,
        False,
    ]
    with pytest.raises(NoMatchError, match="layers/dense.*variable_axes=.'intermediates': 0"):
        capture(Layers(False), "layers/dense")(variables, X)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.block = Block(rngs)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "before", 2 * x)
        return self.block(x)


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks, self.head = nnx.List([Block(rngs), Block(rngs)]), nnx.Linear(4, 3, rngs=rngs)

    def encode(self, x):
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x

    def __call__(self, x):
        return self.head(self.encode(x))


def test_nnx_features_are_what_the_modules_return():
    model = nnx.view(Stack(nnx.Rngs(0)), use_running_average=True)
    out, features = capture(model, ("blocks/*", "blocks/*/norm", "encode"))(X)
    assert set(features) == {"blocks/0", "blocks/0/norm", "blocks/1", "blocks/1/norm", "encode"}
    np.testing.assert_allclose(out, model(X), rtol=1e-5, atol=1e-6)
    first = model.blocks[0]
    np.testing.assert_allclose(
        features["blocks/0/norm"], first.norm(first.dense(X)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(features["blocks/1"], nnx.relu(features["blocks/1/norm"]), rtol=1e-6)
    np.testing.assert_allclose(features["encode"], features["blocks/1"], rtol=1e-6)


def test_nnx_sown_values_are_features_too():
    graph, state = nnx.split(Sowing(nnx.Rngs(0)))
    _, features = jax.jit(
        lambda state, x: capture(nnx.merge(graph, state), ("before", "block"))(x)
    )(state, X)
    np.testing.assert_allclose(features["before"], 2 * X, rtol=1e-6)
    assert set(features) == {"before", "block"}


def test_nnx_works_under_jit_with_gradients_and_batch_statistics():
    graph, params, rest = nnx.split(Stack(nnx.Rngs(0)), nnx.Param, ...)

    def forward(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)
        out, features = capture(model, "blocks/*/norm")(x)
        return features["blocks/0/norm"], (out, nnx.state(model, nnx.BatchStat))

    feature, (out, stats) = jax.jit(forward)(params, rest, X)
    plain = nnx.merge(graph, params, rest)
    np.testing.assert_allclose(out, plain(X), rtol=1e-5, atol=1e-5)
    for (path, value), (expected_path, expected) in zip(
        nnx.to_flat_state(stats), nnx.to_flat_state(nnx.state(plain, nnx.BatchStat)), strict=True
    ):
        assert path == expected_path
        np.testing.assert_allclose(value.get_value(), expected.get_value(), rtol=1e-5)
    np.testing.assert_allclose(feature.mean(0), 0, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda p: (forward(p, rest, X)[0] * X).sum()))(params)
    assert gradient["blocks"][0]["dense"]["kernel"].get_value().any()
    assert not gradient["head"]["kernel"].get_value().any()


def test_nnx_captures_that_nobody_uses_cost_nothing():
    graph, state = nnx.split(nnx.view(Stack(nnx.Rngs(0)), use_running_average=True))
    plain = program(lambda state, x: nnx.merge(graph, state)(x), state, X)
    unused = program(lambda state, x: capture(nnx.merge(graph, state), "**")(x)[0], state, X)
    assert unused == plain and plain[1] > 100


def test_nnx_functions_methods_and_their_errors():
    model = nnx.view(Stack(nnx.Rngs(0)), use_running_average=True)
    of_function = capture(lambda model, x: 2 * model.encode(x), "blocks/1")(model, X)
    of_method = capture(model.encode, "blocks/1")(X)
    np.testing.assert_allclose(of_function[0], 2 * of_method[0], rtol=1e-6)
    np.testing.assert_allclose(of_function[1]["blocks/1"], of_method[1]["blocks/1"], rtol=1e-6)
    with pytest.raises(NoMatchError, match=r"'stem'[\s\S]*blocks/0/dense"):
        capture(model, "stem")(X)
    with pytest.raises(ConfigError, match="trace.observe"):
        capture(lambda x: x, "**")(X)
    for wrong in (3, Stack, Net):
        with pytest.raises(ConfigError, match="takes a Linen module or an NNX module"):
            capture(wrong, "**")


def test_the_model_is_as_it_was(net):
    model, variables = net
    before = run(model, variables, X)
    capture(model, "**")(variables, X)
    np.testing.assert_array_equal(run(model, variables, X), before)
    module = nnx.view(Stack(nnx.Rngs(0)), use_running_average=True)
    call, structure = Stack.__call__, jax.tree.structure(nnx.state(module))
    capture(module, "**")(X)
    assert Stack.__call__ is call and jax.tree.structure(nnx.state(module)) == structure
