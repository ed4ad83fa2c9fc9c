import itertools
import json
import sys
from collections import Counter

import numpy as np
import pytest

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data import WordPieces, load_tokenizer, tokens, train_tokenizer
from compress_jax.data._tokenizer import words

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# fmt: off
PIECES = [
    *SPECIAL, "un", "##aff", "##able", "##ab", "able", "cafe", "caf", "##e", "##é", "é", "don", "'",
    "t", "the", "!", "€", "##5", "日", "本", "語", "ι", "##σ", "##ς", "[", "sep", "]", "a", "##b",
    "##a", "-", "–", "x", "##²", "²", "straße", "strasse", "Un", "UN", "##AB",
]
# What the `tokenizers` library, version 0.23.3, made of these with these pieces: lower case, cased.
REFERENCE = [
    ("Unaffable unable the", [5, 6, 7, 5, 7, 18], [41, 6, 7, 5, 7, 18]),
    ("Caf\xe9 CAF\xc9 cafe\u0301 caf\xe9", [10, 10, 10, 10], [1, 1, 1, 11, 13]),
    ("don't! the-the\u2013the", [15, 16, 17, 19, 18, 34, 18, 35, 18],
     [15, 16, 17, 19, 18, 34, 18, 35, 18]),
    ("\u20ac5 x\xb2 \xb2", [20, 21, 36, 37, 38], [20, 21, 36, 37, 38]),
    ("\u65e5\u672c\u8a9e\u65e5 the", [22, 23, 24, 22, 18], [22, 23, 24, 22, 18]),
    ("\u0399\u03a3 \u03b9\u03c2 \u03b9\u03c3 \u0399\u03a3", [25, 26, 25, 27, 25, 26, 25, 26],
     [1, 25, 27, 25, 26, 1]),
    ("[SEP] [MASK]", [28, 29, 30, 28, 1, 30], [28, 1, 30, 28, 1, 30]),
    ("a\u200bb\x07 \ufeffa\u3000b\u2028a\tb\r\na", [31, 32, 31, 1, 31, 1, 31],
     [31, 32, 31, 1, 31, 1, 31]),
    ("STRASSE stra\xdfe", [40, 39], [1, 39]),
    ("a" * 100, [31] + [33] * 99, [31] + [33] * 99),
    ("ab" * 50 + "a", [1], [1]),
    ("unknownword the", [1, 18], [1, 18]),
    ("", [], []),
    ("UN UNAB Un", [5, 5, 8, 5], [42, 42, 43, 41]),
]
# fmt: on


@pytest.mark.parametrize(("text", "small", "cased"), REFERENCE)
def test_pieces_are_those_of_the_tokenizers_library(text, small, cased):
    assert WordPieces(tuple(PIECES)).encode([text]) == [small]
    assert WordPieces(tuple(PIECES), lowercase=False).encode([text]) == [cased]


def test_a_limit_gives_the_beginning(tmp_path):
    tokenizer = WordPieces(tuple(PIECES))
    for text, whole, _ in REFERENCE:
        for limit in range(len(whole) + 2):
            assert tokenizer.encode([text], limit) == [whole[:limit]]


def test_ascii_and_other_texts_are_cut_alike():
    """The way for ASCII alone is another one than that for all texts."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(map(chr, rng.integers(1, 128, 40)))
        for lowercase in (True, False):
            assert words(text + " ü", lowercase)[:-1] == words(text, lowercase)


def test_a_saved_tokenizer_comes_back_and_so_does_a_vocabulary(tmp_path):
    for lowercase in (True, False):
        tokenizer = WordPieces(tuple(PIECES), lowercase)
        tokenizer.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path)
        assert isinstance(again, WordPieces)
        assert (again.pieces, again.lowercase) == (tokenizer.pieces, lowercase)
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    again = load_tokenizer(tmp_path / "vocab.txt", lowercase=False)
    assert isinstance(again, WordPieces)
    assert (again.pieces, again.lowercase) == (tuple(PIECES), False)


def test_a_tokenizer_of_bert_by_other_hands_is_read(tmp_path):
    WordPieces(tuple(PIECES)).save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    content["truncation"] = {"max_length": 128, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).encode(["unable"]) == [[5, 7]]


@pytest.mark.parametrize(
    "change",
    [
        ("model", {"type": "BPE", "vocab": {}, "merges": []}),
        ("normalizer", None),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("post_processor", None),
    ],
    ids=lambda change: change[0],
)
def test_other_kinds_need_the_library_and_say_so(change, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    WordPieces(tuple(PIECES)).save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, change[0]: change[1]}))
    with pytest.raises(DataError, match=r"pip install 'compress_jax\[text\]'"):
        load_tokenizer(tmp_path)


def test_the_library_reads_what_is_no_word_pieces(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        special_tokens=["<s>", "<pad>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(["to be or not to be"], trainer)
    made.post_processor = library.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made.decoder = library.decoders.ByteLevel()
    made.enable_truncation(4)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == ((0,), (), 1)
    row = tokens(["to be <s> or not"], tokenizer, 30).ids[0]
    assert tokenizer.decode(row[1:].tolist()).startswith("to be <s> or not")
    assert row.tolist().count(0) == 1  # what is called <s> in a text is no token


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no tokenizer.json"),
        ("[]", "is no tokenizer.json"),
        ("{}", "is no tokenizer.json"),
        ('{"model": {}, "normalizer": 3}', "is no tokenizer.json"),
    ],
)
def test_a_damaged_file_is_named(content, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_file_and_a_wrong_vocabulary_are_named(tmp_path):
    with pytest.raises(DataError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="lacks .*PAD"):
        load_tokenizer(tmp_path)
    with pytest.raises(ArgumentError, match="'un' twice"):
        WordPieces((*PIECES, "un"))


# Training.


def brute_force(texts, size, lowercase=True):
    """Count all pairs anew at each step."""
    counts = Counter(word for text in texts for word in words(text, lowercase))
    spelled = {word: [word[0], *("##" + c for c in word[1:])] for word in counts}
    found = sorted({piece for each in spelled.values() for piece in each})
    while len(found) < size - len(SPECIAL):
        pairs = Counter()
        for word, pieces in spelled.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += counts[word]
        best = min(pairs.items(), key=lambda item: (-item[1], item[0]), default=None)
        if best is None or best[1] < 2:
            break
        (a, b), _ = best
        new = a + b.removeprefix("##")
        for pieces in spelled.values():
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == (a, b):
                    pieces[i : i + 2] = [new]
                i += 1
        if new not in found:
            found.append(new)
    return (*SPECIAL, *found)


@pytest.mark.parametrize("seed", range(6))
def test_training_merges_the_most_frequent_pairs(seed):
    rng = np.random.default_rng(seed)
    letters = np.array(list("aab"[: 2 + seed % 2] + "bcAé"[:seed]) or ["a"])
    texts = [
        " ".join("".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(8))
        for _ in range(20)
    ]
    for lowercase in (True, False):
        made = train_tokenizer(texts, 60, lowercase=lowercase)
        assert made.pieces == brute_force(texts, 60, lowercase)


def test_the_order_of_texts_changes_nothing_and_every_seen_word_can_be_written():
    texts = ["the cat sat on the mat", "a dog, the dog!", "9 cats' mats"]
    tokenizer = train_tokenizer(texts, 60)
    assert tokenizer.pieces == train_tokenizer(texts[::-1], 60).pieces
    assert tokenizer.unknown not in sum(tokenizer.encode(texts), [])
    small = train_tokenizer(texts, 9)  # four characters: the others are unknown
    assert small.size == 9 and small.unknown in small.encode(["cat"])[0]


def test_texts_without_words_are_refused():
    with pytest.raises(DataError, match="hold no word"):
        train_tokenizer(["  ", ""])
    with pytest.raises(ArgumentError, match="size"):
        train_tokenizer(["a"], 5)
