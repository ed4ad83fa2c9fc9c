"""How far the run is: a live bar on a terminal, a line now and then anywhere else."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from compress_jax.core.table import printable

Report = Callable[[int, Mapping[str, float]], None]


@contextlib.contextmanager
def progress(
    title: str, steps: int, start: int = 0, *, console: Console | None = None, seconds: float = 10.0
) -> Iterator[Report]:
    """Show progress on standard error while the ``with`` block runs.

    Args:
      title: what is being done.
      steps: the number of steps in all.
      start: how many were done before.
      console: where to show it; standard error by default.
      seconds: the least time between two lines where there is no terminal.

    Yields:
      ``report(step, values)``; empty values leave those shown before.

    Example:
      >>> import sys
      >>> with progress("training", 4, console=Console(file=sys.stdout), seconds=0.0) as report:
      ...     report(4, {"loss": 0.25})
      training 4/4: loss 0.25
    """
    title = escape(printable(title))
    if console is None:
        console = Console(stderr=True)
    if console.is_terminal:
        with _bar(title, steps, start, console) as report:
            yield report
    else:
        yield _lines(title, steps, console, seconds)


@contextlib.contextmanager
def _bar(title: str, steps: int, start: int, console: Console) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, completed=start, values="")

        def report(step: int, values: Mapping[str, float]) -> None:
            # Steps without new metrics leave those shown before.
            fields = {"values": _text(values)} if values else {}
            bar.update(task, completed=step, **fields)  # pyright: ignore[reportArgumentType]

        yield report


def _lines(title: str, steps: int, console: Console, seconds: float) -> Report:
    last = time.monotonic()

    def report(step: int, values: Mapping[str, float]) -> None:
        nonlocal last
        now = time.monotonic()
        # The last step is shown in any case, so that a log ends with the final numbers.
        if values and (step == steps or now - last >= seconds):
            console.print(
                f"{title} {step}/{steps}: {_text(values)}", highlight=False, soft_wrap=True
            )
            last = now

    return report


def say(title: str, text: str, *, console: Console | None = None) -> None:
    """Print a line on standard error, after the progress.

    Args:
      title: what was done.
      text: how it went.
      console: where to print it; standard error by default.

    Example:
      >>> import sys
      >>> say("training", "12 steps a second", console=Console(file=sys.stdout))
      training: 12 steps a second
    """
    console = console or Console(stderr=True)
    line = f"{escape(printable(title))}: {escape(text)}"
    console.print(line, highlight=False, soft_wrap=True)


FIRST = ("loss", "accuracy")
ROOM = 36  # columns for metrics: a line with its title and steps fits into 80


def _text(values: Mapping[str, float]) -> str:
    """Return the metrics that fit on a line, loss and accuracy first; the file has all of them."""
    names = [*(name for name in FIRST if name in values), *(n for n in values if n not in FIRST)]
    text = ""
    for name in names:
        longer = f"{text}  {escape(printable(name))} {values[name]:.4g}".strip()
        if text and len(longer) > ROOM:
            break
        text = longer
    return text
