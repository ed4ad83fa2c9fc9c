"""The loop on blobs: which candidates are tried, what is written, what is trained once."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import compress_jax as cj
from compress_jax.core import ArtifactError, CompressError, ConfigError
from compress_jax.search import Candidate, Network, Requirement, compress
from compress_jax.search._judge import Trained, assess
from compress_jax.search._stage import Stage, stage_key, train
from compress_jax.train import accuracy


def silent(line: str) -> None:
    pass


def leaves(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def asked() -> list:
    """Shapes and dtypes of what the loss was called with."""
    return []


@pytest.fixture(scope="module")
def distilled(experiment, model, training, quantized, asked):
    """An experiment with all there is: a teacher in bfloat16, a loss, two candidates."""

    def loss(student, teacher, labels):
        asked.append([(x.shape, x.dtype.name) for x in (student, teacher, labels)])
        return cj.distill.kl(student, teacher)

    candidates = quantized(8, steps=3), quantized(4, steps=3)
    teacher = Network(dataclasses.replace(model, hidden=(32, 24)), training(30))
    about = {"loss": loss, "teacher": teacher, "teacher_dtype": jnp.bfloat16}
    return experiment(
        candidates=candidates, requirement=Requirement(max_drop=0.1), order="all", **about
    )


@pytest.fixture(scope="module")
def run(distilled, tmp_path_factory):
    """A finished run that tests only read: ``(workdir, result, lines)``."""
    workdir, lines = tmp_path_factory.mktemp("run"), []
    return (
        workdir,
        compress(distilled, workdir, metadata={"arguments": {"bits": 4}}, log_fn=lines.append),
        lines,
    )


@pytest.mark.slow
def test_the_result_is_the_smallest_that_passed(run):
    workdir, result, lines = run
    assert [row.name for row in result.rows] == ["teacher", "student", "int8", "int4"]
    assert result.met and result.chosen.name == "int4" and result.chosen is result.rows[-1]
    assert result.artifact == workdir / "artifact.safetensors"
    assert (
        result.artifact.read_bytes()
        == (workdir / "candidates/int4/artifact.safetensors").read_bytes()
    )
    assert [line.split(":")[0] for line in lines] == [
        "teacher",
        "student in float32",
        "int8",
        "int4",
    ]
    assert all(": accepted: " in line for line in lines[2:])


@pytest.mark.slow
def test_results_json_says_the_same(run):
    workdir, result, _ = run
    results = json.loads((workdir / "results.json").read_text())
    assert (results["experiment"], results["chosen"], results["met"]) == ("blobs", "int4", True)
    assert results["rows"] == [row.as_dict() for row in result.rows]


@pytest.mark.slow
def test_candidates_are_coded_and_what_they_are_compared_with_stays_plain(
    run, distilled, tmp_path, monkeypatch
):
    workdir, result, _ = run
    asked = []

    def save(*args, coded):
        asked.append(coded)
        return cj.save(*args, coded=coded)

    monkeypatch.setattr("compress_jax.search._judge.save", save)
    shutil.copytree(workdir, tmp_path / "again")  # trained already: only written and measured again
    coded = dataclasses.replace(distilled, coded=True)
    metadata = {"arguments": {"bits": 4}}
    again = compress(coded, tmp_path / "again", metadata=metadata, log_fn=silent)
    sizes = [(row.nbytes, other.nbytes) for row, other in zip(result.rows, again.rows, strict=True)]
    # So few weights may have no gain; tests of the artifact show that others have.
    assert asked == [False, False, True, True] and all(b <= a for a, b in sizes[2:])
    for name in ("teacher.safetensors", "student.safetensors"):
        assert (workdir / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert again.chosen.test == result.chosen.test and leaves(cj.load(again.artifact)[0]) == leaves(
        cj.load(result.artifact)[0]
    )


def test_sizes_are_those_on_disk_and_accuracies_those_of_the_files(run, distilled):
    workdir, result, _ = run
    files = (
        "teacher.safetensors",
        "student.safetensors",
        *(f"candidates/int{b}/artifact.safetensors" for b in (8, 4)),
    )
    for row, file in zip(result.rows, files, strict=True):
        model = distilled.teacher.model if row.name == "teacher" else distilled.student.model
        variables = cj.unpack(cj.load(workdir / file)[0])
        assert row.nbytes == (workdir / file).stat().st_size
        assert row.validation == accuracy(model.apply, variables, distilled.data.validation) > 0.8
        assert row.parameters == sum(leaf.size for leaf in jax.tree.leaves(variables))
        tested = row.name != "int8"  # the test split is for the final table alone
        assert row.test == (
            accuracy(model.apply, variables, distilled.data.test) if tested else None
        )


def test_the_artifact_says_what_it_is(run, distilled):
    _, result, _ = run
    packed, metadata = cj.load(result.artifact)
    assert [type(layer["kernel"]).__name__ for layer in packed["params"].values()] == [
        "Quantized"
    ] * 3
    assert metadata == {
        "experiment": "blobs", "name": "int4", "model": "LeNet300100(classes=3, hidden=(24, 16))",
        "data": "blobs",
        "data_sha256": "0" * 64, "validation": result.chosen.validation, "arguments": {"bits": 4},
        "left_alone": {"no pattern matches": ["dense_0/bias", "dense_1/bias", "head/bias"]},
    }  # fmt: skip


def test_the_teacher_is_kept_in_its_own_dtype_and_asked_for_float32(run, asked):
    workdir, _, _ = run
    variables = cj.load(workdir / "teacher.safetensors")[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"bfloat16"}
    assert asked and all(
        call == [((32, 3), "float32"), ((32, 3), "float32"), ((32,), "int32")] for call in asked
    )


@pytest.mark.slow
def test_again_in_the_same_folder_is_the_same_without_a_step(run, distilled, monkeypatch):
    workdir, result, lines = run
    files = [
        *workdir.glob("*.safetensors"),
        *workdir.rglob("*.json*"),
        *workdir.rglob("artifact.safetensors"),
    ]
    before, again = {file: file.read_bytes() for file in files}, []

    class NoBatches:
        def __getitem__(self, step):
            raise AssertionError("a finished stage was trained again")

    monkeypatch.setattr("compress_jax.search._stage.batches", lambda *args, **kwargs: NoBatches())
    assert (
        compress(distilled, workdir, metadata={"arguments": {"bits": 4}}, log_fn=again.append)
        == result
    )
    assert (
        again == lines
        and {file: file.read_bytes() for file in files} == before
        and len(before) >= 10
    )


@pytest.fixture(scope="module")
def restored(run, distilled):
    """The networks of the finished run, as another may take them."""
    workdir, _, _ = run
    files = {"teacher": workdir / "teacher.safetensors", "student": workdir / "student.safetensors"}
    return {
        name: Network(getattr(distilled, name).model, artifact=file) for name, file in files.items()
    }


@pytest.mark.slow
def test_networks_are_restored_from_artifacts(run, distilled, restored, tmp_path):
    workdir, result, _ = run
    again = compress(
        dataclasses.replace(distilled, **restored),
        tmp_path,
        metadata={"arguments": {"bits": 4}},
        log_fn=silent,
    )
    assert not (tmp_path / "teacher").exists() and not (tmp_path / "student").exists()
    assert again.rows == result.rows and again.artifact.read_bytes() == result.artifact.read_bytes()


@pytest.mark.slow
def test_a_student_may_be_its_own_teacher(experiment, restored, training, tmp_path):
    candidate = Candidate("itself", cj.identity(), training(1))
    about = {
        "student": restored["student"],
        "teacher": "student",
        "loss": lambda s, t, y: jnp.square(s - t).sum(-1),
    }
    result = compress(experiment(**about, candidates=(candidate,)), tmp_path, log_fn=silent)
    assert [row.name for row in result.rows] == ["student", "itself"]
    (line,) = (tmp_path / "candidates/itself/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["train/loss"] == 0.0


@pytest.mark.slow
def test_the_loss_may_be_terms_that_see_features_and_learn_parts(
    run, distilled, experiment, training, tmp_path
):
    """A term of the logits alone is the loss of each example.

    A hint's regressor is trained, and never shipped.
    """
    student, teacher = (
        distilled.student,
        Network(distilled.teacher.model, artifact=run[0] / "teacher.safetensors"),
    )
    about = {
        "student": student,
        "teacher": teacher,
        "candidates": (Candidate("none", cj.identity(), training(2)),),
    }
    hint = cj.distill.on_features(
        cj.distill.hint, "dense_1", "dense_0", 0.1, adapter=cj.distill.linear()
    )
    losses = {
        "function": lambda student, teacher, labels: cj.distill.kl(student, teacher, 2.0),
        "term": (cj.distill.on_logits(cj.distill.kl, temperature=2.0),),
        "hint": (cj.distill.on_logits(cj.distill.kl, temperature=2.0), hint),
    }
    found = {}
    for name, loss in losses.items():
        result = compress(experiment(**about, loss=loss), tmp_path / name, log_fn=silent)
        again = compress(experiment(**about, loss=loss), tmp_path / name, log_fn=silent)
        assert again == result
        found[name] = cj.load(result.artifact)[0]
    for one, other in zip(
        *(jax.tree.leaves(found[name]) for name in ("function", "term")), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert leaves(found["hint"]) != leaves(found["term"])
    assert jax.tree.structure(found["hint"]) == jax.tree.structure(found["term"])
    with pytest.raises(ConfigError, match="name of its own"):
        experiment(**about, loss=(hint, hint))
    for wrong in (hint, [hint], "kl"):
        with pytest.raises(
            ConfigError,
            match=r"a tuple of distill.Term, and is a (Term|list|str); one term is \(term,\)",
        ):
            experiment(**about, loss=wrong)


@pytest.mark.slow
def test_the_float32_student_may_learn_from_labels_alone(
    run, distilled, experiment, training, tmp_path
):
    """With a teacher for the candidates only, the student is that of labels alone."""
    about = {"student": distilled.student, "requirement": Requirement(max_drop=0.99)}
    none = Candidate("none", cj.identity(), training(1))
    alone = compress(experiment(**about, candidates=(none,)), tmp_path / "alone", log_fn=silent)
    teacher = Network(distilled.teacher.model, artifact=run[0] / "teacher.safetensors")
    with_teacher = experiment(
        **about, candidates=(none,), teacher=teacher, loss=distilled.loss, float32_student="labels"
    )
    result = compress(with_teacher, tmp_path / "both", log_fn=silent)
    files = [
        (tmp_path / folder / "student.safetensors").read_bytes() for folder in ("alone", "both")
    ]
    assert files[0] == files[1] and result.rows[1].validation == alone.rows[0].validation
    losses = [
        json.loads((tmp_path / folder / "candidates/none/metrics.jsonl").read_text())
        for folder in ("alone", "both")
    ]
    assert losses[0]["train/loss"] != losses[1]["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "names", "tried"),
    [
        ("mild_first", ["int8", "nothing", "int4"], ["int8", "nothing"]),
        ("strong_first", ["nothing", "int8", "int4"], ["nothing", "int8"]),
        ("all", ["nothing", "int8"], ["nothing", "int8"]),
    ],
)
def test_the_order_decides_who_is_tried(
    order, names, tried, experiment, restored, quantized, nothing, tmp_path
):
    known = {"int8": quantized(8), "int4": quantized(4), "nothing": nothing}
    candidates = tuple(known[name] for name in names)
    about = {
        "candidates": candidates,
        "student": restored["student"],
        "requirement": Requirement(max_drop=0.2),
    }
    result = compress(experiment(order=order, **about), tmp_path, log_fn=silent)
    assert [row.name for row in result.rows] == ["student", *tried]
    assert result.met and result.chosen.name == "int8"
    assert {row.name: row.accepted for row in result.rows[1:]} == {"int8": True, "nothing": False}
    assert sorted(folder.name for folder in (tmp_path / "candidates").iterdir()) == sorted(tried)


@pytest.mark.slow
def test_if_none_passes_the_most_accurate_is_written_and_said_to_fail(
    experiment, restored, quantized, nothing, tmp_path
):
    about = {
        "candidates": (nothing, quantized(8)),
        "order": "all",
        "requirement": Requirement(max_bytes=100),
    }
    lines = []
    result = compress(
        experiment(student=restored["student"], **about), tmp_path, log_fn=lines.append
    )
    assert not result.met and result.chosen.name == "int8" and result.chosen.accurate
    assert "refused" in lines[-1] and "more than 100" in lines[-1]
    assert (
        result.artifact.read_bytes()
        == (tmp_path / "candidates/int8/artifact.safetensors").read_bytes()
    )
    assert json.loads((tmp_path / "results.json").read_text())["met"] is False


@pytest.mark.slow
def test_a_pack_that_lies_is_caught_before_it_is_believed(
    experiment, restored, quantized, tmp_path
):
    honest = quantized(8)

    def lie(params, state):
        return {
            **params,
            "head": {**params["head"], "bias": params["head"]["bias"] + jnp.float32(2**-10)},
        }

    liar = dataclasses.replace(honest, method=honest.method._replace(pack=lie, bind=None))
    with pytest.raises(CompressError, match="int8/artifact.safetensors does not give the outputs"):
        compress(
            experiment(student=restored["student"], candidates=(liar,)), tmp_path, log_fn=silent
        )
    assert not (tmp_path / "results.json").exists()


def test_a_file_that_is_no_network_is_an_error(experiment, model, tmp_path):
    cj.save(tmp_path / "file", {"kernel": jnp.ones(3)})
    for file, said in (
        (tmp_path / "file", "holds no 'params'"),
        (tmp_path / "none", "cannot read"),
    ):
        with pytest.raises(ArtifactError, match=f"{said}"):
            compress(
                experiment(student=Network(model, artifact=file)), tmp_path / "run", log_fn=silent
            )


@pytest.mark.slow
def test_eight_devices_train_what_one_does(experiment, quantized, model, mesh, tmp_path):
    variables, candidate, states = (
        model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))),
        quantized(4, steps=20),
        [],
    )
    for n in (1, 8):
        stage = Stage(
            "stage", cj.tasks.pure(model), candidate.training, None, candidate.method, variables
        )
        states.append(train(experiment(mesh=mesh(n)), stage, tmp_path / str(n)))
        # Trained on all; what comes after, such as packing, is done on one.
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(states[-1].opt_state)} == {n}
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(states[-1].params)} == {1}
    for one, eight in zip(*(jax.tree.leaves(state.trainable) for state in states), strict=True):
        np.testing.assert_allclose(one, eight, atol=2e-4, rtol=1e-3)
    for before, after in zip(
        jax.tree.leaves(variables["params"]), jax.tree.leaves(states[0].params), strict=True
    ):
        assert abs(np.asarray(before) - np.asarray(after)).max() > 0.01, "both learned something"


def test_the_key_of_a_stage_is_its_own_and_the_seeds():
    keys = [
        jax.random.key_data(stage_key(*of)).tolist()
        for of in [(0, "a"), (0, "b"), (1, "a"), (0, "a")]
    ]
    assert keys[0] == keys[3] and len({tuple(key) for key in keys}) == 3


@pytest.mark.slow
def test_a_model_is_described_without_addresses(experiment, tmp_path):
    """An address would make the file differ from process to process."""

    class Odd(nn.Module):
        hidden: int = 3
        act: Any = nn.relu
        start: Any = nn.initializers.zeros

        @nn.compact
        def __call__(self, x, train=False):
            x = self.act(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
            return nn.Dense(3, kernel_init=self.start)(x)

    model = Odd(hidden=5, act=lambda x: x)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    trained = Trained("row", cj.tasks.pure(model), dict(variables), packed=variables)
    assess(experiment(), trained, tmp_path / "file", {})
    described = cj.load(tmp_path / "file")[1]["model"]
    assert (
        described.startswith("Odd(hidden=5, act=<function ")
        and " at 0x" not in described
        and "start" not in described
    )


@pytest.mark.slow
def test_training_starts_from_variables_that_are_given(experiment, model, training, tmp_path):
    """Published weights are where a network's training starts, or all that it has."""
    variables = model.init(jax.random.key(7), jnp.zeros((1, 4, 4, 1)))
    for steps, name in ((0, "kept"), (1, "moved")):
        student = Network(model, training(steps), variables=variables)
        compress(experiment(student=student), tmp_path / name, log_fn=silent)
    compress(
        experiment(student=Network(model, variables=variables)), tmp_path / "given", log_fn=silent
    )
    found = {
        name: leaves(cj.load(tmp_path / name / "student.safetensors")[0])
        for name in ("kept", "moved", "given")
    }
    assert found["kept"] == found["given"] == leaves(variables) != found["moved"]
    with pytest.raises(ConfigError, match="variables must be a dict with 'params'"):
        Network(model, variables={"kernel": 1})
    with pytest.raises(ConfigError, match="an artifact stands alone"):
        Network(model, variables=variables, artifact="file")
