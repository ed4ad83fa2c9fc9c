"""Read a run's folder for its report; nothing is measured again."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from compress_jax.core import unpack
from compress_jax.core.errors import ArtifactError, ConfigError
from compress_jax.core.paths import flatten
from compress_jax.core.record import (
    ANYTHING,
    COUNT,
    FLAG,
    NUMBER,
    POSITIVE,
    TEXT,
    Kind,
    deviation,
    mapping,
    optional,
    read_record,
)
from compress_jax.core.table import printable
from compress_jax.core.types import Array, JsonObject, PyTree, Variables
from compress_jax.export import Part, breakdown, load
from compress_jax.report._extra import Extra, read_extra

Curves = dict[str, list[tuple[int, float]]]  # (step, value) by metric
RUN_VERSION = 2  # version 1 had no digest of the config
VERSION = Kind(
    f"at most {RUN_VERSION}, the version that is read here", lambda v: v in (1, RUN_VERSION)
)
RUN_FORM = {
    "version": optional(VERSION),
    "config": TEXT,
    "config_sha256": optional(TEXT),
    "arguments": mapping(ANYTHING),
    "flags": [TEXT],
    "versions": mapping(TEXT),
    "git": optional(mapping(TEXT)),
    "hardware": optional(mapping(TEXT)),
    "requirement": optional(
        {
            "max_drop": optional(NUMBER),
            "min_ratio": optional(NUMBER),
            "max_bytes": optional(NUMBER),
            "reference": Kind(
                "'teacher' or 'student'",
                lambda v: isinstance(v, str) and v in ("teacher", "student"),
            ),
        }
    ),
}
COSTS = {
    "macs": "MACs",
    "bitops": "bit-operations",
    "latency_ms": "latency, ms",
    "memory": "memory of a call, bytes",
}
"""What a row may hold beside its bytes, and the name that a reader sees; smaller is better."""
LIMITED = COSTS | {"parameters": "parameters that are not 0"}
"""What a requirement may limit."""

ROW_FORM = {
    # It becomes part of a path: no name may lead out of the run's folder.
    "name": Kind(
        "the name of a folder",
        lambda v: isinstance(v, str) and v not in ("", ".", "..") and not {"/", "\0"} & set(v),
    ),
    "nbytes": POSITIVE,
    "validation": NUMBER,
    "test": optional(NUMBER),
    "bits": NUMBER,
    "accepted": optional(FLAG),
    "reason": TEXT,
    "metrics": optional(mapping(mapping(NUMBER))),
    "costs": optional(mapping(NUMBER)),
    **dict.fromkeys(COSTS, optional(NUMBER)),
}
RESULTS_FORM = {
    "experiment": TEXT,
    "task": optional(TEXT),
    "metric": optional({"name": TEXT, "percent": FLAG, "higher_is_better": FLAG}),
    "chosen": TEXT,
    "met": FLAG,
    "rows": [ROW_FORM],
    "comparison": optional(
        {
            "measures": [TEXT],
            "values": mapping([TEXT]),
            "prompts": [TEXT],
            "answers": mapping([TEXT]),
        }
    ),
}
AGAIN = "compress-jax run with the same config and arguments writes it again"


@dataclass(frozen=True)
class Run:
    """What a folder holds.

    Attributes:
      directory: the folder.
      results: ``results.json``.
      record: ``run.json``: config, arguments, versions, requirement; empty if the run was not made
        by the command line.
      decisions: the lines of ``log.txt``, or sentences made of the results.
      packed: the artifact's variables, packed.
      metadata: of the artifact.
      before: params of the float32 student, dense, by path.
      after: params of the artifact, unpacked, by path.
      curves: metrics by stage: ``{stage: {"train/loss": [(step, value), ...]}}``.
      parts: what the bytes of the artifact are for.
      notes: sentences on files that are damaged, and so are not shown.
      extra: exports, sensitivities, predictions and times, where the folder has them.

    Example:
      >>> import compress_jax as cj
      >>> folder, rows = Path("runs/tiny"), [{"name": "int4", "nbytes": 9}]
      >>> results = {"experiment": "tiny", "chosen": "int4", "met": True, "rows": rows}
      >>> run = cj.report.Run(folder, results, {}, [], {}, {}, {}, {}, {}, [], [])
      >>> run.results["chosen"]
      'int4'
    """

    directory: Path
    results: JsonObject
    record: JsonObject
    decisions: list[str]
    packed: PyTree
    metadata: JsonObject
    before: dict[str, Array]
    after: dict[str, Array]
    curves: dict[str, Curves]
    parts: list[Part]
    notes: list[str]
    extra: Extra = field(default_factory=Extra)


def read_results(directory: Path, *, intact: bool = True) -> JsonObject:
    """Return ``results.json`` of a folder.

    Args:
      directory: of a finished run.
      intact: whether its digest, if it has one, must match.

    Returns:
      ``{"experiment", "chosen", "met", "rows"}``.

    Raises:
      ConfigError: if it is not there (no run was finished in this folder) or is damaged.

    Example:
      >>> import tempfile
      >>> directory = Path(tempfile.mkdtemp())
      >>> row = {"name": "int4", "nbytes": 9, "validation": 0.9, "test": 0.8, "bits": 32.0}
      >>> rows = [row | {"accepted": None, "reason": ""}]
      >>> results = {"experiment": "tiny", "chosen": "int4", "met": True, "rows": rows}
      >>> _ = (directory / "results.json").write_text(json.dumps(results))
      >>> read_results(directory)["chosen"]
      'int4'
    """
    file = directory / "results.json"
    # lexists: a broken link is damage, to be reported as such, and not a run that is unfinished.
    if not os.path.lexists(file):
        raise ConfigError(
            f"{directory} has no results.json to read; finish the run first (compress-jax run)"
        )
    results = read_record(file, RESULTS_FORM, AGAIN, ConfigError, intact=intact)
    # The schema cannot say that one entry refers to another.
    names = [row["name"] for row in results["rows"]]
    if results["chosen"] not in names:
        raise ConfigError(
            f"{file} is damaged: no row is called {printable(results['chosen'])!r}; {AGAIN}"
        )
    return results


def read_run(directory: Path) -> Run:
    """Read all a report needs.

    Args:
      directory: of a finished run.

    Returns:
      The `Run`.

    Raises:
      ConfigError: if no run was finished there.
      ArtifactError: if an artifact is missing or damaged.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> directory, params = Path(tempfile.mkdtemp()), {"params": {"kernel": jnp.ones((2, 2))}}
      >>> names = ("student", "artifact")
      >>> sizes = [cj.save(directory / f"{name}.safetensors", params) for name in names]
      >>> numbers = {"validation": 0.9, "test": 0.8, "bits": 32.0, "accepted": None, "reason": ""}
      >>> rows = [{"name": name, "nbytes": size, **numbers} for name, size in zip(names, sizes)]
      >>> results = {"experiment": "tiny", "chosen": "artifact", "met": True, "rows": rows}
      >>> _ = (directory / "results.json").write_text(json.dumps(results))
      >>> cj.report.read_run(directory).after["kernel"].tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    # Results and artifacts must be whole; logs and curves may be damaged, and are then noted.
    results = read_results(directory)
    rows = [{**row, **(row.get("costs") or {})} for row in results["rows"]]
    results = {**results, "rows": rows}
    notes: list[str] = []
    packed = _params(directory / "artifact.safetensors")
    before = _params(directory / "student.safetensors")
    return Run(
        directory=directory,
        results=results,
        record=_record(directory),
        decisions=_decisions(directory, results["rows"], notes),
        packed=packed,
        metadata=_metadata(directory / "artifact.safetensors"),
        before=flatten(unpack(before["params"]))[0],
        after=flatten(unpack(packed["params"]))[0],
        curves=_curves(directory, [row["name"] for row in results["rows"]], notes),
        parts=breakdown(directory / "artifact.safetensors"),
        extra=read_extra(directory, notes),
        notes=notes,
    )


def _params(file: Path) -> Variables:
    """Return the variables in an artifact of a run."""
    packed = load(file)[0]
    if not isinstance(packed, dict) or "params" not in packed:
        raise ArtifactError(f"{file} holds no 'params', so it is not what a run writes; {AGAIN}")
    return packed


def _metadata(file: Path) -> JsonObject:
    """Return an artifact's metadata; an invalid list of skipped leaves is left out."""
    metadata = load(file)[1]
    if deviation(metadata.get("left_alone", {}), mapping([TEXT])):
        metadata = {**metadata, "left_alone": {}}
    return metadata


def _record(directory: Path) -> JsonObject:
    """Return ``run.json``, or nothing if the run was not made by the command line."""
    file = directory / "run.json"
    if not os.path.lexists(file):
        return {}
    advice = "copy it from where it is whole, or remove it to have a report without it"
    return read_record(file, RUN_FORM, advice, ConfigError)


def _decisions(directory: Path, rows: list[JsonObject], notes: list[str]) -> list[str]:
    """Return the lines of the log, or if it is missing, sentences made of the results."""
    text = _text(directory / "log.txt", notes, "the decisions are those of results.json")
    if text is not None:
        return text.splitlines()
    verdicts = {True: "accepted", False: "refused"}
    # Teacher and student are references, with no verdict on them.
    judged = [row for row in rows if row["accepted"] is not None]
    return [f"{row['name']}: {verdicts[row['accepted']]}: {row['reason']}" for row in judged]


def _text(file: Path, notes: list[str], instead: str) -> str | None:
    """Return a text file, or None if there is none or it cannot be read, which is noted."""
    if not os.path.lexists(file):
        return None
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        notes.append(f"{file.name} is damaged ({why}); {instead}")
        return None


def _curves(directory: Path, names: list[str], notes: list[str]) -> dict[str, Curves]:
    """Return the metrics of each stage that was trained here; a restored teacher has none."""
    found: dict[str, Curves] = {}
    for name in names:
        own = name in ("teacher", "student", "student-longer")
        parent = directory if own else directory / "candidates"
        file = parent / name / "metrics.jsonl"
        text = _text(file, notes, f"the curves of {name} are not drawn")
        if text is None:
            continue
        found[name], bad = _series(text)
        if bad:
            notes.append(f"{bad} lines of metrics.jsonl of {name} are damaged; they are not drawn")
    return found


def _series(text: str) -> tuple[Curves, int]:
    """Return the values by metric, and the number of damaged lines."""
    series: Curves = {}
    bad = 0
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or brackets nested too deep to parse
            values = {}  # without a step, so the line counts as damaged
        if deviation(values, mapping(optional(NUMBER))) or deviation(values, {"step": COUNT}):
            bad += 1
            continue
        step = values.pop("step")
        for name, value in values.items():
            # A metric may be null where a loss was not finite.
            if value is not None:
                series.setdefault(name, []).append((step, value))
    return series, bad
