"""Train a vocabulary of word pieces: merge the most frequent pair of neighbors, again and again."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable

from compress_jax.core.arguments import whole
from compress_jax.core.errors import DataError
from compress_jax.data._tokenizer import INNER, LONGEST, SPECIAL, WordPieces, words

Pair = tuple[str, str]
CHARACTERS = 1000  # of the alphabet, at most; ideographs alone would fill a small vocabulary
DISTINCT = 30_000  # words that pairs are counted in: the rest is rare, and takes most of the time


def train_tokenizer(
    texts: Iterable[str], size: int = 8192, *, lowercase: bool = True
) -> WordPieces:
    """Make a vocabulary of word pieces from texts: give it those of the train split alone.

    Words begin as single characters. The pair of neighboring pieces that occurs most often becomes
    a piece, until there are ``size`` pieces or no pair occurs twice. Of pairs that are equally
    frequent the first in the alphabet is taken, so the same texts in any order give the same
    vocabulary. Pairs are counted in the 30,000 most frequent words.

    Args:
      texts: any number.
      size: pieces in all, the five special ones included; fewer where the texts do not give them.
      lowercase: whether letters are made small and lose their accents.

    Returns:
      The tokenizer.

    Raises:
      DataError: if the texts hold no word.

    Example:
      >>> import compress_jax as cj
      >>> tokenizer = cj.data.train_tokenizer(["low lower lowest", "slow"], 15)
      >>> tokenizer.pieces[5:]
      ('##e', '##l', '##o', '##r', '##s', '##t', '##w', 'l', 's', '##ow')

    References:
      Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units", ACL
      2016, section 3.2 (the merges); Devlin et al., NAACL 2019 (the pieces).
    """
    whole("size", size, len(SPECIAL) + 1)
    counts = Counter(word for text in texts for word in words(text, lowercase))
    if not counts:
        raise DataError("the texts hold no word to make a vocabulary of; are they empty?")
    # By frequency, then by alphabet, so that the order of texts changes nothing.
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    alphabet = _alphabet(ordered, size - len(SPECIAL))
    kept = [
        (_characters(word), n)
        for word, n in ordered[:DISTINCT]
        if len(word) <= LONGEST and alphabet.issuperset(_characters(word))
    ]
    merged = _merged(kept, size - len(SPECIAL) - len(alphabet))
    return WordPieces((*SPECIAL, *sorted(alphabet), *merged), lowercase)


def _characters(word: str) -> list[str]:
    """Return a word's characters as pieces."""
    return [word[0], *(INNER + c for c in word[1:])]


def _alphabet(counted: list[tuple[str, int]], room: int) -> set[str]:
    """Return the most frequent single characters, as beginnings and as continuations."""
    found: Counter[str] = Counter()
    for word, n in counted:
        for piece in _characters(word):
            found[piece] += n
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return {piece for piece, _ in ordered[: min(room, CHARACTERS)]}


class _Pairs:
    """How often each pair of neighbors occurs, and in which words."""

    def __init__(self, counted: list[tuple[list[str], int]]) -> None:
        self.spelled = [pieces for pieces, _ in counted]
        self.counts = [n for _, n in counted]
        self.number: Counter[Pair] = Counter()
        self.places: defaultdict[Pair, set[int]] = defaultdict(set)
        for i, pieces in enumerate(self.spelled):
            for pair in zip(pieces, pieces[1:], strict=False):
                self.number[pair] += self.counts[i]
                self.places[pair].add(i)
        self.heap = [(-n, pair) for pair, n in self.number.items() if n > 1]
        heapq.heapify(self.heap)

    def most_frequent(self) -> Pair | None:
        """Return the pair that occurs most often, or None if none occurs twice."""
        while self.heap:
            negative, pair = heapq.heappop(self.heap)
            now = self.number[pair]
            if now == -negative:
                return pair
            if now > 1:  # it has become rarer since it was put here
                heapq.heappush(self.heap, (-now, pair))
        return None

    def merge(self, pair: Pair, piece: str) -> None:
        """Make one piece of a pair wherever it occurs."""
        new: set[Pair] = set()
        for i in self.places.pop(pair):
            old = self.spelled[i]
            joined = _joined(old, pair, piece)
            if len(joined) == len(old):  # an earlier merge has taken the pair apart
                continue
            self.spelled[i] = joined
            for each in zip(old, old[1:], strict=False):
                self.number[each] -= self.counts[i]
            for each in zip(joined, joined[1:], strict=False):
                self.number[each] += self.counts[i]
                if piece in each:
                    self.places[each].add(i)
                    new.add(each)
        # Only pairs with the new piece have become more frequent.
        for each in new:
            if self.number[each] > 1:
                heapq.heappush(self.heap, (-self.number[each], each))


def _joined(pieces: list[str], pair: Pair, piece: str) -> list[str]:
    """Return a word's pieces with each such pair, from the left, made one."""
    first, second = pair
    joined: list[str] = []
    i = 0
    last = len(pieces) - 1
    while i <= last:
        if pieces[i] == first and i < last and pieces[i + 1] == second:
            joined.append(piece)
            i += 2
        else:
            joined.append(pieces[i])
            i += 1
    return joined


def _merged(counted: list[tuple[list[str], int]], room: int) -> list[str]:
    """Return the pieces made of pairs, in the order in which they were made."""
    pairs = _Pairs(counted)
    merged: dict[str, None] = {}
    while len(merged) < room:
        pair = pairs.most_frequent()
        if pair is None:
            break
        piece = pair[0] + pair[1].removeprefix(INNER)
        pairs.merge(pair, piece)
        merged[piece] = None  # two ways of cutting may lead to one piece
    return list(merged)
