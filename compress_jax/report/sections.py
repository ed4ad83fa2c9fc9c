"""What both pages of a report say, in order: titles, sentences, tables and pictures, independent of the markup."""

from typing import Any, NamedTuple

from compress_jax.report.read import Run
from compress_jax.report.rows import causes_table, leaves_table, left_alone_table, metadata_table, percent, results_table
from compress_jax.report.tables import Table

CAPTIONS = {
    "tradeoff": "Accuracy on validation data against bytes on disk. The shaded corner is where the requirement is met; "
    "hollow marks are accuracies on test data, measured once, in the end.",
    "weights": "Weights of each layer: the float32 student in grey, the artifact in colour. Exact zeros are not drawn; "
    "their share is in the corner.",
    "layers": "Stored bits for each entry (scales, masks and codebooks included) and share of exact zeros.",
    "curves": "Training, by stage.",
}


class Section(NamedTuple):
    """One part of a report.

    Attributes:
      title: its heading.
      lines: sentences or list items.
      tables: shown after them.
      picture: name of the picture shown last, or None.
    """

    title: str
    lines: list[str] = []
    tables: list[Table] = []
    picture: str | None = None


def headline(run: Run) -> str:
    """Return the result in a sentence.

    Args:
      run: the run.

    Returns:
      What the artifact is, how small and how accurate, and whether that is enough.
    """
    rows = {row["name"]: row for row in run.results["rows"]}
    row, student = rows[run.results["chosen"]], rows["student"]
    met = (
        "It meets the requirement." if run.results["met"] else "It does not meet the requirement; nothing better was found."
    )
    return (
        f"{row['name']}: {row['nbytes']:,} bytes, {student['nbytes'] / row['nbytes']:.1f}x smaller than the student in "
        f"float32, at {percent(row['test'])} on test data (student {percent(student['test'])}"
        f"{', teacher ' + percent(rows['teacher']['test']) if 'teacher' in rows else ''}). {met}"
    )


def sections(run: Run, pictures: list[str]) -> list[Section]:
    """Return the parts of a report.

    Args:
      run: the run.
      pictures: the names of those that were drawn.

    Returns:
      The sections, in order.
    """
    left_alone = run.metadata.get("left_alone", {})
    about = [metadata_table("Arguments", run.about.get("arguments", {})), metadata_table("Versions", _versions(run))]
    results = results_table(run.results["rows"], run.results["chosen"])
    leaves = leaves_table(run.packed, left_alone, run.parts)
    parts = [
        Section("Results", [], [results], "tradeoff"),
        Section("Decisions", run.decisions),
        Section("Files that could not be read", run.notes),
        Section("Layers", [], [leaves, causes_table(run.parts)], "layers"),
        Section("Left alone", [] if left_alone else ["Nothing."], [left_alone_table(left_alone)] if left_alone else []),
        Section("Weights before and after", [], [], "weights"),
        Section("Training", [], [], "curves"),
        Section("Arguments and versions", [_command(run)], [table for table in about if table.rows]),
    ]
    parts = [p if p.picture is None or p.picture in pictures else p._replace(picture=None) for p in parts]
    return [part for part in parts if part.lines or part.tables or part.picture]


def _command(run: Run) -> str:
    if not run.about:
        return "Made by compress_jax.search.compress."
    return f"compress-jax run {' '.join([run.about['config'], *run.about['flags']])}"


def _versions(run: Run) -> dict[str, Any]:
    data = {key: run.metadata[key] for key in ("data", "data_sha256", "model") if key in run.metadata}
    return {**run.about.get("versions", {}), **data}
