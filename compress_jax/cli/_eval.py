"""``compress-jax eval``: the artifact of a run, measured again in a fresh process."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from compress_jax.cli.console import stdout


def evaluate(workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")]) -> int:
    """Measure the artifact of a run again, and compare with what the run wrote down.

    Builds the data and the student from the config and the arguments kept in WORKDIR, reads artifact.safetensors and prints
    its accuracies and bytes beside those of results.json. For example

      compress-jax eval runs/digits

    This executes WORKDIR/config.py, as Python code: use it on folders that you trust. Exit codes: 0 the same, 1 they differ
    or an error.

    Args:
      workdir: the folder of a finished run.

    Returns:
      The exit code.
    """
    from compress_jax.cli.rebuild import rebuilt
    from compress_jax.report import Table, rich_table

    experiment, packed, results = rebuilt(workdir)
    written = next(row for row in results["rows"] if row["name"] == results["chosen"])
    measured = _measure(experiment, packed) | {"nbytes": (workdir / "artifact.safetensors").stat().st_size}
    names = {"test": "test accuracy", "validation": "validation accuracy", "nbytes": "bytes on disk"}
    rows = [(text, _cell(measured[key]), _cell(written[key])) for key, text in names.items()]
    same = all(measured[key] == written[key] for key in names)
    console = stdout()
    console.print(rich_table(Table(results["chosen"], ("", "measured now", "results.json"), tuple(rows))))
    console.print("the same" if same else "[bold red]they differ[/]: the artifact, the data or the versions have changed")
    return 0 if same else 1


def _measure(experiment: Any, packed: Any) -> dict[str, Any]:
    """Return the accuracies of an artifact."""
    from compress_jax.core import unpack
    from compress_jax.train import logits

    variables, data = unpack(packed), experiment.data
    splits = {"test": data.test, "validation": data.validation}
    hits = {n: logits(experiment.student.model.apply, variables, x).argmax(-1) == x["label"] for n, x in splits.items()}
    return {name: float(hit.mean()) for name, hit in hits.items()}


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{100 * value:.2f} %"
