"""What several processes saved is restored by any other number of them, whole."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import compress_jax as cj
from compress_jax.train import Checkpoints

# Of a process: number, processes, port, folder, and whether it saves or restores.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
number, processes, port, folder, what = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", int(processes), int(number))
from compress_jax.train import Best, Checkpoints

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

def placed(values, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

def tree(seed):
    values = np.random.default_rng(seed).normal(size=(512, 256)).astype(np.float32)
    return {"split": placed(values, P("data")), "whole": placed(values[0], P())}

with Checkpoints(folder, keep=1, best=Best("accuracy", True)) as checkpoints:
    if what == "save":
        checkpoints.save(3, tree(0), {"accuracy": 0.5})
    elif what == "save worse":
        # Reopened: each process knows from the record that step 3 is better, and only then saves.
        for step, accuracy in ((4, 0.25), (5, 0.5)):
            assert not checkpoints.is_better({"accuracy": accuracy})
            checkpoints.save(step, tree(step), {"accuracy": accuracy})
        assert checkpoints.is_better({"accuracy": 0.75})
        step, found = checkpoints.restore_best({"split": tree(1)["split"]}, only="split")
        wanted = tree(0)["split"]
        for ours, theirs in zip(found["split"].addressable_shards, wanted.addressable_shards):
            np.testing.assert_array_equal(ours.data, theirs.data)
        print("best", step, checkpoints.steps())
    else:
        step, found = checkpoints.restore_latest(tree(1))
        for name, wanted in tree(0).items():
            for ours, theirs in zip(found[name].addressable_shards, wanted.addressable_shards):
                np.testing.assert_array_equal(ours.data, theirs.data)
        print("restored", step)
"""


def run(processes, folder, what):
    """Run the program in so many processes of four devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    package = str(Path(cj.__file__).parents[1])
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": package}
    words = [str(processes), str(port), str(folder), what]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(number), *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert all(process.returncode == 0 for process in started), said
    return [out.splitlines()[-1:] for out, _ in said]


@pytest.mark.slow
def test_any_number_of_processes_restores_what_others_saved(tmp_path):
    values = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)
    run(2, tmp_path / "two", "save")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    target = {
        "split": jax.device_put(jnp.zeros((512, 256)), NamedSharding(mesh, P(None, "data"))),
        "whole": jnp.zeros(256),
    }
    with Checkpoints(tmp_path / "two") as checkpoints:
        step, found = checkpoints.restore_latest(target)
    assert step == 3
    np.testing.assert_array_equal(found["split"], values)
    np.testing.assert_array_equal(found["whole"], values[0])
    with Checkpoints(tmp_path / "one") as checkpoints:
        checkpoints.save(3, found, {"accuracy": 0.5})
    assert run(2, tmp_path / "one", "restore") == [["restored 3"]] * 2
    assert run(2, tmp_path / "two", "restore") == [["restored 3"]] * 2
    assert run(2, tmp_path / "two", "save worse") == [["best 3 [3, 5]"]] * 2
