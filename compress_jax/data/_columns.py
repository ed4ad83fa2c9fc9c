"""From columns, as tables have them, to `Data`: which is the text, which the label."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compress_jax.core.errors import DataError
from compress_jax.data._data import PARTS, Data
from compress_jax.data._text import from_texts
from compress_jax.data._tokenizer import Tokenizer

Column = np.ndarray | list[str]
Columns = dict[str, Column]
"""Arrays ``[n, ...]`` and lists of n texts, by name."""

SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "eval": "validation", "test": "test",
    "testing": "test",
}  # fmt: skip


class Reading(NamedTuple):
    """How columns become data.

    Attributes:
      text: the column of texts; None for the only one, if there is one.
      label: the column of labels of texts; None for ``label``, ``labels`` or the only other one.
      tokenizer: see `from_texts`.
      length: see `from_texts`.
      fraction: the share of train that a missing split gets.
      seed: of the draw.
      name: of the data set.
      names: of the classes.
    """

    text: str | None = None
    label: str | None = None
    tokenizer: Tokenizer | None = None
    length: int = 128
    fraction: float = 0.1
    seed: int = 0
    name: str = "arrays"
    names: tuple[str, ...] = ()


def from_columns(given: Mapping[str, Columns], how: Reading, notes: list[str]) -> Data:
    """Return data of columns; one column of texts is tokenized, and then only labels stay beside.

    Args:
      given: columns by split; train must be there.
      how: which columns are what.
      notes: what was decided before.

    Returns:
      The data.

    Raises:
      DataError: if it is not clear which column is meant, or columns do not fit together.

    Example:
      >>> columns = {"x": np.ones((40, 3), np.float32), "y": np.arange(40) % 2}
      >>> from_columns({"train": columns}, Reading(), []).train["x"].shape
      (32, 3)
    """
    if "train" not in given:
        raise DataError(f"there is no split train, only {sorted(given)}; name it train")
    splits = _measurable(dict(given), how, notes)
    text = _text_column(splits["train"], how, notes)
    if text is not None:
        data = _of_texts(splits, text, how, notes)
    else:
        parts = [splits.get(part) for part in PARTS]
        data = Data.from_arrays(
            parts[0] or {}, parts[1], parts[2], name=how.name, classes=len(how.names) or None,
            names=how.names, fraction=how.fraction, seed=how.seed,
        )  # fmt: skip
    object.__setattr__(data, "notes", (*notes, *data.notes))  # frozen, but not shown yet
    return data


def _measurable(splits: dict[str, Columns], how: Reading, notes: list[str]) -> dict[str, Columns]:
    """Leave out a test split with hidden labels; validation takes its place, as in `load`."""
    label = _label_column(splits.get("test", {}), how)
    hidden = splits["test"][label] if label is not None else np.zeros(1)
    if isinstance(hidden, np.ndarray) and hidden.size and np.all(hidden == -1):
        notes.append("test: left out, as its labels are hidden (-1)")
        del splits["test"]
        if "validation" in splits:
            notes.append("test: the validation split")
            splits["test"] = splits.pop("validation")
    return splits


def _label_column(columns: Columns, how: Reading) -> str | None:
    if how.label is not None:
        if columns and how.label not in columns:
            raise DataError(f"label={how.label!r} is no column; there are {sorted(columns)}")
        return how.label if columns else None
    return next((name for name in ("label", "labels") if name in columns), None)


def _text_column(columns: Columns, how: Reading, notes: list[str]) -> str | None:
    """Return the column of texts, or None if there are none."""
    label = _label_column(columns, how)
    texts = [name for name, each in columns.items() if isinstance(each, list) and name != label]
    if how.text is not None:
        if how.text not in texts:
            raise DataError(f"text={how.text!r} is no column of texts; those are {texts}")
        return how.text
    if len(texts) > 1:
        raise DataError(f"the columns {texts} are texts; say which is meant: text={texts[0]!r}")
    if texts:
        notes.append(f"text: the column {texts[0]!r}, the only one with texts")
    return texts[0] if texts else None


def _of_texts(splits: dict[str, Columns], text: str, how: Reading, notes: list[str]) -> Data:
    train = splits["train"]
    label = _label_column(train, how)
    others = [name for name in train if name != text]
    if label is None and len(others) == 1:
        label = others[0]
    if label is None or label == text:
        raise DataError(f"which of the columns {others} is the label? Say it: label=...")
    unused = [name for name in others if name != label]
    if unused:
        notes.append(f"columns that are not used: {', '.join(unused)}")
    for part, columns in splits.items():
        lacking = [name for name in (text, label) if name not in columns]
        if lacking:
            raise DataError(f"{part} lacks {lacking[0]!r}; it has {sorted(columns)}")
    pairs = {part: (columns[text], columns[label]) for part, columns in splits.items()}
    return from_texts(
        *pairs["train"],  # pyright: ignore[reportArgumentType]
        validation=pairs.get("validation"),  # pyright: ignore[reportArgumentType]
        test=pairs.get("test"),  # pyright: ignore[reportArgumentType]
        tokenizer=how.tokenizer,
        length=how.length,
        fraction=how.fraction,
        name=how.name,
        names=how.names,
    )


def stacked(values: Sequence[Any], name: str) -> Column:
    """Return the values of one column as an array, or as a list if they are texts.

    Args:
      values: of all examples.
      name: of the column, for errors.

    Returns:
      An array ``[n, ...]`` or a list of n texts.

    Raises:
      DataError: if shapes or dtypes differ.

    Example:
      >>> stacked([1, 2], "y").tolist(), stacked([b"a", b"b"], "text")
      ([1, 2], ['a', 'b'])
    """
    if all(isinstance(each, str | bytes) for each in values):
        return [_as_text(each, name) for each in values]
    arrays = [np.asarray(each) for each in values]
    first = arrays[0]
    for i, each in enumerate(arrays):
        if each.shape != first.shape or each.dtype != first.dtype:
            raise DataError(
                f"{name} of example {i} is {each.dtype}{list(each.shape)}, and that of example 0 "
                f"is {first.dtype}{list(first.shape)}; bring all to one shape and dtype"
            )
    if first.dtype.kind not in "biuf":
        raise DataError(
            f"{name} of example 0 is a {type(values[0]).__name__}; examples hold numbers, arrays "
            "and texts"
        )
    return np.stack(arrays)


def _as_text(value: str | bytes, name: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} holds bytes that are no text in UTF-8; decode them in the pipeline"
        ) from error


def split_of(name: str) -> str | None:
    """Return train, validation or test for any name of a split, None for other names.

    Example:
      >>> split_of("Dev"), split_of("cats")
      ('validation', None)
    """
    return SPLITS.get(name.lower())
