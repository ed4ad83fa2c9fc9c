"""Context-adaptive coding of the symbols of one tensor after the other: no table is stored.

A tensor is a matrix, its last axis the columns (an array of one axis is one row), which is read row
by row; what is already read predicts what comes. A symbol is ``center`` plus or minus a magnitude.
The magnitude that is expected of an entry is that of its column so far, times what its row so far
has been against its columns. Entries of equal expectation, to a quarter of an octave, form a class,
and each class counts its magnitudes.

The format: all numbers are integers, in units of 1/4096 where they stand for others; ``//`` rounds
down. A file has ``[center, order, mean]`` for a tensor: if ``order`` is odd the columns are read as
rows, if it is 2 or 3 the symbols lie on a path; M = MEANS[mean].

Columns
    begin with s = 16 M and r = 16 * 4096. A column is expected to have c = s * 4096 // r.
Rows
    begin with a = b = 8 M and f = 4096. An entry is expected to have e = c * f // 4096, and its
    class is the number of EDGES at or below e. After a piece of the row, a grows by 4096 times its
    magnitudes, b by the c of its columns, and f becomes a * 4096 // b, but 64 at least and 2**18 at
    most. After the row, s grows by 4096 times the column's magnitude and r by f; where r exceeds
    2**22 then, both are halved.
Pieces
    have L = max(32, ceil(n / 4096)) entries of one row, or what is left of it. If L is two rows or
    more, a piece is L // columns whole rows; then f is 4096, and r grows by 4096 for each. Rows of
    more than 2**18 columns are cut: the entries in their order, 2**18 a row.
In a piece
    the magnitudes of one class after the other are coded, ascending, each class by its counts
    before the piece; then the signs (1 is below the center) of the magnitudes above 0 that lie
    within the range on both sides. Then the counts grow: those of a class by 4096 for each of its
    symbols, those of the two classes beside it by 1024, those of the signs by 4096.
Counts
    of a class with the mean m, one of MEANS: t = 2**36 * 4096 // (4096 + m) for the magnitude 0 and
    t * m // (4096 + m) for each next one, of the t before; the count is (t >> 20) + 4. The class is
    a geometric law that weighs as 16 symbols. Both signs begin with 16 * 4096. Magnitudes go up to
    the farther end of the range.

Paths
    are those of `quantize.trellis`, one down each column: q = 2 k - g sign(k) with the grid
    g = state // 2 of the column, whose state is 0 at first and NEXT[state][k % 2] in the next row.
    Then all above is of |k|, not of |q| (but for which signs are known), each class is two, one for
    each grid, and a piece is never more than a row. ``center`` is ``2**(bits - 1)``.

Probabilities are the counts over their sum, in float64, and the coder is the range coder of
constriction (``Categorical(probabilities, perfect=False)``), one queue of 32-bit words for all
tensors in the order of the tree. A quotient of two integers is the same on every machine, bit for
bit, and so is all before it.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import constriction
import numpy as np

from compress_jax.core.errors import ArgumentError, ArtifactError

QUEUE: Any = constriction.stream.queue  # pyright: ignore[reportAttributeAccessIssue]
MODELS: Any = constriction.stream.model  # pyright: ignore[reportAttributeAccessIssue]

WIDTH = 8  # bits of a symbol at most
WIDEST = 2**18  # columns at most; of longer rows, so many entries are a row
LEAST = 32  # entries of a piece at least
PIECES = 2**12  # of a tensor, about, at most: of large tensors the pieces are longer
DENSITY = 256  # symbols a byte at most, and SPARE more, so that no file takes long for its size
SPARE = 2**16
SAMPLE = 2**18  # entries from which settings are chosen

FRACTION = 12
ONE = 2**FRACTION
QUARTERS = (4096, 4871, 5793, 6889)  # 2**(i / 4), in units of 1 / ONE
MIDDLES = (4467, 5312, 6317, 7512)  # 2**(i / 4 + 1 / 8)
LOWEST, HIGHEST = -6, 8  # octaves
OCTAVES = range(LOWEST, HIGHEST)
EDGES = np.array([edge * 2 ** (o - LOWEST) >> -LOWEST for o in OCTAVES for edge in QUARTERS])
# The mean of each class; below the lowest edge there is one class more.
MEANS = [ONE >> -LOWEST, *(m * 2 ** (o - LOWEST) >> -LOWEST for o in OCTAVES for m in MIDDLES)]
CLASSES = len(MEANS)
PRIOR = 16  # symbols, of a class and of a column
ROW_PRIOR = 8  # symbols, of a row
MEMORY = 2**10 * ONE  # rows after which a column's sums are halved
BESIDE = ONE // 4  # what a symbol counts for the classes beside its own
RATIO = 2**6  # between a row and its columns, at most and at least
NEXT = np.array(((0, 2), (2, 0), (1, 3), (3, 1)))  # of a path: state, parity -> next state
ROWS = 2**14  # of a tensor of paths, at most


class Settings(NamedTuple):
    """What a file says of an adaptively coded tensor.

    Attributes:
      center: the symbol of magnitude 0.
      transposed: whether its columns are read as rows.
      mean: the class of the mean magnitude.
      paths: whether its columns, as they are read, are paths of a trellis.
    """

    center: int
    transposed: bool
    mean: int
    paths: bool = False

    @property
    def entry(self) -> list[int]:
        """What stands in a file."""
        return [self.center, self.transposed + 2 * self.paths, self.mean]


class Tensor(NamedTuple):
    """Symbols to be coded.

    Attributes:
      symbols: integers ``[n]`` below ``2**bits``.
      bits: of a symbol, 1 to `WIDTH`.
      shape: of the tensor, n entries.
      settings: how they are coded.
    """

    symbols: np.ndarray
    bits: int
    shape: tuple[int, ...]
    settings: Settings


def choose(symbols: np.ndarray, bits: int, shape: tuple[int, ...]) -> tuple[Settings, float]:
    """Return the settings that code symbols in the fewest bytes, and these bytes.

    Args:
      symbols: as of `Tensor`.
      bits: as of `Tensor`.
      shape: as of `Tensor`.

    Returns:
      ``(settings, bytes)``; the coder itself adds some bytes for all tensors together.

    Example:
      >>> symbols = np.array([8, 8, 9, 7] * 100)
      >>> choose(symbols, 4, (20, 20))[0].center
      8
    """
    counts = np.bincount(symbols, minlength=2**bits)
    levels = np.arange(counts.size)
    # The first rows of a large tensor tell which of the settings are best.
    rows, columns = _matrix(shape)
    first = (max(1, min(rows, SAMPLE // max(columns, 1))), columns)
    sample = symbols[: math.prod(first)]
    found = []
    for center in sorted({int(counts.argmax()), 2 ** (bits - 1), 0}):
        mean = int(counts @ np.abs(levels - center)) * ONE // max(symbols.size, 1)
        for transposed, paths in itertools.product((False, True), repeat=2):
            kind = int(np.searchsorted(EDGES, mean // (2 if paths else 1), "right"))
            each = Tensor(sample, bits, first, Settings(center, transposed, kind, paths))
            fits = allowed(each.settings, bits, shape) and allowed(each.settings, bits, first)
            if fits and (known := _split(each)):
                found.append((_bytes(each, *known), each.settings))
    least, settings = min(found)
    if sample.size < symbols.size:
        whole = Tensor(symbols, bits, shape, settings)
        if settings.paths and not _split(whole):  # only the first rows happen to be paths
            settings = settings._replace(paths=False)
        least = cost(whole._replace(settings=settings))
    return settings, least


def settings_of(entry: object) -> Settings | None:
    """Return settings as a file has them, ``[center, order, mean]``; None if they are none.

    Example:
      >>> settings_of([8, 3, 20]), settings_of([8, True, 20])
      (Settings(center=8, transposed=True, mean=20, paths=True), None)
    """
    # type, not isinstance: true is an integer to Python.
    if not isinstance(entry, list) or [type(x) for x in entry] != [int] * 3:
        return None
    center, order, mean = entry
    return Settings(center, order % 2 == 1, mean, order >= 2) if 0 <= order < 4 else None


def dense(symbols: int, nbytes: float) -> bool:
    """Tell whether so many bytes may hold so many symbols: reading takes time for each symbol.

    Example:
      >>> dense(10**6, 10**4), dense(10**7, 10**4)
      (True, False)
    """
    return symbols <= DENSITY * nbytes + SPARE


def allowed(settings: Settings, bits: int, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor can be coded so.

    Example:
      >>> allowed(Settings(8, True, 20), 4, (20, 20)), allowed(Settings(8, True, 20), 4, (400,))
      (True, False)
    """
    if not (1 <= bits <= WIDTH and 0 <= settings.center < 2**bits and 0 <= settings.mean < CLASSES):
        return False
    rows, columns = _matrix(shape)
    if settings.transposed:
        if rows == 1 or rows > WIDEST or columns > WIDEST:
            return False
        rows, columns = columns, rows
    if not settings.paths:
        return True
    # A row at a time: many of them would take long.
    middle = bits > 1 and settings.center == 2 ** (bits - 1)
    return middle and 1 < rows <= ROWS and columns <= WIDEST


def cost(tensor: Tensor) -> float:
    """Return the bytes of a tensor."""
    return _bytes(tensor, *_known(tensor))


def _bytes(tensor: Tensor, sizes: np.ndarray, below: np.ndarray) -> float:
    estimate = _Estimate(sizes, below)
    _walk(tensor.bits, tensor.shape, tensor.settings, estimate)
    return estimate.bits / 8


def encode(tensors: Sequence[Tensor]) -> np.ndarray:
    """Return the symbols of all tensors as one sequence of words, uint32.

    Example:
      >>> symbols = np.array([8, 8, 9, 7] * 100)
      >>> settings, _ = choose(symbols, 4, (20, 20))
      >>> words = encode([Tensor(symbols, 4, (20, 20), settings)])
      >>> decoder = Decoder(words)
      >>> (decoder.symbols(4, (20, 20), settings) == symbols).all(), decoder.close()
      (np.True_, None)
    """
    encoder = QUEUE.RangeEncoder()
    for each in tensors:
        _walk(each.bits, each.shape, each.settings, _Writer(*_known(each), encoder))
    return encoder.get_compressed()


class Decoder:
    """Reads one tensor after the other.

    Args:
      words: uint32, from `encode`, or anything else.
    """

    def __init__(self, words: np.ndarray) -> None:
        """See above."""
        self._coder = QUEUE.RangeDecoder(words)

    def symbols(self, bits: int, shape: tuple[int, ...], settings: Settings) -> np.ndarray:
        """Return the symbols of the next tensor.

        Args:
          bits: as of `Tensor`.
          shape: as of `Tensor`.
          settings: that `allowed` has found right.

        Returns:
          uint8 ``[n]``.

        Raises:
          ArtifactError: if the words are not of `encode`.
        """
        symbols = np.zeros(math.prod(shape), np.uint8)
        reader = _Reader(self._coder, symbols, bits, settings.center)
        try:
            _walk(bits, shape, settings, reader)
        except AssertionError as error:  # constriction's, of words that no encoder writes
            raise ArtifactError(f"its coded symbols cannot be decoded: {error}") from error
        if not settings.transposed:
            return symbols
        rows, columns = _matrix(shape)
        return symbols.reshape(columns, rows).T.ravel()

    def close(self) -> None:
        """Check that no words are left.

        Raises:
          ArtifactError: if there are.
        """
        if not self._coder.maybe_exhausted():
            raise ArtifactError("its adaptively coded symbols are more than its tensors have")


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns: the last axis, and all before it; an array of one axis is a row."""
    columns = shape[-1] if shape else 1
    return math.prod(shape[:-1]), columns


def _known(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return what is coded of a tensor: magnitudes, and which symbols lie below the center."""
    known = _split(tensor)
    if known is None:
        raise ArgumentError("the symbols lie on no paths of a trellis")
    return known


def _split(tensor: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the same, None if the symbols are to be paths and are none."""
    levels = tensor.symbols.astype(np.int64) - tensor.settings.center
    levels = levels.reshape(_matrix(tensor.shape))
    levels = levels.T if tensor.settings.transposed else levels
    sizes = np.abs(levels)
    if tensor.settings.paths:
        sizes = _indices(sizes)
    return None if sizes is None else (sizes.ravel(), (levels < 0).ravel())


def _indices(sizes: np.ndarray) -> np.ndarray | None:
    """Return the |k| of paths from their |q|, ``[rows, columns]``; None if they are no paths."""
    found = np.zeros_like(sizes)
    states = np.zeros(sizes.shape[1], np.int64)
    for i, row in enumerate(sizes):
        grid = (states >> 1) * (row > 0)
        if ((row + grid) & 1).any():
            return None
        found[i] = (row + grid) >> 1
        states = NEXT[states, found[i] & 1]
    return found


class _Counts:
    """The counts of a tensor.

    Attributes:
      tables: int64 ``[grids * (classes + 2), magnitudes]``; of each grid the first and the last are
        never read.
      totals: their sums.
      signs: int64 ``[2]``, of symbols above and below the center.
    """

    def __init__(self, longest: int, grids: int) -> None:
        self.tables = np.tile(_priors(longest), (grids, 1))
        self.totals = self.tables.sum(1)
        self.signs = np.full(2, PRIOR * ONE)

    def add(self, classes: np.ndarray, magnitudes: np.ndarray) -> None:
        for offset, weight in ((0, ONE), (1, BESIDE), (-1, BESIDE)):
            np.add.at(self.tables, (classes + offset, magnitudes), weight)
            np.add.at(self.totals, classes + offset, weight)

    def model(self, which: int) -> object:
        return _model(self.tables[which])


@functools.lru_cache(maxsize=16)
def _priors(longest: int) -> np.ndarray:
    """Return the first counts of every class: a geometric law, and a little for what is rare."""
    tables = np.zeros((CLASSES + 2, longest + 1), np.int64)
    for which, mean in enumerate(MEANS, start=1):
        term = PRIOR * ONE * 2**20 * ONE // (ONE + mean)  # with 20 bits more
        for k in range(longest + 1):
            tables[which, k] = (term >> 20) + 4
            term = term * mean // (ONE + mean)
    return tables


def _model(counts: np.ndarray) -> object:
    # Sums and quotients of integers below 2**53 are the same on every machine.
    return MODELS.Categorical(counts / counts.sum(), perfect=False)


class _Visitor(Protocol):
    """What is done with the entries of a piece: they are counted, written or read."""

    def magnitudes(self, start: int, classes: np.ndarray, counts: _Counts) -> np.ndarray: ...

    def signs(
        self, start: int, magnitudes: np.ndarray, both: np.ndarray, counts: _Counts
    ) -> np.ndarray: ...


def _walk(bits: int, shape: tuple[int, ...], settings: Settings, visitor: _Visitor) -> None:
    """Visit the pieces of a tensor in their order, and count what they hold."""
    rows, columns = _matrix(shape)
    if settings.transposed:
        rows, columns = columns, rows
    n, columns = rows * columns, max(1, min(columns, WIDEST))
    size = max(LEAST, -(-n // PIECES))
    code = _Coding(bits, columns, settings, visitor)
    expected = _Columns(columns, MEANS[settings.mean])
    most = 1 if settings.paths else max(1, size // columns)
    for start, height, width in _bands(n, columns, most):
        if height == 1:
            expected.row(start, width, size, code)
        else:
            expected.band(start, height, code)


class _Coding:
    """Codes piece after piece: magnitudes, signs, then what they count for the pieces to come."""

    def __init__(self, bits: int, columns: int, settings: Settings, visitor: _Visitor) -> None:
        top = 2**bits - 1 - settings.center
        longest = max(settings.center, top)
        # The index of a path is half a level, rounded up.
        longest = (longest + 1) // 2 if settings.paths else longest
        self.least = min(settings.center, top)
        self.counts = _Counts(longest, grids=2 if settings.paths else 1)
        self.visitor = visitor
        self.paths = settings.paths
        self.states = np.zeros(columns, np.int64)

    def __call__(self, start: int, classes: np.ndarray) -> np.ndarray:
        """Code the entries from one on, given their classes, and return their magnitudes."""
        first = start % self.states.size
        own = self.states[first : first + classes.size] if self.paths else np.zeros(1, np.int64)
        grid = own >> 1
        classes = classes + grid * (CLASSES + 2)
        found = self.visitor.magnitudes(start, classes, self.counts)
        sizes = 2 * found - grid * (found > 0) if self.paths else found
        # Beyond the nearer end of the range, the sign is known.
        both = np.flatnonzero((sizes > 0) & (sizes <= self.least))
        below = self.visitor.signs(start, sizes, both, self.counts)
        negative = int(below[both].sum())
        self.counts.signs += ONE * np.array([both.size - negative, negative])
        self.counts.add(classes, found)
        if self.paths:
            self.states[first : first + classes.size] = NEXT[own, found & 1]
        return found


def _bands(n: int, columns: int, height: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first entry, the rows and the columns of what is read between two updates."""
    full = n // columns
    for row in range(0, full, height):
        yield row * columns, min(height, full - row), columns
    if n % columns:
        yield full * columns, 1, n % columns


class _Columns:
    """What is expected of each column, and the sums behind it."""

    def __init__(self, columns: int, mean: int) -> None:
        self.mean = mean
        self.sums = np.full(columns, PRIOR * mean)
        self.rows = np.full(columns, PRIOR * ONE)

    def expected(self, width: int) -> np.ndarray:
        return self.sums[:width] * ONE // self.rows[:width]

    def row(self, start: int, width: int, size: int, code: Any) -> None:
        """Code one row, a piece at a time."""
        columns = self.expected(width)
        found, predicted = ROW_PRIOR * self.mean, ROW_PRIOR * self.mean
        factor = ONE
        for first in range(0, width, size):
            own = columns[first : first + size]
            magnitudes = code(start + first, _classes(own * factor // ONE))
            self.sums[first : first + own.size] += ONE * magnitudes
            # Python's integers: these sums may exceed 64 bits.
            found += ONE * int(magnitudes.sum())
            predicted += int(own.sum())
            factor = min(max(found * ONE // predicted, ONE // RATIO), ONE * RATIO)
        self.count(width, factor)

    def band(self, start: int, height: int, code: Any) -> None:
        """Code several rows at once."""
        classes = _classes(self.expected(self.sums.size))
        magnitudes = code(start, np.tile(classes, height)).reshape(height, -1)
        self.sums += ONE * magnitudes.sum(0)
        self.count(self.sums.size, ONE * height)

    def count(self, width: int, rows: int) -> None:
        self.rows[:width] += rows
        old = self.rows > MEMORY
        self.rows[old] //= 2
        self.sums[old] //= 2


def _classes(expected: np.ndarray) -> np.ndarray:
    """Return the class of each entry, as rows of `_Counts` number them."""
    return np.searchsorted(EDGES, expected, "right") + 1


def _groups(classes: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each class in a piece, ascending, and the places of its entries."""
    order = np.argsort(classes, kind="stable")
    ends = np.flatnonzero(np.diff(classes[order])) + 1
    for places in np.split(order, ends):
        yield int(classes[places[0]]), places


class _Estimate:
    """Sums the bits of known symbols."""

    def __init__(self, sizes: np.ndarray, below: np.ndarray) -> None:
        self.sizes = sizes
        self.below = below
        self.bits = 0.0

    def magnitudes(self, start: int, classes: np.ndarray, counts: _Counts) -> np.ndarray:
        found = self.sizes[start : start + classes.size]
        self.bits += float(np.log2(counts.totals[classes]).sum())
        self.bits -= float(np.log2(counts.tables[classes, found]).sum())
        return found

    def signs(
        self, start: int, magnitudes: np.ndarray, both: np.ndarray, counts: _Counts
    ) -> np.ndarray:
        below = self.below[start : start + magnitudes.size]
        negative = int(below[both].sum())
        each = np.log2(counts.signs.sum() / counts.signs)  # bits of a sign: [2]
        self.bits += float(each @ [both.size - negative, negative])
        return below


class _Writer:
    """Encodes known symbols."""

    def __init__(self, sizes: np.ndarray, below: np.ndarray, encoder: Any) -> None:
        self.sizes = sizes.astype(np.int32)
        self.below = below
        self.encoder = encoder

    def magnitudes(self, start: int, classes: np.ndarray, counts: _Counts) -> np.ndarray:
        found = self.sizes[start : start + classes.size]
        for which, places in _groups(classes):
            self.encoder.encode(found[places], counts.model(which))
        return found

    def signs(
        self, start: int, magnitudes: np.ndarray, both: np.ndarray, counts: _Counts
    ) -> np.ndarray:
        below = self.below[start : start + magnitudes.size]
        self.encoder.encode(below[both].astype(np.int32), _model(counts.signs))
        return below


class _Reader:
    """Decodes symbols into an array."""

    def __init__(self, decoder: Any, symbols: np.ndarray, bits: int, center: int) -> None:
        self.decoder = decoder
        self.symbols = symbols
        self.center = center
        self.top = 2**bits - 1 - center  # the largest magnitude above the center

    def magnitudes(self, start: int, classes: np.ndarray, counts: _Counts) -> np.ndarray:
        found = np.zeros(classes.size, np.int32)
        for which, places in _groups(classes):
            found[places] = self.decoder.decode(counts.model(which), places.size)
        return found

    def signs(
        self, start: int, magnitudes: np.ndarray, both: np.ndarray, counts: _Counts
    ) -> np.ndarray:
        below = magnitudes > self.top
        below[both] = self.decoder.decode(_model(counts.signs), both.size) == 1
        own = np.where(below, self.center - magnitudes, self.center + magnitudes)
        self.symbols[start : start + magnitudes.size] = own
        return below
