"""`load`: a data set's name to normalised arrays, split, cleaned and fingerprinted."""

import hashlib
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from compress_jax.core.errors import ConfigError, DataError
from compress_jax.data._builders import MNIST, Digits, FashionMNIST, idx
from compress_jax.data._preprocess import Split, clean, normalise, scale_to_unit, statistics
from compress_jax.data._tfds import (
    damaged,
    elsewhere,
    explained,
    first_line,
    no_files,
    progress,
    quiet,
)

# From prepared files to arrays in memory, read once in large pieces.


_CHUNK = 1000  # records in one call


def read(builder: Any, split: str) -> Split:
    """Read a split into memory.

    Args:
      builder: see `prepared`.
      split: the name of a split.

    Returns:
      ``image`` ``[n, height, width, channels]`` in its stored dtype and ``label`` int32 ``[n]``, in
      TFDS's stored order.

    Raises:
      DataError: if the data are not labelled images of one size, or the files on disk are damaged.

    Example:
      >>> import tempfile
      >>> from compress_jax.data._dataset import prepared
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     read(prepared("digits", folder), "test")["image"].shape
      (355, 8, 8, 1)
    """
    try:
        with (
            quiet(),
            progress(
                f"reading {builder.name} {split}", builder.info.splits[split].num_examples
            ) as advance,
        ):
            return _stacked(builder, split, advance)
    except DataError:
        raise
    except Exception as error:
        raise DataError(damaged(builder.data_path, error)) from error


def _stacked(builder: Any, split: str, advance: Callable[[int], None]) -> Split:
    """Read records in chunks into two arrays made for all of them."""
    image, label = builder.info.supervised_keys
    source = builder.as_data_source(split)
    n, first = len(source), np.asarray(source[0][image])
    images, labels = np.empty((n, *first.shape), first.dtype), np.empty(n, np.int32)
    for start in range(0, n, _CHUNK):
        for row, record in enumerate(
            source.__getitems__(range(start, min(start + _CHUNK, n))), start
        ):
            if np.shape(record[image]) != first.shape:
                raise DataError(
                    f"{builder.name} has images of several sizes; only sets of one size can be "
                    "loaded."
                )
            images[row], labels[row] = record[image], record[label]
        advance(min(_CHUNK, n - start))
    return {"image": images, "label": labels}


# Where a data set's files may lie on a machine without a network.


def data_home(data_dir: str | Path | None = None) -> Path:
    """Return the folder in which TFDS keeps prepared data.

    Args:
      data_dir: the folder; None means ``$TFDS_DATA_DIR``, or else ``~/tensorflow_datasets``.

    Returns:
      An absolute path, whether or not it exists.

    Example:
      >>> data_home("/data").as_posix()
      '/data'
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(chosen).expanduser().absolute()


def folders(name: str, home: Path, manual_dir: str | Path | None = None) -> list[Path]:
    """List where the published files of a data set are looked for, in this order.

    Args:
      name: TFDS name, such as ``"fashion_mnist"``.
      home: see `data_home`.
      manual_dir: if given, the only places are this folder and its subfolder ``name``.

    Returns:
      Paths, of which few or none exist: ``$COMPRESS_JAX_DATA/name``,
      ``home/downloads/manual/name``, ``home/downloads/manual``, and where Debian's package puts its
      files.

    Example:
      >>> [path.as_posix() for path in folders("mnist", Path("/home"), manual_dir="/m")]
      ['/m/mnist', '/m']
    """
    if manual_dir is not None:
        given = Path(manual_dir).expanduser().absolute()
        return [given / name, given]
    ours = os.environ.get("COMPRESS_JAX_DATA")
    first = [Path(ours).expanduser().absolute() / name] if ours else []
    manual = home / "downloads" / "manual"
    return [*first, manual / name, manual, Path("/usr/share/datasets") / name.replace("_", "-")]


def find(places: list[Path]) -> Path | None:
    """Return the first folder that has all four files of an MNIST-like set.

    Args:
      places: see `folders`.

    Returns:
      The folder, or None.

    Example:
      >>> find([Path("/nowhere")]) is None
      True
    """
    return next((place for place in places if not idx.missing(place)), None)


# Whether a download has a chance, found out in seconds: TFDS itself would retry for minutes.


_PORTS = {"http": 80, "https": 443, "ftp": 21}


def unreachable(url: str, timeout: float = 10.0) -> str | None:
    """Say why the host of ``url`` cannot be reached.

    Args:
      url: what is to be downloaded; only its host is asked, and only for a connection.
      timeout: seconds.

    Returns:
      The reason, or None if a connection can be made or a proxy stands between, whose business it
      is.

    Example:
      >>> unreachable("http://localhost:1/file").split(" (")[0]
      'there is no connection to localhost'
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in _PORTS or parts.scheme in urllib.request.getproxies():
        return None
    try:
        socket.create_connection(
            (parts.hostname, parts.port or _PORTS[parts.scheme]), timeout
        ).close()
    except OSError as error:
        return f"there is no connection to {parts.hostname} ({error.strerror or error})"
    return None


# From a name to a TFDS builder whose data are on disk, prepared once and without TensorFlow.


_FAMILY = {"mnist": MNIST, "fashion_mnist": FashionMNIST}


def prepared(
    name: str, data_dir: str | Path | None = None, manual_dir: str | Path | None = None
) -> Any:
    """Return a TFDS builder whose data are on disk, preparing them first if they are not.

    TFDS writes into a folder of its own and renames it, so an interrupted preparation leaves
    nothing half done, and of two processes that prepare at once the slower finds the other's
    result.

    Args:
      name: ``"digits"``, ``"mnist"``, ``"fashion_mnist"`` (embedded builders) or any other name
        TFDS knows.
      data_dir: where prepared data are kept; see `compress_jax.data.locate.data_home`.
      manual_dir: where published files lie; see `compress_jax.data.locate.folders`.

    Returns:
      A `tfds.core.DatasetBuilder`.

    Raises:
      DataError: if the name is unknown, or files are missing or damaged; it says what to do.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     prepared("digits", folder).info.splits["train"].num_examples
      1442
    """
    home = data_home(data_dir)
    with quiet(bars=name not in (*_FAMILY, "digits")):
        builder = _builder(name, home)
        _require_images(builder)
        if not builder.is_prepared():
            try:
                _prepare(name, home, manual_dir)
            except Exception as error:
                if not _builder(name, home).is_prepared():
                    raise explained(error, name, home) from error
            builder = _builder(name, home)
        _require_splits(builder)
    return builder


def _builder(name: str, home: Path, **kwargs: Any) -> Any:
    """Make the builder of a name; nothing is downloaded yet."""
    common = {"data_dir": home, "file_format": "array_record"}
    if name in (*_FAMILY, "digits"):
        try:
            return Digits(**common) if name == "digits" else _FAMILY[name](**common, **kwargs)
        except Exception as error:  # it reads what says what was prepared
            raise DataError(damaged(home / name, error)) from error
    try:
        return tfds.builder(name, **common)
    except Exception as error:
        raise DataError(
            f"{name!r} is no data set that TFDS can build here ({type(error).__name__}: "
            f"{first_line(error)}). Embedded "
            "are digits, fashion_mnist and mnist; https://www.tensorflow.org/datasets/catalog "
            "lists the others."
        ) from error


def _prepare(name: str, home: Path, manual_dir: str | Path | None) -> None:
    """Write the data to disk, from local files where there are some and else from the network."""
    if name == "digits":
        _builder(name, home).download_and_prepare()
    elif name in _FAMILY:
        folder = _folder(name, home, manual_dir)
        with progress(f"preparing {name}", 70_000) as advance:
            _builder(name, home, folder=folder, advance=advance).download_and_prepare()
    else:
        _prepare_stock(name, home, manual_dir)


def _folder(name: str, home: Path, manual_dir: str | Path | None) -> Path | None:
    """Return the folder with the files of an MNIST-like set, or None if they can be downloaded."""
    folder, url = find(places := folders(name, home, manual_dir)), _FAMILY[name].URL
    if folder is None:
        why = (
            "with manual_dir nothing is downloaded" if manual_dir is not None else unreachable(url)
        )
        if why is not None:
            raise DataError(no_files(name, url, home, places, why))
    return folder


def _prepare_stock(name: str, home: Path, manual_dir: str | Path | None) -> None:
    """Let TFDS prepare one of its own data sets, unless all it could do is wait for a network that is not there."""
    builder = _builder(name, home)
    cached = any((home / "downloads" / builder.name).glob("*.INFO*"))
    if (
        not cached
        and manual_dir is None
        and builder.url_infos
        and (why := unreachable(next(iter(builder.url_infos))))
    ):
        raise DataError(elsewhere(name, home, why))
    config = tfds.download.DownloadConfig(
        manual_dir=Path(manual_dir).expanduser() if manual_dir else None
    )
    builder.download_and_prepare(download_config=config)


def _require_splits(builder: Any) -> None:
    """Refuse what was prepared if it does not say what is in it, or says nothing that can be."""
    try:
        splits = builder.info.splits
        known = "train" in splits and all(split.num_examples > 0 for split in splits.values())
        stated = (builder.info.metadata or {}).get("maximum")
    except Exception as error:
        raise DataError(damaged(builder.data_path, error)) from error
    if not known:
        raise DataError(
            damaged(builder.data_path, ValueError("it lists no examples of a split train"))
        )
    if stated != getattr(builder, "MAXIMUM", stated):
        raise DataError(
            damaged(
                builder.data_path,
                ValueError(f"its largest pixel is {stated}, not {builder.MAXIMUM}"),
            )
        )


def _require_images(builder: Any) -> None:
    """Refuse, before anything is downloaded, data that are not labelled images."""
    keys, features = builder.info.supervised_keys, builder.info.features
    if keys is None or len(keys) != 2 or len(getattr(features[keys[0]], "shape", ())) != 3:
        raise DataError(
            f"{builder.name} does not hold labelled images; it has {', '.join(features)}."
        )
    if not hasattr(features[keys[1]], "num_classes"):
        raise DataError(f"{builder.name} has no class labels: {keys[1]} is {features[keys[1]]}.")


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled images in memory, each split a dict of ``image`` float32 ``[n, h, w, c]`` and ``label`` int32 ``[n]``.

    Attributes:
      name: the name it was loaded by.
      train: what parameters, statistics and calibration may see.
      validation: what decisions may see.
      test: what only the final report may see.
      classes: how many labels there are.
      fingerprint: sha256 of the examples before normalisation, so that a run can name exactly what
        it used.
      names: the classes' names, in the order of the labels.
      mean: float32 ``[c]``; pixels were divided by ``maximum``, then ``mean`` was subtracted ...
      std: float32 ``[c]``; ... and the result divided by ``std``. Zeros and ones if nothing was
        normalised.
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

    The official test split is left untouched. Validation is the official one or else the last part
    of train, in TFDS's stored order, which is a fixed shuffle. Where there is no official test
    split, the official validation split serves as test, or else the last tenth of train. Mean and
    deviation come from what remains to train on.

    Args:
      name: ``"digits"`` (no network needed), ``"fashion_mnist"``, ``"mnist"``, or another TFDS name
        of labelled images.
      data_dir: where prepared data are kept; None means ``$TFDS_DATA_DIR``, or else
        ``~/tensorflow_datasets``.
      manual_dir: a folder with published files (or with a subfolder ``name`` that has them), for
        machines without a network. Without it, ``$COMPRESS_JAX_DATA/name`` and a few usual places
        are looked at.
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
        raise ConfigError(
            f"validation is {validation}; it is a fraction of train, at least 0 and less than 1."
        )
    # TFDS takes a third of a second to import, which whoever only wants to feed arrays should not
    # pay.
    pass
    pass

    builder = prepared(name, data_dir, manual_dir)
    splits = _three(
        {
            split: read(builder, split)
            for split in ("train", "validation", "test")
            if split in builder.info.splits
        },
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


def _finished(
    name: str, info: Any, splits: dict[str, Split], dropped: dict[str, int], normalised: bool
) -> Data:
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
    return float(
        stated
        if stated is not None
        else np.iinfo(images.dtype).max
        if images.dtype.kind in "ui"
        else 1.0
    )
