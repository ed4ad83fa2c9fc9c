"""The command that plans a run on devices that are not here."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from compress_jax.cli.config import build, load_config
from compress_jax.cli.console import shown, stdout
from compress_jax.core.errors import ConfigError
from compress_jax.core.types import JsonObject

if TYPE_CHECKING:
    from compress_jax.report import Table
    from compress_jax.search import Chip, Plan

ChipName = Literal["v4", "v5e", "v5p", "v6e", "a100", "h100", "h200"]


def plan(
    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    mesh: str | None = None,
    chip: ChipName = "v5p",
    *,
    chosen: Annotated[JsonObject | None, tyro.conf.Suppress] = None,
) -> int:
    """Compile a run for devices that are not here, and print what each would need.

    CONFIG is that of compress-jax run, with its flags:

      compress-jax plan configs/digits.py --devices 64
        --mesh data=8,fsdp=8 --chip v5p

    Nothing is trained and no array is made: the step of every network is compiled from shapes, for
    so many emulated devices. Prints bytes a device by term, temporaries, operations and their
    shares (teacher, student forward and backward, loss), collectives, and an estimate of a step's
    time from the peaks of a chip, in which nothing overlaps. Without --devices it plans for those
    that are here.

    Args:
      config: a Python file with a function 'config'; it comes before its flags.
      mesh: sizes of the axes, such as data=8,fsdp=8; by default the config's mesh.
      chip: whose numbers the time is estimated from.
      chosen: the config's arguments, all of them.

    Returns:
      The exit code.
    """
    from dataclasses import replace

    from compress_jax.report import rich_table
    from compress_jax.search import CHIPS, plan
    from compress_jax.search._check import check
    from compress_jax.train import make_mesh

    experiment = build(load_config(config), chosen or {})
    if mesh is not None:
        experiment = replace(experiment, mesh=make_mesh(**_sizes(mesh)))
    console = stdout()
    for note in check(experiment, {}):
        console.print(f"note: {shown(note)}")
    shape = ", ".join(f"{name}={size}" for name, size in experiment.devices.shape.items())
    console.print(shown(f"{experiment.name}: a mesh of {shape}"))
    for each in plan(experiment):
        console.print(rich_table(_table(each, CHIPS[chip], chip)))
    return 0


def _sizes(text: str) -> dict[str, int]:
    """Read ``data=8,fsdp=8``."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): int(size) for name, size in pairs}
    except ValueError as error:
        raise ConfigError(
            f"--mesh must name axes and their sizes, such as data=8,fsdp=8; got {text!r}"
        ) from error


def _table(plan: "Plan", chip: "Chip", name: str) -> "Table":
    from compress_jax.core.table import units
    from compress_jax.report import Table

    rows: list[Sequence[str]] = [
        *((term, f"{units(size)}B") for term, size in plan.arguments.items()),
        ("temporaries", f"{units(plan.temporaries)}B"),
        ("in all", f"{units(plan.total)}B, {plan.total / chip.memory:.1%} of a {name}"),
        ("operations", units(plan.flops)),
        *((f"operations: {name}", f"{plan.parts.share(name):.1%}") for name in plan.parts.parts),
        *(
            (kind, f"{number} of {units(plan.collectives[kind])}B in all")
            for kind, number in plan.numbers.items()
        ),
        (f"estimated time on a {name}", f"{1e3 * plan.seconds(chip):.3g} ms"),
    ]
    return Table(f"{plan.stage}: one step, on each device", ("", "needs"), tuple(map(tuple, rows)))
