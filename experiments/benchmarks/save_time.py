"""Time that saving a checkpoint takes from training, beside orbax alone.

python experiments/benchmarks/save_time.py                                  # 15 seconds

256 MiB in 64 float32 arrays on one device. Both write in the background; the time is that of the
call, after which training goes on. They take turns; the first save of each is left out.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from interleave import report

from compress_jax.train import Checkpoints

ROUNDS = 7


def seconds(save: Callable[[], Any], wait: Callable[[], Any]) -> float:
    start = time.perf_counter()
    save()
    taken = time.perf_counter() - start
    wait()
    return taken


def main() -> None:
    """Save in turn and write the table."""
    tree = {f"w{i}": jnp.full((1024, 1024), float(i)) for i in range(64)}
    jax.block_until_ready(tree)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        options = ocp.CheckpointManagerOptions(create=True, max_to_keep=3)
        manager = ocp.CheckpointManager(Path(folder) / "orbax", options=options)
        with Checkpoints(Path(folder) / "ours") as checkpoints:
            for step in range(ROUNDS + 1):
                arguments = ocp.args.StandardSave(tree)
                save = lambda step=step: checkpoints.save(step, tree)  # noqa: E731
                other = lambda step=step, a=arguments: manager.save(step, args=a)  # noqa: E731
                ours.append(seconds(save, checkpoints.wait))
                theirs.append(seconds(other, manager.wait_until_finished))
        manager.close()
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    row = [f"{1e3 * statistics.median(each[1:]):.0f}" for each in (ours, theirs)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    head = ["of 256 MiB", "ours, ms", "orbax alone, ms", "ours / orbax"]
    report("save_time", head, [["call of save", *row, spread]], rounds=ROUNDS)


if __name__ == "__main__":
    main()
