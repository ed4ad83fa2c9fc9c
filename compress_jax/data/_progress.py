"""A progress bar that appears only where there is something to wait for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress(text: str, total: int, *, after: float = 2.0) -> Iterator[Callable[[int], None]]:
    """Show a bar with the time left on a terminal's standard error, once ``after`` seconds have passed.

    Args:
      text: what is being done.
      total: examples to do.
      after: seconds to wait before the bar appears.

    Yields:
      ``advance(n)``, to be called when n more examples are done.

    Example:
      >>> with progress("reading", 10) as advance:
      ...     advance(10)
    """
    console = Console(stderr=True)
    columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task, begun, done = bar.add_task(text, total=total), time.monotonic(), 0

    def advance(n: int) -> None:
        nonlocal done
        before, done = done, done + n
        # rich takes a lock for every update: a hundred of them cost nothing, one an example would.
        if before * 100 // total != done * 100 // total:
            bar.update(task, completed=done)
            if not bar.live.is_started and time.monotonic() - begun > after:
                bar.start()

    try:
        yield advance
    finally:
        bar.stop()
