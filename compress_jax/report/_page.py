"""A run's folder to ``report.html``, ``report.md`` and the pictures in ``report/``."""

import base64
import hashlib
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.table import printable
from compress_jax.export import write_atomically
from compress_jax.report._charts import Chart
from compress_jax.report._markdown import text
from compress_jax.report._plots import CAPTIONS, pictures
from compress_jax.report._read import Run, read_run
from compress_jax.report._sections import Section, headline, sections
from compress_jax.report._tables import Table
from compress_jax.report._templates import rendered, source
from compress_jax.report._vega import MISSING, library
from compress_jax.report._written import csv_table, latex_table


class Part(NamedTuple):
    """A section as the template takes it.

    Attributes:
      anchor: its id, and what the contents link to.
      section: its title, lines and caption.
      tables: with the files that they can be had as.
      charts: interactive; empty where there is no library.
      image: a still picture as a data URI, or None.
      alt: what the picture shows.
    """

    anchor: str
    section: Section
    tables: "list[Shown]"
    charts: list[Chart]
    image: str | None
    alt: str


class Shown(NamedTuple):
    """A table, and the same as data URIs of CSV and LaTeX; ``name`` is that of their files."""

    table: Table
    name: str
    csv: str
    latex: str


def page(run: Run, pictures: Mapping[str, bytes]) -> str:
    """Return ``report.html``: one file with style, script and charts inside, and no links.

    Args:
      run: the run.
      pictures: PNG files by name, shown where the library of charts is not installed.

    Returns:
      HTML. Its policy allows the scripts of this package alone, by their digests.
    """
    drawing = library()
    found = sections(run, list(pictures))
    parts = [_part(part, i, run, pictures, drawing is not None) for i, part in enumerate(found)]
    charts = {chart.name: _data(chart) for part in parts for chart in part.charts}
    scripts = [each for each in (drawing if charts else None, source("page.js")) if each]
    return rendered(
        "report.html",
        title=run.results["experiment"],
        headline=headline(run),
        met=run.results["met"],
        notice=None if drawing else MISSING,
        parts=parts,
        charts=_shown(charts),
        style=Markup(source("style.css")),
        scripts=[Markup(_closed(each)) for each in scripts],
        policy=" ".join(_digest(_closed(each)) for each in scripts),
    )


def _part(
    part: Section, number: int, run: Run, pictures: Mapping[str, bytes], interactive: bool
) -> Part:
    charts = part.charts(run) if interactive and part.charts else []
    png = pictures.get(part.picture or "") if not charts else None
    tables = [_downloads(table, f"{number}-{i}") for i, table in enumerate(part.tables)]
    image = None if png is None else _uri("image/png", png)
    alt = CAPTIONS.get(part.picture or "", "")
    return Part(f"part-{number}", part, tables, charts, image, alt)


def _downloads(table: Table, number: str) -> Shown:
    letters = "".join(each if each.isalnum() else "-" for each in table.title.lower())
    name = f"{number}-{letters}" if letters else number
    latex = _quoted("application/x-tex", latex_table(table))
    return Shown(table, name, _quoted("text/csv", csv_table(table)), latex)


def _data(chart: Chart) -> dict[str, Any]:
    about = {"description": chart.description, "zoom": chart.zoom, "labels": chart.labels}
    return {"spec": chart.spec, **about}


def _shown(value: Any) -> Any:
    """Return JSON in which every text is printable."""
    if isinstance(value, dict):
        return {key: _shown(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def _uri(kind: str, data: bytes) -> str:
    # Inside the page, so that one file can be mailed and opened anywhere.
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _quoted(kind: str, text: str) -> str:
    return f"data:{kind};charset=utf-8,{urllib.parse.quote(text)}"


def _closed(script: str) -> str:
    """Return a script without what would end its element early."""
    return script.replace("</script", r"<\/script").replace("<!--", r"<\!--")


def _digest(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"


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
