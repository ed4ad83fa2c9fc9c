"""Stopping politely: Ctrl-C and SIGTERM end a run after the current step, with a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Interrupted(Exception):  # noqa: N818  it is no error: the run was asked to stop, and did
    """A run was stopped by a signal, after its state was saved.

    Attributes:
      signum: the signal's number.
      step: how many steps had been taken.
      exit_code: what the process should end with, ``128 + signum``: 130 for Ctrl-C, 143 for
        SIGTERM.

    Example:
      >>> import compress_jax as cj
      >>> stop = cj.train.Interrupted(signal.SIGTERM, step=7)
      >>> str(stop), stop.exit_code
      ('stopped by SIGTERM after step 7', 143)
    """

    def __init__(self, signum: int, step: int):
        """Remember which signal came, and when."""
        self.signum = signum
        self.step = step
        self.exit_code = 128 + signum
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")


@contextlib.contextmanager
def watch_signals(*signals: int) -> Iterator[Callable[[], int | None]]:
    """Catch signals inside the ``with`` block instead of dying of them.

    The first signal is remembered and the handlers that were there before come back at once, so a
    second one acts as it would have. Outside the main thread, where Python allows no handlers,
    nothing is caught. A process that lets ``jax.distributed`` handle preemption should give no
    SIGTERM here.

    Args:
      *signals: their numbers; SIGINT and SIGTERM if none is given.

    Yields:
      A function that returns the number of the signal that came, or None.

    Example:
      >>> with watch_signals() as received:
      ...     signal.raise_signal(signal.SIGINT)
      ...     print(received() == signal.SIGINT)
      True
    """
    received: list[int] = []
    previous: dict[int, object] = {}

    # A handler that was not set from Python is None, and cannot be given back.
    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)  # pyright: ignore[reportArgumentType]
        previous.clear()

    def remember(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore()  # a second signal acts as usual, should the step never finish

    if threading.current_thread() is threading.main_thread():
        for signum in signals or (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, remember)
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()
