"""`Data`: three splits with a fingerprint; made from arrays of one's own."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.core.types import Array
from compress_jax.data._disk.stored import Column, narrowed, require_alike
from compress_jax.data._preprocess import Split, normalize, scale_to_unit, statistics

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Data:
    """Examples: for training, for decisions, for the final report.

    A split is a dict of arrays ``[n, ...]`` by name, all with the same n. `load` gives images, as
    ``image`` ``[n, height, width, channels]`` and ``label`` ``[n]``; `Data.from_arrays` takes
    arrays of your own. Examples that do not fit into memory stay on disk: `from_records` has a
    `Column` in place of each array.

    Attributes:
      name: the name of the data set.
      train: the split for parameters, statistics and calibration.
      validation: the split for decisions.
      test: the split for the final report only.
      classes: the number of classes; None where nothing says it.
      fingerprint: sha256 of the examples before normalization, which identifies the data of a run;
        made from the splits if it is empty.
      names: the names of the classes, in the order of the labels.
      mean: float32 ``[channels]``; zeros without normalization.
      std: float32 ``[channels]``; ones without normalization.
      maximum: the largest value that a stored pixel can have.
      dropped: the number of train and validation examples dropped by cleaning, by reason.
      notes: what was decided for you, as sentences.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     digits = cj.data.load("digits", data_dir=folder)
      >>> digits.train["image"].shape, digits.maximum, digits.names[:3]
      ((1298, 8, 8, 1), 16.0, ('0', '1', '2'))
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int | None = None
    fingerprint: str = ""
    names: tuple[str, ...] = ()
    mean: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))
    std: np.ndarray = field(default_factory=lambda: np.ones(1, np.float32))
    maximum: float = 1.0
    dropped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Make the fingerprint, if there is none."""
        if not self.fingerprint:
            splits = {part: getattr(self, part) for part in PARTS}
            if all(map(_is_split, splits.values())):
                object.__setattr__(self, "fingerprint", fingerprint(splits))

    @classmethod
    def from_arrays(
        cls,
        train: Mapping[str, Any],
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        *,
        name: str = "arrays",
        classes: int | None = None,
        names: tuple[str, ...] = (),
        normalized: str | None = None,
        fraction: float = 0.1,
        seed: int = 0,
    ) -> "Data":
        """Return data of arrays of your own; what is decided for you is listed in ``notes``.

        A split that is missing is drawn from train at random: give your own where examples belong
        together (of one speaker, one patient, one series). Images of uint8 are scaled to 0..1 and
        normalized by channel; other entries only if ``normalized`` names them. Mean and deviation
        are those of train. 64-bit numbers are stored in 32 bits, as JAX has them.

        Args:
          train: arrays, or lists, ``[n, ...]`` by name: ``{"x": ..., "y": ...}``.
          validation: the like of it; None cuts it from train.
          test: the like of it; None cuts it from train.
          name: of the data set.
          classes: the number of classes, if labels are classes; None for the largest label and one.
          names: the names of the classes, in the order of the labels.
          normalized: the entry to shift and scale to mean 0 and deviation 1, by its last axis.
          fraction: the share of train that a missing split gets.
          seed: of the draw.

        Returns:
          The data.

        Raises:
          DataError: if entries, lengths, shapes or dtypes do not fit together, or a split is empty.

        Example:
          >>> import compress_jax as cj
          >>> data = cj.data.Data.from_arrays({"x": np.ones((50, 3)), "y": np.arange(50) % 2})
          >>> [len(split["y"]) for split in (data.train, data.validation, data.test)]
          [40, 5, 5]
          >>> data.notes[0]
          'x: float64 is stored as float32'
        """
        if not 0 < fraction < 0.5:
            raise ArgumentError(f"fraction must be above 0 and below 0.5; got {fraction}")
        notes: list[str] = []
        given = {"train": train, "validation": validation, "test": test}
        splits = {
            part: _arrays(part, split, notes if part == "train" else [])
            for part, split in given.items()
            if split is not None
        }
        splits = _cut_missing(splits, fraction, seed, notes)
        require_alike(splits)
        digest = fingerprint(splits)
        splits, numbers = _normalized(splits, normalized, notes)
        return cls(
            name, **splits, classes=classes, fingerprint=digest, names=names, **numbers,
            notes=tuple(notes),
        )  # fmt: skip


def fingerprint(splits: dict[str, Split]) -> str:
    """Return the sha256 of the names, dtypes, shapes and bytes of arrays, sorted by name.

    Args:
      splits: dicts of arrays by name of the split.

    Returns:
      64 hexadecimal digits, the same on every machine.

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> cj.data.fingerprint({"train": {"label": np.arange(3, dtype=np.int32)}})[:16]
      '3c16a9ea2cbb0a8d'
    """
    digest = hashlib.sha256()
    for part, split in sorted(splits.items()):
        for key, array in sorted(split.items()):
            if isinstance(array, Column):  # of some of its examples; all might take hours
                digest.update(f"{part}/{key} {array.records.fingerprint}\n".encode())
                continue
            # Little-endian and contiguous, so that the bytes do not depend on the machine.
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            digest.update(f"{part}/{key} {little.dtype.str} {little.shape}\n".encode())
            digest.update(little.data)
    return digest.hexdigest()


def cut(split: Split, fraction: float) -> tuple[Split, Split]:
    """Divide a split into its first part and its last ``fraction``."""
    n = len(next(iter(split.values())))
    at = n - round(n * fraction)
    first = {key: array[:at] for key, array in split.items()}
    last = {key: array[at:] for key, array in split.items()}
    return first, last


def _is_split(split: object) -> bool:
    return isinstance(split, dict) and all(
        isinstance(each, np.ndarray | Column) for each in split.values()
    )


def _arrays(part: str, split: Mapping[str, Any], notes: list[str]) -> Split:
    """Return a split's entries as arrays of what JAX computes with."""
    if not isinstance(split, Mapping) or not split:
        raise DataError(
            f"{part} must be a dict of arrays, such as {{'x': inputs, 'y': labels}}; it is a "
            f"{type(split).__name__}"
        )
    arrays = {key: _array(part, key, each, notes) for key, each in split.items()}
    sizes = {key: len(each) for key, each in arrays.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise DataError(f"the arrays of {part} must have one length, and not 0; got {sizes}")
    return arrays


def _array(part: str, key: str, values: Array, notes: list[str]) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of several lengths
        raise DataError(f"{key} of {part} is no array: {error}; pad its rows") from error
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise DataError(
            f"{key} of {part} must be an array of numbers, one row an example; it is "
            f"{array.dtype}{list(array.shape)}"
            + ("; turn text into tokens first" if array.dtype.kind in "OUS" else "")
        )
    stored = narrowed(f"{key} of {part}", array)
    if stored.dtype != array.dtype:
        notes.append(f"{key}: {array.dtype} is stored as {stored.dtype}")
    return stored


def _cut_missing(
    splits: dict[str, Split], fraction: float, seed: int, notes: list[str]
) -> dict[str, Split]:
    """Draw the splits that are missing from train."""
    train = splits["train"]
    total = len(next(iter(train.values())))
    found = dict(splits)
    for part, rows in drawn(total, splits, fraction, seed, notes).items():
        found[part] = {key: array[rows] for key, array in train.items()}
    return {part: found[part] for part in PARTS}


def drawn(
    total: int, given: Collection[str], fraction: float, seed: int, notes: list[str]
) -> dict[str, np.ndarray]:
    """Return which examples of train each missing split gets, and which are left to train.

    Args:
      total: the number of examples of train.
      given: the splits that are there.
      fraction: the share that each missing one gets.
      seed: of the draw.
      notes: what is decided is added here.

    Returns:
      Ascending numbers by split; nothing if no split is missing.

    Raises:
      DataError: if train has too few.

    Example:
      >>> {part: len(rows) for part, rows in drawn(50, ["train", "test"], 0.1, 0, []).items()}
      {'validation': 5, 'train': 45}
    """
    missing = [part for part in PARTS if part not in given]
    each = max(1, round(total * fraction))
    if not missing:
        return {}
    if total - each * len(missing) < 1:
        raise DataError(f"train has {total} examples, too few to cut {missing} from it")
    order = np.random.default_rng(seed).permutation(total)
    found = {}
    for part in missing:
        found[part], order = np.sort(order[:each]), order[each:]
        notes.append(f"{part}: {each:,} of the {total:,} examples of train, drawn at random")
    return {**found, "train": np.sort(order)}


def _normalized(
    splits: dict[str, Split], entry: str | None, notes: list[str]
) -> tuple[dict[str, Split], dict[str, Any]]:
    """Scale images of uint8, and normalize them or the entry that was asked for."""
    train = splits["train"]
    images = [key for key, each in train.items() if each.dtype == np.uint8 and each.ndim == 4]
    if entry is not None and entry not in train:
        raise DataError(f"normalized={entry!r} is no entry; there are {sorted(train)}")
    numbers: dict[str, Any] = {}
    for key in images:
        splits = {part: scale_to_unit(split, entry=key) for part, split in splits.items()}
        numbers["maximum"] = 255.0
        notes.append(f"{key}: images of uint8 are divided by 255")
    entry = entry or (images[0] if len(images) == 1 else None)
    if entry is None:
        return splits, numbers
    mean, std = statistics(splits["train"], entry=entry)
    normal = {part: normalize(split, mean, std, entry=entry) for part, split in splits.items()}
    notes.append(f"{entry}: normalized by mean and deviation of train, along its last axis")
    return normal, {**numbers, "mean": mean, "std": std}
