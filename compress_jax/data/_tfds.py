"""Around TFDS: error messages that say what to do, a progress bar, and silence."""

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
    """Return the message for missing files: what is missing, where it was searched, what to do.

    Args:
      name: TFDS name.
      url: the folder of the published files.
      home: the folder of prepared data.
      places: the folders that were searched.
      why: a clause that says why nothing was downloaded.

    Returns:
      A text of several lines.

    Example:
      >>> text = no_files("mnist", "http://a/", Path("/h"), [Path("/m")], "there is no network")
      >>> print(text.splitlines()[0])
      mnist is not prepared in /h/mnist, its files were not found, and there is no network
    """
    lines = [f"{name} is not prepared in {home / name}, its files were not found, and {why}"]
    lines.append(f"Looked for {', '.join(idx.FILES)} in")
    lines += [f"  {place}: {_state(place)}" for place in places]
    lines.append("What to do:")
    lines.append(
        f"  * put these four files (from {url}) into a folder DIR/{name}, and set "
        "COMPRESS_JAX_DATA=DIR or pass manual_dir=DIR"
    )
    if name == "fashion_mnist":
        lines.append("  * or, on Debian and Ubuntu: apt-get install dataset-fashion-mnist")
    lines.append(f"  * or copy {name}/ from the data_dir of a machine that has it to {home}")
    lines.append('  * or use data that needs no files: load("digits")')
    return "\n".join(lines)


def unavailable(name: str, home: Path, why: str) -> str:
    """Return the message for a data set that cannot be prepared on this machine."""
    return (
        f"{name} is not prepared in {home} and preparing it failed: {why}\nCopy {name}/ from the "
        f"data_dir of a machine that has it into {home}, or pass manual_dir with its published "
        'files, or use data that needs none: load("digits").'
    )


def damaged(place: object, error: Exception) -> str:
    """Return the message for prepared data that cannot be read."""
    return (
        f"{place} cannot be read ({type(error).__name__}: {first_line(error)}). If it is damaged, "
        "or was prepared as tfrecord (which only TensorFlow reads), delete it or choose another "
        "data_dir, and run again."
    )


def data_error(error: Exception, name: str, home: Path) -> DataError:
    """Return the DataError for an exception of TFDS, with what to do."""
    if isinstance(error, DataError):
        return error
    why = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorflow":
        return DataError(
            f"TFDS can prepare {name} only with TensorFlow. Install it (pip install tensorflow) "
            "and run again."
        )
    if isinstance(error, AssertionError):
        # Of a set that is never downloaded: TFDS's message says where its files belong.
        return DataError(f"{name} cannot be prepared: {error}")
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(
            f"{name} cannot be written to {home} ({why}). Choose another data_dir, or set "
            "TFDS_DATA_DIR."
        )
    return DataError(unavailable(name, home, why))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; TFDS's messages are pages long."""
    return str(error).strip().split("\n")[0]


def _state(place: Path) -> str:
    """Return in a few words which of the files a folder lacks."""
    if not place.is_dir():
        return "no such folder"
    lacking = idx.missing(place)
    return "has none of them" if len(lacking) == len(idx.FILES) else f"lacks {', '.join(lacking)}"


@contextmanager
def progress(text: str, total: int, *, after: float = 2.0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal's standard error, if the work takes longer than ``after``.

    Args:
      text: the label of the bar.
      total: the number of examples.
      after: the number of seconds before the bar appears.

    Yields:
      ``advance(n)``, to be called after each n examples.

    Example:
      >>> with progress("reading", 10) as advance:
      ...     advance(10)
    """
    console = Console(stderr=True)
    columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(text, total=total)
    begun = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        before = done
        done += n
        # rich takes a lock for each update: a hundred cost nothing, one for each example would.
        if before * 100 // total != done * 100 // total:
            bar.update(task, completed=done)
            if not bar.live.is_started and time.monotonic() - begun > after:
                bar.start()

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Silence TFDS's standard output, log and progress bars within a ``with`` block.

    Warnings and exceptions are not changed.

    Args:
      bars: whether to show TFDS's own progress bars, which include downloads.

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
