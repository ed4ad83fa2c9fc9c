"""Read the symbols of packed integers in NumPy, in chunks that bound the memory."""

from collections.abc import Iterator

import numpy as np

# Symbols that are unpacked at once; a multiple of 8, so that a piece begins on a whole byte.
PIECE = 2**20


def unpacked(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the symbols of `Bits` data as int32.

    Args:
      data: uint8 ``[ceil(count * bits / 8)]``.
      bits: the width of a symbol, 1 to 16.
      count: how many.

    Returns:
      int32 ``[count]``.

    Example:
      >>> unpacked(np.array([0x81, 0x9F], np.uint8), 4, 4).tolist()
      [1, 8, 15, 9]
    """
    symbols = np.empty(count, np.int32)
    for start, piece in pieces(data, bits, count):
        symbols[start : start + piece.size] = piece
    return symbols


def pieces(data: np.ndarray, bits: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the symbols of `Bits` data in pieces, each with the index of its first symbol.

    Args:
      data: as of `unpacked`.
      bits: as of `unpacked`.
      count: as of `unpacked`.

    Yields:
      ``(start, int32 symbols)``.
    """
    wide = _wide(bits)
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        piece = data[start * bits // 8 : -(-(start + size) * bits // 8)]
        flags = np.unpackbits(piece, count=size * bits, bitorder="little")
        if bits > 1:
            full = np.zeros((size, wide), np.uint8)  # one bit an entry, the least significant first
            full[:, :bits] = flags.reshape(size, bits)
            flags = np.packbits(full.ravel(), bitorder="little").view(f"<u{wide // 8}")
        yield start, flags.astype(np.int32)


def _wide(bits: int) -> int:
    return 8 if bits <= 8 else 16


def repacked(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Undo `unpacked`.

    Args:
      symbols: integers below ``2**bits``.
      bits: 1 to 16.

    Returns:
      uint8 ``[ceil(n * bits / 8)]``.

    Example:
      >>> repacked(np.array([1, 8, 15, 9]), 4).tolist()
      [129, 159]
    """
    starts = range(0, len(symbols), PIECE)
    packed = [_packed(symbols[start : start + PIECE], bits) for start in starts]
    return np.concatenate(packed or [np.zeros(0, np.uint8)])


def _packed(symbols: np.ndarray, bits: int) -> np.ndarray:
    wide = _wide(bits)
    octets = symbols.astype(f"<u{wide // 8}").view(np.uint8)
    if bits == 1:
        return np.packbits(octets, bitorder="little")
    flags = np.unpackbits(octets, bitorder="little").reshape(-1, wide)  # [symbols, wide]
    return np.packbits(flags[:, :bits].ravel(), bitorder="little")
