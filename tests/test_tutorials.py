"""The tutorials run from the first cell to the last, and become notebooks."""

import importlib.util
import json
import runpy
from pathlib import Path

import jax
import pytest

FOLDER = Path(__file__).parents[1] / "experiments/tutorials"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.read_text().startswith("# %%"))


CHECKS = {
    "compress_your_model": lambda names: (
        names["exact"] and names["accuracy"](names["fn"], names["params"]) > 0.95
    ),
    "write_a_method": lambda names: (
        names["bound"].init(names["stack"]).fixed["kernel"]["exponent"].shape == (2,)
    ),
    "one_step": lambda names: names["student_accuracy"] > 0.9,
}


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert CHECKS[path.stem](runpy.run_path(str(path)))


def test_tutorials_become_notebooks(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    monkeypatch.setattr("sys.argv", ["render.py", "--to", str(tmp_path)])
    render.main()
    assert sorted(path.stem for path in tmp_path.iterdir()) == [path.stem for path in SCRIPTS]
    for path in SCRIPTS:
        cells = json.loads((tmp_path / f"{path.stem}.ipynb").read_text())["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        compile(code, path.stem, "exec")
        assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
        commented = [line for line in path.read_text().splitlines() if not line.startswith("# ")]
        assert [line for line in code.splitlines() if line] == [
            line for line in commented if line.strip("#")
        ]
