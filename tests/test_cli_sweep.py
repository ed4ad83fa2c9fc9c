"""Many runs: the grid of arguments, children that fail or are stopped, stages that are shared."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from compress_jax.cli import main
from compress_jax.cli._grid import combinations
from compress_jax.cli._sweep import _passed_on, sweep
from compress_jax.core.errors import ConfigError

# A stand-in for `python -m compress_jax.cli run`: a real run takes seconds to start.
RUN = """#!{python}
import hashlib, json, pathlib, signal, sys, time

words = sys.argv[4:]
flags = dict(zip(words[1::2], words[2::2]))
folder = pathlib.Path(flags["--workdir"])
folder.mkdir(exist_ok=True)
with (folder.parent / "started.txt").open("a") as file:
    file.write(folder.name + "\\n")
bits, seed = int(flags["--bits"]), int(flags["--seed"])

def stop(signum, frame):
    (folder / "saved").touch()
    sys.exit(128 + signum)

if bits == 9:
    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    time.sleep(60)
if bits == 7 and not (folder.parent / "repaired").exists():
    print("some warning\\nerror: seven is too many", file=sys.stderr)
    sys.exit(1)
source = pathlib.Path(words[0]).read_bytes()
row = dict(name="small", nbytes=100 * bits, validation=.5, test=.25 + .01 * seed, bits=bits,
           accepted=True, reason="")
student = dict(row, name="student", nbytes=3200)
results = dict(experiment="x", chosen="small", met=True, rows=[student, row])
record = dict(version=2, config=words[0], config_sha256=hashlib.sha256(source).hexdigest(),
              arguments=dict(bits=bits, seed=seed, fast=False), flags=[], versions={{}})
(folder / "run.json").write_text(json.dumps(record))
(folder / "results.json").write_text(json.dumps(results))
sys.exit(3 if bits == 5 else 0)
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config, whose runs are those of the stand-in."""
    python = tmp_path / "python"
    python.write_text(RUN.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setattr("compress_jax.cli._sweep.sys.executable", str(python))
    file = tmp_path / "tiny.py"
    file.write_text("def config(bits: int = 4, seed: int = 0, fast: bool = False) -> int: ...\n")
    return file


def names(words: str, config) -> list[str]:
    return [each.name for each in combinations(config, words.split(), Path("x.py"))]


def example(
    bits: int = 4,
    seed: int | None = 0,
    size: tuple[int, ...] = (),
    fast: bool = False,
    name: str = "a",
) -> None: ...


def test_a_grid_is_the_product_of_lists_and_ranges():
    assert names("--bits 2 3 --seed 0:4:2", example) == [
        "bits=2,seed=0",
        "bits=2,seed=2",
        "bits=3,seed=0",
        "bits=3,seed=2",
    ]
    assert names("--seed=3:0:-1", example) == ["seed=3", "seed=2", "seed=1"]
    assert names("--seed 0:2 1", example) == ["seed=0", "seed=1"]
    assert names("", example) == ["defaults"]


def test_types_say_what_is_a_list_and_what_is_a_choice():
    assert names("--size 2 3 --bits 2 3", example) == ["size=_2_3_,bits=2", "size=_2_3_,bits=3"]
    assert names("--fast true false", example) == ["fast=True", "fast=False"]
    assert names("--no-fast --name 0:2", example) == ["fast=False,name=0_2"]
    found = combinations(example, ["--fast", "True", "--bits", "1", "2"], Path("x.py"))
    assert found[1].arguments == {
        "bits": 2,
        "seed": 0,
        "size": (),
        "fast": True,
        "name": "a",
    }


@pytest.mark.parametrize("words", ["--bit 3", "--bits two", "3", "--fast maybe"])
def test_a_wrong_flag_of_a_sweep_is_wrong_usage(words: str, config: Path, capsys):
    assert main(["sweep", str(config), *words.split()]) == 2
    shown = capsys.readouterr()
    assert "compress-jax sweep" in shown.out + shown.err


def test_flags_of_run_itself_go_to_every_run():
    words = ["--bits", "2", "3", "--profile", "5", "--devices", "4", "--share", "d"]
    passed_on, rest = _passed_on(words)
    assert rest == ["--bits", "2", "3"]
    assert sorted(passed_on) == sorted(["--profile", "5", "--devices", "4", "--share", "d"])


def test_what_cannot_be_told_apart_is_refused():
    with pytest.raises(ConfigError, match="no numbers; 0:5 is 0 1 2 3 4"):
        names("--seed 5:0", example)
    with pytest.raises(ConfigError, match="would both be called name=a_b"):
        names("--name a/b a_b", example)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--jobs", "0"], "--jobs must be"), (["--distributed"], "on this machine")],
)
def test_flags_that_cannot_be_are_refused(words: list[str], said: str, config: Path, capsys):
    assert main(["sweep", str(config), *words]) == 1
    assert said in capsys.readouterr().err


def started(workdir: Path) -> list[str]:
    file = workdir / "started.txt"
    names = sorted(file.read_text().split())
    file.unlink()
    return names


def test_failed_runs_are_listed_and_finished_ones_are_not_started_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = tmp_path / "w"
    words = ["sweep", str(config), "--bits", "5", "7", "8", "--seed", "0:2", "--jobs", "2"]
    words += ["--workdir", str(workdir)]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "6 runs in" in shown.out and "4 of 6 runs finished" in shown.out
    assert "bits=8,seed=1: small, test accuracy 26.00 %, 800 bytes\n" in shown.out
    for seed in (0, 1):
        why = f"  bits=7,seed={seed}: failed, exit code 1: error: seven is too many\n"
        assert why in shown.err
    assert len(started(workdir)) == 6
    assert "some warning" in (workdir / "bits=7,seed=0.stderr.txt").read_text()

    (workdir / "repaired").touch()
    assert main(words) == 0
    assert started(workdir) == ["bits=7,seed=0", "bits=7,seed=1"]
    assert "4 of them had finished before" in capsys.readouterr().out
    assert not list(workdir.glob("*.stderr.txt"))
    # Another config is another experiment.
    config.write_text(config.read_text() + "# changed\n")
    assert main(words) == 0
    assert len(started(workdir)) == 6


def test_a_signal_stops_all_runs_which_save_and_no_other_is_started(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    workdir = tmp_path / "w"
    begun = [workdir / f"bits=9,seed={seed}" for seed in (0, 1)]

    def stop() -> None:
        while not all((folder / "ready").exists() for folder in begun):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    words = ["--bits", "9", "--seed", "0:5", "--jobs", "2", "--workdir", str(workdir)]
    assert main(["sweep", str(config), *words]) == 143
    assert started(workdir) == ["bits=9,seed=0", "bits=9,seed=1"]
    assert all((folder / "saved").exists() for folder in begun)
    shown = capsys.readouterr()
    assert shown.err == "stopped by SIGTERM; run the same command to continue\n"
    assert "bits=9,seed=0: stopped" in shown.out and "failed" not in shown.out


def test_a_closed_pipe_leaves_no_run_behind(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workdir = tmp_path / "w"

    class Closed(Console):
        """A pipe whose reader takes the first line alone, once the second run has begun."""

        def print(self, *objects, **options) -> None:
            if workdir.joinpath("bits=8,seed=0").exists():
                while not (workdir / "bits=9,seed=0/ready").exists():
                    time.sleep(0.01)
                raise BrokenPipeError

    monkeypatch.setattr("compress_jax.cli._sweep.stdout", Closed)
    flags = ["--bits", "9", "8", "--seed", "0"]
    with pytest.raises(BrokenPipeError):
        sweep(config, workdir, jobs=2, flags=flags)
    assert (workdir / "bits=9,seed=0/saved").exists()


def test_a_run_in_the_place_of_a_sweep_is_refused(config: Path, tmp_path: Path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert main(["sweep", str(config), "--workdir", str(tmp_path)]) == 1
    assert "is the folder of a run" in capsys.readouterr().err


def test_a_sweep_is_compared_by_its_folder(config: Path, tmp_path: Path, capsys):
    workdir = tmp_path / "w"
    words = ["--bits", "8", "10", "--seed", "0:5", "--jobs", "2", "--workdir", str(workdir)]
    assert main(["sweep", str(config), *words]) == 0
    files = {name: tmp_path / f"table.{name}" for name in ("csv", "latex", "markdown")}
    capsys.readouterr()
    flags = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    assert main(["compare", str(workdir), *flags]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    # Seeds 0 to 4 have 25 to 29 %: their standard deviation is the root of 2.5.
    assert "27.00 ± 1.58 %" in shown and "bits=10" in shown
    assert "with 5 pairs the smallest possible p is 0.0625: no difference" in " ".join(
        shown.split()
    )
    assert "bits=10,small,bytes,5,1000.0,0.0,5,200.0,0.0,0.0625" in files["csv"].read_text()
    assert r"\toprule" in files["latex"].read_text()
    assert "| bits=8 | small | 5 | 27.00 ± 1.58 % |" in files["markdown"].read_text()


CONFIG = '''
"""Blobs."""
import numpy as np, optax
import compress_jax as cj
from compress_jax.search import Candidate, Experiment, Network, Requirement, Training

def split(seed, n):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    image = rng.normal(0, 0.8, (n, 4, 4, 1)).astype(np.float32)
    image[np.arange(n), label, label, 0] += 3
    return {"image": image, "label": label}

def config(bits: int = 4, seed: int = 0) -> Experiment:
    """Compress."""
    data = cj.data.Data.from_arrays(split(0, 128), split(1, 60), split(2, 70))
    training = Training(optax.adam(0.01), 12, batch_size=32)
    small = Candidate("small", cj.at("**/kernel", cj.quantize.uniform(bits)), training)
    return Experiment("blobs", data, Network(cj.models.LeNet300100(3, (32, 16)), training),
        (small,), Requirement(max_drop=0.9), longer_student=False, seed=seed,
        teacher=Network(cj.models.LeNet300100(3, (64, 32)), training),
        loss=cj.tasks.classification().distillation(alpha=0.5, temperature=2.0))
'''


@pytest.mark.slow
def test_runs_of_a_sweep_share_stages_and_end_as_a_run_alone_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG)
    workdir = tmp_path / "w"
    words = ["sweep", str(config), "--bits", "3", "4", "--seed", "0:2", "--jobs", "2"]
    assert main([*words, "--workdir", str(workdir)]) == 0
    shown = capsys.readouterr().out
    # Seeds share nothing, and bits all but the candidate.
    for seed in (0, 1):
        for stage in ("student", "teacher"):
            copied = [f"  {stage}: copied from bits={bits},seed={seed}/{stage}" for bits in (3, 4)]
            assert sum(line in shown for line in copied) == 1
    assert shown.count("copied from") == 4 and "candidates" not in shown
    alone = tmp_path / "alone"
    assert main(["run", str(config), "--bits", "4", "--workdir", str(alone)]) == 0
    for name in ("results.json", "artifact.safetensors", "log.txt"):
        assert (workdir / "bits=4,seed=0" / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.slow
def test_a_run_ends_when_the_sweep_that_started_it_is_killed(tmp_path: Path):
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.replace("adam(0.01), 12", "adam(0.01), 1_000_000"))
    command = [sys.executable, "-m", "compress_jax.cli", "sweep", str(config)]
    process = subprocess.Popen([*command, "--workdir", str(tmp_path / "w")])
    while not (tmp_path / "w/defaults/teacher/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while Path(f"/proc/{children[0]}").exists():
        assert time.monotonic() < until
        time.sleep(0.1)
