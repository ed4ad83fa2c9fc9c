"""A folder of one's own files as `Data`: images or texts by class, or arrays."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress_jax.core.errors import DataError
from compress_jax.data._columns import Columns, Reading, from_columns, split_of
from compress_jax.data._data import Data
from compress_jax.data._images import SUFFIXES, Color, read_images
from compress_jax.data._tokenizer import Tokenizer

TEXTS = (".txt", ".text")
KINDS = {"images": SUFFIXES, "texts": TEXTS}
Listing = list[tuple[Path, int]]
"""Files and the numbers of their classes."""


def from_folder(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    color: Color | None = None,
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    fraction: float = 0.1,
    seed: int = 0,
    name: str | None = None,
) -> Data:
    """Load images or texts that lie in a folder for each class, or arrays of ``.npz`` files.

    Three layouts are known; ``val``, ``valid`` and ``dev`` mean validation:

    * ``path/CLASS/FILE``: validation and test are cut from it;
    * ``path/SPLIT/CLASS/FILE``, of which train must be there;
    * ``path/train.npz`` and others, or one file with ``x_train``, ``y_train``, ``x_test``, ...

    Images that occur twice are kept once, and train loses those that a given test or validation
    split has; `from_texts` says what happens to texts.

    Args:
      path: the folder, or a ``.npz`` file.
      size: height and width of images, or one number for both; None if all have one size.
      color: ``"gray"`` or ``"rgb"``; by default gray if all images are.
      tokenizer: of texts, see `from_texts`.
      length: tokens of a text.
      fraction: the share of train that a missing split gets.
      seed: of the draw of images and arrays.
      name: of the data set; by default the folder's.

    Returns:
      The data: ``image`` or ``tokens`` and ``mask``, and ``label``; or the arrays of the files.

    Raises:
      DataError: if the folder is missing, a class is empty, or a file cannot be read.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> from pathlib import Path
      >>> folder = Path(tempfile.mkdtemp())
      >>> np.savez(folder / "mine.npz", x_train=np.ones((50, 3)), y_train=np.ones(50, int))
      >>> data = cj.data.from_folder(folder)
      >>> sorted(data.train), len(data.test["y"])
      (['x', 'y'], 5)
    """
    place = Path(path).expanduser()
    how = Reading(
        None, "label", tokenizer, length, fraction, seed, name or place.stem
    )  # fmt: skip
    if not place.exists():
        raise DataError(f"there is no folder {place}")
    archives = sorted(place.glob("*.npz")) if place.is_dir() else [place]
    notes: list[str] = []
    if archives:
        return from_columns(_arrays(archives, notes), how._replace(label=None), notes)
    return _of_classes(place, how, size, color, notes)


# Files by class.


def _of_classes(
    place: Path,
    how: Reading,
    size: int | tuple[int, int] | None,
    color: Color | None,
    notes: list[str],
) -> Data:
    """Return data of files in a folder for each class."""
    found = listings_of(place, notes)
    listings = found.files
    names = found.names
    suffixes = found.suffixes
    notes.append(f"classes, by the names of folders: {', '.join(names)}")
    how = how._replace(names=names)
    if suffixes == TEXTS:
        columns = {part: _texts(each) for part, each in listings.items()}
        return from_columns(columns, how, notes)
    columns = {}
    for part in ("train", "test", "validation"):
        if part in listings:
            columns[part] = _images(listings[part], place, size, color, notes)
            # Other splits are read as train is.
            color = color or ("gray" if columns[part]["image"].shape[-1] == 1 else "rgb")
    return from_columns(_unrepeated(columns, notes), how, notes)


class Listings(NamedTuple):
    """The files of a folder.

    Attributes:
      files: by split, each with the number of its class.
      names: of the classes.
      suffixes: of the files: of images or of texts.
    """

    files: dict[str, Listing]
    names: tuple[str, ...]
    suffixes: tuple[str, ...]


def listings_of(
    place: Path, notes: list[str], kinds: dict[str, tuple[str, ...]] = KINDS
) -> Listings:
    """Return the files in a folder for each class, and the classes.

    Args:
      place: the folder, see `from_folder`.
      notes: which files are left out is added here.
      kinds: suffixes by kind; the files that are used must be of one kind.

    Returns:
      The files; train is there.

    Raises:
      DataError: if there are not two classes, or one of them is empty.
    """
    folders = _split_folders(place)
    names = tuple(each.name for each in _folders(folders["train"]))
    if len(names) < 2:
        raise DataError(
            f"{folders['train']} has {len(names)} folders with files; there must be one for each "
            "class, two or more: cats/1.png, dogs/1.png"
        )
    listings = {part: _listing(folder, names) for part, folder in folders.items()}
    suffixes = _kind_of(place, listings, kinds, notes)
    files = {part: _chosen(each, suffixes, part) for part, each in listings.items()}
    _require_classes(files["train"], names, folders["train"])
    return Listings(files, names, suffixes)


def _folders(place: Path) -> list[Path]:
    """Return the folders inside a folder, but for hidden ones."""
    if not place.is_dir():
        raise DataError(f"{place} is no folder")
    return sorted(each for each in place.iterdir() if each.is_dir() and each.name[0] not in "._")


def _split_folders(place: Path) -> dict[str, Path]:
    """Return the folder of each split; train alone if the folders are classes."""
    found: dict[str, Path] = {}
    inside = _folders(place)
    parts = [split_of(each.name) for each in inside]
    if "train" not in parts:
        return {"train": place}
    for each, part in zip(inside, parts, strict=True):
        if part is None:
            raise DataError(
                f"{place} has folders of splits, and {each.name!r}, which is none; move it away"
            )
        if part in found:
            raise DataError(f"{found[part]} and {each} are both {part}; keep one")
        found[part] = each
    return found


def _listing(folder: Path, names: Sequence[str]) -> Listing:
    """Return all files of the classes' folders, in the order of their paths."""
    files: Listing = []
    for each in _folders(folder):
        if each.name not in names:
            raise DataError(f"{folder} has the class {each.name!r}, and train has {list(names)}")
        own = sorted(file for file in each.rglob("*") if file.is_file() and file.name[0] != ".")
        files += [(file, names.index(each.name)) for file in own]
    return files


def _kind_of(
    place: Path, listings: dict[str, Listing], kinds: dict[str, tuple[str, ...]], notes: list[str]
) -> tuple[str, ...]:
    """Return the suffixes of the files that are used: of one kind."""
    files = [file for each in listings.values() for file, _ in each]
    counts = {
        kind: sum(file.suffix.lower() in suffixes for file in files)
        for kind, suffixes in kinds.items()
    }
    found = [kind for kind, count in counts.items() if count]
    if len(found) > 1:
        text = " and ".join(f"{counts[kind]:,} {kind}" for kind in found)
        raise DataError(f"{place} has {text}; give a folder of one kind")
    if not found:
        text = ", ".join(f"no {kind} ({', '.join(each)})" for kind, each in kinds.items())
        arrays = " and no .npz files" if kinds is KINDS else ""
        raise DataError(f"{place} has {text}{arrays}")
    chosen = kinds[found[0]]
    others = [file for file in files if file.suffix.lower() not in chosen]
    if others:
        notes.append(f"{len(others):,} other files are left out, such as {others[0].name}")
    return chosen


def _chosen(files: Listing, suffixes: tuple[str, ...], part: str) -> Listing:
    chosen = [(file, label) for file, label in files if file.suffix.lower() in suffixes]
    if not chosen:
        raise DataError(f"the split {part} has no files; leave its folder out or fill it")
    return chosen


def _require_classes(files: Listing, names: Sequence[str], folder: Path) -> None:
    counts = np.bincount([label for _, label in files], minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise DataError(f"{folder / empty[0]} has no file; fill it or remove it")


def _texts(files: Listing) -> Columns:
    texts = []
    for file, _ in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as text in UTF-8: {error}") from error
    return {"text": texts, "label": np.array([label for _, label in files], np.int32)}


def _images(
    files: Listing,
    place: Path,
    size: int | tuple[int, int] | None,
    color: Color | None,
    notes: list[str],
) -> Columns:
    names = [file.relative_to(place).as_posix() for file, _ in files]
    found: list[str] = []
    images = read_images([file for file, _ in files], names, size=size, color=color, notes=found)
    notes += [note for note in found if note not in notes]
    return {"image": images, "label": np.array([label for _, label in files], np.int32)}


def _unrepeated(columns: dict[str, Columns], notes: list[str]) -> dict[str, Columns]:
    """Keep the first of equal images; those of test come before validation and train."""
    seen: set[bytes] = set()
    kept: dict[str, Columns] = {}
    for part in ("test", "validation", "train"):
        if part not in columns:
            continue
        images = np.asarray(columns[part]["image"])
        keep = np.zeros(len(images), bool)
        for i, image in enumerate(images):
            digest = hashlib.sha256(image.tobytes()).digest()
            keep[i] = digest not in seen
            seen.add(digest)
        if not keep.all():
            notes.append(f"{part}: {(~keep).sum():,} images are dropped that occur before")
        kept[part] = {key: np.asarray(each)[keep] for key, each in columns[part].items()}
    return kept


# Files of arrays.


def _arrays(files: Sequence[Path], notes: list[str]) -> dict[str, Columns]:
    """Return the arrays of ``.npz`` files by split."""
    if len(files) > 1:
        wrong = [file.name for file in files if split_of(file.stem) is None]
        if wrong:
            raise DataError(
                f"{files[0].parent} has several .npz files; call them train.npz, validation.npz "
                f"and test.npz ({wrong[0]} is none of these), or give one of them"
            )
    found: dict[str, Columns] = {}
    for file in files:
        for key, array in _loaded(file).items():
            part, entry = _entry(key, split_of(file.stem))
            if entry in found.setdefault(part, {}):
                raise DataError(f"{file} has {entry!r} of {part} twice; rename {key!r}")
            found[part][entry] = _with_channels(f"{entry} of {part}", array, notes)
    return found


def _loaded(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as content:
            return dict(content)
    except (OSError, ValueError, EOFError, AttributeError, TypeError) as error:
        why = str(error).split("\n")[0]
        if "allow_pickle" in why:
            why = "it holds Python objects, which may execute any code"
        raise DataError(f"{file} cannot be read as arrays: {why}") from error
    except Exception as error:  # zipfile's own, which is none of the above
        raise DataError(f"{file} cannot be read as arrays: {error}") from error


def _entry(key: str, part: str | None) -> tuple[str, str]:
    """Return the split and the entry that a name stands for: ``x_train`` is x of train."""
    if part is not None:
        return part, key
    words = re.split(r"[_/.\-]", key)
    found = [split_of(word) for word in words]
    part = next((each for each in found if each), None)
    rest = "_".join(word for word, each in zip(words, found, strict=True) if not each)
    return part or "train", rest or key


def _with_channels(what: str, array: np.ndarray, notes: list[str]) -> np.ndarray:
    """Give gray images ``[n, height, width]`` of uint8 an axis of channels."""
    if array.dtype == np.uint8 and array.ndim == 3 and min(array.shape[1:]) >= 8:
        notes.append(f"{what}: uint8 of three axes are taken for gray images, with one channel")
        return array[..., None]
    return array
