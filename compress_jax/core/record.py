"""JSON files written and read by this package: their schema, their digest, their errors.

A schema is a `Kind` for text and numbers, ``[schema]`` for a list, ``{"name": schema}`` for an
object with these entries (others are allowed), ``mapping(schema)`` for an object with any names,
``optional(schema)`` for a value that may be null or missing.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeGuard

from compress_jax.core.errors import CompressError
from compress_jax.core.table import printable
from compress_jax.core.types import JsonObject

DIGEST = "sha256"

Schema: TypeAlias = "Kind | _Mapping | _Optional | Sequence[Schema] | Mapping[str, Schema]"


class Kind(NamedTuple):
    """A schema given by a test.

    Attributes:
      words: what passes the test, after "not".
      test: of a parsed value.
    """

    words: str
    test: Callable[[object], bool]


class _Mapping(NamedTuple):
    schema: Schema


class _Optional(NamedTuple):
    schema: Schema


def _is_number(value: object) -> TypeGuard[float]:
    if isinstance(value, int) and not isinstance(value, bool):
        # A longer one is no measurement, and no float holds it.
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and _is_number(value) and value >= 0


TEXT = Kind("text", lambda value: isinstance(value, str))
NUMBER = Kind("a finite number", _is_number)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number, 0 or more", _is_count)
POSITIVE = Kind("a whole number above 0", lambda value: _is_count(value) and value > 0)
ANYTHING = Kind("anything", lambda value: True)


def mapping(schema: Schema) -> Schema:
    """Return the schema of an object with any names, whose values have the schema given."""
    return _Mapping(schema)


def optional(schema: Schema) -> Schema:
    """Return the schema of a value that may be null or missing."""
    return _Optional(schema)


def deviation(value: object, schema: Schema, name: str = "it") -> str | None:
    """Return how a value differs from a schema, or None if it does not.

    Args:
      value: as `json.loads` returns it.
      schema: what it should be.
      name: of the value.

    Returns:
      A clause on the first entry that is wrong.

    Example:
      >>> deviation({"rows": [{"nbytes": 3}, {"nbytes": "x"}]}, {"rows": [{"nbytes": COUNT}]})
      "rows[1].nbytes is 'x', not a whole number, 0 or more"
    """
    if isinstance(schema, _Optional):
        return None if value is None else deviation(value, schema.schema, name)
    if isinstance(schema, Kind):
        return None if schema.test(value) else f"{name} is {_brief(value)}, not {schema.words}"
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{name} is {_brief(value)}, not a list"
        entries = [(f"{name}[{i}]", entry, schema[0]) for i, entry in enumerate(value)]
    else:
        if not isinstance(value, dict):
            return f"{name} is {_brief(value)}, not an object"
        # The name of the whole, "it", would only lengthen those of its entries.
        entries = _entries(value, schema, "" if name == "it" else f"{name}.")
    for own_name, entry, own_schema in entries:
        if found := deviation(entry, own_schema, own_name):
            return found
    return None


def _entries(value: JsonObject, schema: Schema, prefix: str) -> list[tuple[str, object, Schema]]:
    """Return the entries of an object that its schema names: name, value, schema."""
    if isinstance(schema, _Mapping):
        schema = dict.fromkeys(value, schema.schema)
    assert isinstance(schema, Mapping)
    return [(prefix + name, value.get(name), own) for name, own in schema.items()]


def _brief(value: object) -> str:
    text = "missing" if value is None else printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def sealed(content: JsonObject) -> bytes:
    """Return an object as JSON with a digest of itself as its last entry.

    Args:
      content: what JSON takes; an entry ``sha256`` is replaced.

    Returns:
      The file's bytes.

    Raises:
      ValueError: if it holds what JSON cannot, infinity and NaN included.
    """
    rest = _without_digest(content)
    text = json.dumps({**rest, DIGEST: _digest(rest)}, indent=1, allow_nan=False)
    return f"{text}\n".encode()


def read_record(
    path: str | os.PathLike[str],
    schema: Schema,
    advice: str,
    error: type[CompressError],
    *,
    intact: bool = True,
) -> JsonObject:
    """Read a JSON file of this package and check its content.

    Args:
      path: the file.
      schema: of its content.
      advice: what to do if it cannot be used; it ends the sentence.
      error: class of the error that is raised then.
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
      compress_jax.core.errors.CompressError: .../about.json is damaged: ...; write it again
    """
    where = printable(str(path))
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as problem:
        raise error(f"cannot read {where}: {problem.strerror}; {advice}") from problem
    except (ValueError, RecursionError) as problem:  # text that is no UTF-8 is a ValueError too
        raise error(f"{where} is damaged: it is not JSON; {advice}") from problem
    if wrong := deviation(content, schema):
        raise error(f"{where} is damaged or was written by another version: {wrong}; {advice}")
    if intact and DIGEST in content and content[DIGEST] != _digest(_without_digest(content)):
        raise error(f"{where} is damaged: it has other content than was written; {advice}")
    return content


def _without_digest(content: JsonObject) -> JsonObject:
    return {name: value for name, value in content.items() if name != DIGEST}


def _digest(content: JsonObject) -> str:
    # Of the content, not of the file's bytes: keys are sorted, and nothing is indented.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
