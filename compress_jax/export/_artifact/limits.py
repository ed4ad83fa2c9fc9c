"""Limits on untrusted files: bytes in memory, header, number of arrays, depth."""

from typing import NamedTuple

from compress_jax.core.errors import ArtifactError

FLOOR = 2**29  # bytes of memory that any file may take
FACTOR = 1024  # a larger file may take this many times its size
PARSED = 40  # bytes of Python objects that one byte of JSON becomes at most
LENGTHENED = 120  # and that one byte of a short structure becomes besides


class Limits(NamedTuple):
    """What `load` refuses to go beyond; give larger ones for a file that you trust.

    Attributes:
      header: bytes of JSON: the safetensors header, and the description of a compact file.
      arrays: how many arrays the tree has, those inside packed nodes counted too.
      depth: how deeply containers and nodes may be nested.

    Example:
      >>> Limits(depth=500).arrays
      100000
    """

    header: int = 2**24
    arrays: int = 100_000
    depth: int = 100


class Budget:
    """The memory that a file may take once it is decoded and unpacked.

    Args:
      file_bytes: size of the file.
      max_bytes: the limit; None for 512 MiB or 1,024 times the size of the file, whichever is more.

    Raises:
      ArtifactError: if the file alone is larger.

    Example:
      >>> Budget(1000).max_bytes == 2**29
      True
    """

    def __init__(self, file_bytes: int, max_bytes: int | None = None) -> None:
        """See above."""
        self.max_bytes = max(FLOOR, FACTOR * file_bytes) if max_bytes is None else max_bytes
        self.taken = 0
        self.take(file_bytes, "the file itself")

    def take(self, size: int, what: str) -> None:
        """Count bytes before they are allocated.

        Args:
          size: bytes.
          what: what they are for, in words.

        Raises:
          ArtifactError: if there is no room left.
        """
        self.taken += size
        if self.taken > self.max_bytes:
            raise ArtifactError(
                f"with {what}, memory would grow to {self.taken:,} bytes, and the limit is "
                f"{self.max_bytes:,}; if you trust the file, pass a larger max_bytes"
            )

    def parse(self, size: int, limits: Limits, what: str) -> None:
        """Count the objects that a piece of JSON becomes.

        Args:
          size: bytes of JSON.
          limits: with the largest header.
          what: which piece, in words.

        Raises:
          ArtifactError: if the piece, or what it becomes, is too large.
        """
        if size > limits.header:
            raise ArtifactError(
                f"{what} has {size:,} bytes, and the limit is {limits.header:,}; if you trust the "
                "file, pass limits=export.Limits(header=...)"
            )
        self.take(PARSED * size, what)
