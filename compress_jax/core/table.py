"""Tables for the terminal: aligned columns and numbers a person can read."""

import unicodedata
from collections.abc import Sequence

# Names that others chose, made fit to be shown: no character of theirs moves the cursor or turns
# the text around.


# Categories: controls, what turns or joins text invisibly, lone surrogates, unassigned and private
# characters, separators.
HIDDEN = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return text with every character that is not shown as itself written as an escape.

    Terminals act on control characters: they clear the screen, set the title, hide what follows.
    Names of leaves, files, candidates and metadata come from outside, so whatever prints or logs
    them passes them through here.

    Args:
      text: anything; its ``str``.
      lines: whether line ends and tabs stay, for a text of several lines.

    Returns:
      The text, unchanged if all of it can be seen.

    Example:
      >>> printable("\x1b[2Jevil"), printable("dense/kernel"), printable("a\nb"), printable("a\nb", lines=True)
      ('\\x1b[2Jevil', 'dense/kernel', 'a\\nb', 'a\nb')
    """
    kept = "\n\t" if lines else ""
    return "".join(each if each in kept or _shown(each) else _escaped(each) for each in str(text))


def _shown(character: str) -> bool:
    return unicodedata.category(character) not in HIDDEN


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


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
      left: how many of the first columns are words, which stand left; the others are numbers and
        stand right.

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
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
