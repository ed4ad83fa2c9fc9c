"""Names that others chose, made fit to be shown: no character of theirs moves the cursor or turns the text around."""

import unicodedata

# Categories: controls, what turns or joins text invisibly, lone surrogates, unassigned and private characters, separators.
HIDDEN = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return text with every character that is not shown as itself written as an escape.

    Terminals act on control characters: they clear the screen, set the title, hide what follows. Names of leaves, files,
    candidates and metadata come from outside, so whatever prints or logs them passes them through here.

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
