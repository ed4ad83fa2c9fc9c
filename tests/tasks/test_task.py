"""Ready tasks learn what they are for; what cannot be right is refused in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.core import CompressError, ShapeError
from compress_jax.tasks._measure import require_entries, scored

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype(np.float32)


class Tagger(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask=None):
        return nn.Dense(5)(nn.relu(nn.Dense(16)(nn.Embed(5, 8)(tokens))))


def learned(task, model, split, *, terms=None, teacher=None, steps=60, rate=0.02):
    """Train, and return the metrics before and after and the last metrics of training."""
    pure = cj.tasks.pure(model)
    batch = jax.tree.map(jnp.asarray, split)
    variables = pure.init(jax.random.key(0), *task.inputs_of(task.prepare(batch)))
    loss = cj.train.distillation(pure, terms or [task.on_labels(1.0)], task=task)
    aux = loss.init(jax.random.key(1), variables, batch, teacher)
    optimizer = optax.adam(rate)
    state = cj.train.create(variables, cj.identity(), optimizer, jax.random.key(2), aux)
    step = jax.jit(cj.train.make_step(loss, optimizer, cj.identity()))
    for _ in range(steps):
        state, metrics = step(state, batch, teacher=teacher)
    if task.labels is None:
        split = {**split, task.label_entry: np.asarray(teacher(*task.inputs_of(batch)))}
    found = [
        cj.tasks.measure(task, pure.apply, each, split).values[task.metric.name]
        for each in (variables, state.variables())
    ]
    return *found, {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
def test_numbers_are_learned():
    y = (X @ RNG.normal(size=(6, 2))).astype(np.float32)
    before, after, metrics = learned(
        cj.tasks.regression(), nn.Dense(2), {"x": X, "y": y}, steps=150
    )
    assert after < 0.1 * before and "accuracy" not in metrics


@pytest.mark.slow
def test_tags_are_learned_and_padding_is_not():
    tokens = RNG.integers(1, 5, (32, 7)).astype(np.int32)
    mask = np.arange(7)[None] < RNG.integers(1, 8, 32)[:, None]
    split = {"tokens": tokens, "mask": mask, "label": (tokens * 2 % 5).astype(np.int32)}
    task = cj.tasks.token_classification()
    assert learned(task, Tagger(), split)[1] == 1.0
    # Labels of padding say something else, and count for nothing.
    wrong = {**split, "label": np.where(mask, split["label"], 0).astype(np.int32)}
    assert learned(task, Tagger(), wrong)[1] == 1.0


def test_the_next_token_is_learned():
    split = {"tokens": np.cumsum(np.full((32, 9), 3, np.int32), 1, dtype=np.int32) % 5}
    before, after, _ = learned(cj.tasks.language_modelling(), Tagger(), split)
    assert before > 3 and after < 1.2


def test_transcriptions_are_learned():
    frames = np.eye(4, dtype=np.float32)[np.repeat([0, 1, 2, 3], 4)][None].repeat(8, 0)
    labels = np.tile(np.array([1, 2, 3], np.int32), (8, 1))
    task = cj.tasks.transcription("x", unit="character")
    before, after, _ = learned(task, nn.Dense(4), {"x": frames, "label": labels}, rate=0.1)
    assert after == 0.0 and task.metric.name == "character error rate"


@pytest.mark.parametrize("make", [cj.tasks.embedding, lambda x: cj.tasks.classification(x, None)])
def test_without_labels_the_teacher_says_what_is_right(make):
    task = make("x")
    weights = {"params": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32)}
    teacher = cj.distill.Teacher(lambda v, x: x @ v["params"], weights)
    terms = task.distillation(temperature=2.0)
    assert len(terms) == 1
    before, after, _ = learned(task, nn.Dense(3), {"x": X}, terms=terms, teacher=teacher)
    assert after > max(before, 0.9)


def test_several_inputs_reach_student_and_teacher():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x, scale, train=False):
            return nn.Dense(3)(x * scale[:, None])

    task = cj.tasks.classification(("x", "scale"), "y")
    model = Both()
    split = {"x": X, "scale": np.ones(64, np.float32), "y": np.arange(64, dtype=np.int32) % 3}
    variables = model.init(jax.random.key(5), X, split["scale"])
    teacher = cj.distill.Teacher(cj.tasks.pure(model).apply, variables)
    terms = task.distillation(0.0, 1.0)
    _, _, metrics = learned(task, model, split, terms=terms, teacher=teacher, steps=200)
    assert metrics["agreement"] > 0.9


def test_outputs_of_another_runtime_are_scored_alike():
    task = cj.tasks.classification("x", "y")
    split = {"x": X[:, :3], "y": np.arange(64, dtype=np.int32) % 3}
    direct = cj.tasks.measure(task, lambda w, x: x * w, jnp.float32(2), split).values
    assert scored(task, 2 * X[:, :3], split) == direct


WRONG = {
    "an entry that is not there": (cj.tasks.classification(), {"x": X}, "needs 'image'.*'x'"),
    "tokens that are not there": (cj.tasks.language_modelling(), {"x": X}, "needs 'tokens'"),
}


@pytest.mark.parametrize("which", WRONG)
def test_a_split_without_an_entry_is_refused(which):
    task, split, said = WRONG[which]
    with pytest.raises(CompressError, match=said):
        require_entries(task, split)


def test_labels_that_cannot_be_right_are_refused():
    check = cj.tasks.classification().check_labels
    for labels, said in (
        (np.array([0, 3]), "0 to 3, but there are 3 classes"),
        (np.array([-1, 1]), "-1 to 1"),
        (np.array([0.5]), "must be integers"),
        (np.eye(3, dtype=np.int32), "one an example"),
    ):
        with pytest.raises(CompressError, match=said):
            check(labels, 3)
    with pytest.raises(ShapeError, match="must be floats"):
        cj.tasks.regression().check_labels(np.array([1, 2]), None)


@pytest.mark.parametrize(
    ("task", "out", "labels"),
    [
        (cj.tasks.classification(), (2, 3), (2,)),
        (cj.tasks.token_classification(), (2, 7, 3), (2, 7)),
        (cj.tasks.transcription(), (2, 30, 3), (2, 7)),
        (cj.tasks.regression(), (2, 3), (2, 3)),
    ],
)
def test_outputs_must_fit_the_labels(task, out, labels):
    def struct(shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    task.check_outputs(struct(out), struct(labels), 3)
    for wrong in (out[:-1], (*out, 1), (3, *out[1:]), (*out[:-1], 2)):
        with pytest.raises(ShapeError, match="the model must give"):
            task.check_outputs(struct(wrong), struct(labels), 3)
    with pytest.raises(ShapeError, match="it gives a tuple"):
        task.check_outputs((struct(out),), struct(labels), 3)


def test_alpha_shares_labels_and_teacher():
    task = cj.tasks.classification()
    assert [term.weight for term in task.distillation(0.3, 4.0)] == [0.3, 0.7]
    assert [len(task.distillation(alpha)) for alpha in (0, 1)] == [1, 1]
    with pytest.raises(CompressError, match="alpha is the share of the labels"):
        task.distillation(1.5)
