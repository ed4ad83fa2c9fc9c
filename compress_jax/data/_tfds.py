"""What to tell a person when a data set cannot be had: what is missing, where it was looked for, what to do."""

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compress_jax.core.errors import DataError
from compress_jax.data._builders import idx


def no_files(name: str, url: str, home: Path, places: list[Path], why: str) -> str:
    """Write what a person needs to know when the files are nowhere: what, where it was looked for, what to do.

    Args:
      name: TFDS name.
      url: folder of the published files.
      home: where it would have been prepared.
      places: where the files were looked for.
      why: a clause that says why they were not downloaded.

    Returns:
      A text of several lines.

    Example:
      >>> print(no_files("mnist", "http://a/", Path("/h"), [Path("/m")], "there is no network").splitlines()[0])
      mnist is not prepared in /h/mnist, its files were not found, and there is no network
    """
    looked = [f"  {place}: {_state(place)}" for place in places]
    debian = (
        ["  * or, on Debian and Ubuntu: apt-get install dataset-fashion-mnist"]
        if name == "fashion_mnist"
        else []
    )
    return "\n".join(
        [
            f"{name} is not prepared in {home / name}, its files were not found, and {why}",
            f"Looked for {', '.join(idx.FILES)} in",
            *looked,
            "What to do:",
            f"  * put these four files (from {url}) into a folder DIR/{name}, and set "
            "COMPRESS_JAX_DATA=DIR or pass "
            "manual_dir=DIR",
            *debian,
            f"  * or copy {name}/ from the data_dir of a machine that has it to {home}",
            '  * or use data that needs no files: load("digits")',
        ]
    )


def elsewhere(name: str, home: Path, why: str) -> str:
    """Say what to do about a data set that can only come from another machine."""
    return (
        f"{name} is not prepared in {home} and preparing it failed: {why}\nCopy {name}/ from the "
        "data_dir of a machine that "
        f"has it into {home}, or pass manual_dir with its published files, or use data that needs "
        'none: load("digits").'
    )


def damaged(place: object, error: Exception) -> str:
    """Say what to do about prepared data that cannot be read."""
    return (
        f"{place} cannot be read ({type(error).__name__}: {first_line(error)}). If it is damaged, "
        "or was prepared as "
        "tfrecord (which only TensorFlow reads), delete it or choose another data_dir, and run "
        "again."
    )


def explained(error: Exception, name: str, home: Path) -> DataError:
    """Turn what went wrong in TFDS into something a person can act on."""
    if isinstance(error, DataError):
        return error
    why = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorflow":
        return DataError(
            f"TFDS can prepare {name} only with TensorFlow. Install it (pip install tensorflow) "
            "and run again."
        )
    if isinstance(
        error, AssertionError
    ):  # a set that is never downloaded: TFDS's text says where its files belong
        return DataError(f"{name} cannot be prepared: {error}")
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(
            f"{name} cannot be written to {home} ({why}). Choose another data_dir, or set "
            "TFDS_DATA_DIR."
        )
    return DataError(elsewhere(name, home, why))


def first_line(error: Exception) -> str:
    """Return the first line of an error's text; TFDS's go on for pages."""
    return str(error).strip().split("\n")[0]


def _state(place: Path) -> str:
    """Say in a few words what is wrong with a folder."""
    if not place.is_dir():
        return "no such folder"
    lacking = idx.missing(place)
    return "has none of them" if len(lacking) == len(idx.FILES) else f"lacks {', '.join(lacking)}"


# A progress bar that appears only where there is something to wait for.


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


# Silence around TFDS, which talks on standard output, in absl's log and in bars of its own.


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Keep TFDS quiet within a ``with`` block; warnings and errors raised there are not touched.

    Args:
      bars: whether to leave TFDS's own progress bars, which know about downloads.

    Yields:
      Nothing.

    Example:
      >>> with quiet():
      ...     print("Downloading and preparing ...")
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.display_progress_bar(bars)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        logging.set_verbosity(verbosity)
