"""A run's folder to ``report.html``, ``report.md`` and the pictures in ``report/``."""

import base64
import html
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.table import printable
from compress_jax.core.types import JsonObject
from compress_jax.export import write_atomically
from compress_jax.report._plots import pictures
from compress_jax.report._read import Run, read_run
from compress_jax.report._rows import (
    causes_table,
    leaves_table,
    metadata_table,
    results_table,
    skipped_table,
    value_text,
)
from compress_jax.report._tables import Table, escaped, html_table, markdown_table

CAPTIONS = {
    "tradeoff": "The metric on validation data against bytes on disk. The shaded corner is where "
    "the requirement is met; hollow marks are of test data, measured once, in the end.",
    "weights": "Weights of each layer: the float32 student in grey, the artifact in color. Exact "
    "zeros are not drawn; their share is in the corner.",
    "layers": "Stored bits for each entry (scales, masks and codebooks included) and share of "
    "exact zeros.",
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
      The sections, in order.
    """
    left_alone = run.metadata.get("left_alone", {})
    chosen = run.results["chosen"]
    results = results_table(run.results["rows"], chosen, run.results.get("metric"))
    leaves = leaves_table(run.packed, left_alone, run.parts)
    skipped = Section("Skipped", ["Nothing."])
    if left_alone:
        skipped = Section("Skipped", [], [skipped_table(left_alone)])
    arguments = metadata_table("Arguments", run.record.get("arguments", {}))
    origin = (arguments, metadata_table("Versions", _versions(run)))
    # In the order of a reader's questions: what came out, why, where the bytes are, how.
    parts = [
        Section("Results", [], [results], "tradeoff"),
        Section("Decisions", run.decisions),
        Section("Files that could not be read", run.notes),
        Section("Layers", [], [leaves, causes_table(run.parts)], "layers"),
        skipped,
        Section("Weights before and after", [], [], "weights"),
        Section("Training", [], [], "curves"),
        Section("Arguments and versions", [_command(run)], [t for t in origin if t.rows]),
    ]
    # A picture may be missing (a run without metrics), and a section may have nothing to show.
    drawn = [p._replace(picture=p.picture if p.picture in pictures else None) for p in parts]
    return [part for part in drawn if part.lines or part.tables or part.picture]


def _command(run: Run) -> str:
    # Only the command line writes run.json.
    if not run.record:
        return "Made by compress_jax.search.compress."
    return f"compress-jax run {' '.join([run.record['config'], *run.record['flags']])}"


def _versions(run: Run) -> JsonObject:
    keys = ("data", "data_sha256", "model")
    data = {key: run.metadata[key] for key in keys if key in run.metadata}
    return {**run.record.get("versions", {}), **data}


STYLE = """
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: #1c2430; background: #f5f6f8; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 8px; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 20px 0 6px; color: #5b6675; font-weight: 600; }
.headline { font-size: 17px; margin: 0 0 24px; padding: 14px 18px; background: #fff;
  border-left: 5px solid #1f9d61; border-radius: 4px; }
.headline.unmet { border-color: #d9622b; }
section { background: #fff; border: 1px solid #e3e6eb; border-radius: 8px;
  padding: 20px 22px; margin: 0 0 20px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; }
th { text-align: left; color: #5b6675; font-weight: 600; border-bottom: 2px solid #d5dae1;
  white-space: nowrap; }
th, td { padding: 5px 14px 5px 0; vertical-align: top; }
td { border-bottom: 1px solid #edf0f3; overflow-wrap: anywhere; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.marked td { background: #e9f7ef; font-weight: 600; }
tr.total td { font-weight: 600; }
ul { margin: 0; padding-left: 20px; }
figure { margin: 16px 0 0; }
img { max-width: 100%; height: auto; display: block; }
figcaption { color: #5b6675; font-size: 13px; margin-top: 6px; }
"""


def page(run: Run, pictures: Mapping[str, bytes]) -> str:
    """Return ``report.html``: one file with style and pictures inside, and no links.

    Args:
      run: the run.
      pictures: PNG files by name.

    Returns:
      HTML.
    """
    # Names come from configs and files: nothing in them may act as HTML.
    title = _escaped(run.results["experiment"])
    unmet = "" if run.results["met"] else " unmet"
    body = "\n".join(_section(part, pictures) for part in sections(run, list(pictures)))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><style>{STYLE}</style></head>\n'
        f'<body><main><h1>{title}</h1>\n<p class="headline{unmet}">{_escaped(headline(run))}</p>\n'
        f"{body}\n</main></body></html>\n"
    )


def _section(part: Section, pictures: Mapping[str, bytes]) -> str:
    items = "".join(f"<li>{_escaped(line)}</li>" for line in part.lines)
    blocks = [f"<h2>{html.escape(part.title)}</h2>", f"<ul>{items}</ul>" if items else ""]
    # A single table needs no title beside that of its section.
    blocks.extend(_titled(table, several=len(part.tables) > 1) for table in part.tables)
    if part.picture:
        blocks.append(_figure(part.picture, pictures[part.picture]))
    return f"<section>{''.join(blocks)}</section>"


def _titled(table: Table, *, several: bool) -> str:
    return (f"<h3>{html.escape(table.title)}</h3>" if several else "") + html_table(table)


def _figure(name: str, png: bytes) -> str:
    # Inside the page, so that one file can be mailed and opened anywhere.
    data = base64.b64encode(png).decode()
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def text(run: Run, pictures: list[str]) -> str:
    """Return ``report.md``; its pictures are files beside it.

    Args:
      run: the run.
      pictures: the names of those in ``report/``.

    Returns:
      Markdown.
    """
    parts = [
        f"# {escaped(run.results['experiment'])}",
        escaped(headline(run), block=True),
        *(_markdown_section(part) for part in sections(run, pictures)),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_section(part: Section) -> str:
    blocks = [f"## {part.title}"]
    if part.lines:
        blocks.append("\n".join(f"* {escaped(line, block=True)}" for line in part.lines))
    blocks.extend(markdown_table(table) for table in part.tables)
    if part.picture:
        blocks.append(f"![{part.title}](report/{part.picture}.png)\n\n{CAPTIONS[part.picture]}")
    return "\n\n".join(blocks)


@renamed_arguments(say="log_fn")
def write(directory: str | Path, log_fn: Callable[[str], None] | None = None) -> Path:
    """Write the report of a finished run.

    Args:
      directory: its folder.
      log_fn: receives a sentence for each file that is damaged and so is not shown; the report has
        them too.

    Returns:
      ``report.html``, one file that needs nothing else; beside it are ``report.md`` and its
      pictures in ``report/``.

    Raises:
      ConfigError: if no run was finished there.
      ArtifactError: if an artifact is missing or damaged, or nothing can be written.

    Example:
      >>> import json, tempfile
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> directory, params = Path(tempfile.mkdtemp()), {"params": {"kernel": jnp.ones((2, 2))}}
      >>> names = ("student", "artifact")
      >>> sizes = [cj.save(directory / f"{name}.safetensors", params) for name in names]
      >>> numbers = {"validation": 0.9, "test": 0.8, "bits": 32.0, "accepted": None, "reason": ""}
      >>> rows = [{"name": name, "nbytes": size, **numbers} for name, size in zip(names, sizes)]
      >>> results = {"experiment": "tiny", "chosen": "artifact", "met": True, "rows": rows}
      >>> _ = (directory / "results.json").write_text(json.dumps(results))
      >>> cj.report.write(directory).name, (directory / "report" / "tradeoff.png").exists()
      ('report.html', True)
    """
    run = read_run(Path(directory))
    for note in run.notes:
        (log_fn or str)(note)
    # All is drawn before anything is written.
    drawn = pictures(run)
    for name, png in drawn.items():
        write_atomically(run.directory / "report" / f"{name}.png", png)
    write_atomically(run.directory / "report.md", text(run, list(drawn)).encode())
    write_atomically(run.directory / "report.html", page(run, drawn).encode())
    return run.directory / "report.html"
