"""A table of text cells, printed as plain text, for the terminal, as Markdown or as HTML."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from compress_jax.core.table import aligned, printable
from compress_jax.report._templates import rendered

UNLIMITED = 1_000_000  # columns
LONGEST = 24  # letters; a longer word, such as a path, may be folded
NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]\d+)?( ± [\d.,]+(e[-+]\d+)?)?( ?[%x])?|-")


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      title: what it shows; may be empty.
      head: the columns' names.
      rows: the cells, as many a row as there are columns.
      marked: number of the row to point out, or None.
      totals: how many of the last rows are totals.

    Example:
      >>> table = Table("Results", ("network", "bytes"), (("teacher", "1,000"), ("int4", "90")))
      >>> table.numeric(0), table.numeric(1)
      (False, True)
      >>> print(table)
      network  bytes
      teacher  1,000
      int4        90
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None
    totals: int = 0

    def numeric(self, column: int) -> bool:
        """Return whether a column holds numbers, which are aligned right."""
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(NUMBER.fullmatch(cell) for cell in cells)

    def kind(self, column: int) -> str:
        """Return how a column is set: ``n`` for numbers, ``s`` for short words, or nothing."""
        if self.numeric(column):
            return "n"
        return "s" if all(len(row[column]) <= LONGEST for row in self.rows) else ""

    def __str__(self) -> str:
        """Return the table as aligned text, without its title."""
        numbers = [i for i in range(len(self.head)) if self.numeric(i)]
        return aligned([self.head, *self.rows], right=numbers)


class _Fitted(RichTable):
    """rich's table, which never breaks a word.

    Where the terminal is too narrow for that, each row becomes a block of lines.
    """

    source: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as a table, as a table with folded columns, or as blocks."""
        # The width at which no cell is folded.
        needed = Measurement.get(console, options.update(width=UNLIMITED), self).maximum
        if needed <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        widths = _folded(self.source, options.max_width)
        if widths is None:
            yield from _blocks(self.source)
            return
        narrow = _filled(self.source, every_word=True)
        # rich would share out the width by itself, and break words where it likes.
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
        side = "right" if number else "left"
        shown.add_column(Text(head), justify=side, no_wrap=number, overflow="fold")
    first_total = len(table.rows) - table.totals
    for i, row in enumerate(table.rows):
        style = "bold" if i >= first_total else ""
        if i == table.marked:
            style = "bold green"
        shown.add_row(*map(_text, row), style=style, end_section=i == first_total - 1)
    return shown


def _folded(table: Table, width: int) -> list[int] | None:
    """Return the column widths at which no word breaks, or None if there are none."""
    # Every column gets what its longest word needs, and columns of words what is left over.
    columns = list(zip(*([table.head, *table.rows]), strict=True))
    numbers = [table.numeric(i) for i in range(len(columns))]
    widths = [_least_width(column, number) for column, number in zip(columns, numbers, strict=True)]
    spare = width - (len(columns) + 1) - sum(widths)  # one blank between two, and at both ends
    if spare < 0:
        return None
    for i, column in enumerate(columns):
        if not numbers[i]:
            wanted = max(cell_len(printable(cell)) for cell in column)
            more = min(spare, wanted - widths[i])
            widths[i] += more
            spare -= more
    return widths


def _least_width(column: Sequence[str], number: bool) -> int:
    """Return the width at which no number breaks, and no word but a very long one."""
    if number:
        return max(_longest_word(column[0]), *map(cell_len, column[1:]))
    return min(max(_longest_word(cell) for cell in column), LONGEST)


def _longest_word(cell: str) -> int:
    return max((cell_len(word) for word in printable(cell).split()), default=0)


def _blocks(table: Table) -> Iterator[Text]:
    """Yield each row as its first cell and, below it, the named cells of the other columns."""
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
      >>> rows = ("teacher", "1,000"), ("a|b", "90")
      >>> print(markdown_table(Table("", ("network", "bytes"), rows, marked=1)))
      | network | bytes |
      | :-- | --: |
      | teacher | 1,000 |
      | **a\|b** | **90** |
    """
    # GitHub's syntax: a colon at the side of the dashes aligns a column.
    head = [escaped(name) for name in table.head]
    rule = ["--:" if table.numeric(i) else ":--" for i in range(len(table.head))]
    strong = {table.marked, *range(len(table.rows) - table.totals, len(table.rows))}
    rows = []
    for i, row in enumerate(table.rows):
        cells = [escaped(cell) for cell in row]
        rows.append([_bold(cell) for cell in cells] if i in strong else cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def html_table(table: Table) -> str:
    """Return a table as HTML, every cell escaped.

    Args:
      table: any.

    Returns:
      A ``<table>``; its rows have the classes ``marked`` and ``total``, its cells of numbers ``n``.

    Example:
      >>> ">a&lt;b</td>" in html_table(Table("", ("network",), (("a<b",),)))
      True
    """
    return rendered("table.html", table=table, caption=table.title)


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
    # The ampersand first, as the others become entities that begin with one.
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # Underscores within words are no markup.
    line = re.sub(r"([\\`*|~$\[\]!]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)
    return re.sub(r"^(\s*)([#+-]|\d+(?=[.)]))", _unlisted, line) if block else line


def _unlisted(start: re.Match[str]) -> str:
    """Keep the start of a line from beginning a list or a title."""
    space, mark = start.groups()
    return f"{space}{mark}&#8203;" if mark.isdigit() else f"{space}\\{mark}"


def _bold(cell: str) -> str:
    return f"**{cell}**" if cell else cell
