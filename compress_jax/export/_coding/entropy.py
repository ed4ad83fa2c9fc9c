"""Entropy coding of small integers: probability tables and one ANS stream for all."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import constriction
import numpy as np

from compress_jax.core.errors import ArtifactError
from compress_jax.export._coding.bitstream import PIECE

CODERS: ModuleType = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]
NEVER = 255  # a table's entry for a symbol that does not occur
# Tables hold information in sixteenths of a bit, which costs at most 2e-4 bits a symbol.
STEPS = 16
ROOTS = 2.0 ** (-np.arange(STEPS) / STEPS)


class Stream(NamedTuple):
    """Symbols that one table describes.

    Attributes:
      symbols: int32 ``[n]``, each below the length of the table.
      table: uint8, see `quantized`.
    """

    symbols: np.ndarray
    table: np.ndarray


def quantized(counts: np.ndarray) -> np.ndarray:
    """Return the table of a histogram: each symbol's information in sixteenths of a bit.

    The probability of symbol s is ``2 ** (-table[s] / 16)``, divided by the sum of all; 254 stands
    for whatever is rarer, 255 for what never occurs.

    Args:
      counts: how often each symbol occurs, ``[symbols]``.

    Returns:
      uint8 ``[symbols]``.

    Example:
      >>> quantized(np.array([4, 2, 0, 2])).tolist()
      [16, 32, 255, 32]
    """
    # The information of what never occurs is infinite: clipped here, replaced at the end.
    with np.errstate(divide="ignore"):
        information = -STEPS * np.log2(counts / max(counts.sum(), 1))
    steps = np.clip(np.round(information), 0, NEVER - 1)
    return np.where(counts > 0, steps, NEVER).astype(np.uint8)


def probabilities(table: np.ndarray) -> np.ndarray:
    """Return the probabilities of a table, float64, the same on every machine.

    They are made of exact powers of two and sixteen constants.

    Example:
      >>> probabilities(np.array([16, 32, 255, 32], np.uint8)).tolist()
      [0.5, 0.25, 0.0, 0.25]
    """
    # 2**(-t / 16) is one of sixteen constants times a power of two, which ldexp multiplies exactly:
    # encoder and decoder must have the very same numbers.
    weights = np.ldexp(ROOTS[table % STEPS], -(table.astype(np.int32) // STEPS))
    weights = np.where(table == NEVER, 0.0, weights)
    return weights / weights.sum()


def encode(streams: Sequence[Stream]) -> np.ndarray:
    """Return all streams as one sequence of words, uint32, to be read from its end.

    The coder is a stack: what is pushed last comes out first, so the last stream is pushed first.

    Args:
      streams: in the order they will be decoded.

    Returns:
      uint32 words.

    Example:
      >>> stream = Stream(np.array([0, 1, 0, 0], np.int32), quantized(np.array([3, 1])))
      >>> list(map(np.ndarray.tolist, decode(encode([stream]), [(stream.table, 4)])))
      [[0, 1, 0, 0]]
    """
    coder = CODERS.stack.AnsCoder()
    for stream in reversed(streams):
        # A stream of one symbol alone needs no words.
        if stream.symbols.size and (stream.table != NEVER).sum() > 1:
            coder.encode_reverse(*_packed(stream))
    return coder.get_compressed()


def decode(words: np.ndarray, wanted: Sequence[tuple[np.ndarray, int]]) -> Iterator[np.ndarray]:
    """Yield the symbols of one stream after the other; nothing is decoded before it is asked for.

    Args:
      words: uint32, from `encode`.
      wanted: the table of each stream and how many symbols it has.

    Yields:
      int32 ``[n]``.

    Raises:
      ArtifactError: if the words are not of `encode`, or are not all needed.
    """
    decoder = Decoder(words)
    for table, size in wanted:
        yield np.concatenate(list(decoder.pieces(table, size)) or [np.zeros(0, np.int32)])
    decoder.close()


class Decoder:
    """Reads the symbols of streams one after the other, a piece at a time.

    Args:
      words: uint32, from `encode`.

    Raises:
      ArtifactError: if the words cannot be of `encode`.
    """

    def __init__(self, words: np.ndarray) -> None:
        """See above."""
        try:
            self._coder = CODERS.stack.AnsCoder(words)
        except ValueError as error:
            raise ArtifactError(f"its coded symbols cannot be decoded: {error}") from error

    def pieces(self, table: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Yield the symbols of the next stream.

        Args:
          table: of the stream; some symbol occurs in it, or the stream is empty.
          size: how many symbols there are.

        Yields:
          int32, `PIECE` of them or what is left.
        """
        used = np.flatnonzero(table != NEVER).astype(np.int32)
        model = _model(table[used]) if used.size > 1 and size else None
        for start in range(0, size, PIECE):
            count = min(PIECE, size - start)
            if model is None:  # one symbol that never changes holds no information
                yield np.full(count, used[0], np.int32)
            else:
                yield used[self._coder.decode(model, count)]

    def close(self) -> None:
        """Check that no words are left.

        Raises:
          ArtifactError: if there are words that no stream needed.
        """
        if not self._coder.is_empty():
            raise ArtifactError(
                "its coded symbols are more than its tensors have: the file was made by hand, or "
                "the installed constriction codes otherwise than the one that wrote it"
            )


def _packed(stream: Stream) -> tuple[np.ndarray, object]:
    """Return the symbols counted among those that occur, and the coder's model of them."""
    used = np.flatnonzero(stream.table != NEVER)  # [symbols that occur]
    rank = np.zeros(stream.table.size, np.int32)
    rank[used] = np.arange(used.size, dtype=np.int32)
    return rank[stream.symbols], _model(stream.table[used])


def _model(table: np.ndarray) -> object:
    return CODERS.model.Categorical(probabilities(table), perfect=False)
