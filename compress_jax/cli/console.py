"""Consoles for the commands: tables keep their columns, and words are never broken."""

import shutil
import textwrap
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from compress_jax.core.table import printable

UNLIMITED = 10_000  # columns, where nobody looks at a screen


class _Console(Console):
    """A console that wraps text at spaces on a terminal, which would break words; no long word."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does."""
        if self.is_terminal:
            objects = tuple(
                fitted(each, self.width) if isinstance(each, str) else each for each in objects
            )
        super().print(*objects, **options)

    def on_broken_pipe(self) -> NoReturn:
        """Leave a closed pipe to `main`, which has an exit code for it; rich would end with 1."""
        raise


def stdout() -> Console:
    """Return the console for results; files and pipes get whole lines, and numbers no color."""
    return _wide(_Console(highlight=False, soft_wrap=True))


def stderr() -> Console:
    """Return the console for what went wrong."""
    return _wide(_Console(highlight=False, soft_wrap=True, stderr=True))


def shown(text: object) -> str:
    r"""Return foreign text for `Console.print`, without markup or control characters.

    Example:
      >>> shown("[bold]\x1b[2J")
      '\\[bold]\\x1b[2J'
    """
    return escape(printable(text, lines=True))


def fitted(text: str, width: int | None = None) -> str:
    r"""Wrap lines that are wider than the terminal at spaces, and keep their indentation.

    Args:
      text: of several lines.
      width: columns; None asks the terminal.

    Returns:
      The text.

    Example:
      >>> print(fitted("a line\n  run      several words", width=20))
      a line
        run      several
                 words
    """
    columns = width or shutil.get_terminal_size().columns
    lines: list[str] = []
    for line in text.split("\n"):
        start = len(line) - len(line.lstrip())
        name, gap, rest = line[start:].partition("  ")  # a name and what it means, in two columns
        hang = len(line) - len(rest.lstrip()) if gap and rest and start else start
        wrapped = textwrap.wrap(
            line,
            columns,
            subsequent_indent=" " * hang,
            break_long_words=False,
            break_on_hyphens=False,
            tabsize=4,
        )
        lines.extend(wrapped if len(line) > columns else [line])
    return "\n".join(lines)


def _wide(console: Console) -> Console:
    # A file or a pipe has no columns; a table cut at 80 would lose numbers.
    if not console.is_terminal:
        console.width = UNLIMITED
    return console
