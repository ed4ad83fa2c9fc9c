"""The command line on a tiny config; signals and start-up in their own processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from compress_jax.cli import main
from compress_jax.cli._machine import commit
from compress_jax.cli._main import COMMANDS
from compress_jax.cli.parse import parse, parse_config
from compress_jax.cli.workdir import default_workdir, locked

# Two Gaussian blobs a class; deterministic, needs no data set, and is learnt in a few steps.
CONFIG = '''
"""Try the command line.

Command: compress-jax run tiny.py
"""
import numpy as np, optax
import compress_jax as cj
from compress_jax.data import Data
from compress_jax.models import LeNet300100
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training

def split(seed, n):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    image = rng.normal(0, 0.8, (n, 4, 4, 1)).astype(np.float32)
    image[np.arange(n), label, label, 0] += 3
    return {"image": image, "label": label}

def config(bits: int = 4, min_ratio: float = 1.5, steps: int = 12, seed: int = 0) -> Experiment:
    """Compress a network for three blobs.

    Args:
      bits: of each weight.
      min_ratio: how much smaller.
      steps: of each stage.
      seed: of everything.
    """
    data = Data("blobs", split(0, 128), split(1, 60), split(2, 70), 3, "0" * 64, ("a", "b", "c"),
                np.zeros(1, np.float32), np.ones(1, np.float32), 1.0, {})
    training = Training(optax.adam(0.01), steps, batch_size=32, save_every=10)
    def candidate(bits):
        return Candidate(f"int{bits}", cj.at("**/kernel", cj.quantize.uniform(bits)), training)
    return Experiment("blobs", data, Network(LeNet300100(3, (64, 32)), training), (candidate(8),
        candidate(bits)),
                      Requirement(max_drop=0.1, min_ratio=min_ratio), order="all", seed=seed)
'''


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They take most of the time of a small run, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress_jax.report._page.pictures", lambda run: {})
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("configs") / "tiny.py"
    file.write_text(CONFIG)
    return file


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A folder of a finished run, which tests only read."""
    workdir = config.parent / "run"
    assert main(["run", str(config), "--workdir", str(workdir)]) == 0
    return workdir


def numbers(workdir: Path) -> dict[str, bytes]:
    return {
        name: (workdir / name).read_bytes()
        for name in ("results.json", "artifact.safetensors", "log.txt")
    }


def test_run_leaves_what_is_needed_to_repeat_it(finished: Path, config: Path):
    about = json.loads((finished / "run.json").read_text())
    assert about["arguments"] == {"bits": 4, "min_ratio": 1.5, "steps": 12, "seed": 0}
    assert {"compress_jax", "jax", "flax", "optax", "numpy", "python"} <= set(about["versions"])
    assert about["requirement"] == {
        "max_drop": 0.1,
        "min_ratio": 1.5,
        "max_bytes": None,
        "reference": "teacher",
    }
    assert (finished / "config.py").read_bytes() == config.read_bytes()
    assert "int4: accepted" in (finished / "log.txt").read_text()


def test_run_records_its_machine_and_its_time(finished: Path):
    about = json.loads((finished / "run.json").read_text())
    assert about["hardware"]["devices"].endswith("x cpu")
    # The config of this test lies in no repository.
    assert "config" not in about["git"]
    line = json.loads((finished / "sessions.jsonl").read_text().splitlines()[0])
    assert line["ended"] == "finished" and line["seconds"] > 0
    assert line["devices"] == about["hardware"]["devices"]
    page = (finished / "report.html").read_text()
    assert line["started"] in page and about["hardware"]["processor"] in page


def test_commit_of_a_file_says_what_changed(tmp_path: Path):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "config.py"
    file.write_text("one = 1\n")
    git("init")
    assert commit(file) is None, "a repository that does not have the file says nothing of it"
    git("add", "config.py")
    git("commit", "-m", "first")
    assert commit(file) == git("rev-parse", "HEAD")
    file.write_text("one = 2\n")
    assert commit(file) == f"{git('rev-parse', 'HEAD')}, with changes that are in no commit"


def test_report_measures_answers_and_activations(finished: Path):
    results = json.loads((finished / "results.json").read_text())
    assert main(["report", str(finished), "--measure"]) == 0
    found = json.loads((finished / "report" / "measured.json").read_text())
    tests = {row["name"]: row["test"] for row in results["rows"]}
    right = found["right"]
    # The test split has 70 examples; right are those that the accuracies say.
    assert found["examples"] == sum(right.values()) == sum(map(sum, found["confusion"])) == 70
    artifact = right["both"] + right["only the artifact"]
    assert artifact == round(70 * tests[results["chosen"]])
    assert right["both"] + right["only the student"] == round(70 * tests["student"])
    assert list(found["activations"]) == ["dense_0/kernel", "dense_1/kernel", "head/kernel"]
    for site in found["activations"].values():
        assert all(sum(own["shares"]) == pytest.approx(1, abs=1e-4) for own in site.values())
    # What enters the first layer is the image of the first 64 training examples.
    names: dict = {}
    exec(CONFIG, names)
    image = names["split"](0, 128)["image"][:64]
    first = found["activations"]["dense_0/kernel"]["artifact"]
    assert first["low"] == pytest.approx(image.min()) and first["high"] == pytest.approx(
        image.max()
    )
    shares = np.histogram(image, np.linspace(image.min(), image.max(), 62))[0] / image.size
    assert np.abs(shares - first["shares"]).max() < 0.01
    page = (finished / "report.html").read_text()
    assert "who is right" in page and "--measure" not in page


def test_the_same_command_again_ends_with_the_same_files(
    finished: Path, config: Path, capsys: pytest.CaptureFixture[str]
):
    before = numbers(finished)
    assert main(["run", str(config), "--workdir", str(finished)]) == 0
    assert numbers(finished) == before
    shown = capsys.readouterr().out
    row = next(row for row in json.loads(before["results.json"])["rows"] if row["name"] == "int4")
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["int4"])
    assert (
        f"{row['nbytes']:,}" in line
        and f"{100 * row['test']:.2f} %" in line
        and line.split()[-1] == "chosen"
    )


def test_other_arguments_or_another_config_are_refused_by_name(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = numbers(finished)
    assert main(["run", str(config), "--workdir", str(finished), "--bits", "3"]) == 1
    error = capsys.readouterr().err
    assert (
        "bits = 4" in error
        and "3" in error
        and "--workdir" in error
        and len(error.splitlines()) == 1
    )
    changed = tmp_path / "tiny.py"
    changed.write_text(CONFIG.replace("0.01", "0.02"))
    assert main(["run", str(changed), "--workdir", str(finished)]) == 1
    assert "another version" in capsys.readouterr().err
    assert numbers(finished) == before


@pytest.mark.slow
def test_requirement_not_met_is_exit_code_3_and_a_sentence(
    config: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--min-ratio", "1000", "--steps", "2", "--workdir", str(config.parent / "unmet")]
    assert main(["run", str(config), *flags]) == 3
    assert "No candidate met the requirement" in capsys.readouterr().out.splitlines()[-1]


def test_eval_agrees_and_notices_a_changed_result(
    finished: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", str(finished)]) == 0
    assert "the same" in capsys.readouterr().out
    file, before = finished / "results.json", (finished / "results.json").read_text()
    results = json.loads(before)
    for row in results["rows"]:
        row["nbytes"] += 1
    file.write_text(json.dumps(results))
    try:
        assert main(["eval", str(finished)]) == 1
        assert "differ" in capsys.readouterr().out
    finally:
        file.write_text(before)


@pytest.mark.slow
def test_export_writes_and_verifies_and_the_gate_is_exit_code_4(
    finished: Path, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("flatbuffers", reason="needs pip install 'compress_jax[stablehlo]'")
    words = ["export", str(finished), "--to", "stablehlo", "--rounds", "2", "--batch", "8"]
    assert main(words) == 0
    record = json.loads((finished / "export/export.json").read_bytes())["stablehlo"]
    assert (
        record["passed"] and record["agreement"] == 1 and record["accuracy"] == record["reference"]
    )
    assert (
        record["nbytes"]
        == (finished / "export/model.stablehlo").stat().st_size
        < record["baseline_bytes"]
    )
    assert "every file passes" in capsys.readouterr().out
    assert main([*words, "--min-agreement", "1.01"]) == 4
    assert "FAILED" in capsys.readouterr().out


def test_inspect_accounts_for_every_byte(finished: Path, capsys: pytest.CaptureFixture[str]):
    file = finished / "artifact.safetensors"
    assert main(["inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown[shown.index("Leaves") :].splitlines() if "%" in line]
    # path shape form bits zeros % bytes share %, and of the overhead: header and metadata bytes
    # share %
    leaves = {
        words[0]: int(words[6].replace(",", ""))
        for words in lines
        if words[0].startswith("params/")
    }
    sizes = {
        words[0]: int(words[-3].replace(",", ""))
        for words in lines
        if not words[0].startswith("params/")
    }
    assert len(leaves) == 6 and sizes["file"] == file.stat().st_size == sizes["header"] + sum(
        leaves.values()
    )


@pytest.mark.parametrize("content", [None, b"", b"not an artifact"])
def test_inspect_of_a_bad_file_is_one_line(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "bad.safetensors"
    if content is not None:
        file.write_bytes(content)
    assert main(["inspect", str(file)]) == 1
    assert capsys.readouterr().err.startswith(
        f"error: {'cannot read ' if content is None else ''}{file}"
    )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trian"],
        ["run"],
        ["run", "--bits", "3"],
        ["eval"],
        ["inspect", "a", "b"],
        ["report", "--loud"],
        ["compare"],
        ["compare", "--by"],
        ["sweep"],
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "compress-jax" in shown.out + shown.err


def test_wrong_flag_of_a_config_names_the_right_ones(
    config: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["run", str(config), "--bit", "3"]) == 2
    shown = capsys.readouterr()
    assert "--bits" in shown.out + shown.err
    assert main(["run", str(config), "--bits", "many"]) == 2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1", "no function 'config'"),
        ("config = 3", "no function 'config'"),
        ("def config(bits=3): ...", "argument 'bits' has no type"),
        ("def config(workdir: str = ''): ...", "rename"),
        ("def config() -> int:\n  return 3", "returned a int"),
        ("def config(:", "line 1: SyntaxError"),
        ("\nimport no_such_module", "line 2: ModuleNotFoundError"),
        ("def config() -> int:\n  return 1 // 0", "line 2: ZeroDivisionError"),
    ],
)
def test_a_bad_config_is_explained_in_one_line(
    source: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("bad.py").write_text(source)
    assert main(["run", "bad.py"]) == 1
    error = capsys.readouterr().err
    assert said in error and "bad.py" in error or said == "rename"
    assert len(error.splitlines()) == 1 and "Traceback" not in error


def test_debug_shows_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(tmp_path / "none"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "export", "report"])
def test_a_folder_without_a_run_is_an_error(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([command, str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_help_of_a_config_teaches_its_arguments(config: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["run", str(config), "--help"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "Compress a network for three blobs",
        "compress-jax run tiny.py",
        "--min-ratio",
        "how much smaller",
    ):
        assert text in shown


@pytest.mark.parametrize(
    "command", ["run", "eval", "export", "inspect", "report", "plan", "sweep", "compare"]
)
def test_help_of_a_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "--help"]) == 0
    assert f"\n  compress-jax {command} " in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert f"\n  {command} " in capsys.readouterr().out


def test_workdir_is_named_after_what_differs_from_the_defaults():
    defaults = {"bits": 4, "path": "x", "seed": 0}
    assert default_workdir(Path("a/digits.py"), defaults, defaults) == Path("runs/digits")
    named = default_workdir(
        Path("a/digits.py"), {"bits": 3, "path": "/data/x y", "seed": 0}, defaults
    )
    assert named == Path("runs/digits-bits=3-path=_data_x_y")


def test_arguments_of_all_usual_types_come_from_flags():
    def config(
        size: tuple[int, ...] = (1,), fast: bool = False, rate: float | None = None, name: str = "a"
    ) -> None: ...

    flags = "--size 3 4 --fast --rate 0.5 --name b --workdir w".split()
    expected = {"size": (3, 4), "fast": True, "rate": 0.5, "name": "b"}
    assert parse_config(config, flags, "test") == (expected, Path("w"))


def test_plan_and_sweep_are_given_the_flags_of_their_config(config: Path):
    words = [str(config), "--bits", "3"]
    planned = parse("plan", COMMANDS["plan"], [*words, "--chip", "v4"]).keywords
    assert planned["chip"] == "v4" and planned["chosen"]["bits"] == 3
    swept = parse("sweep", COMMANDS["sweep"], [*words, "4", "--jobs", "2"]).keywords
    assert swept["jobs"] == 2 and swept["flags"] == ["--bits", "3", "4"]


def test_a_second_process_is_kept_out(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with locked(tmp_path):
        assert main(["run", str(config), "--workdir", str(tmp_path)]) == 1
    assert "another process" in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_training_is_one_line(
    signum: int,
    code: int,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    before = signal.getsignal(signum)
    file = tmp_path / "stop.py"
    file.write_text(f"import signal\ndef config() -> int:\n  signal.raise_signal({int(signum)})\n")
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(file)]) == code
    name = signal.Signals(signum).name
    assert capsys.readouterr().err == f"stopped by {name}; run the same command to continue\n"
    assert signal.getsignal(signum) is before


def test_a_stop_that_a_library_turned_into_another_error_is_still_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("stop.py").write_text(
        "import signal\ndef config() -> int:\n  try:\n    signal.raise_signal(15)\n"
        "  except BaseException as e:\n    raise RuntimeError('internal') from e\n"
    )
    assert main(["run", "stop.py"]) == 143
    assert capsys.readouterr().err.startswith("stopped by SIGTERM")


@pytest.mark.slow
def test_sigterm_while_training_saves_and_the_same_command_finishes_with_the_same_numbers(
    finished: Path, config: Path
):
    workdir, straight = config.parent / "stopped", config.parent / "straight"
    flags = ["--steps", "150", "--workdir"]
    assert main(["run", str(config), *flags, str(straight)]) == 0
    command = [sys.executable, "-m", "compress_jax.cli", "run", str(config), *flags, str(workdir)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ, text=True
    )
    while not list(workdir.glob("student/checkpoints/*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 143 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("stopped by SIGTERM")
    assert main(["run", str(config), *flags, str(workdir)]) == 0
    assert numbers(workdir) == numbers(straight)
