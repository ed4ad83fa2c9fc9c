"""The report as one HTML file that needs nothing else: style and pictures are inside, and it links to nowhere."""

import base64
import html
from collections.abc import Mapping

from compress_jax.core.printable import printable
from compress_jax.report.read import Run
from compress_jax.report.sections import CAPTIONS, Section, headline, sections
from compress_jax.report.tables import Table, html_table

STYLE = """
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c2430; background: #f5f6f8;
  margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 8px; }
h2 { font-size: 18px; margin: 0 0 12px; }
h3 { font-size: 14px; margin: 20px 0 6px; color: #5b6675; font-weight: 600; }
.headline { font-size: 17px; margin: 0 0 24px; padding: 14px 18px; background: #fff; border-left: 5px solid #1f9d61;
  border-radius: 4px; }
.headline.unmet { border-color: #d9622b; }
section { background: #fff; border: 1px solid #e3e6eb; border-radius: 8px; padding: 20px 22px; margin: 0 0 20px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; }
th { text-align: left; color: #5b6675; font-weight: 600; border-bottom: 2px solid #d5dae1; white-space: nowrap; }
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
    """Return ``report.html``.

    Args:
      run: the run.
      pictures: PNG files by name.

    Returns:
      HTML.
    """
    title = _escaped(run.results["experiment"])
    unmet = "" if run.results["met"] else " unmet"
    body = "\n".join(_section(part, pictures) for part in sections(run, list(pictures)))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f'<body><main><h1>{title}</h1>\n<p class="headline{unmet}">{_escaped(headline(run))}</p>\n'
        f"{body}\n</main></body></html>\n"
    )


def _section(part: Section, pictures: Mapping[str, bytes]) -> str:
    items = "".join(f"<li>{_escaped(line)}</li>" for line in part.lines)
    blocks = [f"<h2>{html.escape(part.title)}</h2>", f"<ul>{items}</ul>" if items else ""]
    blocks.extend(_titled(table, several=len(part.tables) > 1) for table in part.tables)
    if part.picture:
        blocks.append(_figure(part.picture, pictures[part.picture]))
    return f"<section>{''.join(blocks)}</section>"


def _titled(table: Table, *, several: bool) -> str:
    return (f"<h3>{html.escape(table.title)}</h3>" if several else "") + html_table(table)


def _figure(name: str, png: bytes) -> str:
    data, caption = base64.b64encode(png).decode(), html.escape(CAPTIONS[name])
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _escaped(text: str) -> str:
    return html.escape(printable(text))
