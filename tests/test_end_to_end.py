"""The configs themselves, shrunk: from data to artifact, and through any kind of stop to the same
bytes."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import compress_jax as cj
from compress_jax.cli.config import build, load_config
from compress_jax.core.packed import Clustered, Quantized, Sparse
from compress_jax.core.paths import flatten
from compress_jax.data._builders import idx
from compress_jax.search import compress
from compress_jax.search._check import check as check_shapes
from compress_jax.train import accuracy

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Where data sets are prepared, once for all these tests."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def config(data_dir, monkeypatch):
    """``config(name, **arguments)``: an experiment from a config file, on one device."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))

    def make(name: str, examples: int | None = None, **arguments):
        function = load_config(CONFIGS / f"{name}.py")
        if examples:
            load = function.__globals__["load"]
            monkeypatch.setitem(
                function.__globals__, "load", lambda data: cut(load(data), examples)
            )
        mesh = jax.make_mesh(
            (1,), ("data",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,)
        )
        return dataclasses.replace(build(function, {**defaults(function), **arguments}), mesh=mesh)

    return make


def defaults(function) -> dict:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return dict(zip(names, function.__defaults__, strict=True))


def cut(data, n: int):
    """Keep the first n examples of each split."""
    short = {
        name: {k: x[:n] for k, x in getattr(data, name).items()}
        for name in ("train", "validation", "test")
    }
    return dataclasses.replace(data, **short)


def kernels(packed) -> list:
    return [leaf for path, leaf in flatten(packed["params"])[0].items() if path.endswith("/kernel")]


def sparsity(nodes) -> float:
    return sum(int((node.unpack() == 0).sum()) for node in nodes) / sum(
        node.unpack().size for node in nodes
    )


def check(result, experiment) -> list:
    """See that the table is that of the files, and the artifact that of the chosen row; return its
    kernels."""
    table = json.loads((result.artifact.parent / "results.json").read_text())
    assert (
        table["rows"] == [row.as_dict() for row in result.rows]
        and table["chosen"] == result.chosen.name
    )
    assert result.chosen.nbytes == result.artifact.stat().st_size
    packed, metadata = cj.load(result.artifact)
    assert (
        metadata["data_sha256"] == experiment.data.fingerprint
        and metadata["name"] == result.chosen.name
    )
    assert result.chosen.test == accuracy(
        experiment.student.model.apply, cj.unpack(packed), experiment.data.test
    )
    return kernels(packed)


def digits(config):
    steps = {"teacher_steps": 12, "student_steps": 60, "candidate_steps": 20}
    experiment = config("digits", **steps, max_drop=0.99)
    assert [candidate.name for candidate in experiment.candidates] == [
        "prune-85-int4",
        "prune-91-int4",
        "prune-95-int4",
    ]
    # Each is a program to compile.
    return dataclasses.replace(experiment, candidates=experiment.candidates[1:2])


@pytest.mark.slow
def test_digits_on_shapes(config):
    assert check_shapes(digits(config), {}) == []


@pytest.mark.slow
def test_digits(config, tmp_path):
    experiment = digits(config)
    result = compress(experiment, tmp_path, log_fn=lambda line: None)
    teacher, student, longer, tried = result.rows
    assert longer.name == "student-longer" and longer.nbytes == pytest.approx(
        student.nbytes, rel=0.01
    )
    assert (
        (teacher.name, student.name) == ("teacher", "student")
        and result.chosen is tried
        and result.met
    )
    assert (
        student.nbytes / tried.nbytes > 20
        and teacher.nbytes > student.nbytes > 4 * student.parameters
    )
    assert student.validation > 0.5, "60 steps teach a network more than nothing"
    nodes = check(result, experiment)
    assert len(nodes) == 3 and all(
        isinstance(getattr(node, "codes", node), Sparse) for node in nodes
    )
    assert 0.91 <= sparsity(nodes) < 0.93  # 91 % pruned, and a few round to zero
    assert cj.load(result.artifact)[1]["model"] == "LeNet300100()"


@pytest.fixture
def real_images(monkeypatch):
    """Fashion-MNIST's own files, which no test downloads."""
    folder = Path(os.environ.get("COMPRESS_JAX_DATA", "/nowhere")) / "fashion_mnist"
    if idx.missing(folder):
        pytest.skip(f"needs {', '.join(idx.FILES)} in $COMPRESS_JAX_DATA/fashion_mnist")


@pytest.mark.slow
def test_fashion_mnist(config, real_images, tmp_path):
    epochs = {"teacher_epochs": 1, "student_epochs": 1, "candidate_epochs": 1}
    experiment = config(
        "fashion_mnist", examples=512, **epochs, batch_size=32, max_drop=0.99, min_ratio=1.0
    )
    result = compress(experiment, tmp_path, log_fn=lambda line: None)
    assert [row.name for row in result.rows] == [
        "teacher",
        "student",
        "student-longer",
        "prune-60-int4",
        "prune-80-int4",
    ]
    sizes = [row.nbytes for row in result.rows if row.name != "student-longer"]
    assert result.met and sizes == sorted(sizes, reverse=True)
    nodes = check(result, experiment)
    assert all(isinstance(node, Quantized) for node in nodes) and 0.7999 < sparsity(nodes) < 0.9
    assert all(node.scale.size == node.shape[-1] for node in nodes), "a scale for each channel"


@pytest.mark.slow
def test_deep_compression(config, real_images, tmp_path):
    arguments = {
        "epochs": 3,
        "teacher_epochs": 1,
        "candidate_epochs": 3,
        "sparsity": (0.9, 0.95),
        "max_drop": 0.99,
    }
    experiment = config("deep_compression", examples=640, **arguments)
    result = compress(experiment, tmp_path, log_fn=lambda line: None)
    assert [row.name for row in result.rows] == [
        "teacher",
        "student",
        "student-longer",
        "prune-90-share-16",
        "prune-95-share-16",
    ]
    assert (
        result.chosen is result.rows[-1]
        and result.met
        and result.rows[1].nbytes / result.chosen.nbytes > 25
    )
    nodes = check(result, experiment)
    assert all(isinstance(node, Clustered) and isinstance(node.codes, Sparse) for node in nodes)
    for node in nodes:
        values = np.unique(node.unpack())
        assert 0 in values and len(values) <= 17, "16 shared values, and zero"
    assert sparsity(nodes) == pytest.approx(0.95, abs=1e-4)


# The digits config with checkpoints so frequent that each stage of a short run has some.
OFTEN = f"""
import dataclasses, runpy
from compress_jax.search import Experiment

def config(steps: int = 60) -> Experiment:
    '''Compress digits.

    Args:
      steps: of each stage.
    '''
    digits = runpy.run_path({str(CONFIGS / "digits.py")!r})["config"]
    stages = dict.fromkeys(("teacher_steps", "student_steps", "candidate_steps"), steps)
    experiment = digits(**stages, max_drop=0.99, min_ratio=15.0)

    def often(owner):
        training = dataclasses.replace(owner.training, save_every=10)
        return dataclasses.replace(owner, training=training)

    networks = {{"teacher": often(experiment.teacher), "student": often(experiment.student)}}
    candidates = tuple(map(often, experiment.candidates))
    return dataclasses.replace(experiment, **networks, candidates=candidates)
"""
STAGES = ["", "teacher", "student", *(f"candidates/prune-{share}-int4" for share in (85, 91, 95))]


class Command:
    """``compress-jax run`` in processes of its own, one device each, as a user has it."""

    def __init__(self, folder: Path, data_dir: Path):
        self.config = folder / "often.py"
        self.config.write_text(OFTEN)
        self.environment = {
            **os.environ,
            "TFDS_DATA_DIR": str(data_dir),
            "PYTHONPATH": str(CONFIGS.parent),
        }
        del self.environment["XLA_FLAGS"]

    def start(self, workdir: Path) -> subprocess.Popen[str]:
        words = [
            sys.executable,
            "-m",
            "compress_jax.cli",
            "run",
            str(self.config),
            "--workdir",
            str(workdir),
        ]
        return subprocess.Popen(
            words,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, workdir: Path) -> dict[str, bytes]:
        """Run to the end; return the numbers."""
        process = self.start(workdir)
        error = process.communicate(timeout=900)[1]
        assert process.returncode == 0, error
        return numbers(workdir)

    def stop(self, workdir: Path, file: str, seconds: float, signum: int) -> tuple[int, str]:
        """Run until a file is there, and some time more; return the exit code and what was said."""
        process = self.start(workdir)
        while not list(workdir.glob(file)) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(seconds)
        process.send_signal(signum)
        return process.wait(timeout=120), process.communicate()[1]


def numbers(workdir: Path) -> dict[str, bytes]:
    files = [
        workdir / "results.json",
        *workdir.rglob("*.safetensors"),
        *workdir.rglob("metrics.jsonl"),
        workdir / "log.txt",
    ]
    return {str(file.relative_to(workdir)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def command(tmp_path_factory, data_dir) -> Command:
    return Command(tmp_path_factory.mktemp("often"), data_dir)


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory) -> dict[str, bytes]:
    """The numbers of a run that nothing stopped."""
    found = command.finish(tmp_path_factory.mktemp("straight"))
    expected = {f"{stage}/metrics.jsonl" for stage in STAGES[1:]} | {
        f"{stage}/artifact.safetensors" for stage in STAGES[3:]
    }
    assert expected | {
        "results.json",
        "artifact.safetensors",
        "student.safetensors",
        "teacher.safetensors",
    } <= set(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_in_every_stage_ends_with_the_same_bytes(
    seed, command, straight, tmp_path
):
    chance, codes = random.Random(seed), []
    for stage in (
        STAGES
    ):  # a stage's folder appears before it compiles, and the next one's after its evaluation
        codes.append(command.stop(tmp_path, stage or "*", chance.uniform(0, 8), signal.SIGKILL)[0])
    assert codes.count(-signal.SIGKILL) >= 4, "too few of the kills came in time to mean anything"
    assert command.finish(tmp_path) == straight


@pytest.mark.slow
def test_a_run_asked_to_stop_says_so_in_a_line_and_continues_to_the_same_bytes(
    command, straight, tmp_path
):
    for stage, signum in (
        ("teacher", signal.SIGINT),
        ("student", signal.SIGTERM),
        (STAGES[4], signal.SIGINT),
    ):
        code, error = command.stop(tmp_path, f"{stage}/metrics.jsonl", 0.0, signum)
        assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[signum], error
        name = signal.Signals(signum).name
        assert (
            error.splitlines()[-1].startswith(f"stopped by {name}")
            and "run the same command to continue" in error
        )
        assert "Traceback" not in error and error.count("stopped by") == 1
        assert not (tmp_path / "results.json").exists()
    assert command.finish(tmp_path) == straight
