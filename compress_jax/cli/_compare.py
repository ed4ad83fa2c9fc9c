"""The command that compares groups of runs."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from compress_jax.cli.console import shown, stderr, stdout
from compress_jax.core.errors import ArtifactError

File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")],
    by: str = "seed",
    rows: Literal["chosen", "all"] = "chosen",
    csv: File = None,
    markdown: File = None,
    latex: File = None,
) -> int:
    """Compare finished runs: mean, deviation and significance over their seeds.

    RUN is the folder of a run, or of a sweep for all its runs. Runs that differ in nothing but
    --by are one group; of each group the mean and the standard deviation are shown, and the
    difference from the first group. For example

      compress-jax compare runs/digits-sweep
      compress-jax compare runs/digits-sweep --csv digits.csv

    The p values are of a paired test: runs of the same seed are a pair, and under the null
    hypothesis the sign of each difference is a toss. All 2^n assignments of signs are counted, so
    with 5 pairs the smallest p there can be is .0625. For more than 20 pairs 99,999 assignments are
    drawn.

    Nothing is trained or measured here.

    Args:
      runs: folders of finished runs or of sweeps; the first is of the reference group.
      by: the argument that tells the runs of a group apart.
      rows: "chosen" for the artifact of each run, "all" for every network of each; networks of one
        name are then compared.
      csv: file for all numbers, one line a group and measure.
      markdown: file for the tables as Markdown.
      latex: file for the tables as LaTeX, for the package booktabs.

    Returns:
      The exit code.
    """
    from compress_jax.report import rich_table
    from compress_jax.report._compare import Comparison
    from compress_jax.report._groups import found_runs
    from compress_jax.report._tables import markdown_table
    from compress_jax.report._written import latex_table

    if not runs:
        stderr().print("compress-jax compare: which runs? see compress-jax compare --help")
        return 2
    found, notes = found_runs(runs)
    comparison = Comparison.of(found, by, every_row=rows == "all")
    tables = comparison.tables()
    console = stdout()
    for table in tables:
        console.print(rich_table(table))
    for note in (*notes, *comparison.notes()):
        console.print(shown(note))
    if csv:
        _write(csv, comparison.csv())
    if markdown:
        parts = [f"{table.title}\n\n{markdown_table(table)}\n" for table in tables]
        _write(markdown, "\n".join((*parts, *comparison.notes(), "")))
    if latex:
        _write(latex, "\n".join(map(latex_table, tables)))
    return 0


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"cannot write {file}: {error.strerror}; choose another file"
        ) from error
    stdout().print(f"written: {shown(file)}")
