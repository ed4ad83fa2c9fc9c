"""Write the tutorials as Jupyter notebooks.

python experiments/tutorials/render.py --to /tmp/notebooks
"""

import argparse
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def scripts() -> list[Path]:
    """Return the tutorials: the scripts in this folder that begin with a cell."""
    return [path for path in sorted(FOLDER.glob("*.py")) if path.read_text().startswith("# %%")]


def notebook(script: str) -> dict[str, Any]:
    """Return the cells of a script in the percent format as a notebook, version 4.5."""
    cells = []
    for i, block in enumerate(script.split("# %%")[1:]):
        head, _, body = block.partition("\n")
        lines = body.strip("\n").split("\n")
        markdown = "[markdown]" in head
        if markdown:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        source = "\n".join(lines).splitlines(keepends=True)
        cell = {"cell_type": "markdown" if markdown else "code", "id": f"cell-{i}", "metadata": {}}
        if not markdown:
            cell |= {"execution_count": None, "outputs": []}
        cells.append({**cell, "source": source})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    """Write one notebook a tutorial."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, required=True, help="folder for the notebooks")
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    for path in scripts():
        target = folder / f"{path.stem}.ipynb"
        target.write_text(json.dumps(notebook(path.read_text()), indent=1) + "\n")
        print(target)


if __name__ == "__main__":
    main()
