"""Examples that stay on disk: read, decoded and checked when a batch asks for them."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.core.table import units
from compress_jax.core.types import DType, Shape

NARROWER = {"float64": np.float32, "int64": np.int32, "uint64": np.int32, "uint32": np.int32}
SEEN = 64  # examples that identify the data, and that are checked before a training

Form: TypeAlias = dict[str, tuple[Shape, DType]]
"""Shape and dtype of each entry of an example."""
Rows: TypeAlias = slice | np.ndarray
"""Numbers of examples, int ``[n]``, or a slice of them."""


class Source(Protocol):
    """What records are read from: grain's and TFDS's data sources, a `grain.MapDataset`, a list.

    Example:
      >>> source: Source = [b"first", b"second"]
      >>> len(source), source[1]
      (2, b'second')
    """

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def __getitem__(self, number: Any, /) -> Any:
        """Return a record; several threads may ask at once."""
        ...


@dataclass(frozen=True, eq=False)
class Records:
    """Examples of a source, each read when it is asked for.

    Attributes:
      source: the records.
      example: ``record -> {name: array}``, all of one form; None if records are that already.
      augment: ``(record, random) -> {name: array}``, in training and in place of ``example``; the
        generator depends on the seed, the step and the record alone.
      name: of the split, for errors.
      numbers: which records, int64 ``[n]``; None for all.
      threads: how many examples are read at once.
      workers: processes that read batches; 0 for threads of this one. They help where ``example``
        is slow Python code, which threads run one at a time.

    Example:
      >>> import compress_jax as cj
      >>> import numpy as np
      >>> def example(record):
      ...     return {"x": np.full(3, record, np.float32), "label": record % 2}
      >>> split = cj.data.Records(range(10), example).columns()
      >>> split["x"].shape, split["label"][2:5].tolist()
      ((10, 3), [0, 1, 0])
    """

    source: Source
    example: Callable[[Any], Mapping[str, Any]] | None = None
    augment: Callable[[Any, np.random.Generator], Mapping[str, Any]] | None = None
    name: str = "train"
    numbers: np.ndarray | None = None
    threads: int = 16
    workers: int = 0
    _recent: list[tuple[bytes, dict[str, np.ndarray]]] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.source) if self.numbers is None else len(self.numbers)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read last, which a worker has no use for."""
        return {**self.__dict__, "_recent": []}

    @cached_property
    def form(self) -> Form:
        """Shape and dtype of each entry of an example, by the first one."""
        if not len(self):
            raise DataError(f"{self.name} has no examples")
        first = self._read(0, None)
        return {key: (value.shape, value.dtype) for key, value in first.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of the number and the form of the examples, and of 64 of them, evenly spread."""
        digest = hashlib.sha256(f"{len(self)} {self.form}".encode())
        for key, values in sorted(self.take(spread_rows(len(self), SEEN)).items()):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)
        if self.numbers is not None:
            digest.update(np.asarray(self.numbers, "<i8").tobytes())
        return digest.hexdigest()

    def columns(self) -> "dict[str, Column]":
        """Return a split: a `Column` for each entry of an example."""
        return {key: Column(self, key) for key in self.form}

    def part(self, rows: np.ndarray) -> "Records":
        """Return some of the examples, int ``[n]``."""
        own = rows if self.numbers is None else self.numbers[rows]
        return replace(self, numbers=np.asarray(own, np.int64), _recent=[])

    def take(self, rows: Rows, seed: tuple[int, ...] | None = None) -> dict[str, np.ndarray]:
        """Read examples.

        Args:
          rows: which.
          seed: of the augmentation; None for examples as they are.

        Returns:
          Arrays ``[n, ...]`` by name.

        Raises:
          DataError: if one cannot be read, is of another form than the first, or is not finite.
        """
        chosen = _numbers(rows, len(self))
        found = {key: np.empty((len(chosen), *form[0]), form[1]) for key, form in self.form.items()}
        threads = min(self.threads, len(chosen))

        def fill(places: range) -> None:
            for place in places:
                example = self._read(int(chosen[place]), seed)
                self._require_form(int(chosen[place]), example)
                for key, value in example.items():
                    found[key][place] = value

        if threads < 2:
            fill(range(len(chosen)))
        else:
            shares = [range(first, len(chosen), threads) for first in range(threads)]
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(fill, shares))
        self._require_finite(chosen, found)
        return found

    def recent(self, rows: Rows) -> dict[str, np.ndarray]:
        """Read examples; those that were read last are kept, for the next column of theirs."""
        chosen = _numbers(rows, len(self))
        key = chosen.tobytes()
        for known, found in self._recent:
            if known == key:
                return found
        found = self.take(chosen)
        self._recent[:] = [(key, found)]
        return found

    def _read(self, row: int, seed: tuple[int, ...] | None) -> dict[str, np.ndarray]:
        """Return an example's entries as arrays of what JAX computes with."""
        number = row if self.numbers is None else int(self.numbers[row])
        record = None
        try:
            record = self.source[number]
            if seed is not None and self.augment is not None:
                made = self.augment(record, np.random.default_rng((*seed, number)))
            else:
                made = record if self.example is None else self.example(record)
            if not isinstance(made, Mapping) or not made:
                raise DataError(
                    f"it must be a dict of arrays, and is a {type(made).__name__}; example= makes "
                    "one of a record"
                )
            return {key: _array(key, value) for key, value in made.items()}
        except Exception as error:  # of a file, of a decoder or of the user's own function
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            why = str(error).strip().split("\n")[0]
            file = f" ({record})" if isinstance(record, str | Path) else ""
            raise DataError(f"{self._called(row)}{file}: {kind}{why}") from error

    def _called(self, row: int) -> str:
        """Return what errors call an example."""
        if self.numbers is None:
            return f"example {row} of {self.name}"
        return f"example {row} of {self.name}, record {self.numbers[row]}"

    def _require_form(self, row: int, example: dict[str, np.ndarray]) -> None:
        if set(example) != set(self.form):
            raise DataError(
                f"{self._called(row)} has {sorted(example)}, and example 0 {sorted(self.form)}"
            )
        for key, value in example.items():
            shape, dtype = self.form[key]
            if value.shape != shape or value.dtype != dtype:
                raise DataError(
                    f"{key} of {self._called(row)} is {value.dtype}{list(value.shape)}, "
                    f"and that of example 0 is {dtype}{list(shape)}; bring all to one form"
                )

    def _require_finite(self, rows: np.ndarray, found: dict[str, np.ndarray]) -> None:
        for key, values in found.items():
            if not np.issubdtype(values.dtype, np.floating):
                continue
            bad = np.flatnonzero(~np.isfinite(values.reshape(len(rows), -1)).all(axis=1))
            if len(bad):
                raise DataError(f"{key} of {self._called(int(rows[bad[0]]))} is not finite")


@dataclass(frozen=True, eq=False)
class Column:
    """One entry of examples that stay on disk: it has the shape of an array, and is read by rows.

    Attributes:
      records: the examples.
      name: the entry.

    Example:
      >>> import compress_jax as cj
      >>> column = cj.data.Records([{"x": 1.0}, {"x": 2.0}, {"x": 3.0}]).columns()["x"]
      >>> column.shape, column[1:].tolist(), float(column[0])
      ((3,), [2.0, 3.0], 1.0)
    """

    records: Records
    name: str

    @property
    def shape(self) -> Shape:
        """``[n, ...]``."""
        return (len(self.records), *self.records.form[self.name][0])

    @property
    def dtype(self) -> DType:
        """Of each value."""
        return self.records.form[self.name][1]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The memory that all of it would take, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.records)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Read rows: a slice, numbers, or one number."""
        if isinstance(rows, int | np.integer):
            return self.records.recent(np.array([rows]))[self.name][0]
        return self.records.recent(rows)[self.name]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Refuse to become an array, which might not fit into memory."""
        raise DataError(
            f"{self.name} of {self.records.name} stays on disk ({units(self.nbytes)}B in "
            f"memory); read rows of it, such as {self.name}[:1000]"
        )


def take(
    split: Mapping[str, Any], rows: Rows, seed: tuple[int, ...] | None = None
) -> dict[str, np.ndarray]:
    """Return rows of a split, of arrays and of what stays on disk; each example is read once.

    Args:
      split: arrays or columns ``[n, ...]`` by name.
      rows: which.
      seed: of the augmentation of records; None for none.

    Returns:
      Arrays by name.

    Example:
      >>> split = {**Records([{"x": 1}, {"x": 2}]).columns(), "y": np.arange(2)}
      >>> {key: values.tolist() for key, values in take(split, np.array([1, 0])).items()}
      {'x': [2, 1], 'y': [1, 0]}
    """
    stored = {id(each.records): each.records for each in columns_of(split)}
    read = {key: records.take(rows, seed) for key, records in stored.items()}
    return {
        name: read[id(each.records)][each.name] if isinstance(each, Column) else each[rows]
        for name, each in split.items()
    }


def columns_of(split: Mapping[str, Any]) -> list[Column]:
    """Return the entries of a split that stay on disk."""
    return [each for each in split.values() if isinstance(each, Column)]


def some(split: Mapping[str, Any], examples: int = SEEN) -> Mapping[str, Any]:
    """Return a split as it is if it is in memory, else arrays of some examples, evenly spread.

    Args:
      split: arrays or columns by name.
      examples: how many, at most.

    Returns:
      A split in memory.

    Example:
      >>> split = Records([{"x": i} for i in range(100)]).columns()
      >>> some(split, 3)["x"].tolist()
      [0, 50, 99]
    """
    found = columns_of(split)
    return take(split, spread_rows(len(found[0]), examples)) if found else split


def _numbers(rows: Rows, total: int) -> np.ndarray:
    """Return which examples rows mean, int64 ``[n]``."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(total))
    chosen = np.asarray(rows)
    if chosen.dtype == bool:
        return np.flatnonzero(chosen)
    if chosen.size and not -total <= chosen.min() <= chosen.max() < total:
        raise ArgumentError(f"there are {total} examples; got numbers up to {chosen.max()}")
    return np.where(chosen < 0, chosen + total, chosen)


def spread_rows(total: int, examples: int) -> np.ndarray:
    """Return numbers of examples, the first and the last among them, int64 ``[n]``."""
    return np.unique(np.linspace(0, total - 1, min(examples, total)).round().astype(np.int64))


def _array(key: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{key} must be numbers, and is {array.dtype}"
            + ("; turn text into tokens first" if array.dtype.kind in "OUS" else "")
        )
    return narrowed(key, array)


def narrowed(name: str, array: np.ndarray) -> np.ndarray:
    """Return numbers of 64 bits in 32, as JAX has them, and others as they are.

    Args:
      name: of the array, for errors.
      array: of any shape.

    Returns:
      The array.

    Raises:
      DataError: if a whole number does not fit.

    Example:
      >>> narrowed("x", np.ones(2)).dtype.name
      'float32'
    """
    narrower = NARROWER.get(array.dtype.name)
    if narrower is None:
        return array
    if array.dtype.kind in "iu" and array.size and np.abs(array).max() >= 2**31:
        raise DataError(f"{name} has {array.dtype} beyond 32 bits, which JAX cannot hold")
    return array.astype(narrower)


def require_alike(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise unless every split has the entries of train, of the same shapes and dtypes.

    Args:
      splits: arrays or columns by name, by the name of the split.

    Raises:
      DataError: if not; it names the entry.
    """
    train = splits["train"]
    for part, split in splits.items():
        if set(split) != set(train):
            raise DataError(f"{part} has {sorted(split)}, and train has {sorted(train)}")
        for key, array in split.items():
            ours = f"{array.dtype}{list(array.shape[1:])}"
            theirs = f"{train[key].dtype}{list(train[key].shape[1:])}"
            if ours != theirs:
                raise DataError(f"{key} of {part} is {ours} an example, and {theirs} in train")
