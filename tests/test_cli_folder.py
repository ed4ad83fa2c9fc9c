"""The folder of a run: whose it is, what it is made of, and what damage to its files is told as."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from compress_jax.cli import main

HELPERS = """
import numpy as np
import compress_jax as cj

def split(seed, n):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    image = rng.normal(0, 0.5, (n, 4, 4, 1)).astype(np.float32)
    image[np.arange(n), label, label, 0] += 3
    return {"image": image, "label": label}

def compression():
    return cj.at("**/kernel", cj.quantize.uniform(8))

def unused():
    return 1
"""

CONFIG = '''
"""Blobs."""
import numpy as np, optax
import blob_helpers
from compress_jax.data import Data
from compress_jax.models import LeNet300100
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training

def config(max_bytes: float = float("inf"), candidate_steps: int = 4) -> Experiment:
    """Compress a network for three blobs.

    Args:
      max_bytes: on disk.
      candidate_steps: of training.
    """
    splits = [blob_helpers.split(seed, 64) for seed in range(3)]
    data = Data("blobs", *splits, 3, "0" * 64, ("a", "b", "c"), np.zeros(1), np.ones(1), 1.0, {})
    def training(steps):
        return Training(optax.adam(0.01), steps, batch_size=16, save_every=2)
    candidate = Candidate("small", blob_helpers.compression(), training(candidate_steps))
    return Experiment("blobs", data, Network(LeNet300100(3, (6,)), training(20)), (candidate,),
                      Requirement(max_drop=0.9, min_ratio=0.1, max_bytes=max_bytes))
'''


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a config and the module it imports, which is on the path."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "blob_helpers.py").write_text(HELPERS)
    (folder / "blobs.py").write_text(CONFIG)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("blob_helpers", None)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They take most of the time of a small run, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress_jax.report._page.pictures", lambda run: {})
        yield


@pytest.fixture(scope="module")
def finished(sources: Path) -> Path:
    """A finished run, which tests only copy."""
    assert main(["run", str(sources / "blobs.py"), "--workdir", str(sources / "run")]) == 0
    return sources / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def run(sources: Path, copy: Path, capfd: pytest.CaptureFixture[str]):
    """Call a command on the copy; what it says on standard error is one line, and no trace."""

    def call(command: str, *words: str) -> tuple[int, str]:
        capfd.readouterr()
        first = (
            [str(sources / "blobs.py"), "--workdir", str(copy)] if command == "run" else [str(copy)]
        )
        code = main([command, *first, *words])
        return code, capfd.readouterr().err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and f.name != ".lock"
    }


@pytest.mark.slow
def test_infinity_as_an_argument_ends_as_any_other(finished: Path, run):
    assert json.loads((finished / "run.json").read_text())["arguments"]["max_bytes"] == "inf"
    assert run("run") == (0, "") and run("eval")[0] == 0


STRANGERS = {
    "a config and a log": {"config.py": "mine = 1\n", "log.txt": "my notes\n"},
    "notes": {"notes.md": "x"},
    "a hidden folder": {".git/HEAD": "ref"},
    "another's run.json": {"run.json": '{"name": "another tool"}', "config.py": "mine = 1"},
    "a run.json that is a list": {"run.json": "[1]"},
    "a run.json that is no JSON": {"run.json": "\x00\xff"},
}


@pytest.mark.parametrize("which", STRANGERS)
def test_a_folder_that_is_no_runs_is_left_as_it_is(
    which: str, sources: Path, tmp_path: Path, capsys
):
    for name, text in STRANGERS[which].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    assert main(["run", str(sources / "blobs.py"), "--workdir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "--workdir" in error and len(error.splitlines()) == 1
    assert contents(tmp_path) == before and not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("workdir", ["", " "])
def test_a_folder_without_a_name_is_refused(
    workdir: str, sources: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(sources / "blobs.py"), "--workdir", workdir]) == 1
    assert "--workdir is empty" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_corrected_config_takes_the_place_of_one_that_never_began(
    sources: Path, tmp_path: Path, capsys
):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        CONFIG.replace(
            "blob_helpers.compression()",
            'blob_helpers.cj.at("nothing", blob_helpers.cj.identity())',
        )
    )
    assert main(["run", str(wrong), "--workdir", str(tmp_path / "run")]) == 1
    assert "candidate 'small': pattern 'nothing' matches no leaf" in capsys.readouterr().err
    wrong.write_text(CONFIG)
    assert (
        main(["run", str(wrong), "--workdir", str(tmp_path / "run"), "--candidate-steps", "0"]) == 0
    )


EDITS = {  # in the helpers: what is said of it, or None if it is nothing to the run
    "other bits": ("uniform(8)", "uniform(4)", "bits was 8, and now is 4"),
    "other data": ("+= 3", "+= 2", "data['image']"),
    "a comment": ("def unused", "# a word\ndef unused", None),
    "a function that is not used": ("return 1", "return 2", None),
}


@pytest.mark.parametrize("which", EDITS)
def test_a_module_of_ones_own_that_changed_is_never_mixed_in(
    which: str, copy: Path, run, monkeypatch: pytest.MonkeyPatch
):
    """Imported anew, as another process would: refused by name, or ends as before."""
    old, new, said = EDITS[which]
    assert HELPERS.count(old) == 1
    changed = copy.parent / "changed"
    changed.mkdir()
    (changed / "blob_helpers.py").write_text(HELPERS.replace(old, new))
    monkeypatch.syspath_prepend(changed)
    monkeypatch.delitem(sys.modules, "blob_helpers")
    before = contents(copy)
    code, error = run("run")
    assert Path(sys.modules["blob_helpers"].__file__).parent == changed
    assert code == (1 if said else 0), error
    if said:
        assert said in error and len(error.splitlines()) == 1 and "--workdir" in error
    after = contents(copy)
    assert not [
        name
        for name in before
        if name.endswith((".safetensors", ".json")) and after[name] != before[name]
    ]


def test_checkpoints_of_unknown_origin_are_not_gone_on_with(copy: Path, run):
    (copy / "student" / "made_of.json").unlink()
    code, error = run("run")
    assert code == 1 and "made_of.json" in error and str(copy / "student") in error


def test_a_config_that_was_changed_in_the_folder_is_not_executed(copy: Path, run):
    (copy / "config.py").write_text(CONFIG + "\nraise SystemExit('executed')\n")
    for command in ("eval", "export"):
        code, error = run(command)
        assert code == 1 and "not executed" in error
    assert run("run") == (0, "")
    assert (copy / "config.py").read_text() == CONFIG


@pytest.mark.parametrize("command", ["eval", "export"])
def test_what_executes_a_config_says_so(command: str, capsys):
    assert main([command, "--help"]) == 0
    assert "executes WORKDIR/config.py" in " ".join(capsys.readouterr().out.split())


def damaged(data: bytes, how: str, rng: np.random.Generator) -> bytes:
    if how == "cut":
        return data[: rng.integers(len(data))]
    if how == "flipped":
        at = rng.integers(len(data))
        return data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :]
    return {"garbage": rng.bytes(200), "empty": b"", "list": b"[1, 2]", "deep": b"[" * 100_000}[how]


FILES = [
    "run.json",
    "results.json",
    "log.txt",
    "config.py",
    "student/metrics.jsonl",
    "candidates/small/metrics.jsonl",
]
FILES += ["student/made_of.json", "artifact.safetensors", "student.safetensors"]


HOW = ["cut", "flipped", "garbage", "empty", "list", "deep", "folder"]
CASES = [(name, how) for name in FILES for how in HOW]


@pytest.mark.wide(1)
@pytest.mark.parametrize(
    ("name", "how"),
    CASES[:: len(HOW) + 1] + [("student/metrics.jsonl", "garbage"), ("run.json", "list")],
)
def test_damage_is_one_sentence_and_run_brings_back_what_it_can(
    name: str, how: str, finished: Path, copy: Path, run
):
    """A few files in a few ways; experiments/faults/fuzz_workdir.py has all of them, many times."""
    file, whole = copy / name, (finished / name).read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    else:
        file.write_bytes(damaged(whole, how, np.random.default_rng(0)))
    for command in ("report", "run"):
        code, error = run(command)
        assert code in (0, 1) and "Traceback" not in error
        assert code == 0 or len(error.splitlines()) == 1 and file.name.split(".")[0] in error
    if file.is_dir():
        file.rmdir()
    file.write_bytes(whole)
    assert run("run") == (0, "")
