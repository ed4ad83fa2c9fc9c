"""``compress-jax report``: the pages of a run, written again."""

from pathlib import Path
from typing import Annotated

import tyro

from compress_jax.cli.console import shown, stdout


def report(workdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR")]) -> int:
    """Write report.html and report.md of a run: tables, pictures and decisions.

    report.html is one file that needs nothing else; report.md has its pictures in WORKDIR/report/. For example

      compress-jax report runs/digits

    compress-jax run does this at its end; nothing is trained or measured here.

    Args:
      workdir: the folder of a finished run.

    Returns:
      The exit code.
    """
    from compress_jax.report import write

    console = stdout()
    page = write(workdir, say=lambda note: console.print(f"note: {shown(note)}"))
    console.print(shown(f"{page}\n{page.with_suffix('.md')}"))
    return 0
