"""The step trains params and learned arrays together, and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from compress_jax.core import ArgumentError, Compression, CompressionState, identity
from compress_jax.distill import Teacher, on_logits
from compress_jax.models import LeNet300100
from compress_jax.train import (
    create,
    distillation,
    distilled,
    label_optimizer,
    make_step,
    supervised,
)


def scaled() -> Compression:
    """``view = scale * mask * params``: scales learned, masks fixed, updated to count the steps."""

    def init(params):
        ones = jax.tree.map(jnp.ones_like, params)
        return CompressionState(
            {"scale": jnp.float32(2.0)},
            {"mask": ones, "seen": jnp.zeros((), jnp.int32), "grads": ones},
        )

    def view(params, state):
        return jax.tree.map(
            lambda p, m: state.learned["scale"] * m * p, params, state.fixed["mask"]
        )

    def update(params, state, *, step, grads=None, stats=None, key=None):
        assert key is not None
        mask = jax.tree.map(jnp.zeros_like, state.fixed["mask"])
        return state._replace(fixed={"mask": mask, "seen": step + 100, "grads": grads})

    return Compression(init, view, update, lambda params, state: view(params, state))


def quadratic(params, model_state, batch, key, teacher, train=True):
    return 0.5 * jnp.square(params["w"] - batch).sum(), (model_state, {"w": params["w"].sum()})


def test_one_step_follows_the_analytic_gradients_of_params_and_learned():
    optimizer = label_optimizer(optax.sgd(0.1), optax.sgd(0.01))
    state = create(
        {"params": {"w": jnp.array([1.0, -1.0])}}, scaled(), optimizer, jax.random.key(0)
    )
    step = make_step(quadratic, optimizer, scaled())
    new, metrics = step(state, jnp.array([1.0, 3.0]))
    residual = np.array([2.0 * 1 - 1, 2.0 * -1 - 3])  # scale * w - batch
    np.testing.assert_allclose(
        new.params["w"], np.array([1.0, -1.0]) - 0.1 * residual * 2.0, rtol=1e-6
    )
    np.testing.assert_allclose(
        new.learned["scale"], 2.0 - 0.01 * (residual @ [1.0, -1.0]), rtol=1e-6
    )
    np.testing.assert_allclose(metrics["loss"], 0.5 * residual @ residual, rtol=1e-6)
    assert int(new.fixed["seen"]) == 100 and int(new.step) == 1
    np.testing.assert_array_equal(
        new.fixed["grads"]["w"], residual
    )  # at the weights the model used
    masked, metrics = step(new, jnp.array([1.0, 3.0]))
    assert float(metrics["w"]) == 0.0  # the updated mask is in force
    np.testing.assert_array_equal(masked.params["w"], new.params["w"])
    np.testing.assert_array_equal(
        masked.fixed["grads"]["w"], [-1.0, -3.0]
    )  # dense, though all is masked


def test_it_is_traced_once_over_many_steps():
    traces = []

    def loss(params, model_state, batch, key, teacher, train=True):
        traces.append(1)
        return quadratic(params, model_state, batch, key, teacher)

    optimizer = label_optimizer(optax.adam(1e-2), optax.sgd(1e-2))
    state = create({"params": {"w": jnp.ones(2)}}, scaled(), optimizer, jax.random.key(0))
    step = jax.jit(make_step(loss, optimizer, scaled()), donate_argnums=0)
    for _ in range(20):
        state, _ = step(state, np.ones(2, np.float32))
    assert len(traces) == 1
    assert int(state.step) == 20


def test_create_copies_so_that_donation_leaves_the_callers_arrays_alive():
    kernel = jnp.ones((4, 4))
    state = create({"params": {"w": kernel}}, identity(), optax.adam(0.1), jax.random.key(0))
    jax.jit(make_step(quadratic, optax.adam(0.1), identity()), donate_argnums=0)(
        state, jnp.zeros((4, 4))
    )
    assert kernel.sum() == 16.0
    assert state.params["w"].is_deleted()


def test_create_explains_wrong_arguments():
    with pytest.raises(ValueError, match="must hold 'params'.*kernel"):
        create({"kernel": jnp.ones(1)}, identity(), optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ArgumentError, match=r"jax.random.key\(seed\)"):
        create({"params": {}}, identity(), optax.sgd(0.1), jax.random.PRNGKey(0))


def test_every_step_and_every_run_draws_its_own_numbers():
    def loss(params, model_state, batch, key, teacher, train=True):
        return params["w"].sum(), (model_state, {"drawn": jax.random.uniform(key)})

    step = jax.jit(make_step(loss, optax.sgd(0.1), identity()))
    runs = [
        create({"params": {"w": jnp.ones(2)}}, identity(), optax.sgd(0.1), jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    drawn = [
        float(step(step(state, None)[0] if late else state, None)[1]["drawn"])
        for state in runs
        for late in (0, 1)
    ]
    assert drawn[0:2] == drawn[2:4] and len(set(drawn)) == 4


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(4)(nn.BatchNorm(use_running_average=not train)(x.reshape(len(x), -1)))


def test_model_state_moves_in_training_only():
    model, calls = Normalised(), []
    batch = {"image": jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), "label": jnp.arange(4)}

    def augment(key, batch):
        calls.append(1)
        return batch

    loss = supervised(model, augment=augment)
    variables = jax.jit(model.init)(jax.random.key(1), batch["image"])
    state = create(variables, identity(), optax.sgd(0.1), jax.random.key(2))
    step = jax.jit(make_step(loss, optax.sgd(0.1), identity()))
    first, metrics = step(state, batch)
    before, after = (jax.tree.leaves(s.model_state["batch_stats"]) for s in (state, first))
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert sorted(metrics) == ["accuracy", "labels", "loss"]
    in_eval_mode = jax.jit(lambda s: loss(s.params, s.model_state, batch, s.key, None, train=False))
    _, (unmoved, _) = in_eval_mode(state)
    assert len(calls) == 1  # no augmentation in eval mode
    jax.tree.map(np.testing.assert_array_equal, unmoved, state.model_state)


def test_the_teacher_is_an_argument_that_sees_the_augmented_batch_and_gets_no_gradient():
    model = LeNet300100(classes=2, hidden=(3,))
    batch = {"image": jnp.ones((2, 4)), "label": jnp.array([0, 1])}
    kernel = {"w": jnp.arange(8.0).reshape(4, 2)}

    def augment(key, batch):
        return {**batch, "image": 2 * batch["image"]}

    def total(s, t, y):
        return (0.0 * s + t).sum(-1)

    def apply(variables, x):
        return x @ variables["w"]

    loss = distillation(model, [on_logits(total, labels=True)], augment=augment)
    with pytest.warns(DeprecationWarning, match="on_logits"):
        old = distilled(model, apply, total, augment=augment)
    variables = model.init(jax.random.key(0), batch["image"])

    def value(params, teacher, loss=loss):
        return loss(params, {}, batch, jax.random.key(1), teacher)[0]

    teacher = Teacher(apply, kernel)
    assert float(value(variables["params"], teacher)) == 2 * 28.0
    assert not jax.grad(value, argnums=1)(variables["params"], teacher).variables["w"].any()
    assert float(value(variables["params"], kernel, old)) == 2 * 28.0
    state = create(variables, identity(), optax.sgd(0.1), jax.random.key(2))
    _, metrics = jax.jit(make_step(loss, optax.sgd(0.1), identity()))(state, batch, teacher=teacher)
    assert float(metrics["loss"]) == 56.0
