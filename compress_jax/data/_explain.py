"""What to tell a person when a data set cannot be had: what is missing, where it was looked for, what to do."""

from pathlib import Path

from compress_jax.core.errors import DataError
from compress_jax.data._builders import idx


def no_files(name: str, url: str, home: Path, places: list[Path], why: str) -> str:
    """Write what a person needs to know when the files are nowhere: what, where it was looked for, what to do.

    Args:
      name: TFDS name.
      url: folder of the published files.
      home: where it would have been prepared.
      places: where the files were looked for.
      why: a clause that says why they were not downloaded.

    Returns:
      A text of several lines.

    Example:
      >>> print(no_files("mnist", "http://a/", Path("/h"), [Path("/m")], "there is no network").splitlines()[0])
      mnist is not prepared in /h/mnist, its files were not found, and there is no network
    """
    looked = [f"  {place}: {_state(place)}" for place in places]
    debian = ["  * or, on Debian and Ubuntu: apt-get install dataset-fashion-mnist"] if name == "fashion_mnist" else []
    return "\n".join(
        [
            f"{name} is not prepared in {home / name}, its files were not found, and {why}",
            f"Looked for {', '.join(idx.FILES)} in",
            *looked,
            "What to do:",
            f"  * put these four files (from {url}) into a folder DIR/{name}, and set COMPRESS_JAX_DATA=DIR or pass "
            "manual_dir=DIR",
            *debian,
            f"  * or copy {name}/ from the data_dir of a machine that has it to {home}",
            '  * or use data that needs no files: load("digits")',
        ]
    )


def elsewhere(name: str, home: Path, why: str) -> str:
    """Say what to do about a data set that can only come from another machine."""
    return (
        f"{name} is not prepared in {home} and preparing it failed: {why}\nCopy {name}/ from the data_dir of a machine that "
        f'has it into {home}, or pass manual_dir with its published files, or use data that needs none: load("digits").'
    )


def damaged(place: object, error: Exception) -> str:
    """Say what to do about prepared data that cannot be read."""
    return (
        f"{place} cannot be read ({type(error).__name__}: {first_line(error)}). If it is damaged, or was prepared as "
        "tfrecord (which only TensorFlow reads), delete it or choose another data_dir, and run again."
    )


def explained(error: Exception, name: str, home: Path) -> DataError:
    """Turn what went wrong in TFDS into something a person can act on."""
    if isinstance(error, DataError):
        return error
    why = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name == "tensorflow":
        return DataError(f"TFDS can prepare {name} only with TensorFlow. Install it (pip install tensorflow) and run again.")
    if isinstance(error, AssertionError):  # a set that is never downloaded: TFDS's text says where its files belong
        return DataError(f"{name} cannot be prepared: {error}")
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"{name} cannot be written to {home} ({why}). Choose another data_dir, or set TFDS_DATA_DIR.")
    return DataError(elsewhere(name, home, why))


def first_line(error: Exception) -> str:
    """Return the first line of an error's text; TFDS's go on for pages."""
    return str(error).strip().split("\n")[0]


def _state(place: Path) -> str:
    """Say in a few words what is wrong with a folder."""
    if not place.is_dir():
        return "no such folder"
    lacking = idx.missing(place)
    return "has none of them" if len(lacking) == len(idx.FILES) else f"lacks {', '.join(lacking)}"
