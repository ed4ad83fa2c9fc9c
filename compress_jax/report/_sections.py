"""The parts of a report, in the order of a reader's questions; both pages show them."""

from collections.abc import Callable
from typing import NamedTuple

from compress_jax.core.types import JsonObject
from compress_jax.report import _charts, _histograms
from compress_jax.report._asked import requirements_table
from compress_jax.report._charts import Chart
from compress_jax.report._exports import export_tables
from compress_jax.report._origin import command, origin_tables
from compress_jax.report._read import Run
from compress_jax.report._rows import (
    causes_table,
    leaves_table,
    results_table,
    skipped_table,
    value_text,
)
from compress_jax.report._stages import stages_table
from compress_jax.report._tables import Table

NOT_MEASURED = (
    "Not measured: compress-jax report WORKDIR --measure runs both networks on test data and draws "
    "their answers and activations. It executes WORKDIR/config.py."
)


class Section(NamedTuple):
    """One part of a report.

    Attributes:
      title: its heading.
      lines: sentences or list items.
      tables: shown after them.
      picture: name of the picture shown last where charts cannot be, or None.
      charts: draws the interactive charts; None if it has none.
      caption: a sentence below them.
    """

    title: str
    lines: list[str] = []
    tables: list[Table] = []
    picture: str | None = None
    charts: Callable[[Run], list[Chart]] | None = None
    caption: str = ""


def headline(run: Run) -> str:
    """Return the result in a sentence.

    Args:
      run: the run.

    Returns:
      What the artifact is, how small and how accurate, and whether that is enough.
    """
    # Sizes are compared with the student's, as the teacher is another network, if there is one.
    rows = {row["name"]: row for row in run.results["rows"]}
    row = rows[run.results["chosen"]]
    student = rows["student"]
    ratio = student["nbytes"] / row["nbytes"]
    metric = run.results.get("metric")
    others = f"student {value_text(student['test'], metric)}"
    if "teacher" in rows:
        others += f", teacher {value_text(rows['teacher']['test'], metric)}"
    name = "" if metric is None else metric["name"]
    met = "It does not meet the requirement; nothing better was found."
    if run.results["met"]:
        met = "It meets the requirement."
    return (
        f"{row['name']}: {row['nbytes']:,} bytes, {ratio:.1f}x smaller than the student in "
        f"float32, at {name} {value_text(row['test'], metric)} on test data ({others}). {met}"
    )


def sections(run: Run, pictures: list[str]) -> list[Section]:
    """Return the parts of a report.

    Args:
      run: the run.
      pictures: the names of those that were drawn.

    Returns:
      The sections, in order; those with nothing to show are left out.
    """
    parts = [*_results(run), *_artifact(run), *_behavior(run), *_making(run)]
    # A picture may be missing (a run without metrics).
    drawn = [p._replace(picture=p.picture if p.picture in pictures else None) for p in parts]
    return [part for part in drawn if part.lines or part.tables or part.picture]


def _results(run: Run) -> list[Section]:
    """Return what came out, and why."""
    asked = requirements_table(run)
    untold = "The folder does not record what was asked: the run was not made by compress-jax run."
    results = results_table(run.results["rows"], run.results["chosen"], run.results.get("metric"))
    front = Section(
        "Results", [], [results], "tradeoff", _charts.fronts,
        "Filled marks are of validation data, hollow ones of test data, measured once, in the end. "
        "Nothing beats the networks on the gray line in both; within the dashed lines the "
        "requirement is met. Names without room are left out; hovering and the table tell them.",
    )  # fmt: skip
    return [
        Section("Asked and reached", [] if asked else [untold], [asked] if asked else []),
        front,
        _side_by_side(run.results.get("comparison")),
        Section("Decisions", run.decisions),
        Section("Files that could not be read", run.notes),
    ]


def _side_by_side(found: JsonObject | None) -> Section:
    """Return what the float32 student and the artifact answer; an empty section without it."""
    if not found:
        return Section("Side by side")
    values = tuple((name, *own) for name, own in found["values"].items())
    tables = [Table("Measured on the same texts", ("network", *found["measures"]), values)]
    if found["prompts"]:
        columns = zip(found["prompts"], *found["answers"].values(), strict=False)
        head = ("prompt", *found["answers"])
        tables.append(Table("What they write", head, tuple(columns)))
    return Section("Side by side", [], tables)


def _artifact(run: Run) -> list[Section]:
    """Return how the artifact is stored."""
    left_alone = run.metadata.get("left_alone", {})
    leaves = leaves_table(run.packed, left_alone, run.parts)
    skipped = Section("Skipped", ["Nothing."])
    if left_alone:
        skipped = Section("Skipped", [], [skipped_table(left_alone)])
    return [
        Section(
            "Layers", [], [leaves, causes_table(run.parts)], "layers", _charts.layers,
            "Bits for each entry count scales, masks and codebooks.",
        ),
        skipped,
        _sensitivities(run.extra.sensitivities),
        Section(
            "Weights before and after", [], [], "weights", _histograms.weights,
            "Weights of each layer: the float32 student in gray, the artifact in color. Exact "
            "zeros are not drawn; their share is written below each.",
        ),
    ]  # fmt: skip


def _sensitivities(found: JsonObject) -> Section:
    """Return the scores of options as a section; an empty one if the folder has none."""
    options = list(dict.fromkeys(name for own in found.get("scores", {}).values() for name in own))
    rows = []
    for path, own in found.get("scores", {}).items():
        rows.append((path, *(f"{own[name]:.3g}" if name in own else "-" for name in options)))
    if not rows:
        return Section("Sensitivities")
    head = ("leaf", *(f"{name}: {found['measure']}" for name in options))
    table = Table("Sensitivities", head, tuple(rows))
    stays = [f"{path} stays: {why}" for path, why in (found.get("left") or {}).items()]
    return Section("Sensitivities", stays, [table], None, _histograms.sensitivities)


def _behavior(run: Run) -> list[Section]:
    """Return how reference and artifact answer, and what is inside them."""
    found = run.extra.measured
    if not found:
        return [Section("Answers and activations", [NOT_MEASURED])]
    lines = [*found["notes"]]
    if found["activations"]:
        lines.append(f"Activations are of {found['activation_examples']:,} training examples.")
    return [
        Section("Answers", _told(found), _right_table(found), None, _histograms.confusion),
        Section("Activations", lines, [], None, _histograms.activations),
    ]


def _told(found: JsonObject) -> list[str]:
    """Return what the confusion says, in sentences."""
    counts = found.get("confusion")
    name = found["reference"]
    if not counts:
        return [f"{name} and artifact give no answers to count: the task has no classes."]
    agreed = sum(row[i] for i, row in enumerate(counts) if i < len(row))
    total = sum(map(sum, counts))
    share = f"{100 * agreed / max(total, 1):.2f} %"
    return [f"{name} and artifact give the same answer on {agreed:,} of {total:,} ({share})."]


def _right_table(found: JsonObject) -> list[Table]:
    right = found.get("right") or {}
    rows = tuple((name, f"{count:,}") for name, count in right.items())
    return [Table("Who is right", ("who is right", "test examples"), rows)] if rows else []


def _making(run: Run) -> list[Section]:
    """Return how all of it was made, and what was exported."""
    stages = stages_table(run)
    return [
        Section(
            "Training", [], [stages] if stages.rows else [], "curves", _charts.curves,
            "Training and validation, by stage.",
        ),
        Section("Exports", [], export_tables(run.extra.exports)),
        Section("How to make it again", [command(run)], origin_tables(run)),
    ]  # fmt: skip
