"""Stop on Ctrl-C and SIGTERM: one line and the exit code the shell expects, no traceback."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


class Stopped(BaseException):
    """A signal asked the command to stop.

    It is not an Exception, so no ``except Exception`` on the way mistakes it for an error.

    Attributes:
      exit_code: what the process should end with, ``128 + signum``: 130 for Ctrl-C, 143 for
        SIGTERM.
    """

    def __init__(self, signum: int, sentence: str = ""):
        """Say which signal came."""
        self.exit_code = 128 + signum
        super().__init__(sentence or f"stopped by {signal.Signals(signum).name}")


@dataclass
class Stop:
    """Whether a signal came.

    Attributes:
      stopped: what was raised; it is stored here because code that runs outside Python may hide an
        exception.
    """

    stopped: Stopped | None = None


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """Raise `Stopped` inside the ``with`` block on SIGINT or SIGTERM.

    A second signal ends the process at once.

    While a network trains, `compress_jax.train.watch_signals` takes over, to finish the step and
    save it first. Outside the main thread, where Python allows no handlers, nothing is caught.

    Yields:
      The `Stop`, which remembers the signal.

    Example:
      >>> with stopped_by_signals() as stop:
      ...     try:
      ...         signal.raise_signal(signal.SIGTERM)
      ...     except Stopped as error:
      ...         print(error, stop.stopped is error)
      stopped by SIGTERM True
    """
    stop = Stop()
    signals: tuple[signal.Signals, ...] = ()
    if threading.current_thread() is threading.main_thread():
        signals = (signal.SIGINT, signal.SIGTERM)

    def handle(signum: int, frame: FrameType | None) -> None:
        stop.stopped = Stopped(signum)
        for each in signals:
            signal.signal(each, signal.SIG_DFL)
        raise stop.stopped

    previous = {signum: signal.signal(signum, handle) for signum in signals}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
