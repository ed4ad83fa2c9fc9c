"""Stages that runs share: the same numbers as alone, copied only if made of the same and whole."""

import fcntl
import os
import threading
from pathlib import Path

import numpy as np
import optax
import pytest

import compress_jax as cj
from compress_jax.core.errors import ConfigError
from compress_jax.search._ingredients import require_same
from compress_jax.search._shared import origin, shared_stage

RNG = np.random.default_rng(0)
IMAGES = {"image": RNG.normal(size=(96, 4, 4, 1)).astype("f4"), "label": np.arange(96) % 3}


def experiment(bits: int = 4, seed: int = 0) -> cj.search.Experiment:
    training = cj.search.Training(optax.adam(0.01), 6, batch_size=16)
    student = cj.search.Network(cj.models.LeNet300100(3, (16, 8)), training)
    method = cj.at("**/kernel", cj.quantize.uniform(bits))
    return cj.search.Experiment(
        "random",
        cj.data.Data.from_arrays(IMAGES),
        student,
        (cj.search.Candidate("small", method, training),),
        cj.search.Requirement(max_drop=0.9),
        longer_student=False,
        seed=seed,
    )


def run(folder: Path, **options: int) -> dict[str, bytes]:
    cj.search.compress(experiment(**options), folder, log_fn=lambda line: None)
    names = ("results.json", "artifact.safetensors", "student/metrics.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.slow
def test_a_stage_of_another_run_is_copied_and_ends_with_the_numbers_of_a_run_alone(tmp_path: Path):
    lines: list[str] = []
    with cj.search.sharing(tmp_path / "stages", lines.append):
        run(tmp_path / "a", bits=4)
        assert lines == []
        shared = run(tmp_path / "b", bits=3)
    student = tmp_path / "a/student"
    assert lines == [f"student: made of the same as {student}, and copied from there"]
    assert origin(tmp_path / "b/student") == str(student)
    assert origin(student) is None and origin(tmp_path / "b/candidates/small") is None
    assert shared == run(tmp_path / "alone", bits=3)
    # What is copied takes no space of its own, and its metrics can be changed alone.
    ours = {path.stat().st_ino for path in (tmp_path / "b/student/checkpoints").rglob("*")}
    theirs = {path.stat().st_ino for path in (student / "checkpoints").rglob("*")}
    assert ours & theirs
    metrics = [tmp_path / name / "student/metrics.jsonl" for name in "ab"]
    assert metrics[0].stat().st_ino != metrics[1].stat().st_ino


@pytest.mark.slow
def test_nothing_is_copied_of_another_seed(tmp_path: Path):
    lines: list[str] = []
    with cj.search.sharing(tmp_path / "stages", lines.append):
        run(tmp_path / "a")
        run(tmp_path / "b", seed=1)
    assert lines == [] and origin(tmp_path / "b/student") is None


MADE_OF = {"seed": "0"}


def finish(directory: Path) -> None:
    """Do as a training does, as far as files tell."""
    require_same(directory, MADE_OF)
    (directory / "checkpoints/6").mkdir(parents=True)
    (directory / "checkpoints/6/x").write_text("weights")


def test_a_stage_that_fails_is_not_kept_and_one_that_has_begun_goes_on(tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with cj.search.sharing(tmp_path / "stages", lambda line: None):
        with pytest.raises(KeyError), shared_stage(theirs, MADE_OF, "student"):
            finish(theirs)
            raise KeyError
        (theirs / "checkpoints/6/x").write_text("half")
        finish(ours)
        (ours / "checkpoints/6/x").write_text("own")
        with shared_stage(ours, MADE_OF, "student"):
            pass
        # The stage kept now is that of the second; what has begun is left as it is.
        with shared_stage(theirs, MADE_OF, "student"):
            assert (theirs / "checkpoints/6/x").read_text() == "half"
        with shared_stage(tmp_path / "new", MADE_OF, "student"):
            assert (tmp_path / "new/checkpoints/6/x").read_text() == "own"


def test_a_stage_that_another_run_trains_is_waited_for(tmp_path: Path):
    stages = tmp_path / "stages"
    lines: list[str] = []
    with cj.search.sharing(stages, lines.append), shared_stage(tmp_path / "a", MADE_OF, "student"):
        finish(tmp_path / "a")
    (kept,) = [path for path in stages.iterdir() if path.is_dir()]
    hidden = kept.rename(tmp_path / "hidden")

    def told(line: str) -> None:
        lines.append(line)
        if "waited for" in line:  # the other run finishes only now
            threading.Timer(0.1, lambda: hidden.rename(kept)).start()

    with kept.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with cj.search.sharing(stages, told), shared_stage(tmp_path / "b", MADE_OF, "student"):
            assert (tmp_path / "b/checkpoints/6/x").read_text() == "weights"
    assert [line.split(", ")[0] for line in lines] == [
        "student: another run trains the same",
        f"student: made of the same as {tmp_path / 'a'}",
    ]


def test_a_stage_whose_record_is_another_one_is_refused(tmp_path: Path):
    stages = tmp_path / "stages"
    with cj.search.sharing(stages), shared_stage(tmp_path / "a", MADE_OF, "student"):
        finish(tmp_path / "a")
        (tmp_path / "a/made_of.json").write_text('{"version": 1, "made_of": {"seed": "1"}}')
    with pytest.raises(ConfigError, match="seed was 1, and now is 0"):
        with cj.search.sharing(stages), shared_stage(tmp_path / "b", MADE_OF, "student"):
            pass


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot share stages in .*file"):
        with cj.search.sharing(tmp_path / "file"), shared_stage(tmp_path / "a", MADE_OF, "student"):
            pass


def test_file_systems_without_links_are_copied_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(source: str, target: str) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with cj.search.sharing(tmp_path / "stages", lambda line: None):
        with shared_stage(tmp_path / "a", MADE_OF, "student"):
            finish(tmp_path / "a")
        with shared_stage(tmp_path / "b", MADE_OF, "student"):
            assert (tmp_path / "b/checkpoints/6/x").read_text() == "weights"
