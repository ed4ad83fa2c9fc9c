"""Files are written whole or not at all."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from compress_jax.core.errors import ArtifactError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: write a temporary file, sync it to disk, then rename it.

    Args:
      path: the file; its directory is made.
      data: its content.

    Raises:
      ArtifactError: if the disk is full or not writable; what was there before is unchanged.

    Example:
      >>> file = Path(tempfile.mkdtemp()) / "results.json"
      >>> write_atomically(file, b"{}")
      >>> file.read_bytes()
      b'{}'
    """
    with replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, nbytes: int) -> Iterator[Path]:
    """Give a temporary file to write, which then takes the place of a file.

    Args:
      path: the file; its directory is made.
      nbytes: about as many bytes will be written, for the error.

    Yields:
      The temporary file, empty.

    Raises:
      ArtifactError: if the disk is full or not writable; what was there before is unchanged.
    """
    temporary = None
    # In the same directory, for a rename across file systems is a copy and not atomic. The content
    # is on the disk before the name points to it, so that a power failure leaves either file whole.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            yield temporary
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # temporary files are made for their owner alone
        temporary.replace(path)
    except OSError as error:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise ArtifactError(f"cannot write {path} ({nbytes:,} bytes): {why}{kept}") from error
    finally:
        # After the rename there is nothing left to remove.
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
