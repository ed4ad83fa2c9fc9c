"""Tables of the files that were exported to other runtimes, and verified there."""

import math

from compress_jax.core.types import JsonObject
from compress_jax.report._tables import Table
from compress_jax.tasks._metrics import number_text


def export_tables(exports: JsonObject) -> list[Table]:
    """Return what ``export/export.json`` holds.

    Args:
      exports: by target.

    Returns:
      The files with their measurements, the times, and how each site is computed; empty without an
      export.

    Example:
      >>> record = {"path": "model.onnx", "nbytes": 900, "failures": []}
      >>> export_tables({"onnx": record})[0].rows[0][:4]
      ('onnx', 'model.onnx', '900', '-')
    """
    tables = [_files(exports), _times(exports), _sites(exports), _failures(exports)]
    return [table for table in tables if table.rows]


def _files(exports: JsonObject) -> Table:
    head = ("target", "file", "bytes", "float bytes", "agreement", "metric", "in JAX", "verdict")
    rows = []
    for target, record in exports.items():
        percent = bool(record.get("percent", True))
        rows.append(
            (
                target,
                record["path"],
                f"{record['nbytes']:,}",
                _number(record.get("baseline_bytes") or None, ",.0f"),
                number_text(_finite(record.get("agreement")), True),
                number_text(_finite(record.get("accuracy")), percent),
                number_text(_finite(record.get("reference")), percent),
                "fails" if record["failures"] else "passes",
            )
        )
    return Table("Exported files", head, tuple(rows))


def _times(exports: JsonObject) -> Table:
    head = ("target", "examples a call", "threads", "ms", "float, ms", "speedup", "quartiles")
    rows = []
    for target, record in exports.items():
        for each in record.get("timings") or ():
            low = _number(each.get("low"), ".2f")
            high = _number(each.get("high"), ".2f")
            row = (
                target,
                _number(each.get("batch"), ",.0f"),
                _number(each.get("threads"), ",.0f"),
                _number(each.get("seconds"), ".3f", 1e3),
                _number(each.get("baseline"), ".3f", 1e3),
                _number(each.get("speedup"), ".2f"),
                f"{low} to {high}",
            )
            rows.append(row)
    return Table("Times of a call", head, tuple(rows))


def _sites(exports: JsonObject) -> Table:
    rows = []
    for target, record in exports.items():
        for site in record.get("sites") or ():
            rows.append((target, site["name"], site["form"], site.get("reason") or ""))
    return Table("Sites in the files", ("target", "site", "computed as", "why"), tuple(rows))


def _failures(exports: JsonObject) -> Table:
    rows = [(target, each) for target, record in exports.items() for each in record["failures"]]
    return Table("Failures", ("target", "what fails"), tuple(rows))


def _finite(value: object) -> float | None:
    """Return a finite number, or None: export.json has NaN for what was not measured."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _number(value: object, pattern: str, scale: float = 1.0) -> str:
    number = _finite(value)
    return "-" if number is None else format(scale * number, pattern)
