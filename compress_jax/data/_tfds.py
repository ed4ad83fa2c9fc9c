"""Any data set of TFDS that it can prepare without TensorFlow: texts, tables, images."""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from compress_jax.core.errors import DataError
from compress_jax.data._columns import Reading, from_columns, split_of
from compress_jax.data._data import Data
from compress_jax.data._dataset import (
    damaged,
    data_error,
    data_home,
    first_line,
    quiet,
    unavailable,
    unreachable,
)
from compress_jax.data._records import read_columns
from compress_jax.data._tokenizer import Tokenizer


def from_tfds(
    name: str,
    *,
    text: str | None = None,
    label: str | None = None,
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    fraction: float = 0.1,
    seed: int = 0,
) -> Data:
    """Load a data set of TFDS with all its columns; texts are tokenized. `load` is for images.

    The splits train, validation and test are used. A missing one is cut from train; where the
    labels of test are hidden (-1), as in GLUE, validation is the test split.

    Args:
      name: TFDS name, with its configuration: ``"glue/sst2"``, ``"imdb_reviews"``.
      text: the column with texts, where there are several.
      label: the column with the labels of texts; by default ``label``.
      tokenizer: see `from_texts`.
      length: tokens of a row of text.
      data_dir: the folder of prepared data, see `load`.
      manual_dir: a folder with published files, for sets that TFDS does not download itself.
      fraction: the share of train that a missing split gets.
      seed: of the draw.

    Returns:
      The data.

    Raises:
      DataError: if TFDS does not know the name, or cannot prepare the data here.

    Example:
      >>> import compress_jax as cj
      >>> cj.data.from_tfds("no_such_data")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.DataError: TFDS cannot build 'no_such_data' (...
    """
    home = data_home(data_dir)
    with quiet(bars=True):
        builder = _prepared(name, home, manual_dir)
        notes: list[str] = []
        found = {}
        for split in builder.info.splits:
            part = split_of(split)
            if part is None or part in found:
                notes.append(f"the split {split!r} is left out")
                continue
            try:
                found[part] = read_columns(part, builder.as_data_source(split))
            except DataError:
                raise
            except Exception as error:  # of TFDS, of any kind
                raise DataError(damaged(builder.data_path, error)) from error
    feature = dict(builder.info.features.items()).get(label or "label")
    names = tuple(getattr(feature, "names", None) or ())
    how = Reading(text, label, tokenizer, length, fraction, seed, name.replace("/", "_"), names)
    return from_columns(found, how, notes)


def _prepared(name: str, home: Path, manual_dir: str | Path | None) -> Any:
    """Return a builder whose data are on disk."""
    try:
        builder = tfds.builder(name, data_dir=home, file_format="array_record")
    except Exception as error:  # of TFDS, of any kind
        raise DataError(
            f"TFDS cannot build {name!r} ({type(error).__name__}: {first_line(error)}); "
            "https://www.tensorflow.org/datasets/catalog lists what it knows"
        ) from error
    if builder.is_prepared():
        return builder
    # TFDS itself would try for minutes.
    url = next(iter(builder.url_infos or ()), None)
    why = unreachable(url) if url is not None and manual_dir is None else None
    if why is not None:
        raise DataError(unavailable(name, home, why))
    try:
        folder = Path(manual_dir).expanduser() if manual_dir else None
        config = tfds.download.DownloadConfig(manual_dir=folder)
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # of TFDS, of any kind
        raise data_error(error, name, home) from error
    return builder
