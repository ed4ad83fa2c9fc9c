"""From a name to arrays in memory: TFDS builders, prepared once on disk and read without TensorFlow."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from compress_jax.core.errors import DataError
from compress_jax.data._progress import progress
from compress_jax.data.builders import MNIST, Digits, FashionMNIST
from compress_jax.data.locate import advice, data_home, find, folders
from compress_jax.data.preprocess import Split

_FAMILY = {"mnist": MNIST, "fashion_mnist": FashionMNIST}
_CHUNK = 1000  # records read in one call


def prepared(name: str, data_dir: str | Path | None = None, manual_dir: str | Path | None = None) -> Any:
    """Return a TFDS builder whose data are on disk, preparing them first if they are not.

    TFDS writes into a folder of its own and renames it, so an interrupted preparation leaves nothing half done, and of
    two processes that prepare at once the slower finds the other's result.

    Args:
      name: ``"digits"``, ``"mnist"``, ``"fashion_mnist"`` (embedded builders) or any other name TFDS knows.
      data_dir: where prepared data are kept; see `compress_jax.data.locate.data_home`.
      manual_dir: where published files lie; see `compress_jax.data.locate.folders`.

    Returns:
      A `tfds.core.DatasetBuilder`.

    Raises:
      DataError: if the name is unknown, or files are missing or damaged; it says what to do.

    Example:
      >>> import tempfile
      >>> prepared("digits", tempfile.mkdtemp()).info.splits["train"].num_examples
      1442
    """
    home = data_home(data_dir)
    with _quiet(bars=name not in (*_FAMILY, "digits")):
        if not _ready(builder := _builder(name, home)):
            try:
                _prepare(name, home, manual_dir)
            except Exception as error:
                if not _ready(_builder(name, home)):
                    raise _explained(error, name, home, manual_dir) from error
            builder = _builder(name, home)
    return builder


def read(builder: Any, split: str) -> Split:
    """Read a split into memory.

    Args:
      builder: see `prepared`.
      split: the name of a split.

    Returns:
      ``image`` ``[n, height, width, channels]`` in its stored dtype and ``label`` int32 ``[n]``, in TFDS's stored order.

    Raises:
      DataError: if the data are not labelled images of one size, or the files on disk are damaged.

    Example:
      >>> import tempfile
      >>> read(prepared("digits", tempfile.mkdtemp()), "test")["image"].shape
      (355, 8, 8, 1)
    """
    try:
        with _quiet(), progress(f"reading {builder.name} {split}", builder.info.splits[split].num_examples) as advance:
            return _stacked(builder, split, advance)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{builder.data_path} cannot be read ({type(error).__name__}: {error}). If it is damaged, or was prepared as "
            "tfrecord (which only TensorFlow reads), delete it or choose another data_dir, and run again."
        ) from error


def _builder(name: str, home: Path, **kwargs: Any) -> Any:
    """Make the builder of a name; nothing is downloaded yet."""
    common = {"data_dir": home, "file_format": "array_record"}
    if name == "digits":
        return Digits(**common)
    if name in _FAMILY:
        return _FAMILY[name](**common, **kwargs)
    try:
        return tfds.builder(name, **common)
    except Exception as error:
        raise DataError(
            f"{name!r} is no data set that TFDS can build here ({type(error).__name__}: {_first_line(error)}). Embedded "
            "are digits, fashion_mnist and mnist; https://www.tensorflow.org/datasets/catalog lists the others."
        ) from error


def _ready(builder: Any) -> bool:
    """Return whether the data are on disk, complete."""
    return builder.is_prepared()


def _prepare(name: str, home: Path, manual_dir: str | Path | None) -> None:
    """Write the data to disk, from local files where there are some and else from the network."""
    if name not in _FAMILY:
        _builder(name, home).download_and_prepare()
        return
    folder = find(places := folders(name, home, manual_dir))
    if folder is None and manual_dir is not None:
        raise DataError(advice(name, _FAMILY[name].URL, home, places, "manual_dir was given"))
    with progress(f"preparing {name}", 70_000) as advance:
        _builder(name, home, folder=folder, advance=advance).download_and_prepare()


def _explained(error: Exception, name: str, home: Path, manual_dir: str | Path | None) -> DataError:
    """Turn what went wrong in TFDS into something a person can act on."""
    if isinstance(error, DataError):
        return error
    why = f"{type(error).__name__}: {_first_line(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorflow":
        return DataError(f"TFDS can prepare {name} only with TensorFlow. Install it (pip install tensorflow) and run again.")
    if isinstance(error, PermissionError):
        return DataError(f"{name} cannot be written to {home} ({why}). Choose another data_dir, or set TFDS_DATA_DIR.")
    if name in _FAMILY:
        return DataError(advice(name, _FAMILY[name].URL, home, folders(name, home, manual_dir), why))
    return DataError(
        f"{name} is not prepared in {home} and preparing it failed: {why}\nWithout a network, copy {name}/ from the "
        f'data_dir of a machine that has it to {home}, or use data that needs no files: load("digits").'
    )


def _stacked(builder: Any, split: str, advance: Callable[[int], None]) -> Split:
    """Read records in chunks into two arrays made for all of them."""
    keys = builder.info.supervised_keys
    if keys is None or len(keys) != 2 or len(getattr(builder.info.features[keys[0]], "shape", ())) != 3:
        raise DataError(f"{builder.name} does not hold labelled images but {builder.info.features}.")
    source = builder.as_data_source(split)
    n, shape = len(source), np.shape(source[0][keys[0]])
    images, labels = np.empty((n, *shape), np.asarray(source[0][keys[0]]).dtype), np.empty(n, np.int32)
    for start in range(0, n, _CHUNK):
        for row, record in enumerate(source.__getitems__(range(start, min(start + _CHUNK, n))), start):
            if np.shape(record[keys[0]]) != shape:
                raise DataError(f"{builder.name} has images of several sizes; only sets of one size can be loaded.")
            images[row], labels[row] = record[keys[0]], record[keys[1]]
        advance(min(_CHUNK, n - start))
    return {"image": images, "label": labels}


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text; TFDS's go on for pages."""
    return str(error).strip().split("\n")[0]


@contextlib.contextmanager
def _quiet(bars: bool = False) -> Iterator[None]:
    """Silence absl's and TFDS's chatter; ``bars`` leaves TFDS's own progress bars, which know about downloads."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.display_progress_bar(bars)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        logging.set_verbosity(verbosity)
