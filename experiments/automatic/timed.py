"""Time in ONNX Runtime what a search chose, the float32 student, and a float32 network as fast.

    pip install '.[onnx]'
    python experiments/automatic/timed.py fashion_mnist --seeds 0 1 2

In XLA a packed network unpacks its weights in each call. Reads the runs of ``run.py``.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from run import CONFIGS, RUNS, row_of

import compress_jax as cj
from compress_jax.cli.config import build, load_config
from compress_jax.export._verify.verify import runner
from compress_jax.search._automatic import read_proposals
from compress_jax.search._loop import with_proposals
from compress_jax.search._method import rebuilt_model

CALLS = 300


def main() -> None:
    """Print a line for each network of each seed."""
    parser = argparse.ArgumentParser(description="Times in ONNX Runtime.")
    parser.add_argument("name", help="as of run.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=RUNS)
    chosen = parser.parse_args()
    print("| seed | network | bytes | ms in ONNX Runtime | drop, points |\n|--:|---|--:|--:|--:|")
    for seed in chosen.seeds:
        timed(chosen.name, chosen.runs / f"{chosen.name}-{seed}", seed)


def timed(name: str, folder: Path, seed: int) -> None:
    """Time the networks of a run, one after the other and again, and print their rows."""
    results = json.loads((folder / "results.json").read_text())
    given: dict[str, object] = {"seed": seed}
    if name not in CONFIGS:
        given["data"] = name
    config = CONFIGS.get(name, ["configs/automatic.py"])[0]
    experiment = build(load_config(Path(config)), given)
    experiment = with_proposals(experiment, read_proposals(results))
    fast = [row["name"] for row in results["rows"] if "as-fast" in row["name"]]
    calls = {
        each: network(experiment, folder, each) for each in ("student", results["chosen"], *fast)
    }
    seconds: dict[str, list[float]] = {each: [] for each in calls}
    for _ in range(CALLS):  # in turn, so that what else the machine does hits all alike
        for each, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[each].append(time.perf_counter() - began)
    for each, own in seconds.items():
        row = row_of(results, each)
        drop = "-" if row["drop"] is None else f"{100 * row['drop']:.2f}"
        milliseconds = 1e3 * statistics.median(own)
        print(f"| {seed} | {each} | {row['nbytes']:,} | {milliseconds:.4f} | {drop} |", flush=True)


def network(experiment: cj.search.Experiment, folder: Path, name: str) -> Callable[[], object]:
    """Return a call of one example of a stored network in ONNX Runtime."""
    model, file = experiment.student.pure, folder / "student.safetensors"
    if name != "student":
        file = folder / "candidates" / name / "artifact.safetensors"
        model = rebuilt_model(experiment, file, name)
    rows = {key: np.asarray(x[:1]) for key, x in experiment.data.train.items()}
    inputs = [np.asarray(x) for x in experiment.task.inputs_of(experiment.task.prepare(rows))]
    example = inputs[0] if len(inputs) == 1 else tuple(inputs)
    out = Path(tempfile.mkdtemp()) / "model.onnx"
    cj.export.to_onnx(
        lambda v, *x: model.apply(v, *x), cj.load(file)[0], example, out, batch="example"
    )
    call = runner(out)
    jax.block_until_ready(call(*inputs))
    return lambda: call(*inputs)


if __name__ == "__main__":
    main()
