"""Write README.md: every study's claim, the published number, ours, and the verdict, in one table.

    python experiments/table.py            # writes experiments/README.md
    python experiments/table.py --check    # fails if the file is not what would be written

A row is a ``[[study]]`` of claims.toml. Numbers in braces are read from the results files of the
study; the others are quoted from the section that ``source`` names, and the tests look them up.
"""

import argparse
import json
import re
import statistics
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FILE = FOLDER / "README.md"
COLUMNS = ("study", "claim", "paper", "ours", "command", "minutes", "date", "verdict")
TITLES = {"paper": "the paper's number", "ours": "ours (mean ± deviation, seeds)"}
HEAD = """# All studies in one table

Written by `table.py` from [claims.toml](claims.toml) and the results in each study's folder; do not
edit it. `python experiments/smoke.py` runs the scripts in their smallest settings.

"Paper" is what was published, or another library's number of the same run where the study says so;
"-" where the study's page has none. ± is the standard deviation of a sample over seeds (divided by
n - 1; the page of the solvers divides by n). Minutes are the page's own words, of 2 CPU cores
unless it says otherwise. A verdict is about the claim in its row, on that study's data, no more.
"""
TAIL = """
Without a row, as no results of them are kept here: `automatic/run.py` and
`benchmarks/data_on_disk.py`. [Tutorials](tutorials/README.md) and the table of losses
([distillation/losses.md](distillation/losses.md)) claim no number.
"""


def studies() -> list[dict[str, Any]]:
    """Return the rows of claims.toml."""
    return tomllib.loads((FOLDER / "claims.toml").read_text())["study"]


def select(value: Any, at: list[Any]) -> list[Any]:
    """Return what a path leads to: keys (``*`` matches), indices, or tables that a row equals."""
    if not at:
        return [value]
    first, *rest = at
    return [found for each in step(value, first) for found in select(each, rest)]


def step(value: Any, key: Any) -> list[Any]:
    """Return the entries of a mapping or a list that one part of a path names."""
    if isinstance(key, dict):
        return [row for row in value if key.items() <= row.items()]
    if isinstance(key, int):
        return [value[key]]
    if isinstance(value, list):
        return value
    return [each for name, each in value.items() if name == key or fnmatch(name, key)]


def files(study: dict[str, Any], name: str | None = None) -> list[Path]:
    """Return the results files of a study, or of one of its numbers."""
    pattern = name or study.get("results")
    found = sorted(FOLDER.glob(pattern)) if pattern else []
    if pattern and not found:
        sys.exit(f"claims.toml, {study['study']!r}: no file is named {pattern}")
    return found


def number(study: dict[str, Any], name: str) -> str:
    """Return a number of a study as text: mean and deviation, or what its results say."""
    how = study["numbers"][name]
    results = [json.loads(path.read_text()) for path in files(study, how.get("file"))]
    values = [value for result in results for value in select(result, how["at"])]
    if not values:
        sys.exit(f"claims.toml, {study['study']!r}: nothing is at {how['at']} for {name}")
    if isinstance(values[0], str):
        if len(values) > 1:
            sys.exit(
                f"claims.toml, {study['study']!r}: {name} is {values}, and has to be one of them"
            )
        return values[0]
    scaled = [how.get("times", 1) * value for value in values]
    mean = f"{statistics.mean(scaled):,.{how.get('digits', 2)}f}"
    if len(scaled) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(scaled):.{how.get('digits', 2)}f}"


def cell(study: dict[str, Any], column: str) -> str:
    """Return a cell of the table."""
    if column == "verdict":
        why = study.get("why", "")
        return f"**{study['verdict']}**" + (f": {why}" if why else "")
    text = study.get(column, "-")
    for name in re.findall(r"{(\w+)}", text):
        text = text.replace(f"{{{name}}}", number(study, name))
    if column == "study":
        return f"[{text}]({study['source'].split('#')[0]})"
    return f"`{text}`" if column == "command" else text


def table() -> str:
    """Return the file's text."""
    titles = [TITLES.get(column, column) for column in COLUMNS]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(COLUMNS)}"]
    for study in studies():
        cells = [cell(study, column).replace("|", "\\|") for column in COLUMNS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([HEAD, *lines, TAIL])


def main() -> None:
    """Write the table, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description="The table of all studies.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is old")
    if not parser.parse_args().check:
        FILE.write_text(table())
    elif not FILE.is_file() or FILE.read_text() != table():
        sys.exit("experiments/README.md is out of date: run python experiments/table.py")


if __name__ == "__main__":
    main()
