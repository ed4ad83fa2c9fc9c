"""Read and check the four IDX files of MNIST-like data sets."""

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
    """Return the names of the files that a folder lacks.

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

    The checksum is of the decompressed content: Debian's copies have another gzip header than the
    published files.

    Args:
      path: the ``.gz`` file.
      sha256: the hex digest of the decompressed file; None to check only its header.

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
            f"sha256\n  {digest}, expected\n  {sha256}.\nDelete it and fetch it again, or put the "
            "right four files in a folder of their own."
        )
    return _parse(path, content)


def _parse(path: Any, content: bytes) -> np.ndarray:
    """Return the bytes of an IDX file as an array.

    Its header is two zeros, the type (8 for bytes), the rank, and the sizes as big-endian int32.
    """
    rank = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    header = content[4 : 4 + 4 * rank].ljust(4 * rank, b"\0")
    shape = tuple(int(n) for n in np.frombuffer(header, ">i4"))
    if rank == 0 or len(content) != 4 + 4 * rank + int(np.prod(shape)):
        raise DataError(
            f"{path} is not an IDX file of bytes, or is cut short. Delete it and fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
