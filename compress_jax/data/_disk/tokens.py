"""Token streams that stay on disk: rows of one length, of documents that follow each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from compress_jax.core.arguments import whole
from compress_jax.core.errors import DataError
from compress_jax.data._data import Data
from compress_jax.data._disk.records import Reading, data_of

Files: TypeAlias = str | Path | Sequence[str | Path]
Stored: TypeAlias = Literal["uint8", "uint16", "uint32", "int32"]


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens of files, as a source of `Records`.

    Attributes:
      files: raw numbers, or ``.npy`` files of one axis.
      length: tokens of a row that are predicted; it holds one more.
      dtype: of raw files.
      separator: the token that ends a document; None if rows need not know.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "train.npy"
      >>> np.save(file, np.array([5, 6, 0, 7, 8, 9, 0], np.uint16))
      >>> rows = TokenRows((file,), 3, "uint16", 0)
      >>> len(rows), {name: values.tolist() for name, values in rows[1].items()}
      (2, {'tokens': [7, 8, 9, 0], 'segments': [0, 0, 0, 0], 'positions': [0, 1, 2, 3]})
    """

    files: tuple[Path, ...]
    length: int
    dtype: Stored
    separator: int | None
    _open: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        """Leave out the open files: another process opens its own."""
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        """Return the number of rows of all files; the rest of a file that fills none is left."""
        return sum(self.rows_of(i) for i in range(len(self.files)))

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """Return a row: ``tokens`` int32 ``[length + 1]``, and where documents are in it."""
        place = number
        for i in range(len(self.files)):
            if place < self.rows_of(i):
                begin = place * self.length
                row = np.asarray(self._tokens(i)[begin : begin + self.length + 1])
                return self._row(row.astype(np.int32))
            place -= self.rows_of(i)
        raise IndexError(f"there are {len(self)} rows, and no row {number}")

    def rows_of(self, file: int) -> int:
        """Return the number of rows of a file."""
        return max(len(self._tokens(file)) - 1, 0) // self.length

    def _tokens(self, file: int) -> np.ndarray:
        """Return a file's tokens; they are read where they are looked at."""
        if file not in self._open:
            self._open[file] = _mapped(self.files[file], self.dtype)
        return self._open[file]

    def _row(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        if self.separator is None:
            return {"tokens": tokens}
        # A document begins after a separator: [length + 1].
        begins = np.concatenate([[False], tokens[:-1] == self.separator])
        places = np.arange(len(tokens))
        start = np.maximum.accumulate(np.where(begins, places, 0))
        return {
            "tokens": tokens,
            "segments": np.cumsum(begins).astype(np.int32),
            "positions": (places - start).astype(np.int32),
        }


def tokens_on_disk(
    train: Files,
    validation: Files | None = None,
    test: Files | None = None,
    *,
    length: int,
    vocabulary: int,
    dtype: Stored = "uint16",
    separator: int | None = None,
    fraction: float = 0.01,
    seed: int = 0,
    name: str = "tokens",
    threads: int = 16,
) -> Data:
    """Return rows of token files, for `tasks.language_modelling`: texts of any size.

    Documents follow each other in a file, and rows are cut from it every ``length`` tokens, so that
    no place of a row is padding. Row i holds the tokens ``i * length`` to ``(i + 1) * length``, the
    last of which is only predicted.

    Args:
      train: a file, or several: ``.npy`` of one axis, or raw numbers. They are never read whole.
      validation: the like of it; None draws rows from train.
      test: the like of it; None draws rows from train.
      length: tokens of a row.
      vocabulary: the number of tokens there are; a token beyond it is an error.
      dtype: of raw files, in the byte order of this machine.
      separator: the token that ends a document. With it rows also have ``segments``, the number of
        each token's document in the row, and ``positions``, its place there, for models that do not
        look from one document into another.
      fraction: the share of train that a missing split gets.
      seed: of the draw.
      name: of the data set.
      threads: rows read at once.

    Returns:
      The data, on disk: ``tokens`` int32 ``[n, length + 1]``.

    Raises:
      DataError: if a file is missing or too short.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> file = Path(tempfile.mkdtemp()) / "train.bin"
      >>> np.arange(1001, dtype=np.uint16).tofile(file)
      >>> data = cj.data.tokens_on_disk(file, length=10, vocabulary=1001)
      >>> data.train["tokens"].shape, data.classes
      ((98, 11), 1001)
    """
    whole("length", length, 1)
    whole("vocabulary", vocabulary, 2)
    given = {"train": train, "validation": validation, "test": test}
    rows = {
        part: _rows(part, files, length, dtype, separator)
        for part, files in given.items()
        if files is not None
    }
    how = Reading(threads=threads, classes=vocabulary, fraction=fraction, seed=seed, name=name)
    return data_of(rows, how, [])


def _rows(part: str, files: Files, length: int, dtype: Stored, separator: int | None) -> TokenRows:
    each = [files] if isinstance(files, str | Path) else list(files)
    found = TokenRows(tuple(Path(f).expanduser() for f in each), length, dtype, separator)
    short = [file for i, file in enumerate(found.files) if not found.rows_of(i)]
    if short or not found.files:
        where = short[0] if short else "an empty list of files"
        raise DataError(f"{part}: {where} has fewer than {length + 1} tokens, which a row needs")
    return found


def _mapped(file: Path, dtype: Stored) -> np.ndarray:
    """Return a file's tokens ``[n]``, which are read where they are looked at."""
    try:
        if file.suffix == ".npy":
            tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        elif file.stat().st_size % np.dtype(dtype).itemsize:
            raise DataError(f"{file} holds no whole number of {dtype}; say its dtype")
        else:
            tokens = np.memmap(file, dtype, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as tokens: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(
            f"{file} must hold whole numbers in one axis; it is {tokens.dtype}{list(tokens.shape)}"
        )
    return tokens
