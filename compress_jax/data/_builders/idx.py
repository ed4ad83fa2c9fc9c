"""Reading and checking the four IDX files in which MNIST and its relatives are published."""

import gzip
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from compress_jax.core.errors import DataError


def file_name(part: str, kind: str) -> str:
    """Return the published name of a file.

    Args:
      part: ``"train"`` or ``"t10k"``.
      kind: ``"images"`` or ``"labels"``.

    Returns:
      The name.

    Example:
      >>> file_name("t10k", "labels")
      't10k-labels-idx1-ubyte.gz'
    """
    return f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz"


FILES = tuple(file_name(part, kind) for part in ("train", "t10k") for kind in ("images", "labels"))


def missing(folder: Path) -> list[str]:
    """Return which of the four files are not in ``folder``.

    Args:
      folder: any path; it need not exist.

    Returns:
      Names, in the order of `FILES`.

    Example:
      >>> len(missing(Path("/nowhere")))
      4
    """
    return [name for name in FILES if not (folder / name).is_file()]


def read(path: Any, sha256: str | None = None) -> np.ndarray:
    """Read one gzipped IDX file of bytes.

    The checksum is of the content, not of the gzip file: Debian's copies differ from upstream's in
    the gzip header only.

    Args:
      path: the ``.gz`` file.
      sha256: hex digest that the decompressed file must have; None: only its header is checked.

    Returns:
      uint8 ``[n, height, width]`` of images or ``[n]`` of labels.

    Raises:
      DataError: if the file is not gzip, is cut short, or has another content than expected.
    """
    try:
        content = gzip.decompress(Path(path).read_bytes())
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as gzip ({error}). Delete it and fetch it again."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise DataError(
            f"{path} is damaged or belongs to another data set: its decompressed content has "
            f"sha256\n  {digest}, expected"
            f"\n  {sha256}.\nDelete it and fetch it again, or put the right four files in a "
            "folder of their own."
        )
    return _parse(path, content)


def _parse(path: Any, content: bytes) -> np.ndarray:
    """Split an IDX file into its header (two zeros, type 8, rank, then the sizes as big-endian int32) and its bytes."""
    rank = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    shape = tuple(
        int(n) for n in np.frombuffer(content[4 : 4 + 4 * rank].ljust(4 * rank, b"\0"), ">i4")
    )
    if rank == 0 or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise DataError(
            f"{path} is not an IDX file of bytes, or is cut short. Delete it and fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
