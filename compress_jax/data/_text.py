"""Texts: tokens and masks, and splits that no two texts that are alike fall into."""

import dataclasses
import hashlib
import math
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.core.types import Array
from compress_jax.data._data import PARTS, Data
from compress_jax.data._preprocess import Split
from compress_jax.data._tokenizer import Tokenizer, WordPieces
from compress_jax.data._train_tokenizer import train_tokenizer

Labels = Sequence[int] | Sequence[str] | Array
Texts = tuple[Sequence[str], Labels]
"""Texts and their labels."""


class Tokens(NamedTuple):
    """Texts as numbers, all of one length.

    Attributes:
      ids: int32 ``[n, length]``.
      mask: bool ``[n, length]``, false for padding.
      truncated: the rows whose text was longer, ascending.

    Example:
      >>> import compress_jax as cj
      >>> tokenizer = cj.data.train_tokenizer(["so so it it is is"], 20)
      >>> found = cj.data.tokens(["so", "so it is so"], tokenizer, length=4)
      >>> found.mask.sum(1).tolist(), found.truncated.tolist()
      ([3, 4], [1])
    """

    ids: np.ndarray
    mask: np.ndarray
    truncated: np.ndarray


def tokens(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Tokens:
    """Turn texts into numbers, padded and cut to one length.

    A row is the tokenizer's start, the text's first tokens, its end, then padding. What is cut off
    is the end of a text, never the token that ends the row.

    Args:
      texts: n texts.
      tokenizer: from `load_tokenizer` or `train_tokenizer`.
      length: of each row.

    Returns:
      The `Tokens`; ``truncated`` lists the texts that were cut.

    Raises:
      ArgumentError: if there is no room for a token, or what is given are no texts.

    Example:
      >>> import compress_jax as cj
      >>> tokenizer = cj.data.train_tokenizer(["to be or not to be"], 30)
      >>> row = cj.data.tokens(["to be"], tokenizer, length=6).ids[0]
      >>> [tokenizer.pieces[i] for i in row]
      ['[CLS]', 'to', 'be', '[SEP]', '[PAD]', '[PAD]']
    """
    _require_texts("texts", texts)
    room = length - len(tokenizer.start) - len(tokenizer.end)
    whole("length", length, 1)
    if room < 1:
        raise ArgumentError(
            f"length={length} leaves no room for a token: start and end take {length - room}"
        )
    ids = np.full((len(texts), length), tokenizer.pad, np.int32)
    mask = np.zeros((len(texts), length), bool)
    truncated = []
    for i, found in enumerate(tokenizer.encode(texts, room + 1)):
        if len(found) > room:
            truncated.append(i)
        row = [*tokenizer.start, *found[:room], *tokenizer.end]
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Tokens(ids, mask, np.array(truncated, int))


@dataclass(frozen=True, eq=False)
class TextData(Data):
    """Texts as `Data`, with the tokenizer that made numbers of them.

    Attributes:
      tokenizer: for texts that come later.

    Example:
      >>> import compress_jax as cj
      >>> texts = [f"text {i}" for i in range(40)]
      >>> data = cj.data.from_texts(texts, [i % 2 for i in range(40)], length=8)
      >>> cj.data.tokens(["text 5"], data.tokenizer, 8).ids.shape, data.train["tokens"].shape[1:]
      ((1, 8), (8,))
    """

    tokenizer: Tokenizer | None = None


class _Part(NamedTuple):
    """The texts of a split and their labels, int32."""

    texts: list[str]
    labels: np.ndarray

    def kept(self, keep: np.ndarray) -> "_Part":
        rows = np.flatnonzero(keep)
        return _Part([self.texts[i] for i in rows], self.labels[rows])


def from_texts(
    texts: Sequence[str],
    labels: Labels,
    *,
    validation: Texts | None = None,
    test: Texts | None = None,
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    vocabulary: int = 8192,
    lowercase: bool = True,
    near: float | None = 0.6,
    fraction: float = 0.1,
    name: str = "texts",
    names: tuple[str, ...] = (),
) -> TextData:
    """Return data of texts and labels: cleaned, split, tokenized; notes say what was decided.

    Empty texts are dropped, and so are repeats: texts that differ in case and white space alone.
    Without splits of your own, the sha256 of a text says which split it belongs to, so it is the
    same whatever other texts there are; texts that are almost alike go where the first by that hash
    goes. With splits of your own, train loses the texts that are like one of validation or test,
    and validation those like one of test.

    Args:
      texts: n texts, of train or of all.
      labels: n classes: whole numbers from 0, or words, whose alphabetical order numbers them.
      validation: texts and labels; None cuts it from ``texts``.
      test: texts and labels; None cuts it from ``texts``.
      tokenizer: from `load_tokenizer`; by default word pieces are made of the train split alone.
      length: tokens of a row; longer texts are cut, see `tokens`.
      vocabulary: how many pieces to make, if there is no tokenizer.
      lowercase: of the tokenizer that is made.
      near: how alike two texts must be to be kept together, from 0 to 1: the share of their runs of
        three words that both have; None for repeats alone, for sets of millions.
      fraction: the share of ``texts`` that a missing split gets.
      name: of the data set.
      names: of the classes, if labels are numbers.

    Returns:
      The data, with ``tokens`` int32 ``[n, length]``, ``mask`` bool ``[n, length]`` and ``label``
      int32 ``[n]`` in each split.

    Raises:
      DataError: if texts and labels do not fit together, or a split would be empty.

    Example:
      >>> import compress_jax as cj
      >>> texts = [f"number {i} is {'odd' if i % 2 else 'even'}" for i in range(60)]
      >>> data = cj.data.from_texts(texts, ["odd" if i % 2 else "even" for i in range(60)])
      >>> data.names, data.train["tokens"].shape[1], data.classes
      (('even', 'odd'), 128, 2)
    """
    if not 0 < fraction < 0.5:
        raise ArgumentError(f"fraction must be above 0 and below 0.5; got {fraction}")
    given = {"train": (texts, labels), "validation": validation, "test": test}
    parts, names = _numbered({part: each for part, each in given.items() if each}, names)
    notes: list[str] = []
    dropped: dict[str, int] = {}
    parts = {part: _unrepeated(each, dropped, notes) for part, each in parts.items()}
    parts = _separated(parts, near, dropped, notes)
    parts = _cut(parts, near, fraction, notes)
    if tokenizer is None:
        tokenizer = train_tokenizer(parts["train"].texts, vocabulary, lowercase=lowercase)
        notes.append(f"tokenizer: {tokenizer.size:,} word pieces, made of the train split alone")
    splits = {part: _split(part, parts[part], names, tokenizer, length, notes) for part in PARTS}
    arrays = (splits["train"], splits["validation"], splits["test"])
    data = Data.from_arrays(*arrays, name=name, classes=len(names) or None, names=names)
    own = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    own["notes"] = (*notes, *data.notes)
    return TextData(**{**own, "dropped": dropped}, tokenizer=tokenizer)


def _require_texts(what: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str | bytes):
        raise ArgumentError(f"{what} must be a list of texts; one text is [text]")
    wrong = next((each for each in texts if not isinstance(each, str)), None)
    if wrong is not None:
        advice = "; decode bytes first: text.decode()" if isinstance(wrong, bytes) else ""
        raise ArgumentError(f"{what} must be texts, and has a {type(wrong).__name__}{advice}")


# Labels.


def _numbered(
    given: dict[str, Texts], names: tuple[str, ...]
) -> tuple[dict[str, _Part], tuple[str, ...]]:
    """Return each split with labels as numbers, and the names of the classes."""
    labels = {}
    for part, (texts, own) in given.items():
        _require_texts(f"the texts of {part}", texts)
        labels[part] = np.asarray(own)
        if labels[part].shape != (len(texts),):
            raise DataError(
                f"{part} has {len(texts)} texts and labels {list(labels[part].shape)}; give one "
                "label for each text"
            )
    if any(each.dtype.kind in "US" for each in labels.values()):
        found = sorted({str(label) for each in labels.values() for label in each})
        names = names or tuple(found)
        unknown = [label for label in found if label not in names]
        if unknown:
            raise DataError(f"the label {unknown[0]!r} is not among names, {list(names)}")
        number = {label: i for i, label in enumerate(names)}
        labels = {part: np.array([number[str(y)] for y in each]) for part, each in labels.items()}
    for part, each in labels.items():
        if each.dtype.kind not in "biu" or (len(each) and each.min() < 0):
            raise DataError(
                f"labels of {part} must be words, or whole numbers from 0; they are {each.dtype}"
                + (f" from {each.min()}" if each.dtype.kind == "i" else "")
            )
    parts = {p: _Part(list(texts), labels[p].astype(np.int32)) for p, (texts, _) in given.items()}
    return parts, names


# Repeats, and texts that are almost alike.


def _plain(text: str) -> str:
    """Return a text as it is compared: case and white space make no difference."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _digest(text: str) -> str:
    return hashlib.sha256(_plain(text).encode("utf-8", "replace")).hexdigest()


def _unrepeated(part: _Part, dropped: dict[str, int], notes: list[str]) -> _Part:
    """Drop empty texts and repeats; the first of several is kept."""
    first: dict[str, int] = {}
    keep = np.zeros(len(part.texts), bool)
    other = 0
    empty = 0
    for i, text in enumerate(part.texts):
        plain = _plain(text)
        if not plain:
            empty += 1
            continue
        kept = first.setdefault(plain, i)
        keep[i] = kept == i
        other += part.labels[kept] != part.labels[i]
    repeats = len(keep) - int(keep.sum()) - empty
    for reason, count in (("empty", empty), ("duplicate", repeats)):
        dropped[reason] = dropped.get(reason, 0) + count
        if count:
            notes.append(f"{count:,} texts are dropped: {reason}")
    if other:
        notes.append(f"{other:,} of them had another label than the one that was kept")
    return part.kept(keep)


def _groups(texts: list[str], near: float | None) -> np.ndarray:
    """Return the index of the first text that each is alike to; its own where there is none."""
    if near is not None:
        return near_groups(texts, near)
    first: dict[str, int] = {}
    return np.array([first.setdefault(_plain(text), i) for i, text in enumerate(texts)], int)


def _separated(
    parts: dict[str, _Part], near: float | None, dropped: dict[str, int], notes: list[str]
) -> dict[str, _Part]:
    """Drop texts that are like one of a given split that is measured on."""
    order = [part for part in ("test", "validation", "train") if part in parts]
    if len(order) == 1:
        return parts
    texts = [text for part in order for text in parts[part].texts]
    groups = _groups(texts, near)
    found = dict(parts)
    seen: set[int] = set()
    begin = 0
    for part in order:
        own = groups[begin : begin + len(parts[part].texts)]
        begin += len(own)
        keep = np.array([group not in seen for group in own.tolist()], bool)
        seen |= set(own.tolist())
        found[part] = parts[part].kept(keep)
        count = int((~keep).sum())
        if count:
            dropped["in another split"] = dropped.get("in another split", 0) + count
            notes.append(f"{count:,} texts of {part} are dropped: a split measured on has the like")
    return found


def _cut(
    parts: dict[str, _Part], near: float | None, fraction: float, notes: list[str]
) -> dict[str, _Part]:
    """Cut the missing splits from train, by the hash of each group of texts."""
    missing = [part for part in ("test", "validation") if part not in parts]
    if missing:
        train = parts["train"]
        share = _shares(train.texts, _groups(train.texts, near), notes)
        chosen = np.minimum(np.floor(share / fraction).astype(int), len(missing))
        parts = {**parts, "train": train.kept(chosen == len(missing))}
        parts |= {part: train.kept(chosen == i) for i, part in enumerate(missing)}
        notes.append(f"{' and '.join(missing)}: cut from train by the sha256 of each text")
    sizes = {part: len(parts[part].texts) for part in PARTS}
    if 0 in sizes.values():
        raise DataError(
            f"the splits have {sizes} texts, and none may be empty; give more texts, or splits of "
            "your own"
        )
    return parts


def _shares(texts: list[str], groups: np.ndarray, notes: list[str]) -> np.ndarray:
    """Return for each text a number from 0 to 1 that its group has, by the sha256 of one text."""
    least: dict[int, str] = {}
    for text, group in zip(texts, groups.tolist(), strict=True):
        digest = _digest(text)
        least[group] = min(digest, least.get(group, digest))
    sizes = np.bincount(groups)
    alike = int(sizes[sizes > 1].sum())
    if alike:
        notes.append(
            f"{alike:,} texts are like another one, in {int((sizes > 1).sum()):,} groups of at "
            f"most {sizes.max():,}; each group is in one split"
        )
    # Hashed again: the least of several is small, and would bring large groups into one split.
    share = {group: int(_digest(digest)[:13], 16) / 16**13 for group, digest in least.items()}
    return np.array([share[group] for group in groups.tolist()])


# Which texts are almost alike, found without comparing all pairs.

WORDS = 3  # in a row make a shingle
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_WORD = re.compile(r"\w+")


def near_groups(texts: Sequence[str], near: float) -> np.ndarray:
    r"""Put texts that are almost alike into one group.

    Two texts are if :math:`|A \cap B| / |A \cup B| \ge t`, of the sets of their runs of three
    words; and so are two that a chain of such texts joins. All such pairs are found: in the order
    of rarity each set's first :math:`|A| - \lceil t|A| \rceil + 1` members would otherwise have
    none in common.

    Args:
      texts: n texts; upper case and punctuation make no difference.
      near: the threshold t, above 0 and at most 1.

    Returns:
      int ``[n]``: the index of the first text of each one's group.

    Raises:
      ArgumentError: if the threshold is out of range.

    Example:
      >>> near_groups(["one two three four", "One two three four!", "five six"], 0.8).tolist()
      [0, 0, 2]

    References:
      Broder, "On the resemblance and containment of documents", 1997; Bayardo, Ma and Srikant,
      "Scaling up all pairs similarity search", WWW 2007, section 4 (the prefixes).
    """
    if not 0 < near <= 1:
        raise ArgumentError(f"near must be above 0 and at most 1, or None; got {near!r}")
    if not texts:
        return np.zeros(0, int)
    sets = _shingles(texts)
    groups = _Groups(sets, near)
    shared = _sharing(sets, near)
    # Neighbors first: a thousand copies of one text are then one group after a thousand steps.
    for members in shared:
        for a, b in zip(members, members[1:], strict=False):
            groups.compare(a, b)
    for members in shared:
        groups.compare_all(members)
    return np.array([groups.root(i) for i in range(len(texts))])


class _Groups:
    """A union of texts that are found to be alike; the root of a group is its first text."""

    def __init__(self, sets: list[np.ndarray], near: float) -> None:
        self.sets = sets
        self.near = near
        self.parent = [*range(len(sets))]
        self.different: set[tuple[int, int]] = set()

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def compare(self, a: int, b: int) -> None:
        """Join two texts if they are alike and not joined yet."""
        first, second = sorted((self.root(a), self.root(b)))
        if first == second or (a, b) in self.different:
            return
        if _resemblance(self.sets[a], self.sets[b], self.near) >= self.near - 1e-9:
            self.parent[second] = first
        else:
            self.different.add((a, b))

    def compare_all(self, members: list[int]) -> None:
        """Compare all texts of a list that are in different groups."""
        for k, a in enumerate(members):
            if len({self.root(i) for i in members[k:]}) == 1:
                return
            for b in members[k + 1 :]:
                self.compare(a, b)


def _resemblance(a: np.ndarray, b: np.ndarray, near: float) -> float:
    """Return the share of two sets that is common to both; 0 if their sizes rule it out."""
    small, large = sorted((len(a), len(b)))
    if small < near * large - 1e-9:
        return 0.0
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (small + large - common)


def _shingles(texts: Sequence[str]) -> list[np.ndarray]:
    """Return the set of each text's runs of words as sorted hashes, uint64."""
    number: dict[str, int] = {}
    sets = []
    for text in texts:
        words = _WORD.findall(text.lower())
        for word in words:
            if word not in number:
                number[word] = zlib.crc32(word.encode("utf-8", "replace"))
        # Filled up, so that a text of two words has a run too.
        words += [""] * (WORDS - len(words))
        hashes = np.array([number.get(word, 0) for word in words], np.uint64)
        run = np.zeros(len(words) - WORDS + 1, np.uint64)
        for i in range(WORDS):
            run = (run ^ hashes[i : i + len(run)]) * _MULTIPLIER  # modulo 2^64
            run ^= run >> np.uint64(29)
        sets.append(np.unique(run))
    return sets


def _sharing(sets: list[np.ndarray], near: float) -> list[list[int]]:
    """Return lists of texts that share one of the rarest shingles of each, in a fixed order."""
    sizes = np.array([len(each) for each in sets])
    text = np.repeat(np.arange(len(sets)), sizes)
    shingle, number = np.unique(np.concatenate(sets), return_inverse=True)
    frequency = np.bincount(number, minlength=len(shingle))
    order = np.lexsort((number, frequency[number], text))  # by text, then by rarity
    text, number = text[order], number[order]
    place = np.arange(len(text)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    prefix = np.array([n - math.ceil(near * n - 1e-9) + 1 for n in sizes.tolist()])
    kept = (place < prefix[text]) & (frequency[number] > 1)
    text, number = text[kept], number[kept]
    order = np.lexsort((text, number))
    text, number = text[order], number[order]
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    lists = np.split(text, starts[1:])
    # Several shingles may be shared by the same texts.
    return [list(each) for each in dict.fromkeys(tuple(x.tolist()) for x in lists) if len(each) > 1]


# The arrays.


def _split(
    part: str,
    texts: _Part,
    names: tuple[str, ...],
    tokenizer: Tokenizer,
    length: int,
    notes: list[str],
) -> Split:
    """Return the arrays of a split."""
    found = tokens(texts.texts, tokenizer, length)
    cut = len(found.truncated)
    n = len(texts.texts)
    counts = np.bincount(texts.labels).tolist()
    shown = ", ".join(f"{names[i] if names else i}: {k:,}" for i, k in enumerate(counts[:20]))
    notes.append(f"{part}: {n:,} texts ({shown})")
    if cut:
        notes.append(f"{part}: {cut:,} of {n:,} texts are cut to {length} tokens")
    if isinstance(tokenizer, WordPieces):
        unknown = float((found.ids[found.mask] == tokenizer.unknown).mean())
        if unknown > 0.001:
            notes.append(f"{part}: {100 * unknown:.1f} % of the tokens are unknown")
    return {"tokens": found.ids, "mask": found.mask, "label": texts.labels}
