"""Read the files that a run's folder may hold beside its results, each noted if it is damaged."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from compress_jax.core.errors import ConfigError
from compress_jax.core.record import (
    ANYTHING,
    COUNT,
    NUMBER,
    TEXT,
    Schema,
    deviation,
    mapping,
    optional,
    read_record,
)
from compress_jax.core.types import JsonObject

MEASURED = "measured.json"  # in report/: what compress-jax report --measure found
SESSIONS = "sessions.jsonl"  # one line each time the command ran
HISTOGRAM: Schema = {"low": NUMBER, "high": NUMBER, "shares": [NUMBER]}
MEASURED_FORM: Schema = {
    "artifact_sha256": TEXT,
    "reference": TEXT,
    "examples": COUNT,
    "confusion": optional([[COUNT]]),
    "right": optional(mapping(COUNT)),
    "activation_examples": COUNT,
    "activations": mapping(mapping(HISTOGRAM)),
    "notes": [TEXT],
}
SENSITIVITIES_FORM: Schema = {
    "measure": TEXT,
    "scores": mapping(mapping(NUMBER)),
    "nbytes": mapping(mapping(NUMBER)),
    "left": optional(mapping(TEXT)),
}
EXPORTS_FORM: Schema = mapping(
    {
        "path": TEXT,
        "nbytes": COUNT,
        "timings": optional([mapping(ANYTHING)]),
        "failures": [TEXT],
        "sites": optional([{"name": TEXT, "form": TEXT, "reason": optional(TEXT)}]),
    }
)
SESSION_FORM: Schema = {"started": TEXT, "seconds": NUMBER, "ended": TEXT, "devices": TEXT}


@dataclass(frozen=True)
class Extra:
    """What a folder holds beside the results.

    Attributes:
      sensitivities: ``search/sensitivities.json``, as `Sensitivities.to_json` writes it; or empty.
      exports: ``export/export.json`` by target; empty if nothing was exported.
      measured: ``report/measured.json``: confusion and activations; empty if not measured.
      sessions: one entry each time the command ran: ``started``, ``seconds``, ``ended``,
        ``devices``.
    """

    sensitivities: JsonObject = field(default_factory=dict)
    exports: JsonObject = field(default_factory=dict)
    measured: JsonObject = field(default_factory=dict)
    sessions: list[JsonObject] = field(default_factory=list)


def read_extra(directory: Path, notes: list[str]) -> Extra:
    """Read what a folder holds beside the results.

    Args:
      directory: of a finished run.
      notes: gets a sentence for each file that is damaged or of another artifact.

    Returns:
      The `Extra`.
    """
    file = directory / "search" / "sensitivities.json"
    sensitivities = _optional_record(file, SENSITIVITIES_FORM, notes)
    exports = _optional_record(directory / "export" / "export.json", EXPORTS_FORM, notes)
    measured = _optional_record(directory / "report" / MEASURED, MEASURED_FORM, notes)
    if measured and measured["artifact_sha256"] != digest(directory / "artifact.safetensors"):
        notes.append(
            "report/measured.json is of another artifact, so it is not shown; "
            "compress-jax report --measure makes it anew"
        )
        measured = {}
    return Extra(sensitivities, exports, measured, _sessions(directory / SESSIONS, notes))


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _optional_record(file: Path, schema: Schema, notes: list[str]) -> JsonObject:
    """Return a JSON file, or nothing if there is none, or if it is damaged, which is noted."""
    if not os.path.lexists(file):
        return {}
    try:
        return read_record(file, schema, "it is not shown", ConfigError)
    except ConfigError as error:
        notes.append(str(error))
        return {}


def _sessions(file: Path, notes: list[str]) -> list[JsonObject]:
    """Return the lines of ``sessions.jsonl``; damaged ones are counted and noted."""
    if not os.path.lexists(file):
        return []
    try:
        lines = file.read_bytes().decode().splitlines()
    except (OSError, UnicodeDecodeError):
        notes.append(f"{file.name} is damaged; the times are not shown")
        return []
    found = [_session(line) for line in lines]
    good = [each for each in found if each]
    if len(good) < len(found):
        bad = len(found) - len(good)
        notes.append(f"{bad} lines of {file.name} are damaged; they are not shown")
    return good


def _session(line: str) -> JsonObject:
    """Return a line as an object, or nothing if it is damaged."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return {} if deviation(value, SESSION_FORM) else value
