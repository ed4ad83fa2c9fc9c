"""One command runs on one process or several, is stopped in any way, and ends with one result."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import compress_jax as cj
from compress_jax.cli import main
from compress_jax.cli.processes import split_flags
from compress_jax.core.errors import ConfigError
from compress_jax.train._processes import once

CONFIG = '''
"""Pruned and quantized below a teacher."""
import jax, numpy as np, optax
import compress_jax as cj

# Divided kernels need collectives of other sizes than the votes on signals do.
RULES = (("dense_*/kernel", jax.sharding.PartitionSpec("fsdp")),)

def split(seed, n):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    image = rng.normal(0, 0.8, (n, 4, 4, 1)).astype(np.float32)
    image[np.arange(n), label, label, 0] += 3
    return {"image": image, "label": label}

def shifted(key, batch):
    # By place in the batch: the order of rows must not depend on the number of processes.
    noise = jax.random.normal(key, batch["image"].shape) * 0.01
    return {**batch, "image": batch["image"] + noise}

class Rows:
    """Examples one by one, as files have them."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays["label"])

    def __getitem__(self, number):
        return {name: each[number] for name, each in self.arrays.items()}

def config(steps: int = 60, on_disk: bool = False) -> cj.search.Experiment:
    """Compress."""
    splits = [split(0, 128), split(1, 60), split(2, 70)]
    data = cj.data.Data.from_arrays(*splits)
    if on_disk:  # each example is read by the process that needs it
        data = cj.data.from_records(*map(Rows, splits), classes=3)
    training = cj.search.Training(optax.sgd(0.05), steps, batch_size=32, save_every=5,
                                  augment=shifted)
    small = cj.at("**/kernel", cj.chain(cj.prune.magnitude(0.5),
                                        cj.quantize.uniform(4, granularity="channel")))
    return cj.search.Experiment(
        "blobs", data, cj.search.Network(cj.models.LeNet300100(3, (32, 16)), training, rules=RULES),
        (cj.search.Candidate("small", small, training),),
        cj.search.Requirement(max_drop=0.9),
        mesh=cj.train.make_mesh(fsdp=min(2, jax.device_count())),
        teacher=cj.search.Network(cj.models.LeNet300100(3, (64, 32)), training),
        loss=cj.tasks.classification().distillation(alpha=0.5, temperature=2.0),
    )
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("processes") / "small.py"
    file.write_text(CONFIG)
    return file


def started(config, workdir, *flags):
    command = [sys.executable, "-m", "compress_jax.cli", "run", str(config), *flags]
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(cj.__file__).parents[1])},
        text=True,
    )


def finished(process):
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def assert_same(one, other):
    """Check that two artifacts have the same masks and codes, and scales up to rounding."""
    packed = [cj.load(folder / "artifact.safetensors")[0] for folder in (one, other)]
    ours, theirs = (jax.tree_util.tree_leaves_with_path(tree) for tree in packed)
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        if np.issubdtype(a.dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=str(path))
        else:
            np.testing.assert_array_equal(a, b, err_msg=str(path))


@pytest.mark.slow
def test_two_processes_that_are_stopped_and_killed_and_one_that_goes_on_give_one_result(config):
    straight, shared = config.parent / "straight", config.parent / "shared"
    assert finished(started(config, straight, "--devices", "1"))[0] == 0
    # Here each process reads the rows of its own devices; above all data are in memory.
    two = ("--processes", "2", "--devices", "4", "--on-disk")

    # A signal that one process gets stops all, after one step.
    process = started(config, shared, *two)
    os.kill(_last_child(process, shared / "teacher"), signal.SIGTERM)
    code, _, err = finished(process)
    assert code == 143 and "stopped by SIGTERM after step" in err and "Traceback" not in err

    # A lost process is told in one line, and nothing that was saved is lost.
    process = started(config, shared, *two)
    os.kill(_last_child(process, shared / "student"), signal.SIGKILL)
    code, _, err = finished(process)
    assert code == 1 and "was ended by SIGKILL" in err and "Traceback" not in err

    # Two again as far as the candidate, then eight devices of one.
    process = started(config, shared, *two)
    os.kill(_last_child(process, shared / "candidates/small"), signal.SIGTERM)
    code, out, _ = finished(process)
    assert code == 143 and out.count("student in float32") == 1  # one process prints
    code, _, err = finished(started(config, shared, "--devices", "8", "--on-disk"))
    assert code == 0, err
    assert_same(straight, shared)


def _last_child(process, stage):
    """Return the last process that was started, once a stage has a checkpoint."""
    while not list(stage.glob("checkpoints/*")) and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[-1])


@pytest.mark.slow
def test_what_one_process_finds_wrong_is_told_once_and_ends_all(config):
    odd = config.parent / "odd.py"
    wrong = "    if jax.process_index() == 1: raise ValueError('only here')\n"
    head, body = CONFIG.split('    """Compress."""\n')
    odd.write_text(f'{head}    """Compress."""\n{wrong}{body}')
    code, _, err = finished(started(odd, config.parent / "odd", "--processes", "2"))
    assert code == 1 and "Traceback" not in err
    assert err.count("ValueError: only here") == 1 and "process 1: error:" in err


def test_flags_on_processes_are_checked_before_anything_starts(config):
    with pytest.raises(ConfigError, match="--coordinator HOST:PORT needs"):
        split_flags(["digits.py", "--coordinator", "host:1"])
    with pytest.raises(ConfigError, match="--process needs --coordinator"):
        split_flags(["digits.py", "--processes", "2", "--process", "1"])
    with pytest.raises(ConfigError, match="--devices must be a whole number from 1"):
        split_flags(["digits.py", "--devices", "0"])
    with pytest.raises(ConfigError, match="--peak-tflops must be a number above 0"):
        split_flags(["digits.py", "--peak-tflops", "-1"])
    flags, rest = split_flags(["digits.py", "--peak-tflops", "0.5", "--bits", "3"])
    assert flags.peak_tflops == 0.5 and rest == ["digits.py", "--bits", "3"]


def test_a_cluster_that_says_nothing_is_one_sentence(config, capsys):
    assert main(["run", str(config), "--distributed"]) == 1
    assert "give --coordinator HOST:PORT" in capsys.readouterr().err


def test_alone_the_first_process_is_all_there_is():
    with pytest.raises(ValueError, match="of the function"):
        once(lambda: (_ for _ in ()).throw(ValueError("of the function")))
