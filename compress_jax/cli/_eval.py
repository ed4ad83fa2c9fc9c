"""``compress-jax eval``: the artifact of a run, measured again in a fresh process."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from compress_jax.cli.config import build, load_config
from compress_jax.cli.console import stdout


def evaluate(workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")]) -> int:
    """Measure the artifact of a run again, and compare with what the run wrote down.

    Builds the data and the student from the config and the arguments kept in WORKDIR, reads artifact.safetensors and prints
    its accuracies and bytes beside those of results.json. For example

      compress-jax eval runs/digits

    Exit code 1 means that they differ.

    Args:
      workdir: the folder of a finished run.

    Returns:
      The exit code.
    """
    from compress_jax.cli.workdir import CONFIG, read_run
    from compress_jax.report import Table, read_results, rich_table

    flags, results = read_run(workdir)["flags"], read_results(workdir)
    written = next(row for row in results["rows"] if row["name"] == results["chosen"])
    measured = _measure(workdir, flags, workdir / CONFIG)
    names = {"test": "test accuracy", "validation": "validation accuracy", "nbytes": "bytes on disk"}
    rows = [(text, _cell(measured[key]), _cell(written[key])) for key, text in names.items()]
    same = all(measured[key] == written[key] for key in names)
    console = stdout()
    console.print(rich_table(Table(results["chosen"], ("", "measured now", "results.json"), tuple(rows))))
    console.print("the same" if same else "[bold red]they differ[/]: the artifact, the data or the versions have changed")
    return 0 if same else 1


def _measure(workdir: Path, flags: list[str], config: Path) -> dict[str, Any]:
    """Return accuracies and bytes of the artifact of a folder."""
    from compress_jax.cli.parse import parse_config
    from compress_jax.core import unpack
    from compress_jax.export import load
    from compress_jax.train import logits

    function = load_config(config)
    experiment = build(function, parse_config(function, flags, f"compress-jax run {config}")[0])
    file = workdir / "artifact.safetensors"
    model: Any = experiment.student.model
    variables, data = unpack(load(file)[0]), experiment.data
    splits = {"test": data.test, "validation": data.validation}
    hits = {name: logits(model.apply, variables, split).argmax(-1) == split["label"] for name, split in splits.items()}
    return {name: float(hit.mean()) for name, hit in hits.items()} | {"nbytes": file.stat().st_size}


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{100 * value:.2f} %"
