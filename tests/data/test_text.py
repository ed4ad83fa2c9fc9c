import hashlib

import numpy as np
import pytest

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data import WordPieces, from_texts, tokens, train_tokenizer
from compress_jax.data._text import near_groups

PARTS = ("train", "validation", "test")


def shingles(text):
    words = text.lower().split()
    words += [""] * (3 - len(words))
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def resemblance(a, b):
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def random_texts(seed, n=60):
    """Texts of few words, and changed copies of some."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        if texts and rng.random() < 0.5:
            words = texts[rng.integers(len(texts))].split()
            words[rng.integers(len(words))] = f"w{rng.integers(99)}"
            if rng.random() < 0.3:
                words.append("more")
        else:
            words = [f"w{k}" for k in rng.integers(0, 12, rng.integers(1, 30))]
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("near", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_those_of_comparing_all_pairs(seed, near):
    texts = random_texts(seed)
    root = list(range(len(texts)))
    for i, a in enumerate(texts):
        for j in range(i):
            if resemblance(a, texts[j]) >= near - 1e-12:
                low, high = sorted((root[i], root[j]))
                root = [low if each == high else each for each in root]
    found = near_groups(texts, near)
    assert found.tolist() == root
    assert 1 < len(set(root)) < len(texts) or near == 0.3  # the case says something


def test_many_copies_are_found_quickly():
    texts = [f"the same words come again and again in every mail number {i}" for i in range(3000)]
    assert len(set(near_groups(texts, 0.6).tolist())) == 1


@pytest.mark.parametrize("near", [0, -1, 1.5])
def test_a_threshold_out_of_range_is_refused(near):
    with pytest.raises(ArgumentError, match="near must be above 0"):
        near_groups(["a"], near)


# Tokens.


@pytest.fixture
def tokenizer():
    return WordPieces(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"))


def test_rows_are_start_text_end_padding(tokenizer):
    found = tokens(["a b", "", "a a b b", "b x a"], tokenizer, 5)
    assert found.ids.tolist() == [
        [2, 4, 5, 3, 0], [2, 3, 0, 0, 0], [2, 4, 4, 5, 3], [2, 5, 1, 4, 3]
    ]  # fmt: skip
    assert found.mask.tolist() == [[True] * k + [False] * (5 - k) for k in (4, 2, 5, 5)]
    assert found.truncated.tolist() == [2]
    assert (found.ids.dtype, found.mask.dtype) == (np.int32, np.bool_)


def test_what_is_no_list_of_texts_is_refused(tokenizer):
    with pytest.raises(ArgumentError, match=r"one text is \[text\]"):
        tokens("a b", tokenizer, 5)
    with pytest.raises(ArgumentError, match="has a bytes; decode"):
        tokens([b"a"], tokenizer, 5)  # pyright: ignore
    with pytest.raises(ArgumentError, match="leaves no room"):
        tokens(["a"], tokenizer, 2)


# Data.


def sentences(n, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{' '.join(f'w{k}' for k in rng.integers(0, 500, 12))}" for _ in range(n)]


def texts_of(data, part):
    return {row.tobytes() for row in getattr(data, part)["tokens"]}


def test_the_vocabulary_is_of_train_alone():
    texts = sentences(300)
    data = from_texts(texts, [0, 1] * 150, length=40)
    assert isinstance(data.tokenizer, WordPieces)
    numbers = {}
    for part in PARTS:
        ids = getattr(data, part)["tokens"]
        numbers[part] = [t for t in texts if tokens([t], data.tokenizer, 40).ids[0].tobytes()
                         in {row.tobytes() for row in ids}]  # fmt: skip
    assert sum(map(len, numbers.values())) == 300
    again = train_tokenizer(numbers["train"], 8192)
    assert data.tokenizer.pieces == again.pieces
    assert data.tokenizer.pieces != train_tokenizer(texts, 8192).pieces


def test_a_text_stays_in_its_split_whatever_comes_with_it():
    texts = sentences(200)
    tokenizer = train_tokenizer(texts, 300)
    few = from_texts(texts[:100], [0, 1] * 50, length=20, tokenizer=tokenizer)
    many = from_texts(texts[::-1], [1, 0] * 100, length=20, tokenizer=tokenizer)
    for part in PARTS:
        assert texts_of(few, part) <= texts_of(many, part)
        share = len(texts_of(many, part)) / 200
        assert abs(share - {"train": 0.8}.get(part, 0.1)) < 0.07


def test_the_split_follows_the_published_rule():
    """sha256 of the sha256 of the plain text, as anyone can compute it."""
    texts = sentences(80)
    tokenizer = train_tokenizer(texts, 300)
    data = from_texts(texts, [0, 1] * 40, length=60, tokenizer=tokenizer)
    for text in texts:
        first = hashlib.sha256(text.encode()).hexdigest()
        share = int(hashlib.sha256(first.encode()).hexdigest()[:13], 16) / 16**13
        part = "test" if share < 0.1 else "validation" if share < 0.2 else "train"
        assert tokens([text], tokenizer, 60).ids[0].tobytes() in texts_of(data, part)


def test_texts_that_are_alike_are_never_in_two_splits():
    base = sentences(120)
    copies = [f"{text} w{i % 7}" for i, text in enumerate(base)]
    upper = [text.upper() for text in base]
    texts = base + copies + upper
    tokenizer = train_tokenizer(base, 300)
    data = from_texts(texts, [0, 1] * 180, length=60, tokenizer=tokenizer)
    assert data.dropped == {"empty": 0, "duplicate": 120}
    assert any("120 texts are dropped: duplicate" in note for note in data.notes)
    assert any(
        "240 texts are like another one, in 120 groups of at most 2" in n for n in data.notes
    )
    for part in PARTS:
        own = texts_of(data, part)
        for a, b in zip(base, copies, strict=True):
            pair = [tokens([text], tokenizer, 60).ids[0].tobytes() in own for text in (a, b)]
            assert pair[0] == pair[1]


def test_large_groups_go_to_every_split_alike():
    """The least hash of a large group is small; it must not decide by itself."""
    texts = []
    for group in range(300):
        words = " ".join(f"g{group}w{k}" for k in range(30))
        texts += [f"{words} {i}" for i in range(6)]
    data = from_texts(texts, [0, 1] * 900, length=8, tokenizer=train_tokenizer(texts[:9], 50))
    assert abs(len(data.test["label"]) / 1800 - 0.1) < 0.05


def test_repeats_with_another_label_are_told():
    texts = [*sentences(40), "one  TWO", "One two", ""]
    data = from_texts(texts, [0, 1] * 20 + [0, 1, 1], length=20)
    assert data.dropped == {"empty": 1, "duplicate": 1}
    assert any("1 of them had another label" in note for note in data.notes)


def test_given_splits_stay_and_train_loses_what_is_like_them():
    base = sentences(60)
    test = ([*base[:5], "something else"], [0, 1, 0, 1, 0, 1])
    validation = ([f"{base[10]} w1", base[20], base[2]], [0, 0, 0])
    tokenizer = train_tokenizer(base, 300)
    data = from_texts(base, [0, 1] * 30, validation=validation, test=test, length=60,
                      tokenizer=tokenizer)  # fmt: skip
    assert len(data.test["label"]) == 6
    assert len(data.validation["label"]) == 2  # base[2] is in test
    assert len(data.train["label"]) == 60 - 5 - 2
    assert data.dropped["in another split"] == 8
    exact = from_texts(base, [0, 1] * 30, validation=validation, test=test, length=60,
                       tokenizer=tokenizer, near=None)  # fmt: skip
    assert len(exact.train["label"]) == 60 - 5 - 1  # base[10] is not the same to the letter


def test_words_as_labels_are_numbered_in_order():
    texts = sentences(40)
    data = from_texts(texts, ["ham", "spam"] * 20, length=20)
    assert (data.names, data.classes) == (("ham", "spam"), 2)
    assert set(np.concatenate([getattr(data, p)["label"] for p in PARTS])) == {0, 1}
    given = from_texts(texts, ["ham", "spam"] * 20, length=20, names=("spam", "ham"))
    assert np.array_equal(given.train["label"], 1 - data.train["label"])


@pytest.mark.parametrize(
    ("texts", "labels", "error", "message"),
    [
        (["a", "b"], [0], DataError, "train has 2 texts and labels"),
        (["a", "b"], [0, -1], DataError, "whole numbers from 0"),
        (["a", "b"], [0.5, 1.0], DataError, "whole numbers from 0; they are float64"),
        (["a", "b"], [0, 1], DataError, "none may be empty"),
        ("ab", [0, 1], ArgumentError, "must be a list of texts"),
        (["a", 3], [0, 1], ArgumentError, "has a int"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(texts, labels, error, message):
    with pytest.raises(error, match=message):
        from_texts(texts, labels, length=8)


def test_a_label_that_has_no_name_is_refused():
    with pytest.raises(DataError, match="'eggs' is not among names"):
        from_texts(sentences(40), ["ham", "eggs"] * 20, names=("ham", "spam"))


def test_truncation_and_unknown_tokens_are_told():
    texts = sentences(60)
    data = from_texts(texts, [0, 1] * 30, length=8, tokenizer=train_tokenizer(texts[:3], 60))
    assert any("texts are cut to 8 tokens" in note for note in data.notes)
    plain = WordPieces(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "w"))
    data = from_texts(texts, [0, 1] * 30, length=8, tokenizer=plain)
    assert any("% of the tokens are unknown" in note for note in data.notes)
