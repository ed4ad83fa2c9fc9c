"""From a name to a TFDS builder whose data are on disk, prepared once and without TensorFlow."""

from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from compress_jax.core.errors import DataError
from compress_jax.data._explain import damaged, elsewhere, explained, first_line, no_files
from compress_jax.data._network import unreachable
from compress_jax.data._progress import progress
from compress_jax.data._quiet import quiet
from compress_jax.data.builders import MNIST, Digits, FashionMNIST
from compress_jax.data.locate import data_home, find, folders

_FAMILY = {"mnist": MNIST, "fashion_mnist": FashionMNIST}


def prepared(name: str, data_dir: str | Path | None = None, manual_dir: str | Path | None = None) -> Any:
    """Return a TFDS builder whose data are on disk, preparing them first if they are not.

    TFDS writes into a folder of its own and renames it, so an interrupted preparation leaves nothing half done, and of
    two processes that prepare at once the slower finds the other's result.

    Args:
      name: ``"digits"``, ``"mnist"``, ``"fashion_mnist"`` (embedded builders) or any other name TFDS knows.
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
            f"{name!r} is no data set that TFDS can build here ({type(error).__name__}: {first_line(error)}). Embedded "
            "are digits, fashion_mnist and mnist; https://www.tensorflow.org/datasets/catalog lists the others."
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
        why = "with manual_dir nothing is downloaded" if manual_dir is not None else unreachable(url)
        if why is not None:
            raise DataError(no_files(name, url, home, places, why))
    return folder


def _prepare_stock(name: str, home: Path, manual_dir: str | Path | None) -> None:
    """Let TFDS prepare one of its own data sets, unless all it could do is wait for a network that is not there."""
    builder = _builder(name, home)
    cached = any((home / "downloads" / builder.name).glob("*.INFO*"))
    if not cached and manual_dir is None and builder.url_infos and (why := unreachable(next(iter(builder.url_infos)))):
        raise DataError(elsewhere(name, home, why))
    config = tfds.download.DownloadConfig(manual_dir=Path(manual_dir).expanduser() if manual_dir else None)
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
        raise DataError(damaged(builder.data_path, ValueError("it lists no examples of a split train")))
    if stated != getattr(builder, "MAXIMUM", stated):
        raise DataError(damaged(builder.data_path, ValueError(f"its largest pixel is {stated}, not {builder.MAXIMUM}")))


def _require_images(builder: Any) -> None:
    """Refuse, before anything is downloaded, data that are not labelled images."""
    keys, features = builder.info.supervised_keys, builder.info.features
    if keys is None or len(keys) != 2 or len(getattr(features[keys[0]], "shape", ())) != 3:
        raise DataError(f"{builder.name} does not hold labelled images; it has {', '.join(features)}.")
    if not hasattr(features[keys[1]], "num_classes"):
        raise DataError(f"{builder.name} has no class labels: {keys[1]} is {features[keys[1]]}.")
