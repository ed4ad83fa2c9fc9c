"""One table of text cells, three looks: the terminal, Markdown, HTML."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from compress_jax.core.table import printable

UNLIMITED = 1_000_000
LONGEST = 24  # a word that is longer, such as a path, may be folded
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


class _Fitted(RichTable):
    """rich's table, which never breaks a word.

    Where the terminal is too narrow for that, each row becomes a block of lines.
    """

    source: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table, as a table with folded columns, or as blocks."""
        if (
            Measurement.get(console, options.update(width=UNLIMITED), self).maximum
            <= options.max_width
        ):
            yield from super().__rich_console__(console, options)
            return
        widths = _folded(self.source, options.max_width)
        if widths is None:
            yield from _blocks(self.source)
            return
        narrow = _filled(self.source, every_word=True)
        for column, width in zip(narrow.columns, widths, strict=True):
            column.width = width
        yield from RichTable.__rich_console__(narrow, console, options.update(no_wrap=False))


def rich_table(table: Table) -> RichTable:
    """Return a table for `rich.console.Console.print`.

    Args:
      table: any.

    Returns:
      rich's own table; columns of words fold at spaces where the terminal is narrow, columns of
      numbers never. Where even that does not fit, each row is a block of lines.

    Example:
      >>> shown = rich_table(Table("", ("network", "bytes"), (("teacher", "1,000"),)))
      >>> [column.justify for column in shown.columns]
      ['left', 'right']
    """
    return _filled(table, every_word=False)


def _filled(table: Table, *, every_word: bool) -> "_Fitted":
    """Return a rich table; heads of number columns take two lines, or one line a word."""
    padding = (0, 0) if every_word else (0, 1)
    shown = _Fitted(
        title=_text(table.title) or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=padding,
    )
    shown.source = table
    for i, name in enumerate(table.head):
        number = table.numeric(i)
        head = name.replace(" ", "\n", -1 if every_word else 1) if number else name
        shown.add_column(
            Text(head), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for i, row in enumerate(table.rows):
        style = (
            "bold green"
            if i == table.marked
            else "bold"
            if i >= len(table.rows) - table.totals
            else ""
        )
        shown.add_row(
            *map(_text, row), style=style, end_section=i == len(table.rows) - table.totals - 1
        )
    return shown


def _folded(table: Table, width: int) -> list[int] | None:
    """Return the column widths at which no word breaks, or None if there are none."""
    columns = list(zip(*([table.head, *table.rows]), strict=True))
    numbers = [table.numeric(i) for i in range(len(columns))]
    wide = [max(cell_len(printable(cell)) for cell in column) for column in columns]
    least = [max(_longest_word(cell) for cell in column) for column in columns]
    least = [
        max(_longest_word(column[0]), *map(cell_len, column[1:])) if number else min(word, LONGEST)
        for column, word, number in zip(columns, least, numbers, strict=True)
    ]
    spare = width - (len(columns) + 1) - sum(least)  # one blank between two, and at both ends
    if spare < 0:
        return None
    for i, number in enumerate(numbers):
        more = 0 if number else min(spare, wide[i] - least[i])
        least[i], spare = least[i] + more, spare - more
    return least


def _longest_word(cell: str) -> int:
    return max((cell_len(word) for word in printable(cell).split()), default=0)


def _blocks(table: Table) -> Iterator[Text]:
    """Yield each row as its first cell and, below it, what the other columns say."""
    if table.title:
        yield Text(printable(table.title), style="italic")
    for i, row in enumerate(table.rows):
        yield Text(printable(row[0]), style="bold green" if i == table.marked else "bold")
        for name, cell in list(zip(table.head, row, strict=True))[1:]:
            if cell:
                yield Text(f"  {name}: {printable(cell)}")


def _text(cell: str) -> Text:
    return Text(printable(cell))


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
    head = [escaped(name) for name in table.head]
    rule = ["--:" if table.numeric(i) else ":--" for i in range(len(table.head))]
    strong = {table.marked, *range(len(table.rows) - table.totals, len(table.rows))}
    rows = [
        [_bold(escaped(cell)) if i in strong else escaped(cell) for cell in row]
        for i, row in enumerate(table.rows)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


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
    head = "".join(
        f"<th{kind}>{html.escape(printable(name))}</th>"
        for name, kind in zip(table.head, kinds, strict=True)
    )
    lines = []
    for i, row in enumerate(table.rows):
        kind = (
            ' class="marked"'
            if i == table.marked
            else ' class="total"'
            if i >= len(table.rows) - table.totals
            else ""
        )
        cells = "".join(
            f"<td{each}>{html.escape(printable(cell))}</td>"
            for cell, each in zip(row, kinds, strict=True)
        )
        lines.append(f"<tr{kind}>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def escaped(text: str, *, block: bool = False) -> str:
    r"""Return text as one line of Markdown that shows it as it is.

    No character of it acts as markup, as HTML or as the end of a cell.

    Args:
      text: any.
      block: whether it begins a line or an item, where some signs begin a list or a title.

    Returns:
      The line.

    Example:
      >>> print(escaped("a|b <b>*x*</b> $1 layer_0"), escaped("two\nlines"))
      a\|b &lt;b&gt;\*x\*&lt;/b&gt; \$1 layer_0 two lines
      >>> print(escaped("# no title", block=True), escaped("1. no item", block=True))
      \# no title 1&#8203;. no item
    """
    line = printable(text, lines=True).replace("\n", " ").replace("\t", " ")
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(
        r"([\\`*|~$\[\]!]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line
    )  # underscores within words are safe
    return re.sub(r"^(\s*)([#+-]|\d+(?=[.)]))", _unlisted, line) if block else line


def _unlisted(start: re.Match[str]) -> str:
    """Keep the start of a line from beginning a list or a title."""
    space, mark = start.groups()
    return f"{space}{mark}&#8203;" if mark.isdigit() else f"{space}\\{mark}"


def _bold(cell: str) -> str:
    return f"**{cell}**" if cell else cell
