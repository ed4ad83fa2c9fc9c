"""A digest appended to a StableHLO file; JAX ignores bytes after the program."""

import hashlib

from compress_jax.core.errors import ExportError

MARK = b"compress_jax sha256 "
DIGITS = 64


def sealed(data: bytes) -> bytes:
    """Return a program with the digest of its bytes behind it.

    Example:
      >>> unsealed(sealed(b"program")) == b"program"
      True
    """
    return data + MARK + hashlib.sha256(data).hexdigest().encode()


def unsealed(data: bytes) -> bytes:
    """Return a program without its digest.

    A program without one (an older file, or one that JAX alone wrote) is returned as it is.

    Args:
      data: the file.

    Returns:
      The program.

    Raises:
      ExportError: if the digest is that of other bytes.
    """
    # The seal ends the file: the mark, then 64 hexadecimal digits.
    start = len(data) - len(MARK) - DIGITS
    if start < 0 or data[start : start + len(MARK)] != MARK:
        return data
    program = data[:start]
    digest = data[-DIGITS:]
    if hashlib.sha256(program).hexdigest().encode() != digest:
        raise ExportError("it is damaged: its checksum does not match. Copy or export it again")
    return program
