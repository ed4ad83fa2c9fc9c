"""Tokenizers: word pieces, as BERT has them, and whatever the `tokenizers` library reads."""

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compress_jax.core.errors import ArgumentError, DataError

PAD = "[PAD]"
UNKNOWN = "[UNK]"
START = "[CLS]"
END = "[SEP]"
MASK = "[MASK]"
SPECIAL = (PAD, UNKNOWN, START, END, MASK)
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")
INNER = "##"  # begins a piece that continues a word
LONGEST = 100  # characters; BERT takes no longer word apart
_ASCII = re.compile(r"[^\s!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")


class Tokenizer(Protocol):
    """What turns texts into numbers and back: `WordPieces`, or anything with these six names."""

    @property
    def size(self) -> int:
        """How many different tokens there are."""
        ...

    @property
    def pad(self) -> int:
        """The number of the token that fills up a row."""
        ...

    @property
    def start(self) -> tuple[int, ...]:
        """The numbers put before each text."""
        ...

    @property
    def end(self) -> tuple[int, ...]:
        """The numbers put after each text."""
        ...

    def encode(
        self, texts: Sequence[str], limit: int | None = None, *, special: bool = False
    ) -> list[list[int]]:
        """Return the numbers of each text, at most ``limit``, without those of start and end.

        The names of special tokens inside a text are text, or with ``special`` those tokens.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of numbers."""
        ...


@dataclass(frozen=True, eq=False)
class WordPieces:
    """BERT's tokenizer: words are cut into the longest pieces that the vocabulary has.

    A text is cut at white space and around punctuation; ideographs stand alone. A piece within a
    word begins with ``##``. A word that cannot be put together is one ``[UNK]``. The names of
    special tokens have no meaning inside a text: ``[SEP]`` there is three words.

    Attributes:
      pieces: the vocabulary; the number of a piece is its place.
      lowercase: whether letters are made small and lose their accents first.

    Example:
      >>> import compress_jax as cj
      >>> pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##able", ".")
      >>> tokenizer = cj.data.WordPieces(pieces)
      >>> tokenizer.encode(["Unable. Stable."]), tokenizer.start, tokenizer.end
      ([[4, 5, 6, 1, 6]], (2,), (3,))

    References:
      Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019; Wu et al.,
      "Google's Neural Machine Translation System", 2016, section 4.1.
    """

    pieces: tuple[str, ...]
    lowercase: bool = True

    def __post_init__(self) -> None:
        """Check that there are special tokens and no piece twice."""
        lacking = [name for name in (PAD, UNKNOWN, START, END) if name not in self._number]
        if lacking:
            raise ArgumentError(f"the vocabulary lacks {lacking}; put these tokens first")
        if len(self._number) < len(self.pieces):
            twice = next(piece for i, piece in enumerate(self.pieces) if self._number[piece] != i)
            raise ArgumentError(f"the vocabulary has {twice!r} twice; each piece needs one number")

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.pieces))

    @functools.cached_property
    def _known(self) -> dict[str, list[int]]:
        return {}  # words that were seen before: most of a text

    @property
    def size(self) -> int:
        """The number of pieces."""
        return len(self.pieces)

    @property
    def pad(self) -> int:
        """The number of ``[PAD]``."""
        return self._number[PAD]

    @property
    def unknown(self) -> int:
        """The number of ``[UNK]``."""
        return self._number[UNKNOWN]

    @property
    def start(self) -> tuple[int, ...]:
        """The number of ``[CLS]``."""
        return (self._number[START],)

    @property
    def end(self) -> tuple[int, ...]:
        """The number of ``[SEP]``."""
        return (self._number[END],)

    def encode(
        self, texts: Sequence[str], limit: int | None = None, *, special: bool = False
    ) -> list[list[int]]:
        """Return the numbers of each text's pieces.

        Args:
          texts: any number.
          limit: of the pieces of a text; the rest of a long text is not looked at.
          special: whether names of special tokens inside a text are those tokens.

        Returns:
          A list for each text, without ``[CLS]`` and ``[SEP]``.
        """
        if special:
            return [self._with_special(text)[:limit] for text in texts]
        return [self._encoded(text, limit) for text in texts]

    def _with_special(self, text: str) -> list[int]:
        numbers: list[int] = []
        for part in _SPECIAL.split(text):
            own = [self._number[part]] if part in self._number and part in SPECIAL else None
            numbers += self._encoded(part, None) if own is None else own
        return numbers

    def _encoded(self, text: str, limit: int | None) -> list[int]:
        numbers: list[int] = []
        for word in words(text, self.lowercase):
            if limit is not None and len(numbers) >= limit:
                break
            found = self._known.get(word)
            if found is None:
                found = self._known[word] = self._cut(word)
            numbers += found
        return numbers[:limit]

    def _cut(self, word: str) -> list[int]:
        """Return the numbers of the longest pieces of a word, from the left."""
        numbers: list[int] = []
        begin = 0
        while begin < len(word) <= LONGEST:
            prefix = INNER if begin else ""
            for end in range(min(len(word), begin + self._longest), begin, -1):
                number = self._number.get(prefix + word[begin:end])
                if number is not None:
                    break
            else:
                return [self.unknown]
            numbers.append(number)
            begin = end
        return numbers or [self.unknown]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of pieces: those within a word are joined, words stand apart.

        Args:
          tokens: numbers of pieces; others, as models with larger tables give, are ``[UNK]``.
        """
        pieces = [self.pieces[i] if 0 <= i < self.size else UNKNOWN for i in tokens]
        return " ".join(pieces).replace(f" {INNER}", "")

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a JSON file, which the `tokenizers` library reads too.

        Args:
          path: the file, usually ``tokenizer.json``; `load_tokenizer` reads it.
        """
        Path(path).write_text(json_of(self) + "\n", encoding="utf-8")


def words(text: str, lowercase: bool = True) -> list[str]:
    """Cut a text into words and punctuation, as BERT does before it looks for pieces.

    Args:
      text: any.
      lowercase: whether letters are made small and lose their accents.

    Returns:
      Words without white space.

    Example:
      >>> words("Don't cafés cost €5?")
      ['don', "'", 't', 'cafes', 'cost', '€5', '?']
    """
    if text.isascii():
        text = text.translate(_CLEAN)
        return _ASCII.findall(text.lower() if lowercase else text)
    text = text.translate(_CLEAN)
    if lowercase:
        text = unicodedata.normalize("NFD", text).translate(_NO_ACCENTS)
        text = text.replace(
            "Σ", "σ"
        ).lower()  # Python alone has another small sigma at a word's end
    return text.translate(_APART).split()


class _Table(dict[int, str]):
    """What becomes of each character, found when it is first met; for `str.translate`."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = self._rule(chr(code))
        return self[code]


def _clean(c: str) -> str:
    if c in "\t\n\r" or unicodedata.category(c)[0] == "Z":
        return " "
    # Code points that this version of Unicode does not know stay, as `tokenizers` has it.
    if c == "\N{REPLACEMENT CHARACTER}" or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return f" {c} " if _is_ideograph(ord(c)) else c


def _is_ideograph(code: int) -> bool:
    blocks = (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF)
    more = (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)
    return any(low <= code <= high for low, high in (*blocks, *more))


def _apart(c: str) -> str:
    symbol = c.isascii() and not c.isalnum() and not c.isspace()
    return f" {c} " if symbol or unicodedata.category(c)[0] == "P" else c


_CLEAN = _Table(_clean)
_NO_ACCENTS = _Table(lambda c: "" if unicodedata.category(c) == "Mn" else c)
_APART = _Table(_apart)


# Files: `tokenizer.json` of the `tokenizers` library, and BERT's `vocab.txt`.


def load_tokenizer(path: str | Path, *, lowercase: bool = True) -> Tokenizer:
    """Read a tokenizer: ``tokenizer.json`` or ``vocab.txt``.

    Word pieces are read without any package. Other kinds (byte-level BPE, Unigram) need the
    `tokenizers` package: ``pip install 'compress_jax[text]'``.

    Args:
      path: the file, or a folder that has it.
      lowercase: of a ``vocab.txt``, which does not say; ``tokenizer.json`` does.

    Returns:
      A `Tokenizer`.

    Raises:
      DataError: if there is no such file, or it cannot be read.

    Example:
      >>> import tempfile
      >>> import compress_jax as cj
      >>> folder = tempfile.mkdtemp()
      >>> file = f"{folder}/tokenizer.json"
      >>> cj.data.train_tokenizer(["to be or not to be"], 20).save(file)
      >>> tokenizer = cj.data.load_tokenizer(folder)
      >>> [tokenizer.pieces[i] for i in tokenizer.encode(["Be to"])[0]]
      ['be', 'to']
    """
    given = Path(path).expanduser()
    candidates = [given / "tokenizer.json", given / "vocab.txt"] if given.is_dir() else [given]
    file = next((each for each in candidates if each.is_file()), None)
    if file is None:
        raise DataError(
            f"there is no tokenizer at {given}; give a tokenizer.json, a vocab.txt, or the folder "
            "of a model that has one"
        )
    if file.suffix == ".txt":
        lines = _text_of(file).splitlines()
        return _word_pieces(file, lines, lowercase)
    return tokenizer_of_json(_text_of(file), file)


def tokenizer_of_json(text: str, file: Path) -> Tokenizer:
    """Return the tokenizer that a ``tokenizer.json`` describes.

    Args:
      text: the JSON.
      file: where it is from, for errors.

    Returns:
      A `Tokenizer`.

    Raises:
      DataError: if it describes none.
    """
    try:
        content = json.loads(text)
        pieces = _pieces_of(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} is no tokenizer.json ({type(error).__name__}: {error})") from error
    if pieces is None:
        return _Library.read(text, file)
    return _word_pieces(file, pieces, content["normalizer"]["lowercase"])


def json_of(tokenizer: Tokenizer) -> str:
    """Return the ``tokenizer.json`` that describes a tokenizer.

    Args:
      tokenizer: as `load_tokenizer` reads it.

    Returns:
      JSON.

    Raises:
      DataError: if it is a tokenizer of another kind.
    """
    if isinstance(tokenizer, WordPieces):
        return json.dumps(_as_json(tokenizer), ensure_ascii=False, indent=1)
    if isinstance(tokenizer, _Library):
        return tokenizer.tokenizer.to_str()
    raise DataError(f"a tokenizer that is a {type(tokenizer).__name__} has no tokenizer.json")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error


def _word_pieces(file: Path, pieces: Sequence[str], lowercase: bool) -> WordPieces:
    try:
        return WordPieces(tuple(pieces), lowercase)
    except ArgumentError as error:
        raise DataError(f"{file} is no vocabulary of word pieces: {error}") from error


def _as_json(tokenizer: WordPieces) -> dict[str, Any]:
    """Return word pieces as the `tokenizers` library writes them."""
    special = [name for name in SPECIAL if name in tokenizer.pieces]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": tokenizer.pieces.index(name), "content": name, **flags, "special": True}
        for name in special
    ]
    around = {
        name: {"id": name, "ids": [tokenizer.pieces.index(name)], "tokens": [name]}
        for name in (START, END)
    }
    start, end = ({"SpecialToken": {"id": name, "type_id": 0}} for name in (START, END))
    first = [start, {"Sequence": {"id": "A", "type_id": 0}}, end]
    second = [{"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": END, "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": tokenizer.lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": around,
        },
        "decoder": {"type": "WordPiece", "prefix": INNER, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": INNER,
            "max_input_chars_per_word": LONGEST,
            "vocab": {piece: i for i, piece in enumerate(tokenizer.pieces)},
        },
    }


def _pieces_of(content: dict[str, Any]) -> list[str] | None:
    """Return the pieces of a ``tokenizer.json``; None for another kind than `WordPieces`."""
    model = content["model"]
    normal = content.get("normalizer") or {}
    lowercase = normal.get("lowercase")
    same = (
        model.get("type", "WordPiece" if "continuing_subword_prefix" in model else "")
        == "WordPiece",
        model.get("continuing_subword_prefix") == INNER,
        model.get("unk_token") == UNKNOWN,
        model.get("max_input_chars_per_word") == LONGEST,
        normal.get("type") == "BertNormalizer",
        normal.get("clean_text") is True,
        normal.get("handle_chinese_chars") is True,
        normal.get("strip_accents") in (None, lowercase),
        (content.get("pre_tokenizer") or {}).get("type") == "BertPreTokenizer",
        _surrounds(content.get("post_processor") or {}),
    )
    if not all(same):
        return None
    vocabulary = dict(model["vocab"])
    for token in content.get("added_tokens", ()):
        vocabulary.setdefault(token["content"], token["id"])
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    return ordered if [vocabulary[piece] for piece in ordered] == [*range(len(ordered))] else None


def _surrounds(processor: dict[str, Any]) -> bool:
    """Return whether ``[CLS]`` is put before each text and ``[SEP]`` after it, and nothing else."""
    if processor.get("type") == "BertProcessing":
        return processor["cls"][0] == START and processor["sep"][0] == END
    parts = processor.get("single", ())
    found = [next(iter(part.values()))["id"] for part in parts]
    return found == [START, "A", END]


@dataclass(frozen=True, eq=False)
class _Library:
    """A tokenizer of the `tokenizers` package, as a `Tokenizer`."""

    tokenizer: Any
    size: int
    pad: int
    start: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def read(cls, text: str, file: Path) -> "_Library":
        """Read the text of a ``tokenizer.json``; the file is for errors."""
        try:
            import tokenizers  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise DataError(
                f"{file} is another kind of tokenizer than word pieces, and is read by the "
                "tokenizers package: pip install 'compress_jax[text]'"
            ) from error
        try:
            made = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises Exception itself
            raise DataError(f"{file} cannot be read by tokenizers: {error}") from error
        made.no_truncation()
        made.no_padding()
        # The names of special tokens inside a text are text.
        made.encode_special_tokens = True
        return cls(made, made.get_vocab_size(), _pad_of(made), *_around(made))

    def encode(
        self, texts: Sequence[str], limit: int | None = None, *, special: bool = False
    ) -> list[list[int]]:
        self.tokenizer.encode_special_tokens = not special
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        self.tokenizer.encode_special_tokens = True
        return [each.ids[:limit] for each in found]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)


def _pad_of(made: Any) -> int:
    """Return the number of the token for padding; 0 where none is named so."""
    names = (PAD, "<pad>", "<|pad|>", "<|endoftext|>")
    found = (made.token_to_id(name) for name in names)
    return next((number for number in found if number is not None), 0)


def _around(made: Any) -> Iterator[tuple[int, ...]]:
    """Yield the numbers put before a text, and those put after it."""
    bare = made.encode("a", add_special_tokens=False).ids
    whole = made.encode("a", add_special_tokens=True).ids
    extra = len(whole) - len(bare)
    before = next((i for i in range(extra + 1) if whole[i : i + len(bare)] == bare), 0)
    yield tuple(whole[:before])
    yield tuple(whole[before + len(bare) :])
