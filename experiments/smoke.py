"""Run every study's script in its smallest setting, two at a time.

    python experiments/smoke.py                  # all, each within --limit seconds
    python experiments/smoke.py --only solvers   # those whose command contains a word
    python experiments/smoke.py --list           # what would run, and what has no small setting

Each script runs in a copy of its own, so that results kept here stay as they are. What needs a
package or data that are not here is listed as not run; the exit code is 1 if a script fails or
takes too long.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("compress_jax", "configs", "experiments")
DATA = "COMPRESS_JAX_DATA"

# A script with the flags of its smallest setting. {work} is an empty folder, {data} that of DATA.
RUNS = (
    "table.py --check",
    "benchmarks/artifact_size.py --rounds 1",
    "benchmarks/chunked_kl.py --vocabularies 1024 --tokens 16 --chunks 256 128 --rounds 1",
    "benchmarks/compile_time.py --kernels 2 --after --methods 'int4, absmax'",
    "benchmarks/gptq_time.py --size 64 --rounds 1",
    "benchmarks/logit_cache.py",
    "benchmarks/mask_update.py --sizes 1e4 --rounds 1",
    "benchmarks/quantization_error.py --size 64",
    "benchmarks/save_time.py",
    "benchmarks/step_overhead.py --depth 8 --batch 2 --rounds 1",
    "coding/beside_nncodec.py --errors .2 --parameters -19 -14 --steps 300",
    "distillation/compressed.py --examples 256 --epochs 1 --teacher-epochs 1 --seeds 1"
    " --work {work} --data {data}/fashion_mnist",
    "distillation/losses.py",
    "export/targets.py --model bert_tiny --targets stablehlo --rounds 1",
    "faults/fuzz_artifact.py --mutations 20 --batch 10",
    "faults/fuzz_programs.py --suffix .stablehlo --mutations 4",
    "faults/fuzz_workdir.py --trials 1",
    "faults/mistakes.py",
    "faults/spellings.py --only 'linen: BatchNorm without'",
    "house/measure.py",
    "pruning/beside_jaxpruner.py --seeds 1 --algorithms magnitude",
    "pruning/shrink_resnet.py --speed --widths 8",
    "pruning/transformer.py --seeds 0 --width 16 --depth 1 --heads 2 --length 16 --steps 2",
    "quantization/accuracy.py digits --seeds 1 --formats W8A8",
    "quantization/solvers.py digits --seeds 1 --bits 4",
    "tutorials/compress_your_model.py",
    "tutorials/one_step.py",
    "tutorials/render.py --to {work}",
    "tutorials/write_a_method.py",
)
PACKAGES = {
    "benchmarks/gptq_time.py": "torch",
    "benchmarks/quantization_error.py": "qwix",
    "coding/beside_nncodec.py": "nncodec",
    "faults/spellings.py": "jax2onnx",
    "pruning/beside_jaxpruner.py": "jaxpruner",
    "quantization/accuracy.py": "qwix",
}
FOLDERS = {  # that have to be in the folder of DATA
    "distillation/compressed.py": "fashion_mnist",
    "pruning/beside_jaxpruner.py": "fashion_mnist",
    "pruning/transformer.py": "texts",
}
NOT_RUN = {
    "automatic/run.py": "no small setting: a whole search a seed",
    "automatic/timed.py": "needs finished runs of automatic/run.py",
    "benchmarks/data_on_disk.py": "no small setting: writes 2 GB",
    "benchmarks/header_size.py": "no small setting: 5 minutes",
    "benchmarks/step_memory.py": "no small setting: compiles for 3 minutes at any depth",
    "distillation/fashion_mnist.py": "no small setting: its teacher takes 936 steps",
    "faults/kills.py": "no small setting: each campaign begins with a whole run",
    "fields/beside_shipped.py": "needs a finished run of configs/pitch.py",
    "fields/seeds.py": "no small setting: whole runs of the configs",
    "pretrained/minilm.py": "needs a folder of published weights",
    "pruning/minilm.py": "needs a folder of published weights",
    "language/llama_cpp_logits.py": "no small setting: a language model of 135 million weights",
    "language/foreign.py": "needs a clone of jax-ml/bonsai",
    "language/recover.py": "no small setting: a language model of 135 million weights",
    "language/cache.py": "no small setting: a language model of 135 million weights",
    "language/shrink.py": "no small setting: a language model of 135 million weights",
    "language/solvers.py": "no small setting: a language model of 135 million weights",
    "smoke.py": "this script",
}


def missing(script: str) -> str:
    """Return what a script needs and is not here, or nothing."""
    package, folder = PACKAGES.get(script), FOLDERS.get(script)
    if package and find_spec(package) is None:
        return f"no package {package}"
    if folder and not (Path(os.environ.get(DATA, "/nowhere")) / folder).is_dir():
        return f"no {folder} in ${DATA}"
    return ""


def outcome(run: str, copy: Path, limit: float) -> tuple[str, str]:
    """Run a script in the copy; return how it ended, and its last line."""
    script, *flags = shlex.split(run)
    with tempfile.TemporaryDirectory() as work:
        data = os.environ.get(DATA, "")
        words = [flag.replace("{work}", work).replace("{data}", data) for flag in flags]
        command = [sys.executable, f"experiments/{script}", *words]
        paths = os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
        done = finished(command, copy, environment, limit)
    if done is None:
        return "TOO LONG", f"stopped after {limit:.0f} seconds"
    code, output, errors = done
    last = (errors if code else output).strip().splitlines()[-1:]
    return "FAILED" if code else "ran", "".join(last)[:100]


def finished(
    command: list[str], folder: Path, environment: dict[str, str], limit: float
) -> tuple[int, str, str] | None:
    """Return a process's code, output and errors, or None if the limit ended it and its own."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # at an interrupt too, which does not reach another session
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output, errors


def copied(folder: Path) -> Path:
    """Copy what scripts read and write."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def line(*cells: str) -> None:
    """Print a row of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def carried_out(chosen: argparse.Namespace, run: str) -> tuple[str, str, str]:
    """Run a script in a copy of its own; return how it ended, its seconds, its last line."""
    why = missing(run.split()[0])
    if why or chosen.list:
        return ("not run" if why else "listed"), "", why
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        end, last = outcome(run, copied(Path(folder)), chosen.limit)
    return end, f"{time.perf_counter() - began:.1f}", last.replace("|", "/")


def main() -> None:
    """Run the scripts and print the table."""
    parser = argparse.ArgumentParser(description="Every script in its smallest setting.")
    parser.add_argument("--only", default="", help="commands that contain this")
    parser.add_argument("--limit", type=float, default=300, help="seconds for each")
    parser.add_argument("--jobs", type=int, default=2, help="scripts at once")
    parser.add_argument("--list", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    line("script and flags", "end", "seconds", "last line, or why it is not run")
    line("---", "---", "--:", "---")
    runs = [run for run in RUNS if chosen.only in run]
    ends = []
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for run, cells in zip(runs, pool.map(partial(carried_out, chosen), runs), strict=True):
            line(f"`{run}`", *cells)
            ends.append(cells[0])
    for script, why in NOT_RUN.items():
        if chosen.only in script:
            line(f"`{script}`", "not run", "", why)
    sys.exit(int(bool({"FAILED", "TOO LONG"} & set(ends))))


if __name__ == "__main__":
    main()
