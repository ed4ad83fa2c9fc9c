"""Where commands print: tables keep their columns also where there is no terminal to fit."""

from rich.console import Console


def stdout() -> Console:
    """Return the console for results; lines are never wrapped, and numbers are not coloured."""
    return _wide(Console(highlight=False, soft_wrap=True))


def stderr() -> Console:
    """Return the console for what went wrong."""
    return _wide(Console(highlight=False, soft_wrap=True, stderr=True))


def _wide(console: Console) -> Console:
    if not console.is_terminal:
        console.width = 160
    return console
