"""One table of text cells, three looks: the terminal, Markdown, HTML."""

import html
import re
from dataclasses import dataclass

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

NUMBER = re.compile(r"[\d.,]+( ?[%x])?|-")


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      title: what it shows; may be empty.
      head: the columns' names.
      rows: the cells, as many a row as there are columns.
      marked: number of the row to point out, or None.
      totals: how many of the last rows are totals.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None
    totals: int = 0

    def numeric(self, column: int) -> bool:
        """Tell whether a column holds numbers, which are aligned to the right."""
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells)


def rich_table(table: Table) -> RichTable:
    """Return a table for `rich.console.Console.print`.

    Args:
      table: any.

    Returns:
      rich's own table; columns of words fold where the terminal is narrow, columns of numbers never.

    Example:
      >>> shown = rich_table(Table("", ("network", "bytes"), (("teacher", "1,000"),)))
      >>> [column.justify for column in shown.columns]
      ['left', 'right']
    """
    shown = RichTable(title=table.title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, name in enumerate(table.head):
        number = table.numeric(i)
        head = name.replace(" ", "\n", 1) if number else name
        shown.add_column(head, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for i, row in enumerate(table.rows):
        style = "bold green" if i == table.marked else "bold" if i >= len(table.rows) - table.totals else ""
        shown.add_row(*(Text(cell) for cell in row), style=style, end_section=i == len(table.rows) - table.totals - 1)
    return shown


def markdown_table(table: Table) -> str:
    r"""Return a table as Markdown; the marked row and the totals are bold.

    Args:
      table: any.

    Returns:
      Lines, without the title.

    Example:
      >>> print(markdown_table(Table("", ("network", "bytes"), (("teacher", "1,000"), ("a|b", "90")), marked=1)))
      | network | bytes |
      | :-- | --: |
      | teacher | 1,000 |
      | **a\|b** | **90** |
    """
    rule = ["--:" if table.numeric(i) else ":--" for i in range(len(table.head))]
    strong = {table.marked, *range(len(table.rows) - table.totals, len(table.rows))}
    rows = [[_bold(_one_line(cell)) if i in strong else _one_line(cell) for cell in row] for i, row in enumerate(table.rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (table.head, rule, *rows))


def html_table(table: Table) -> str:
    """Return a table as HTML, every cell escaped.

    Args:
      table: any.

    Returns:
      A ``<table>``; its rows have the classes ``marked`` and ``total``, its cells of numbers ``n``.

    Example:
      >>> "<td>a&lt;b</td>" in html_table(Table("", ("network",), (("a<b",),)))
      True
    """
    kinds = [' class="n"' if table.numeric(i) else "" for i in range(len(table.head))]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(table.head, kinds, strict=True))
    lines = []
    for i, row in enumerate(table.rows):
        kind = ' class="marked"' if i == table.marked else ' class="total"' if i >= len(table.rows) - table.totals else ""
        cells = "".join(f"<td{each}>{html.escape(cell)}</td>" for cell, each in zip(row, kinds, strict=True))
        lines.append(f"<tr{kind}>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _one_line(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _bold(cell: str) -> str:
    return f"**{cell}**" if cell else cell
