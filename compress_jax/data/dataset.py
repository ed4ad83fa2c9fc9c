"""`load`: a data set's name to normalised arrays, split, cleaned and fingerprinted."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress_jax.core.errors import ConfigError
from compress_jax.data.preprocess import Split, clean, normalise, scale_to_unit, statistics


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled images in memory, each split a dict of ``image`` float32 ``[n, h, w, c]`` and ``label`` int32 ``[n]``.

    Attributes:
      name: the name it was loaded by.
      train: what parameters, statistics and calibration may see.
      validation: what decisions may see.
      test: what only the final report may see.
      classes: how many labels there are.
      fingerprint: sha256 of the examples before normalisation, so that a run can name exactly what it used.
      names: the classes' names, in the order of the labels.
      mean: float32 ``[c]``; pixels were divided by ``maximum``, then ``mean`` was subtracted ...
      std: float32 ``[c]``; ... and the result divided by ``std``. Zeros and ones if nothing was normalised.
      maximum: the largest value a stored pixel can have.
      dropped: how many examples of train and validation cleaning took away, by reason.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    fingerprint: str
    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    maximum: float
    dropped: dict[str, int]


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    validation: float = 0.1,
    normalised: bool = True,
    drop_duplicates: bool = False,
) -> Data:
    r"""Load a data set through TFDS, without TensorFlow: :math:`(x / \text{maximum} - \mu_c) / \sigma_c`.

    The official test split is left untouched. Validation is the official one or else the last part of train, in TFDS's
    stored order, which is a fixed shuffle. Where there is no official test split, the official validation split serves
    as test, or else the last tenth of train. Mean and deviation come from what remains to train on.

    Args:
      name: ``"digits"`` (no network needed), ``"fashion_mnist"``, ``"mnist"``, or another TFDS name of labelled images.
      data_dir: where prepared data are kept; None means ``$TFDS_DATA_DIR``, or else ``~/tensorflow_datasets``.
      manual_dir: a folder with published files (or with a subfolder ``name`` that has them), for machines without a
        network. Without it, ``$COMPRESS_JAX_DATA/name`` and a few usual places are looked at.
      validation: fraction of train, in [0, 1), to validate on where there is no official split.
      normalised: False leaves the images in [0, 1].
      drop_duplicates: whether to drop exact repeats within train and within validation.

    Returns:
      The `Data`.

    Raises:
      ConfigError: if ``validation`` is not in [0, 1).
      DataError: if the data are missing or damaged; it says what to do.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     data = load("digits", data_dir=folder)
      >>> len(data.train["label"]), len(data.validation["label"]), len(data.test["label"]), data.classes
      (1298, 144, 355, 10)
    """
    if not 0 <= validation < 1:
        raise ConfigError(f"validation is {validation}; it is a fraction of train, at least 0 and less than 1.")
    # TFDS takes a third of a second to import, which whoever only wants to feed arrays should not pay.
    from compress_jax.data.prepare import prepared
    from compress_jax.data.read import read

    builder = prepared(name, data_dir, manual_dir)
    splits = _three(
        {split: read(builder, split) for split in ("train", "validation", "test") if split in builder.info.splits},
        validation,
    )
    dropped: dict[str, int] = {}
    for part in ("train", "validation"):
        splits[part], gone = clean(splits[part], drop_duplicates=drop_duplicates)
        dropped = {reason: dropped.get(reason, 0) + count for reason, count in gone.items()}
    return _finished(name, builder.info, splits, dropped, normalised)


def fingerprint(splits: dict[str, Split]) -> str:
    """Name arrays by their content: sha256 over names, dtypes, shapes and bytes, in sorted order of the names.

    Args:
      splits: dicts of arrays.

    Returns:
      64 hexadecimal digits, the same on every machine.

    Example:
      >>> fingerprint({"train": {"label": np.arange(3, dtype=np.int32)}})[:16]
      '3c16a9ea2cbb0a8d'
    """
    digest = hashlib.sha256()
    for part, split in sorted(splits.items()):
        for key, array in sorted(split.items()):
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            digest.update(f"{part}/{key} {little.dtype.str} {little.shape}\n".encode())
            digest.update(little.data)
    return digest.hexdigest()


def _three(found: dict[str, Split], fraction: float) -> dict[str, Split]:
    """Return train, validation and test, cutting from the end of train what is not there."""
    splits = dict(found)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    for part, share in (("test", 0.1), ("validation", fraction)):
        if part not in splits:
            splits["train"], splits[part] = _cut(splits["train"], share)
    return splits


def _cut(split: Split, fraction: float) -> tuple[Split, Split]:
    """Divide a split into its first part and its last ``fraction``."""
    n = len(split["label"])
    at = n - round(n * fraction)
    return {k: v[:at] for k, v in split.items()}, {k: v[at:] for k, v in split.items()}


def _finished(name: str, info: Any, splits: dict[str, Split], dropped: dict[str, int], normalised: bool) -> Data:
    """Scale, normalise and describe the cleaned splits."""
    labels = info.features[info.supervised_keys[1]]
    maximum = _maximum(info, splits["train"]["image"])
    mark = fingerprint(splits)
    splits = {part: scale_to_unit(split, maximum=maximum) for part, split in splits.items()}
    channels = splits["train"]["image"].shape[-1]
    mean, std = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    if normalised:
        mean, std = statistics(splits["train"])
        splits = {part: normalise(split, mean, std) for part, split in splits.items()}
    return Data(
        name=name,
        **splits,
        classes=labels.num_classes,
        fingerprint=mark,
        names=tuple(labels.names),
        mean=mean,
        std=std,
        maximum=maximum,
        dropped=dropped,
    )


def _maximum(info: Any, images: np.ndarray) -> float:
    """Return the largest value a pixel can have: what the builder says, or what the dtype allows."""
    stated = (info.metadata or {}).get("maximum")
    return float(stated if stated is not None else np.iinfo(images.dtype).max if images.dtype.kind in "ui" else 1.0)
