"""Joint search beside each plain way at equal bytes, over seeds: one table.

    python experiments/automatic/run.py fashion_mnist --seeds 0 1 2
    python experiments/automatic/run.py brown --seeds 0 1 2
    python experiments/automatic/run.py keywords --seeds 0 1 2 --max-drop .02 --max-latency-ms 1000

Runs a config once a seed, in ``runs/automatic/NAME-SEED``; finished runs are read.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

RUNS = Path("runs/automatic")
CONFIGS = {
    "brown": ["experiments/automatic/brown.py"],
    "keywords": ["experiments/automatic/keywords.py"],
}


def main() -> None:
    """Run each seed, and print the table."""
    parser = argparse.ArgumentParser(description="Joint search beside each plain way.")
    parser.add_argument("name", help="brown, keywords, or a data set of images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--max-latency-ms", type=float)
    parser.add_argument("--runs", type=Path, default=RUNS)
    chosen = parser.parse_args()
    for seed in chosen.seeds:
        run(chosen, seed)
    results = [
        json.loads((chosen.runs / f"{chosen.name}-{seed}" / "results.json").read_text())
        for seed in chosen.seeds
    ]
    print("| seed | student, test | bytes | chosen | bytes | ms | validation | test |")
    print("|--:|--:|--:|---|--:|--:|--:|--:|")
    for seed, each in zip(chosen.seeds, results, strict=True):
        print(line(seed, each))
    print("\n| beside it, trained as long | bytes | ms | drop, points |\n|---|--:|--:|--:|")
    for each in results:
        print("\n".join(beside(each)))
    sizes = [row_of(each, each["chosen"])["nbytes"] for each in results]
    single = [smallest_alike(each)["nbytes"] for each in results]
    if len(results) > 1:
        print(
            f"\nchosen {mean(sizes):,.0f} ± {stdev(sizes):,.0f} bytes, the smallest single option"
        )
        print(f"that passes {mean(single):,.0f} ± {stdev(single):,.0f}")


def run(chosen: argparse.Namespace, seed: int) -> None:
    """Run a seed, unless it is finished."""
    folder = chosen.runs / f"{chosen.name}-{seed}"
    if (folder / "results.json").is_file():
        return
    flags = {"seed": seed, "max-drop": chosen.max_drop, "workdir": folder}
    if chosen.max_latency_ms is not None:
        flags["max-latency-ms"] = chosen.max_latency_ms
    config = CONFIGS.get(chosen.name)
    if config is None:
        config = ["configs/automatic.py", "--data", chosen.name]
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    began = time.perf_counter()
    command = [sys.executable, "-m", "compress_jax.cli", "run", *config, *words]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    print(f"seed {seed}: {(time.perf_counter() - began) / 60:.1f} minutes", file=sys.stderr)


def row_of(results: dict, name: str) -> dict:
    """Return a row by its name."""
    return next(row for row in results["rows"] if row["name"] == name)


def milliseconds(row: dict) -> str:
    """Return how long a call took, if that was measured."""
    taken = row["costs"].get("latency_ms")
    return "-" if taken is None else f"{taken:.2f}"


def line(seed: int, results: dict) -> str:
    """Return a row of the table: the student, and the chosen file."""
    best, student = row_of(results, results["chosen"]), row_of(results, "student")
    return (
        f"| {seed} | {100 * student['test']:.2f} % | {student['nbytes']:,} | {best['name']} | "
        f"{best['nbytes']:,} | {milliseconds(best)} | {100 * best['validation']:.2f} % | "
        f"{100 * best['test']:.2f} % |"
    )


def full_steps(results: dict) -> str:
    """Return the steps of a training in full."""
    return str(max(each["steps"] for each in results["proposals"]))


def beside(results: dict) -> list[str]:
    """Return rows of what was trained as long."""
    steps = full_steps(results)
    return [
        f"| {row['name']}{'' if row['accepted'] else ', refused'} | {row['nbytes']:,} | "
        f"{milliseconds(row)} | {100 * row['drop']:.2f} |"
        for row in results["rows"]
        if row["name"].endswith(f"-{steps}") and row["drop"] is not None
    ]


def smallest_alike(results: dict) -> dict:
    """Return the smallest accepted row in which all leaves of the student take one option."""
    alike = {
        "-".join([next(iter(each["options"].values())), str(each["steps"])])
        for each in results["proposals"]
        if each["start"] == "whole" and len(set(each["options"].values())) == 1
    }
    rows = [row for row in results["rows"] if row["name"] in alike and row["accepted"]]
    return min(rows, key=lambda row: row["nbytes"])


if __name__ == "__main__":
    main()
