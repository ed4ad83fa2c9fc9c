"""`from_records`: data of examples that stay on disk, for sets larger than memory."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ArgumentError
from compress_jax.core.table import units
from compress_jax.data._data import PARTS, Data, drawn
from compress_jax.data._disk.stored import SEEN, Records, Source, require_alike, some

Example: TypeAlias = Callable[[Any], Mapping[str, Any]]
"""``record -> {name: array}``."""
Augmented: TypeAlias = Callable[[Any, np.random.Generator], Mapping[str, Any]]
"""``(record, random) -> {name: array}``."""


def from_records(
    train: Source,
    validation: Source | None = None,
    test: Source | None = None,
    *,
    example: Example | None = None,
    augment: Augmented | None = None,
    classes: int | None = None,
    names: tuple[str, ...] = (),
    fraction: float = 0.1,
    seed: int = 0,
    name: str = "records",
    threads: int = 16,
    workers: int = 0,
) -> Data:
    """Return data whose examples are read when a batch needs them, each time anew.

    The batch of a step depends on the seed and the step alone: not on threads, workers, the number
    of processes, or where a run was resumed. Each process reads the rows of its own devices.
    Batches are read ahead; ``speed.jsonl`` has the share of time that a training waited for them.

    Every example is checked when it is read: its form, and that it is finite. Ahead of a training
    64 of each split are read.

    Args:
      train: records by number, with a length: `grain.sources.ArrayRecordDataSource`, the data
        source of TFDS (``builder.as_data_source``), a `grain.MapDataset`, or a list, of paths say.
      validation: the like of it; None cuts it from train.
      test: the like of it; None cuts it from train.
      example: ``record -> {name: array}``: decodes, resizes, tokenizes; None if records are dicts
        of arrays already.
      augment: ``(record, random) -> {name: array}``, in place of ``example`` for training batches;
        the generator of NumPy depends on the seed, the step and the record.
      classes: the number of classes, if labels are classes.
      names: the names of the classes.
      fraction: the share of train that a missing split gets.
      seed: of the draw of missing splits.
      name: of the data set.
      threads: how many examples of a batch are read at once.
      workers: processes that read batches, where ``example`` is slow Python code; 0 for threads.
        Functions and source are sent to them, and a script that starts them has its own code under
        ``if __name__ == "__main__":``.

    Returns:
      The data: a split has a `Column` for each entry.

    Raises:
      DataError: if examples cannot be read or do not fit together, or there are too few to cut.

    Example:
      >>> import compress_jax as cj
      >>> def example(path):
      ...     return {"x": np.full(3, len(path), np.float32), "label": len(path) % 2}
      >>> data = cj.data.from_records(["a" * n for n in range(50)], example=example, classes=2)
      >>> data.train["x"].shape, data.test["label"].dtype.name
      ((40, 3), 'int32')
      >>> cj.data.batches(data.train, 8, seed=0)[3]["x"].shape
      (8, 3)
    """
    given = {"train": train, "validation": validation, "test": test}
    sources = {part: source for part, source in given.items() if source is not None}
    how = Reading(example, augment, threads, workers, classes, names, fraction, seed, name)
    return data_of(sources, how, [])


class Reading(NamedTuple):
    """How records become data; see `from_records`."""

    example: Example | None = None
    augment: Augmented | None = None
    threads: int = 16
    workers: int = 0
    classes: int | None = None
    names: tuple[str, ...] = ()
    fraction: float = 0.1
    seed: int = 0
    name: str = "records"


def data_of(sources: Mapping[str, Source], how: Reading, notes: list[str]) -> Data:
    """Return data of the sources of some splits; what is decided is added to the notes.

    Args:
      sources: by split; train must be there.
      how: they are read.
      notes: what was decided before.

    Returns:
      The data.

    Raises:
      DataError: as `from_records` does.

    Example:
      >>> data_of({"train": [{"x": i} for i in range(50)]}, Reading(), ["read"]).notes[0]
      'read'
    """
    if not 0 < how.fraction < 0.5:
        raise ArgumentError(f"fraction must be above 0 and below 0.5; got {how.fraction}")
    whole("threads", how.threads, 1)
    whole("workers", how.workers, 0)
    told = list(notes)
    records = {part: _records(part, source, how) for part, source in sources.items()}
    records = _with_missing(records, how, told)
    splits: dict[str, Any] = {part: each.columns() for part, each in records.items()}
    require_alike(splits)
    for part, split in splits.items():
        some(split)  # what is wrong with one of these is found now
        size = sum(column.nbytes for column in split.values())
        told.append(
            f"{part}: {len(records[part]):,} examples stay on disk ({units(size)}B in "
            f"memory); {min(SEEN, len(records[part]))} were checked, the others when they are read"
        )
    return Data(how.name, **splits, classes=how.classes, names=how.names, notes=tuple(told))


def _records(part: str, source: Source, how: Reading) -> Records:
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ArgumentError(
            f"{part} must give a record by its number, and have a length; it is a "
            f"{type(source).__name__}. A pipeline that can only be iterated over goes to from_grain"
        )
    own = how.augment if part == "train" else None
    return Records(source, how.example, own, part, threads=how.threads, workers=how.workers)


def _with_missing(
    records: dict[str, Records], how: Reading, notes: list[str]
) -> dict[str, Records]:
    """Draw the splits that are missing from train."""
    rows = drawn(len(records["train"]), records, how.fraction, how.seed, notes)
    found = {part: records.get(part, records["train"]) for part in PARTS}
    for part, own in rows.items():
        augment = found[part].augment if part == "train" else None
        found[part] = replace(found[part].part(own), name=part, augment=augment)
    return found
