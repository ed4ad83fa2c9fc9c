"""JSON files written and read by this package: their schema, their digest, their errors.

A *form* says what a value must be: a `Kind` for text and numbers, ``[form]`` for a list,
``{"name": form}`` for an object with these entries (others are allowed), ``mapping(form)`` for one
whose names are free, ``optional(form)`` for null or none.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from compress_jax.core.errors import CompressError
from compress_jax.core.table import printable

DIGEST = "sha256"


class Kind(NamedTuple):
    """A form given by a test: ``words`` says what passes it."""

    words: str
    test: Callable[[Any], bool]


class _Mapping(NamedTuple):
    form: Any


class _Optional(NamedTuple):
    form: Any


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63  # longer ones are no measurement, and no float holds them
    return isinstance(value, float) and math.isfinite(value)


TEXT = Kind("text", lambda value: isinstance(value, str))
NUMBER = Kind("a finite number", _is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind(
    "a whole number, 0 or more",
    lambda value: isinstance(value, int) and _is_number(value) and value >= 0,
)
POSITIVE = Kind("a whole number above 0", lambda value: COUNT.test(value) and value > 0)
ANYTHING = Kind("anything", lambda value: True)


def mapping(form: Any) -> Any:
    """Return the form of an object with any names, whose values have the form given."""
    return _Mapping(form)


def optional(form: Any) -> Any:
    """Return the form of a value that may be null, or not there."""
    return _Optional(form)


def deviation(value: Any, form: Any, at: str = "it") -> str | None:
    """Return how a value departs from a form, or None if it does not.

    Args:
      value: as `json.loads` gives it.
      form: what it should be.
      at: its name.

    Returns:
      A clause that names the first entry that is wrong.

    Example:
      >>> deviation({"rows": [{"nbytes": 3}, {"nbytes": "x"}]}, {"rows": [{"nbytes": COUNT}]})
      "rows[1].nbytes is 'x', not a whole number, 0 or more"
    """
    if isinstance(form, _Optional):
        return None if value is None else deviation(value, form.form, at)
    if isinstance(form, Kind):
        return None if form.test(value) else f"{at} is {_brief(value)}, not {form.words}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{at} is {_brief(value)}, not a list"
        entries = [(f"{at}[{i}]", entry, form[0]) for i, entry in enumerate(value)]
    else:
        if not isinstance(value, dict):
            return f"{at} is {_brief(value)}, not an object"
        entries = _entries(value, form, "" if at == "it" else f"{at}.")
    return next(
        (found for name, entry, own in entries if (found := deviation(entry, own, name))), None
    )


def _entries(value: dict[str, Any], form: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    """Return the entries of an object that its form speaks of: name, value, form."""
    forms = dict.fromkeys(value, form.form) if isinstance(form, _Mapping) else form
    return [(prefix + name, value.get(name), own) for name, own in forms.items()]


def _brief(value: Any) -> str:
    text = "missing" if value is None else printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def sealed(content: dict[str, Any]) -> bytes:
    """Return an object as JSON with a digest of itself as its last entry.

    Args:
      content: what JSON takes; an entry ``sha256`` is replaced.

    Returns:
      The file's bytes.

    Raises:
      ValueError: if it holds what JSON cannot, infinity and NaN included.
    """
    rest = {name: value for name, value in content.items() if name != DIGEST}
    return f"{json.dumps({**rest, DIGEST: _digest(rest)}, indent=1, allow_nan=False)}\n".encode()


def read_record(
    path: str | os.PathLike[str],
    form: Any,
    advice: str,
    error: type[CompressError],
    *,
    intact: bool = True,
) -> dict[str, Any]:
    """Read a JSON file of ours and see that it is what it should be.

    Args:
      path: the file.
      form: of its content.
      advice: what to do if it cannot be used; it ends the sentence.
      error: what is raised then.
      intact: whether a digest in it, if there is one, must match.

    Returns:
      The content.

    Raises:
      CompressError: the ``error`` given, in one sentence: the file, what is wrong with it, the
        advice.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "about.json"
      >>> _ = file.write_bytes(sealed({"k": 3}))
      >>> read_record(file, {"k": COUNT}, "write it again", CompressError)["k"]
      3
      >>> _ = file.write_bytes(file.read_bytes().replace(b"3", b"4", 1))
      >>> read_record(file, {"k": COUNT}, "write it again", CompressError)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.CompressError: .../about.json is damaged: ... other content than was written; write it again
    """
    where = printable(str(path))
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as problem:
        raise error(f"cannot read {where}: {problem.strerror}; {advice}") from problem
    except (ValueError, RecursionError) as problem:  # text that is no UTF-8 is a ValueError too
        raise error(f"{where} is damaged: it is not JSON; {advice}") from problem
    if wrong := deviation(content, form):
        raise error(f"{where} is damaged or was written by another version: {wrong}; {advice}")
    if (
        intact
        and DIGEST in content
        and content[DIGEST] != _digest({n: v for n, v in content.items() if n != DIGEST})
    ):
        raise error(f"{where} is damaged: it has other content than was written; {advice}")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
