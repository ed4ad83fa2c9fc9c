"""The tensors of an artifact as few bytes: symbols at their entropy, all else by zstandard where that is smaller.

``ans`` holds the symbols of all coded tensors in one stream of little-endian 32-bit words (see `entropy`), ``rest`` the
bytes of all other tensors, one after the other, the bytes of equal significance of each side by side, compressed as a
whole. Both follow the order of the tree. ``index`` has an entry for each tensor: the number of its table if it is coded;
``null`` if it is packed symbols that zstandard makes smaller; else its dtype and shape. ``tables`` are hexadecimal, two
digits a symbol.
"""

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import zstandard

from compress_jax.core.errors import ArtifactError
from compress_jax.export.entropy import Stream, decode, encode, quantized
from compress_jax.export.sharing import cost, share
from compress_jax.export.structure import NATIVE, Tensors, places

BEST, FAST, LARGE = 19, 9, 2**22  # levels of zstandard; the best takes a second for a megabyte
PIECE = 2**20  # symbols that are unpacked at once


class Coded(NamedTuple):
    """What a file holds of its tensors.

    Attributes:
      index: ``{"tensors": [...], "tables": [...], "crc32": of the tensors' bytes}``.
      ans: bytes of all entropy-coded symbols.
      rest: compressed bytes of all else.
    """

    index: dict[str, Any]
    ans: bytes
    rest: bytes


def code(structure: Any, tensors: Tensors) -> Coded:
    """Return the tensors of a tree, coded.

    Args:
      structure: of `structure.encode`; it tells which tensors hold symbols, and their order.
      tensors: by name.

    Returns:
      Index and bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.core.bits import Bits
      >>> from compress_jax.export.structure import encode as structured
      >>> zeros = jnp.zeros(10_000, int).at[::100].set(3)
      >>> tree, tensors = structured({"codes": Bits.pack(zeros, 2), "bias": jnp.ones(3)})
      >>> coded = code(tree, tensors)
      >>> sum(x.nbytes for x in tensors.values()), len(coded.ans) < 150
      (2512, True)
      >>> (uncode(tree, coded)["codes"] == tensors["codes"]).all()
      np.True_
    """
    found = list(places(structure))
    symbols = {name: unpacked(tensors[name], *held) for name, held in found if held}
    kinds = {name: held[0] for name, held in found if held}
    counts = {name: np.bincount(each, minlength=2 ** kinds[name]) for name, each in symbols.items()}
    names = [name for name in symbols if cost(counts[name]) <= len(squeezed(tensors[name].tobytes()))]
    groups = dict(zip(names, share([counts[n] for n in names], [kinds[n] for n in names]), strict=True))
    totals = [np.sum([counts[n] for n in names if groups[n] == g], axis=0) for g in range(len(set(groups.values())))]
    tables = [quantized(total) for total in totals]
    words = encode([Stream(symbols[name], tables[groups[name]]) for name in names])
    others = [(name, held) for name, held in found if name not in groups]
    rest = b"".join(_planes(tensors[name]) for name, _ in others)
    described = {name: None if held else [tensors[name].dtype.name, list(tensors[name].shape)] for name, held in others}
    index = {
        "tensors": [groups.get(name, described.get(name)) for name, _ in found],
        "tables": [table.tobytes().hex() for table in tables],
        "crc32": _sum(tensors[name] for name, _ in found),
    }
    return Coded(index, words.astype("<u4").tobytes(), squeezed(rest))


def uncode(structure: Any, coded: Coded) -> Tensors:
    """Undo `code`.

    Args:
      structure: the same.
      coded: what it returned.

    Returns:
      The tensors by name.

    Raises:
      ArtifactError: if what is decoded is not what was coded, as a coder of another version might do.
    """
    tensors = dict(decoded(structure, coded))
    check(_sum(tensors.values()), coded)
    return tensors


def check(total: int, coded: Coded) -> None:
    """Raise ArtifactError unless the CRC-32 of all decoded bytes is that of what was coded."""
    if total != coded.index["crc32"]:
        raise ArtifactError(
            "the tensors do not decode to what was written, though the file is whole: the installed constriction or numpy "
            "codes otherwise than the one that wrote it; please report both versions"
        )


def decoded(structure: Any, coded: Coded) -> Iterator[tuple[str, np.ndarray]]:
    """Yield one tensor after the other, in the order of the tree; only one is held decoded at a time."""
    tables = [np.frombuffer(bytes.fromhex(table), np.uint8) for table in coded.index["tables"]]
    found = list(zip(places(structure), coded.index["tensors"], strict=True))
    wanted = [(tables[entry], held[1]) for (_, held), entry in found if isinstance(entry, int) and held]
    streams = decode(np.frombuffer(coded.ans, "<u4").astype(np.uint32), wanted)
    rest, start = zstandard.decompress(coded.rest), 0
    for (name, held), entry in found:
        if isinstance(entry, int):
            assert held is not None
            yield name, repacked(next(streams), held[0])
            continue
        dtype, shape = ("uint8", [-(-held[0] * held[1] // 8)]) if held else entry
        if dtype not in NATIVE:
            raise ArtifactError(f"tensor {name!r} has the unknown dtype {dtype!r}")
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        planes = np.frombuffer(rest, np.uint8, size, start).reshape(np.dtype(dtype).itemsize, -1)
        yield name, np.ascontiguousarray(planes.T).view(dtype).reshape(shape)
        start += size


def unpacked(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the symbols of `Bits` data as int32, some at a time, since each passes through an array of its bits.

    Example:
      >>> unpacked(np.array([0x81, 0x9F], np.uint8), 4, 4).tolist()
      [1, 8, 15, 9]
    """
    weights, symbols = 1 << np.arange(bits, dtype=np.int32), np.empty(count, np.int32)
    for start in range(0, count, PIECE):  # a piece begins on a whole byte
        size = min(PIECE, count - start)
        piece = data[start * bits // 8 : -(-(start + size) * bits // 8)]
        flags = np.unpackbits(piece, count=size * bits, bitorder="little").reshape(size, bits)
        symbols[start : start + size] = flags @ weights
    return symbols


def repacked(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Undo `unpacked`.

    Example:
      >>> repacked(np.array([1, 8, 15, 9]), 4).tolist()
      [129, 159]
    """
    places = np.arange(bits, dtype=np.int32)
    pieces = [symbols[start : start + PIECE, None] >> places & 1 for start in range(0, len(symbols), PIECE)]
    return np.concatenate([np.packbits(p.astype(np.uint8).ravel(), bitorder="little") for p in pieces] or [EMPTY])


EMPTY = np.zeros(0, np.uint8)


def squeezed(data: bytes) -> bytes:
    """Return bytes compressed by zstandard."""
    return zstandard.compress(data, BEST if len(data) <= LARGE else FAST)


def _planes(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x.reshape(-1).view(np.uint8).reshape(-1, x.itemsize).T).tobytes()


def _sum(tensors: Any) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(np.ascontiguousarray(tensor).data.cast("B") if tensor.size else b"", total)
    return total
