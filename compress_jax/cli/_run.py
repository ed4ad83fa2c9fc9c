"""``compress-jax run``: a config to a verified artifact and a report."""

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Annotated, Any

import tyro

from compress_jax.cli.config import build, load_config
from compress_jax.cli.console import shown, stdout
from compress_jax.cli.signals import Stopped

UNMET = 3


def run(
    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    workdir: Path | None = None,
    *,
    chosen: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None,
    flags: Annotated[list[str] | None, tyro.conf.Suppress] = None,
) -> int:
    """Train, compress and verify what a config describes.

    CONFIG is a Python file with a function 'config'; its arguments are flags. The first of these explains them, with the
    time the run takes and the numbers to expect:

      compress-jax run configs/digits.py --help
      compress-jax run configs/digits.py --bits 3

    The second leaves artifact.safetensors, results.json, log.txt, report.html, metrics and checkpoints in the folder
    runs/digits-bits=3.

    A run that was stopped in any way continues where it was when the same command is given again. Exit code 3 means that
    no candidate met the requirement; the artifact is then the best there was.

    Args:
      config: a Python file with a function 'config'; it comes before its flags.
      workdir: where the run is kept.
      chosen: the config's arguments, all of them.
      flags: the words they were read from.

    Returns:
      The exit code.
    """
    from compress_jax.cli.workdir import check_same, default_workdir, describe, locked, remember

    function, arguments = load_config(config), chosen or {}
    workdir = workdir or default_workdir(config, arguments, _defaults(function))
    source = config.read_bytes()
    described = describe(config, source, arguments, flags or [])
    check_same(workdir, source, described)  # before anything is written there
    with locked(workdir):
        check_same(workdir, source, described)
        _quiet()
        experiment = build(function, arguments)
        remember(workdir, source, described | {"requirement": _as_json(experiment.requirement)})
        return _compress(experiment, workdir, {"config": described["config"], "arguments": described["arguments"]})


def _compress(experiment: Any, workdir: Path, about: dict[str, Any]) -> int:
    """Run the loop, show what it found and write the report."""
    from compress_jax import report, search
    from compress_jax.cli.workdir import logging_to
    from compress_jax.train import Interrupted

    console = stdout()
    with logging_to(workdir, lambda line: console.print(shown(line))) as say:
        try:
            result = search.compress(experiment, workdir, about=about, say=say)
        except Interrupted as stop:  # in the middle of training, whose state is saved by now
            raise Stopped(stop.signum, str(stop)) from stop
    console.print(report.rich_table(report.results_table([row.as_dict() for row in result.rows], result.chosen.name)))
    page = report.write(workdir, say=lambda note: console.print(f"note: {shown(note)}"))
    console.print(f"artifact: {shown(str(workdir / result.artifact.name))}\nreport:   {shown(str(page))}")
    if not result.met:
        best = f"{shown(result.chosen.name)} is the best there was: {shown(result.chosen.reason)}"
        console.print(f"No candidate met the requirement; {best}.")
    return 0 if result.met else UNMET


def _defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _as_json(requirement: Any) -> dict[str, Any]:
    """Return the requirement's fields; JSON has no infinity, so no limit on the bytes is null."""
    return {name: None if value == math.inf else value for name, value in dataclasses.asdict(requirement).items()}


def _quiet() -> None:
    """Let checkpointing and TFDS speak only of what a person should act on; what fails is raised, and told once."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)  # orbax logs whole traces of what it then raises
    for name in ("orbax", "jax", "tensorflow_datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
