"""Silence around TFDS, which talks on standard output, in absl's log and in bars of its own."""

import contextlib
import io
from collections.abc import Iterator

import tensorflow_datasets as tfds
from absl import logging


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
