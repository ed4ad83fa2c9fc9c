"""What cannot work is found before anything is trained, by the name of the piece that is wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.core import CompressError, ConfigError, DataError
from compress_jax.search import Candidate, Network, Requirement, Training, compress
from compress_jax.search._check import check


def refuses(experiment, *words: str) -> None:
    """The whole loop refuses it, says all of this, and has written nothing."""
    with pytest.raises(CompressError) as error:
        check(experiment, {})
    assert all(word in str(error.value) for word in words), str(error.value)


def under(compression, training, name: str = "it", steps: int = 1) -> tuple[Candidate, ...]:
    return (Candidate(name, compression, training(steps)),)


class Wrong(nn.Module):
    """A network whose output is what a function makes of its logits."""

    change: object

    @nn.compact
    def __call__(self, x, train=False):
        return self.change(nn.Dense(3)(x.reshape(x.shape[0], -1)))


def grows(params, state, **_):
    return state._replace(fixed={**state.fixed, "more": jnp.ones(())})


BASE = cj.identity()
CANDIDATES = {
    "a glob that matches nothing": (lambda: cj.at("**/kernels", cj.quantize.uniform(4)),
        "matches no leaf"),
    "one inside a chain": (lambda: cj.chain(cj.identity(), cj.at("x/**",
        cj.prune.magnitude(0.5))), "matches no leaf"),
    "one of rules": (lambda: cj.rules([("**/kernel", cj.identity()), ("nothing", cj.identity())]),
        "nothing"),
    "groups that do not divide": (lambda: cj.at("**/kernel", cj.quantize.uniform(4,
        granularity=7)), "7"),
    "a view of another shape": (lambda: BASE._replace(view=lambda p,
        s: jax.tree.map(lambda x: x[None], p)), "view"),
    "a view of another dtype": (
        lambda: BASE._replace(view=lambda p, s: jax.tree.map(lambda x: x.astype(jnp.bfloat16),
        p)), "view",
    ),
    "an update that grows its state": (lambda: BASE._replace(update=grows), "update"),
    "an init that fails": (lambda: BASE._replace(init=lambda p: p["nowhere"]), "KeyError"),
}  # fmt: skip


@pytest.mark.wide(4)
@pytest.mark.parametrize("which", CANDIDATES)
def test_a_candidate_that_cannot_work_is_named(which, experiment, training):
    make, said = CANDIDATES[which]
    refuses(
        experiment(candidates=under(make(), training, name="the one")), "candidate 'the one'", said
    )


def test_a_candidate_may_need_values(experiment, training):
    """What cannot be traced is said to be unchecked, and is none the worse for it."""
    needs = BASE._replace(
        init=lambda p: cj.CompressionState(
            {}, {"n": jnp.asarray(float(jax.tree.leaves(p)[0].max()))}
        )
    )
    (sentence,) = check(experiment(candidates=under(needs, training)), {})
    assert "candidate 'it'" in sentence and "not checked" in sentence


CHANGES = {
    "too few outputs": (lambda y: y[:, :2], "3 classes"),
    "a rank too many": (lambda y: y[:, None], "logits"),
    "a tuple": (lambda y: (y, y), "logits"),
    "a mean over the batch": (lambda y: y.mean(0, keepdims=True), "logits"),
    "an error": (lambda y: y @ jnp.ones((9, 9)), "TypeError"),
}


@pytest.mark.parametrize("which", CHANGES)
@pytest.mark.parametrize("network", ["student", "teacher"])
def test_outputs_that_do_not_fit_the_labels(which, network, experiment, training):
    change, said = CHANGES[which]
    refuses(experiment(**{network: Network(Wrong(change), training(1))}), f"{network}: ", said)


def test_a_metric_that_cannot_be_computed(experiment):
    task = cj.tasks.classification(metrics=(cj.tasks.accuracy(), cj.tasks.accuracy(top=5)))
    refuses(experiment(task=task), "student: top-5 accuracy is 1 for 3 classes")
    wrong = cj.tasks.mean("wrong", lambda y, t: y @ t)
    refuses(experiment(task=task._replace(metrics=(wrong,))), "student: Type")


def test_a_batch_that_the_devices_cannot_share(experiment, model, training, mesh):
    odd = Network(model, dataclasses.replace(training(1), batch_size=30))
    refuses(experiment(student=odd, mesh=mesh(8)), "choose a multiple of 8")


def test_a_loss_that_cannot_compare_student_and_teacher(experiment, model, training):
    teacher = Network(dataclasses.replace(model, classes=5), training(1))
    refuses(experiment(teacher=teacher, loss=lambda s, t, y: cj.distill.kl(s, t)), "student: ")
    wide = cj.distill.on_features(cj.distill.hint, "dense_9", "dense_0")
    refuses(experiment(teacher=Network(model, training(1)), loss=(wide,)), "dense_9")


@pytest.mark.wide(3)
@pytest.mark.parametrize("training_changes", [
    {"batch_size": 300},
    {"augment": lambda key, batch: {"image": batch["image"]}},
    {"augment": lambda key, batch: {**batch, "image": batch["image"][:, :2]}},
    {"optimizer": optax.masked(optax.sgd(0.1), {"not": True})},
])  # fmt: skip
def test_training_that_cannot_take_a_step(training_changes, experiment, model, training, quantized):
    brief = dataclasses.replace(training(1), **training_changes)
    refuses(experiment(student=Network(model, brief)), "student: ")
    refuses(
        experiment(candidates=(dataclasses.replace(quantized(4), training=brief),)),
        "candidate 'int4': ",
    )


DATA = {
    "labels out of range": ("label", lambda x: x + 3, "3 to 5"),
    "negative labels": ("label", lambda x: x - 1, "-1 to 1"),
    "labels that are floats": ("label", lambda x: x.astype(np.float32), "float32"),
    "labels one-hot": ("label", lambda x: np.eye(3, dtype=np.int32)[x], "int32["),
    "fewer labels": ("label", lambda x: x[1:], "one length"),
    "bytes": ("image", lambda x: x.astype(np.uint8), "uint8"),
    "another shape": ("image", lambda x: x[:, :2], "[2, 4, 1]"),
    "a NaN": (
        "image",
        lambda x: np.where(np.arange(len(x))[:, None, None, None] == 5, np.float32("nan"), x),
        "is 5",
    ),
    "nothing": ("image", lambda x: None, "a dict of arrays"),
}


@pytest.mark.parametrize("which", DATA)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_data_that_are_no_labelled_images(which, split, experiment, blobs):
    key, change, said = DATA[which]
    bad = {**getattr(blobs, split), key: change(getattr(blobs, split)[key])}
    with pytest.raises(DataError) as error:
        check(experiment(data=dataclasses.replace(blobs, **{split: bad})), {})
    assert said in str(error.value) or which == "another shape"


@pytest.mark.parametrize("metadata", [{"x": float("inf")}, {"x": object()}, {"x": float("nan")}])
def test_what_cannot_be_written_in_the_end_is_refused_at_the_start(metadata, experiment, tmp_path):
    with pytest.raises(ConfigError, match="JSON"):
        compress(experiment(), tmp_path, metadata=metadata, log_fn=print)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_works_passes_and_computes_nothing(
    experiment, model, training, quantized, monkeypatch
):
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("something was compiled"))
    loss = (
        cj.distill.on_logits(cj.distill.kl),
        cj.distill.on_features(cj.distill.hint, "dense_1", "dense_1"),
    )
    candidates = (
        *under(cj.quantize.lsq(4), training),
        quantized(4),
        *under(cj.cluster.kmeans(4), training, "k", 0),
    )
    assert (
        check(experiment(teacher=Network(model, training(1)), loss=loss, candidates=candidates), {})
        == []
    )


FIELDS = [
    (Requirement, "max_drop", (-0.1, "0.1", None, True, float("nan"), float("inf"))),
    (Requirement, "min_ratio", (0, -1, float("inf"), "8", float("nan"))),
    (Requirement, "max_bytes", (-1, 0, "1k", None, True)),
    (Requirement, "reference", ("techer", None, 1)),
    (Training, "steps", (-5, 1.5, "9", None, True)),
    (Training, "batch_size", (0, -1, 2.0)),
    (Training, "save_every", (0, None)),
    (Training, "optimizer", (optax.adam, 0.1, None)),
    (Training, "learned", (0.1,)),
    (Training, "augment", ("flip",)),
]


@pytest.mark.parametrize(
    ("kind", "field", "values"), FIELDS, ids=lambda each: str(getattr(each, "__name__", each))[:20]
)
def test_a_field_of_the_wrong_type_or_range_is_refused_by_name(kind, field, values):
    usual = {"optimizer": optax.sgd(0.1), "steps": 1} if kind is Training else {}
    for value in values:
        with pytest.raises(ConfigError, match=f"{kind.__name__}: {field} must be"):
            kind(**{**usual, field: value})


def test_a_drop_of_one_is_told_what_it_means(experiment):
    with pytest.raises(ConfigError, match="1 means all of it; one point is 0.01"):
        experiment(requirement=Requirement(max_drop=1))


@pytest.mark.parametrize("changes", [
    {"candidates": []}, {"candidates": None}, {"candidates": ("int4",)}, {"data": {}},
    {"student": None}, {"seed": -1},
    {"seed": 1.5}, {"coded": 1}, {"teacher_dtype": "int8"}, {"teacher_dtype": "floot"},
    {"requirement": 0.01},
    {"mesh": 8}, {"teacher": 3},
])  # fmt: skip
def test_fields_of_an_experiment(changes, experiment):
    with pytest.raises(ConfigError, match=f"Experiment: {list(changes)[0]} must be"):
        experiment(**changes)


@pytest.mark.parametrize(
    "compression", [cj.quantize.gptq, cj.prune.shrink, "int4", None, [cj.identity()]]
)
def test_a_candidate_needs_a_way_to_get_smaller(compression, training):
    with pytest.raises(ConfigError, match="candidate 'x': method must be a Compression"):
        Candidate("x", compression, training(1))


def test_a_network_needs_a_model_that_was_made(training):
    for wrong in (Wrong, None, lambda x: x, (nn.relu,)):
        with pytest.raises(ConfigError, match="Network: model must be"):
            Network(wrong, training(1))
