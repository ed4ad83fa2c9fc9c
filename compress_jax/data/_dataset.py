"""`load`: from the name of a data set to normalized arrays, split, cleaned and fingerprinted."""

import contextlib
import io
import os
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.errors import ConfigError, DataError
from compress_jax.data._builders import MNIST, Digits, FashionMNIST, idx
from compress_jax.data._data import Data, cut, fingerprint
from compress_jax.data._preprocess import Split, clean, normalize, scale_to_unit, statistics

# Around TFDS: error messages that say what to do, a progress bar, and silence.


def no_files(name: str, url: str, home: Path, places: list[Path], why: str) -> str:
    """Return the message for missing files: what is missing, where it was searched, what to do.

    Args:
      name: TFDS name.
      url: the folder of the published files.
      home: the folder of prepared data.
      places: the folders that were searched.
      why: a clause that says why nothing was downloaded.

    Returns:
      A text of several lines.

    Example:
      >>> text = no_files("mnist", "http://a/", Path("/h"), [Path("/m")], "there is no network")
      >>> print(text.splitlines()[0])
      mnist is not prepared in /h/mnist, its files were not found, and there is no network
    """
    lines = [f"{name} is not prepared in {home / name}, its files were not found, and {why}"]
    lines.append(f"Looked for {', '.join(idx.FILES)} in")
    lines += [f"  {place}: {_state(place)}" for place in places]
    lines.append("What to do:")
    lines.append(
        f"  * put these four files (from {url}) into a folder DIR/{name}, and set "
        "COMPRESS_JAX_DATA=DIR or pass manual_dir=DIR"
    )
    if name == "fashion_mnist":
        lines.append("  * or, on Debian and Ubuntu: apt-get install dataset-fashion-mnist")
    lines.append(f"  * or copy {name}/ from the data_dir of a machine that has it to {home}")
    lines.append('  * or use data that needs no files: load("digits")')
    return "\n".join(lines)


def unavailable(name: str, home: Path, why: str) -> str:
    """Return the message for a data set that cannot be prepared on this machine."""
    return (
        f"{name} is not prepared in {home} and preparing it failed: {why}\nCopy {name}/ from the "
        f"data_dir of a machine that has it into {home}, or pass manual_dir with its published "
        'files, or use data that needs none: load("digits").'
    )


def damaged(place: object, error: Exception) -> str:
    """Return the message for prepared data that cannot be read."""
    return (
        f"{place} cannot be read ({type(error).__name__}: {first_line(error)}). If it is damaged, "
        "or was prepared as tfrecord (which only TensorFlow reads), delete it or choose another "
        "data_dir, and run again."
    )


def data_error(error: Exception, name: str, home: Path) -> DataError:
    """Return the DataError for an exception of TFDS, with what to do."""
    if isinstance(error, DataError):
        return error
    why = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorflow":
        return DataError(
            f"TFDS can prepare {name} only with TensorFlow. Install it (pip install tensorflow) "
            "and run again."
        )
    if isinstance(error, AssertionError):
        # Of a set that is never downloaded: TFDS's message says where its files belong.
        return DataError(f"{name} cannot be prepared: {error}")
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(
            f"{name} cannot be written to {home} ({why}). Choose another data_dir, or set "
            "TFDS_DATA_DIR."
        )
    return DataError(unavailable(name, home, why))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; TFDS's messages are pages long."""
    return str(error).strip().split("\n")[0]


def _state(place: Path) -> str:
    """Return in a few words which of the files a folder lacks."""
    if not place.is_dir():
        return "no such folder"
    lacking = idx.missing(place)
    return "has none of them" if len(lacking) == len(idx.FILES) else f"lacks {', '.join(lacking)}"


@contextmanager
def progress(text: str, total: int, *, after: float = 2.0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal's standard error, if the work takes longer than ``after``.

    Args:
      text: the label of the bar.
      total: the number of examples.
      after: the number of seconds before the bar appears.

    Yields:
      ``advance(n)``, to be called after each n examples.

    Example:
      >>> with progress("reading", 10) as advance:
      ...     advance(10)
    """
    console = Console(stderr=True)
    columns = TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(text, total=total)
    begun = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        before = done
        done += n
        # rich takes a lock for each update: a hundred cost nothing, one for each example would.
        if before * 100 // total != done * 100 // total:
            bar.update(task, completed=done)
            if not bar.live.is_started and time.monotonic() - begun > after:
                bar.start()

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Silence TFDS's standard output, log and progress bars within a ``with`` block.

    Warnings and exceptions are not changed.

    Args:
      bars: whether to show TFDS's own progress bars, which include downloads.

    Yields:
      Nothing.

    Example:
      >>> with quiet():
      ...     print("Downloading and preparing ...")
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.display_progress_bar(bars)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        logging.set_verbosity(verbosity)


Builder: TypeAlias = Any
"""A `tfds.core.DatasetBuilder`."""

_CHUNK = 1000  # records in one call
_PORTS = {"http": 80, "https": 443, "ftp": 21}
_FAMILY = {"mnist": MNIST, "fashion_mnist": FashionMNIST}


@renamed_arguments(normalised="normalized")
def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    manual_dir: str | Path | None = None,
    validation: float = 0.1,
    normalized: bool = True,
    drop_duplicates: bool = False,
) -> Data:
    r"""Load a data set through TFDS, without TensorFlow, and normalize its images.

    .. math:: (x / \text{maximum} - \mu_c) / \sigma_c

    The official test split is not changed. The validation split is the official one, else the last
    part of train in TFDS's stored order, which is a fixed shuffle. Without an official test split,
    the official validation split is the test split, else the last tenth of train. Mean and
    deviation are those of the remaining train split.

    Args:
      name: ``"digits"`` (no network needed), ``"fashion_mnist"``, ``"mnist"``, or another TFDS name
        of labeled images.
      data_dir: the folder of prepared data; by default ``$TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``.
      manual_dir: a folder with published files (or with a subfolder ``name`` that has them), for
        machines without a network. By default they are searched in ``$COMPRESS_JAX_DATA/name`` and
        a few usual places.
      validation: the fraction of train, in [0, 1), for validation if there is no official split.
      normalized: False for images in [0, 1].
      drop_duplicates: whether to drop exact repeats within train and within validation.

    Returns:
      The `Data`.

    Raises:
      ConfigError: if ``validation`` is not in [0, 1).
      DataError: if the data are missing or damaged, with what to do.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     digits = cj.data.load("digits", data_dir=folder)
      >>> [len(split["label"]) for split in (digits.train, digits.validation, digits.test)]
      [1298, 144, 355]
    """
    if not 0 <= validation < 1:
        raise ConfigError(
            f"validation is {validation}; it is a fraction of train, at least 0 and less than 1."
        )
    builder = prepared(name, data_dir, manual_dir)
    # TFDS's "all" and unlabeled splits are not used.
    present = [split for split in ("train", "validation", "test") if split in builder.info.splits]
    splits = _three({split: read(builder, split) for split in present}, validation)
    dropped: dict[str, int] = {}
    for part in ("train", "validation"):
        splits[part], counts = clean(splits[part], drop_duplicates=drop_duplicates)
        dropped = {reason: dropped.get(reason, 0) + count for reason, count in counts.items()}
    return _finished(name, builder.info, splits, dropped, normalized)


def _three(found: dict[str, Split], fraction: float) -> dict[str, Split]:
    """Return train, validation and test; those that are missing are cut from the end of train."""
    splits = dict(found)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    for part, share in (("test", 0.1), ("validation", fraction)):
        if part not in splits:
            splits["train"], splits[part] = cut(splits["train"], share)
    return splits


def _finished(
    name: str, info: Any, splits: dict[str, Split], dropped: dict[str, int], normalized: bool
) -> Data:
    """Scale, normalize and describe the cleaned splits."""
    labels = info.features[info.supervised_keys[1]]
    maximum = _maximum(info, splits["train"]["image"])
    digest = fingerprint(splits)
    splits = {part: scale_to_unit(split, maximum=maximum) for part, split in splits.items()}
    channels = splits["train"]["image"].shape[-1]
    mean = np.zeros(channels, np.float32)
    std = np.ones(channels, np.float32)
    if normalized:
        mean, std = statistics(splits["train"])
        splits = {part: normalize(split, mean, std) for part, split in splits.items()}
    return Data(
        name=name,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        classes=labels.num_classes,
        fingerprint=digest,
        names=tuple(labels.names),
        mean=mean,
        std=std,
        maximum=maximum,
        dropped=dropped,
    )


def _maximum(info: Any, images: np.ndarray) -> float:
    """Return the largest value of a pixel by the builder's metadata, else by the dtype."""
    stated = (info.metadata or {}).get("maximum")
    if stated is not None:
        return float(stated)
    return float(np.iinfo(images.dtype).max) if images.dtype.kind in "ui" else 1.0


def read(builder: Builder, split: str) -> Split:
    """Read a split into memory.

    Args:
      builder: see `prepared`.
      split: the name of a split.

    Returns:
      ``image`` ``[n, height, width, channels]`` in its stored dtype and ``label`` int32 ``[n]``, in
      TFDS's stored order.

    Raises:
      DataError: if the data are not labeled images of one size, or the files on disk are damaged.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     read(prepared("digits", folder), "test")["image"].shape
      (355, 8, 8, 1)
    """
    try:
        text = f"reading {builder.name} {split}"
        with quiet(), progress(text, builder.info.splits[split].num_examples) as advance:
            return _stacked(builder, split, advance)
    except DataError:
        raise
    except Exception as error:
        raise DataError(damaged(builder.data_path, error)) from error


def _stacked(builder: Builder, split: str, advance: Callable[[int], None]) -> Split:
    """Read records in chunks into two arrays of their full size."""
    image, label = builder.info.supervised_keys
    source = builder.as_data_source(split)
    n = len(source)
    first = np.asarray(source[0][image])
    images = np.empty((n, *first.shape), first.dtype)
    labels = np.empty(n, np.int32)
    for start in range(0, n, _CHUNK):
        records = source.__getitems__(range(start, min(start + _CHUNK, n)))
        for row, record in enumerate(records, start):
            if np.shape(record[image]) != first.shape:
                raise DataError(
                    f"{builder.name} has images of several sizes; only sets of one size can be "
                    "loaded."
                )
            images[row] = record[image]
            labels[row] = record[label]
        advance(len(records))
    return {"image": images, "label": labels}


def prepared(
    name: str, data_dir: str | Path | None = None, manual_dir: str | Path | None = None
) -> Builder:
    """Return a TFDS builder whose data are on disk, and prepare them first if they are not.

    TFDS writes to a temporary folder and renames it. An interrupted preparation thus leaves nothing
    behind, and if two processes prepare at once the slower one uses the other's result.

    Args:
      name: ``"digits"``, ``"mnist"``, ``"fashion_mnist"`` (embedded builders) or any other name
        in TFDS.
      data_dir: the folder of prepared data, see `data_home`.
      manual_dir: the folder of published files, see `folders`.

    Returns:
      A `tfds.core.DatasetBuilder`.

    Raises:
      DataError: if the name is unknown, or files are missing or damaged, with what to do.

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
                    raise data_error(error, name, home) from error
            builder = _builder(name, home)
        _require_splits(builder)
    return builder


def _builder(name: str, home: Path, **kwargs: Any) -> Builder:
    """Return the builder of a name; nothing is downloaded yet."""
    common = {"data_dir": home, "file_format": "array_record"}
    if name in (*_FAMILY, "digits"):
        try:
            return Digits(**common) if name == "digits" else _FAMILY[name](**common, **kwargs)
        except Exception as error:  # a builder reads the metadata of data that were prepared
            raise DataError(damaged(home / name, error)) from error
    try:
        return tfds.builder(name, **common)
    except Exception as error:
        raise DataError(
            f"TFDS cannot build {name!r} ({type(error).__name__}: {first_line(error)}). Embedded "
            "are digits, fashion_mnist and mnist; https://www.tensorflow.org/datasets/catalog "
            "lists the others."
        ) from error


def _prepare(name: str, home: Path, manual_dir: str | Path | None) -> None:
    """Write the data to disk, from local files if there are any, else from the network."""
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
    url = _FAMILY[name].URL
    places = folders(name, home, manual_dir)
    folder = find(places)
    if folder is None:
        why = unreachable(url) if manual_dir is None else "with manual_dir nothing is downloaded"
        if why is not None:
            raise DataError(no_files(name, url, home, places, why))
    return folder


def _prepare_stock(name: str, home: Path, manual_dir: str | Path | None) -> None:
    """Let TFDS prepare one of its own data sets; raise DataError at once if there is no network."""
    builder = _builder(name, home)
    cached = any((home / "downloads" / builder.name).glob("*.INFO*"))
    if not cached and manual_dir is None and builder.url_infos:
        why = unreachable(next(iter(builder.url_infos)))
        if why is not None:
            raise DataError(unavailable(name, home, why))
    folder = Path(manual_dir).expanduser() if manual_dir else None
    config = tfds.download.DownloadConfig(manual_dir=folder)
    builder.download_and_prepare(download_config=config)


def _require_splits(builder: Builder) -> None:
    """Raise DataError if the metadata of prepared data are damaged or do not fit the builder."""
    place = builder.data_path
    try:
        splits = builder.info.splits
        known = "train" in splits and all(split.num_examples > 0 for split in splits.values())
        stated = (builder.info.metadata or {}).get("maximum")
    except Exception as error:
        raise DataError(damaged(place, error)) from error
    if not known:
        raise DataError(damaged(place, ValueError("it lists no examples of a split train")))
    if stated != getattr(builder, "MAXIMUM", stated):
        error = ValueError(f"its largest pixel is {stated}, not {builder.MAXIMUM}")
        raise DataError(damaged(place, error))


def _require_images(builder: Builder) -> None:
    """Raise DataError, before anything is downloaded, if the data are not labeled images."""
    keys = builder.info.supervised_keys
    features = builder.info.features
    if keys is None or len(keys) != 2 or len(getattr(features[keys[0]], "shape", ())) != 3:
        raise DataError(
            f"{builder.name} does not hold labeled images; it has {', '.join(features)}."
        )
    if not hasattr(features[keys[1]], "num_classes"):
        raise DataError(f"{builder.name} has no class labels: {keys[1]} is {features[keys[1]]}.")


def data_home(data_dir: str | Path | None = None) -> Path:
    """Return the folder of prepared data.

    Args:
      data_dir: the folder; by default ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.

    Returns:
      An absolute path; the folder need not exist.

    Example:
      >>> data_home("/data").as_posix()
      '/data'
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(chosen).expanduser().absolute()


def folders(name: str, home: Path, manual_dir: str | Path | None = None) -> list[Path]:
    """Return the folders in which the published files of a data set are searched, in this order.

    Args:
      name: TFDS name, such as ``"fashion_mnist"``.
      home: see `data_home`.
      manual_dir: if given, the only places are this folder and its subfolder ``name``.

    Returns:
      Paths, which need not exist: ``$COMPRESS_JAX_DATA/name``, ``home/downloads/manual/name``,
      ``home/downloads/manual``, and the folder of Debian's package.

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
    debian = Path("/usr/share/datasets") / name.replace("_", "-")
    return [*first, manual / name, manual, debian]


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


def unreachable(url: str, timeout: float = 10.0) -> str | None:
    """Return why the host of a URL cannot be reached, within seconds.

    TFDS itself would retry a download for minutes. Behind a proxy nothing is checked.

    Args:
      url: the download; only a connection to its host is opened.
      timeout: seconds.

    Returns:
      The reason, or None if a connection can be opened or there is a proxy.

    Example:
      >>> unreachable("http://localhost:1/file").split(" (")[0]
      'there is no connection to localhost'
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in _PORTS or parts.scheme in urllib.request.getproxies():
        return None
    address = (parts.hostname, parts.port or _PORTS[parts.scheme])
    try:
        socket.create_connection(address, timeout).close()
    except OSError as error:
        return f"there is no connection to {parts.hostname} ({error.strerror or error})"
    return None
