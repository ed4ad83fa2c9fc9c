"""Tables for the terminal: aligned columns, readable numbers, and no control characters."""

import unicodedata
from collections.abc import Collection, Sequence

# Unicode categories that are not shown as themselves: controls, characters that turn or join text
# invisibly, lone surrogates, unassigned and private characters, separators.
HIDDEN = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")
UNITS = ("", "k", "M", "G", "T", "P", "E")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return text with every character that is not shown as itself written as an escape.

    Terminals act on control characters: these clear the screen, set the title, or hide text. Names
    of leaves, files, candidates and metadata come from outside, so every function that prints or
    logs them escapes them with this one.

    Args:
      text: any object; its ``str``.
      lines: whether line ends and tabs stay, for a text of several lines.

    Returns:
      The text, unchanged if it has no such characters.

    Example:
      >>> printable("\x1b[2Jevil"), printable("dense/kernel")
      ('\\x1b[2Jevil', 'dense/kernel')
      >>> printable("a\nb"), printable("a\nb", lines=True)
      ('a\\nb', 'a\nb')
    """
    allowed = "\n\t" if lines else ""
    return "".join(_escaped(each, allowed) for each in str(text))


def _escaped(character: str, allowed: str) -> str:
    if character in allowed or unicodedata.category(character) not in HIDDEN:
        return character
    return character.encode("unicode_escape").decode("ascii")


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
        number = number / 1000
        power += 1
    if power == 0:
        return f"{number:g}"
    return f"{number:#.3g}".rstrip(".") + UNITS[power]


def aligned(
    rows: Sequence[Sequence[str]], left: int = 0, *, right: Collection[int] | None = None
) -> str:
    """Return rows of cells as lines of aligned columns.

    Args:
      rows: of equal lengths.
      left: how many of the first columns are words, which are aligned left; the others are numbers
        and are aligned right.
      right: instead of ``left``, which columns are aligned right.

    Returns:
      The lines, without trailing blanks; cells are `printable`.

    Example:
      >>> print(aligned([("site", "MACs"), ("head", "96")], left=1))
      site  MACs
      head    96
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if right is None:
        right = range(left, len(widths))
    sides = [">" if i in right else "<" for i in range(len(widths))]
    lines = []
    for row in rows:
        columns = zip(row, sides, widths, strict=True)
        line = "  ".join(f"{cell:{side}{width}}" for cell, side, width in columns)
        lines.append(line.rstrip())
    return "\n".join(lines)
