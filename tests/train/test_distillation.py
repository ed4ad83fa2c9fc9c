"""Distillation by terms: adapters under an own label, memory, schedules, and resumed runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import compress_jax as cj
from compress_jax import distill as d
from compress_jax.core.errors import ConfigError, NoMatchError, StateError
from compress_jax.train import (
    as_teacher,
    create,
    distillation,
    fit,
    jit_step,
    label_optimizer,
    make_step,
    mutual_step,
    place,
)


class Net(nn.Module):
    """Two layers with batch norm between: names, collections and a train mode."""

    width: int = 6

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(
            nn.Dense(self.width, name="body")(x)
        )
        return nn.Dense(3, name="head")(nn.relu(x))


SMALL, LARGE = Net(6), Net(10)
X = jax.random.normal(jax.random.key(1), (16, 5))
BATCH = {"image": X, "label": jnp.arange(16) % 3, "index": jnp.arange(16)}
SEE = d.capture(LARGE, ("body", "norm"))
TEACHER = d.Teacher(SEE, LARGE.init(jax.random.key(0), X))
HINT = partial(d.on_features, d.hint, "body", "body", adapter=d.linear())


def begin(loss, optimizer, c=None, teacher=TEACHER, model=SMALL, batch=BATCH):
    variables, key = model.init(jax.random.key(2), X), jax.random.key(3)
    return create(
        variables, c or cj.identity(), optimizer, key, loss.init(key, variables, batch, teacher)
    )


def compiled(loss, optimizer, c=None):
    return jax.jit(make_step(loss, optimizer, c or cj.identity()))


def adam(parts=None):
    return label_optimizer(optax.adam(0.02), optax.adam(0.02), parts)


def same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(*map(jax.random.key_data, (x, y)))
                 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.testing.assert_array_equal(x, y), a, b)  # fmt: skip # noqa: E501


@pytest.mark.slow
def test_parts_train_under_a_label_of_their_own_and_are_never_exported():
    terms = [d.on_labels(0.1), d.on_logits(d.kl, 0.9, temperature=2.0), HINT(1.0)]
    loss = distillation(SMALL, terms)
    optimizer = label_optimizer(optax.sgd(0.0), optax.sgd(0.0), optax.adam(0.05))
    state = begin(loss, optimizer)
    first, step, losses = state, compiled(loss, optimizer), []
    for _ in range(60):
        state, metrics = step(state, BATCH, teacher=TEACHER)
        losses.append(float(metrics["hint"]))
    assert losses[-1] < 0.5 * losses[0]
    same(state.params, first.params)
    assert set(state.variables()) == {"params", "batch_stats"} and "hint" not in state.params
    assert set(metrics) == {
        "loss", "labels", "kl", "hint", "accuracy", "teacher_accuracy", "agreement", "teacher_id"
    }  # fmt: skip


@pytest.mark.slow
def test_the_loss_is_the_scheduled_sum_of_what_its_terms_give():
    weight, cooling = optax.linear_schedule(0.0, 1.0, 4), optax.linear_schedule(8.0, 1.0, 4)
    loss = distillation(SMALL, [d.on_labels(0.5), d.on_logits(d.kl, weight, temperature=cooling)])
    state, step = begin(loss, optax.sgd(0.0)), compiled(loss, optax.sgd(0.0))
    for i in range(3):
        logits, _ = SMALL.apply(state.variables(), X, train=True, mutable=["batch_stats"])
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, BATCH["label"]).mean()
        soft = d.kl(logits, TEACHER(X), 8.0 - 7.0 * i / 4).mean()
        state, metrics = step(state, BATCH, teacher=TEACHER)
        np.testing.assert_allclose(metrics["loss"], 0.5 * hard + i / 4 * soft, rtol=1e-4)


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_with_parts_bank_and_average(tmp_path):
    terms = [
        d.on_labels(),
        HINT(1.0),
        d.contrast("body", "norm", BATCH["label"], dim=4, negatives=5),
    ]
    loss = distillation(SMALL, terms)
    optimizer = adam(optax.adam(0.05))
    step = compiled(loss, optimizer)
    feed = [{name: jnp.roll(x, i, axis=0) for name, x in BATCH.items()} for i in range(6)]
    whole = fit(step, begin(loss, optimizer), feed, steps=6, teacher=TEACHER)
    fit(step, begin(loss, optimizer), feed, steps=3, teacher=TEACHER, directory=tmp_path)
    resumed = fit(step, begin(loss, optimizer), feed, steps=6, teacher=TEACHER, directory=tmp_path)
    same(whole, resumed)
    bank = begin(loss, optimizer).memory["crd"]["bank"]
    assert (resumed.memory["crd"]["bank"].student != bank.student).all(axis=1).all()
    d.require_same(resumed.memory, TEACHER)
    with pytest.raises(StateError, match="began with teacher .*restore the first"):
        d.require_same(resumed.memory, TEACHER.cast(jnp.bfloat16))


@pytest.mark.slow
def test_features_that_no_term_uses_cost_nothing():
    def flops(teacher, terms):
        loss = distillation(SMALL, terms)
        state = begin(loss, optax.sgd(0.1), teacher=teacher)
        lowered = jax.jit(make_step(loss, optax.sgd(0.1), cj.identity())).lower(
            state, BATCH, teacher=teacher
        )
        return lowered.compile().cost_analysis()["flops"]

    kl = d.on_logits(d.kl)
    idle = kl._replace(student=("body", "norm"))
    plain = d.Teacher(LARGE.apply, TEACHER.variables)
    assert flops(TEACHER, [idle]) == flops(plain, [kl]) < flops(TEACHER, [kl, HINT()])


class Graph(nnx.Module):
    def __init__(self, rngs):
        self.body, self.norm = nnx.Linear(5, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.body(x)))))


@pytest.mark.slow
def test_nnx_students_train_on_features_with_dropout_and_batch_statistics():
    graphdef, params, rest = nnx.split(Graph(nnx.Rngs(0)), nnx.Param, ...)
    loss, optimizer, key = (
        distillation(graphdef, [d.on_logits(d.kl), HINT(1.0)]),
        adam(),
        jax.random.key(0),
    )
    variables = {"params": params, "rest": rest}
    state = create(
        variables, cj.identity(), optimizer, key, loss.init(key, variables, BATCH, TEACHER)
    )
    step, losses = compiled(loss, optimizer), []
    for _ in range(40):
        state, metrics = step(state, BATCH, teacher=TEACHER)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert (state.model_state["rest"]["norm"]["mean"][...] != 0).all()
    trained = nnx.merge(graphdef, state.params, state.model_state["rest"])
    trained.eval()
    assert trained(X).shape == (16, 3)


@pytest.mark.slow
def test_logits_and_features_that_come_with_the_batch_train_the_same_student():
    loss, optimizer = distillation(SMALL, [d.on_logits(d.kl), HINT(1.0)]), adam()
    step = compiled(loss, optimizer)
    logits, features = jax.jit(TEACHER.forward)(X)
    cached = {**BATCH, "teacher": logits, "teacher/body": features["body"]}
    online = begin(loss, optimizer)
    offline = online._replace(memory={})
    for _ in range(3):
        online, a = step(online, BATCH, teacher=TEACHER)
        offline, b = step(offline, cached)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    for x, y in zip(jax.tree.leaves(online.params), jax.tree.leaves(offline.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_the_batch_is_augmented_once_for_both_and_the_teacher_has_its_own_view():
    def augment(key, batch):
        return {**batch, "image": batch["image"] * jax.random.uniform(key)}

    teacher = d.Teacher(
        lambda v, x: x[:, :3] + 0.0 * v["w"], {"w": jnp.zeros(())}, view=lambda x: 2.0 * x
    )

    def compare(seen, parts, memory):
        return jnp.square(2.0 * seen.batch["image"][:, :3] - seen.teacher_logits).sum(-1), memory

    loss = distillation(SMALL, [d.Term("difference", compare)], augment=augment)
    _, metrics = compiled(loss, optax.sgd(0.1))(
        begin(loss, optax.sgd(0.1), teacher=teacher), BATCH, teacher=teacher
    )
    assert float(metrics["difference"]) == 0.0


@pytest.mark.slow
def test_the_students_own_average_teaches_it():
    loss, optimizer = (
        distillation(SMALL, [d.on_labels(), d.on_logits(d.kl)], average=0.75),
        optax.sgd(0.5),
    )
    state, step = begin(loss, optimizer, teacher=None), compiled(loss, optimizer)
    expected = state.params
    for _ in range(3):
        expected = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, expected, state.params)
        state, metrics = step(state, BATCH)
    for x, y in zip(
        jax.tree.leaves(state.memory["average"]["params"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert float(metrics["kl"]) > 0


@pytest.mark.slow
def test_prune_quantize_and_distill_in_one_step():
    c = cj.at(
        "**/kernel",
        cj.chain(cj.prune.magnitude(0.5), cj.quantize.uniform(4, granularity="channel")),
    )
    loss, optimizer = distillation(SMALL, [d.on_logits(d.kl), HINT(1.0)]), adam()
    state, step = begin(loss, optimizer, c), compiled(loss, optimizer, c)
    losses = []
    for _ in range(30):
        state, metrics = step(state, BATCH, teacher=TEACHER)
        losses.append(float(metrics["loss"]))
    seen = state.variables(c)["params"]["body"]["kernel"]
    assert (seen == 0).mean() >= 0.5 and losses[-1] < 0.7 * losses[0]
    same(
        cj.unpack(c.pack(state.params, state.compression)), c.view(state.params, state.compression)
    )


@pytest.mark.slow
def test_weights_and_several_teachers_and_masks():
    teachers = d.Teachers((TEACHER, d.Teacher(LARGE.apply, LARGE.init(jax.random.key(9), X))))
    stacked = teachers(X)
    terms = [
        d.on_logits(d.ensembled(d.kl, [1, 3]), temperature=2.0, name="mean of probabilities"),
        d.on_logits(d.averaged(d.mse, [1, 3]), name="mean of losses"),
    ]
    loss = distillation(SMALL, terms)
    state = begin(loss, optax.sgd(0.1), teacher=teachers)
    mask = jnp.arange(16) < 5
    _, metrics = compiled(loss, optax.sgd(0.1))(state, {**BATCH, "mask": mask}, teacher=teachers)
    logits, _ = SMALL.apply(state.variables(), X, train=True, mutable=["batch_stats"])
    p = 0.25 * jax.nn.softmax(stacked[0] / 2) + 0.75 * jax.nn.softmax(stacked[1] / 2)
    soft = 4 * (p * (jnp.log(p) - jax.nn.log_softmax(logits / 2))).sum(-1)
    np.testing.assert_allclose(metrics["mean of probabilities"], soft[:5].mean(), rtol=1e-3)
    each = [d.mse(logits, each) for each in stacked]
    np.testing.assert_allclose(
        metrics["mean of losses"], (0.25 * each[0] + 0.75 * each[1])[:5].mean(), rtol=1e-4
    )

    own = d.Teacher(SMALL.apply, SMALL.init(jax.random.key(8), X))
    loss = distillation(SMALL, [d.on_weights(pattern="**/kernel")])
    _, metrics = compiled(loss, optax.sgd(0.1))(
        begin(loss, optax.sgd(0.1), teacher=own), BATCH, teacher=own
    )
    params = SMALL.init(jax.random.key(2), X)["params"]
    difference = [
        params[k]["kernel"] - own.variables["params"][k]["kernel"] for k in ("body", "head")
    ]
    np.testing.assert_allclose(
        metrics["l2_sp"], sum(0.5 * jnp.square(x).sum() for x in difference), rtol=1e-5
    )


@pytest.mark.slow
def test_mutual_learning_brings_students_together_and_graduates_teach():
    terms = [d.on_labels(0.1), d.on_logits(d.kl)]
    losses, optimizer = [distillation(model, terms) for model in (SMALL, LARGE)], optax.adam(0.02)
    states = tuple(
        begin(loss, optimizer, teacher=None, model=m)
        for loss, m in zip(losses, (SMALL, LARGE), strict=True)
    )
    step = jax.jit(
        mutual_step(
            [make_step(x, optimizer, cj.identity()) for x in losses], [SMALL.apply, LARGE.apply]
        )
    )
    first, _ = step(states, BATCH)[1]
    for _ in range(60):
        states, (own, _) = step(states, BATCH)
    assert own["kl"] < 0.3 * first["kl"]
    teacher = as_teacher(states[0], SMALL.apply)
    np.testing.assert_array_equal(teacher(X), SMALL.apply(states[0].variables(), X))
    with pytest.raises(ConfigError, match="two or more"):
        mutual_step([step], [SMALL.apply])


@pytest.mark.slow
def test_eight_devices_train_the_parts_the_bank_and_the_student_of_one():
    terms = [
        d.on_logits(d.top_k_kl),
        HINT(1.0),
        d.contrast("body", "norm", BATCH["label"], dim=4, negatives=5),
    ]
    loss, optimizer = distillation(SMALL, terms), optax.sgd(0.05)
    logits, features = TEACHER.forward(X)
    batch = {
        **BATCH,
        "teacher": d.top_k(logits, 2),
        **{f"teacher/{path}": x for path, x in features.items()},
    }
    ended = []
    for n in (1, 8):
        mesh = jax.make_mesh(
            (n,), ("data",), devices=jax.devices()[:n], axis_types=(jax.sharding.AxisType.Auto,)
        )
        state = begin(loss, optimizer, teacher=None, batch=batch)
        step, state = (
            jit_step(make_step(loss, optimizer, cj.identity()), mesh, state),
            place(state, mesh),
        )
        for _ in range(2):
            state, metrics = step(state, batch)
        ended.append((state.params, state.parts, state.memory["crd"]["bank"], metrics))
    for one, eight in zip(*map(jax.tree.leaves, ended), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_errors_name_what_is_missing():
    with pytest.raises(ConfigError, match="a name of its own.*'kl', 'kl'"):
        distillation(SMALL, [d.on_logits(d.kl), d.on_logits(d.kl)])
    with pytest.raises(ConfigError, match="a Linen, NNX or Equinox module"):
        distillation(Graph, [d.on_labels()])
    with pytest.raises(
        NoMatchError, match="teacher has no feature 'head', only .'body', 'norm'.*capture"
    ):
        begin(distillation(SMALL, [d.on_features(d.hint, "body", "head")]), optax.sgd(0.1))
    loss = distillation(SMALL, [d.contrast("body", "norm", BATCH["label"], dim=4, negatives=5)])
    state = begin(loss, optax.sgd(0.1))
    with pytest.raises(ConfigError, match="'index'.*'image', 'label'"):
        make_step(loss, optax.sgd(0.1), cj.identity())(
            state, {"image": X, "label": BATCH["label"]}, teacher=TEACHER
        )
