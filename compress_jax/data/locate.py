"""Where a data set's files may lie on a machine without a network."""

import os
from pathlib import Path

from compress_jax.data.builders import idx


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
      Paths, of which few or none exist: ``$COMPRESS_JAX_DATA/name``, ``home/downloads/manual/name``,
      ``home/downloads/manual``, and where Debian's package puts its files.

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
