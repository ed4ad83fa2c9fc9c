"""Tables for the terminal: aligned columns and numbers a person can read."""

from collections.abc import Sequence

from compress_jax.core.printable import printable

UNITS = ("", "k", "M", "G", "T", "P", "E")


def units(number: float) -> str:
    """Return a number with three digits and a unit.

    Args:
      number: not negative.

    Returns:
      The text; ``k`` is 1000, ``M`` a million, ``G`` 10^9, ``T`` 10^12.

    Example:
      >>> units(4_089_184_256), units(1536), units(999_999), units(96)
      ('4.09G', '1.54k', '1.00M', '96')
    """
    power = 0
    while float(f"{number:.3g}") >= 1000 and power < len(UNITS) - 1:
        number, power = number / 1000, power + 1
    return f"{number:#.3g}".rstrip(".") + UNITS[power] if power else f"{number:g}"


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return rows of cells as lines of columns.

    Args:
      rows: of equal lengths.
      left: how many of the first columns are words, which stand left; the others are numbers and stand right.

    Returns:
      The lines, without blanks at their ends.

    Example:
      >>> print(aligned([("site", "MACs"), ("head", "96")], left=1))
      site  MACs
      head    96
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if i < left else ">" for i in range(len(widths))]
    columns = list(zip(sides, widths, strict=True))
    lines = ("  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
