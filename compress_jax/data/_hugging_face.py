"""Data sets that Hugging Face's `datasets` wrote to disk, read by pyarrow alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from compress_jax.core.errors import DataError
from compress_jax.data._columns import Column, Columns, Reading, from_columns, split_of
from compress_jax.data._data import Data
from compress_jax.data._dataset import progress
from compress_jax.data._images import Color, read_images
from compress_jax.data._tokenizer import Tokenizer


def from_hugging_face(
    path: str | Path,
    *,
    text: str | None = None,
    label: str | None = None,
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    size: int | tuple[int, int] | None = None,
    color: Color | None = None,
    fraction: float = 0.1,
    seed: int = 0,
    name: str | None = None,
) -> Data:
    """Load a data set that ``dataset.save_to_disk(path)`` wrote: numbers, lists, texts, images.

    The `datasets` package is not needed, nor does any code of the data set run. A test split whose
    labels are all -1 (hidden) is left out, and validation takes its place.

    Args:
      path: the folder: of a ``DatasetDict``, or of one ``Dataset``, which is then cut.
      text: the column with texts, where there are several.
      label: the column with the labels of texts; by default ``label``.
      tokenizer: see `from_texts`.
      length: tokens of a row of text.
      size: of images, see `from_folder`.
      color: of images, see `from_folder`.
      fraction: the share of train that a missing split gets.
      seed: of the draw.
      name: of the data set; by default the folder's.

    Returns:
      The data, with an entry for each column; of texts ``tokens``, ``mask`` and ``label``.

    Raises:
      DataError: if there is no such data set, pyarrow is lacking, or a column cannot be used.

    Example:
      >>> import compress_jax as cj
      >>> cj.data.from_hugging_face("/nowhere")
      Traceback (most recent call last):
      compress_jax.core.errors.DataError: there is no folder /nowhere
    """
    folder = Path(path).expanduser()
    notes: list[str] = []
    found = {}
    names: dict[str, tuple[str, ...]] = {}
    for part, place in _splits(folder, notes).items():
        features = _features(place)
        table = _table(place)
        images = [each for each in table.column_names if _is_image(table.schema.field(each).type)]
        columns: Columns = {}
        for column in table.column_names:
            values = table.column(column).combine_chunks()
            if column in images:
                what = f"{column} of {part}"
                found_images = _images(values, what, size, color, notes)
                # Other splits are read as the first one.
                color = color or ("gray" if found_images.shape[-1] == 1 else "rgb")
                columns[column] = found_images
                continue
            array = _array(values, f"{column} of {part}")
            if array is None:
                notes.append(f"{part}: the column {column!r} ({values.type}) is left out")
            else:
                columns[column] = array
        names |= {each: tuple(f["names"]) for each, f in features.items() if "names" in f}
        found[part] = columns
    classes = _names_of(names, label)
    how = Reading(text, label, tokenizer, length, fraction, seed, name or folder.name, classes)
    return from_columns(found, how, notes)


def _names_of(names: dict[str, tuple[str, ...]], label: str | None) -> tuple[str, ...]:
    """Return the names of the classes; of no column, if several have some."""
    if label is not None:
        return names.get(label, ())
    return next(iter(names.values())) if len(names) == 1 else names.get("label", ())


# The folders.


def _splits(folder: Path, notes: list[str]) -> dict[str, Path]:
    """Return the folder of each split."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    if (folder / "state.json").is_file():
        return {"train": folder}
    if not (folder / "dataset_dict.json").is_file():
        raise DataError(
            f"{folder} is no data set of Hugging Face: it has neither dataset_dict.json nor "
            "state.json; write it with dataset.save_to_disk(folder)"
        )
    listed = _json(folder / "dataset_dict.json").get("splits", [])
    found: dict[str, Path] = {}
    for each in listed:
        part = split_of(each)
        if part is None or part in found:
            notes.append(f"the split {each!r} is left out; train, validation and test are used")
        else:
            found[part] = folder / each
    if "train" not in found:
        raise DataError(f"{folder} has no split train, only {listed}")
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _features(folder: Path) -> dict[str, Any]:
    features = _json(folder / "dataset_info.json").get("features") or {}
    return {name: each for name, each in features.items() if isinstance(each, dict)}


def _table(folder: Path) -> Any:
    """Return all rows of a split as a table of pyarrow."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            "data sets of Hugging Face are read by pyarrow, which is not installed: "
            "pip install pyarrow"
        ) from error
    state = _json(folder / "state.json")
    if state.get("_indices_files"):
        raise DataError(
            f"{folder} was written with an index by an old version; run "
            "dataset.flatten_indices().save_to_disk(folder) there"
        )
    files = [folder / Path(each["filename"]).name for each in state.get("_data_files", ())]
    if not files:
        raise DataError(f"{folder} lists no data files; it is empty")
    tables = []
    with progress(f"reading {folder.name}", len(files)) as advance:
        for file in files:
            try:
                with pa.memory_map(str(file)) as source:
                    tables.append(pa.ipc.open_stream(source).read_all())
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file} cannot be read by pyarrow: {error}") from error
            advance(1)
    table = pa.concat_tables(tables)
    if not table.num_rows:
        raise DataError(f"{folder} has no rows")
    return table


# The columns.


def _is_image(kind: Any) -> bool:
    """Return whether a column has images: a struct of bytes and path."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {
        "bytes",
        "path",
    }


def _images(
    values: Any,
    what: str,
    size: int | tuple[int, int] | None,
    color: Color | None,
    notes: list[str],
) -> np.ndarray:
    sources: list[bytes | Path] = []
    for i, each in enumerate(values.to_pylist()):
        content = (each or {}).get("bytes") or (each or {}).get("path")
        if content is None:
            raise DataError(f"row {i} of {what} has no image")
        sources.append(content if isinstance(content, bytes) else Path(content))
    names = [f"row {i} of {what}" for i in range(len(sources))]
    return read_images(sources, names, size=size, color=color, notes=notes)


def _array(values: Any, what: str) -> Column | None:
    """Return a column as an array or as texts; None for kinds that are neither."""
    import pyarrow as pa

    kind = getattr(values.type, "storage_type", values.type)
    values = getattr(values, "storage", values)
    if values.null_count:
        raise DataError(f"{what} lacks a value in {values.null_count} rows; fill or drop them")
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return values.to_pylist()
    shape = [len(values)]
    while (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        lengths = values.value_lengths().unique().to_pylist()
        if len(lengths) > 1:
            raise DataError(
                f"{what} has rows of {min(lengths)} to {max(lengths)} values; pad them to one "
                "length before you save them"
            )
        shape.append(lengths[0])
        values = values.flatten()
        kind = values.type
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not numeric:
        return None
    if values.null_count:
        raise DataError(f"{what} lacks {values.null_count} values; fill or drop them")
    return values.to_numpy(zero_copy_only=False).reshape(shape)
