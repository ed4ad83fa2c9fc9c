"""A table as the files that people carry on with: CSV and LaTeX."""

import csv
import io

from compress_jax.core.table import printable
from compress_jax.report._tables import Table

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
FORMULAS = ("=", "+", "-", "@")  # what begins a formula in a spreadsheet


def csv_table(table: Table) -> str:
    """Return a table as CSV: the head, then the rows, with the text of each cell.

    Args:
      table: any.

    Returns:
      Lines. A cell that a spreadsheet would run as a formula begins with an apostrophe.

    Example:
      >>> print(csv_table(Table("", ("network", "bytes"), (("a, b", "1,000"), ("=1", "-")))))
      network,bytes
      "a, b","1,000"
      '=1,-
      <BLANKLINE>
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_inert(cell) for cell in row] for row in (table.head, *table.rows))
    return text.getvalue()


def _inert(cell: str) -> str:
    cell = printable(cell)
    return f"'{cell}" if cell.startswith(FORMULAS) and cell != "-" else cell


def latex_table(table: Table) -> str:
    r"""Return a table as LaTeX, for the package booktabs; the marked row and the totals are bold.

    Args:
      table: any.

    Returns:
      A ``tabular``, every cell escaped.

    Example:
      >>> print(latex_table(Table("", ("network", "bytes"), (("a_b", "90"),))))
      \begin{tabular}{lr}
      \toprule
      network & bytes \\
      \midrule
      a\_b & 90 \\
      \bottomrule
      \end{tabular}
      <BLANKLINE>
    """
    sides = "".join("r" if table.numeric(i) else "l" for i in range(len(table.head)))
    strong = {table.marked, *range(len(table.rows) - table.totals, len(table.rows))}
    rows = [_latex_row(row, bold=i in strong) for i, row in enumerate(table.rows)]
    head = _latex_row(table.head, bold=False)
    lines = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", head, r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_row(cells: tuple[str, ...], *, bold: bool) -> str:
    texts = ["".join(LATEX.get(each, each) for each in printable(cell)) for cell in cells]
    if bold:
        texts = [rf"\textbf{{{text}}}" if text else "" for text in texts]
    return " & ".join(texts) + r" \\"
