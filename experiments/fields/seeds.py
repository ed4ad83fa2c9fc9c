"""Images, text and speech over seeds: run each config, export what it chose, and print one table.

python experiments/fields/seeds.py runs/fields
python experiments/fields/seeds.py runs/fields --configs configs/digits.py --seeds 0 1 2 --to onnx

Runs that are finished are read, those that were stopped are continued. "exported" is the metric of
the exported file in its own runtime, on the same test data. Run it in the repository's folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

CONFIGS = ("configs/digits.py", "configs/brown.py", "configs/keywords.py")
# The same with a student in another framework, for the first seed.
OTHERS = tuple(
    f"experiments/fields/{name}.py" for name in ("digits_nnx", "brown_equinox", "keywords_nnx")
)
COLUMNS = ("config", "metric", "teacher", "student", "trained on", "compressed", "bytes", "smaller")


def compress_jax(*words: str) -> None:
    """Run a command as a user does; 3 says that no candidate met the requirement."""
    done = subprocess.run([sys.executable, "-m", "compress_jax.cli", *words])
    if done.returncode not in (0, 3):
        raise SystemExit(f"compress-jax {' '.join(words)} ended with {done.returncode}")


def run(config: str, seed: int, folder: Path, to: list[str]) -> dict[str, object]:
    """Return the numbers of one run, in percent where the metric is a share."""
    workdir = folder / f"{Path(config).stem}-{seed}"
    if not (workdir / "results.json").is_file():
        compress_jax("run", config, "--seed", str(seed), "--workdir", str(workdir))
    exported = workdir / "export" / "export.json"
    if not exported.is_file() or not set(to) <= set(json.loads(exported.read_text())):
        compress_jax("export", str(workdir), "--to", *to, "--rounds", "3")
    results = json.loads((workdir / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    student, chosen = rows["student"], rows[results["chosen"]]
    measured = json.loads(exported.read_text())
    return {
        "metric": results["metric"]["name"],
        "chosen": results["chosen"],
        "met": results["met"],
        "teacher": 100 * rows["teacher"]["test"],
        "student": 100 * student["test"],
        "trained on": 100 * rows["student-longer"]["test"],
        "compressed": 100 * chosen["test"],
        "bytes": chosen["nbytes"],
        "smaller": student["nbytes"] / chosen["nbytes"],
        **{f"{target} %": 100 * measured[target]["accuracy"] for target in to},
    }


def cell(values: list[object]) -> str:
    """Return mean ± standard deviation, or the distinct words."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    if len(numbers) < len(values):
        return ", ".join(sorted(set(map(str, values))))
    mean, spread = statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0
    return f"{mean:,.0f} ± {spread:,.0f}" if mean > 1000 else f"{mean:.2f} ± {spread:.2f}"


def table(found: dict[str, list[dict[str, object]]], to: list[str]) -> str:
    """Return the Markdown table, a row for each config."""
    columns = [*COLUMNS, *(f"{target} %" for target in to), "chosen"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * 2}{'--:|' * (len(columns) - 3)}---|"]
    for config, runs in found.items():
        cells = [cell([each[column] for each in runs]) for column in columns[1:]]
        lines.append(f"| {' | '.join([f'`{config}`', *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--others", nargs="*", default=OTHERS, help="configs for the first seed")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--to", nargs="+", default=["stablehlo"])
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, object]]] = {}
    for seed in arguments.seeds:
        others = arguments.others if seed == arguments.seeds[0] else ()
        for config in [*arguments.configs, *others]:
            numbers = run(config, seed, arguments.folder, arguments.to)
            found.setdefault(config, []).append({"seed": seed, **numbers})
            (arguments.folder / "seeds.json").write_text(f"{json.dumps(found, indent=1)}\n")
    print(table(found, arguments.to))


if __name__ == "__main__":
    main()
