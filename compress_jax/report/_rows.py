"""Tables of the results, of the leaves of an artifact, of skipped leaves, of metadata."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence

from compress_jax.core import coverage
from compress_jax.core.types import JsonObject, PyTree
from compress_jax.export import Part
from compress_jax.report._read import COSTS
from compress_jax.report._tables import Table
from compress_jax.tasks._metrics import number_text

ACCURACY: JsonObject = {"name": "accuracy", "percent": True, "higher_is_better": True}
"""The metric of results that name none: of a version that measured nothing else."""


def results_table(
    rows: Sequence[JsonObject], chosen: str, metric: JsonObject | None = None
) -> Table:
    """Return the results of a run.

    Args:
      rows: of ``results.json``: teacher, student and candidates, each with ``name``, ``nbytes``,
        ``validation``, ``test``, ``bits``, ``accepted`` and ``reason``.
      chosen: the name of the row that became the artifact.
      metric: of ``results.json``: ``name``, ``percent`` and ``higher_is_better``; None for
        accuracy. Other metrics that the rows have are shown after it, and costs such as ``macs``
        after the bytes.

    Returns:
      One row a network.

    Example:
      >>> row = {"name": "student", "nbytes": 4000, "bits": 32.0, "accepted": None}
      >>> results_table([row | {"validation": 0.9, "test": 0.89}], "student").rows[0]
      ('student', '89.00 %', '90.00 %', '4,000', '1.0x', '-', '32.00', 'reference')
    """
    metric = metric or ACCURACY
    name = metric["name"]
    measured = [row.get("metrics", {}).get("test", {}) for row in rows]
    others = [each for each in dict.fromkeys(itertools.chain(*measured)) if each != name]
    costs = [key for key in COSTS if any(row.get(key) is not None for row in rows)]
    # A run without a teacher has no ratio to it, and shows "-".
    sizes = {row["name"]: row["nbytes"] for row in rows}
    head = (
        "network",
        f"test {name}",
        f"validation {name}",
        *(f"test {other}" for other in others),
        "bytes on disk",
        "ratio to student",
        "ratio to teacher",
        "bits per weight",
        *(COSTS[key] for key in costs),
        "verdict",
    )
    cells = [
        (
            row["name"],
            value_text(row["test"], metric),
            value_text(row["validation"], metric),
            *(number_text(_other(row, other), False) for other in others),
            f"{row['nbytes']:,}",
            _ratio(sizes.get("student"), row["nbytes"]),
            _ratio(sizes.get("teacher"), row["nbytes"]),
            f"{row['bits']:.2f}",
            *(_cost(row.get(key)) for key in costs),
            verdict(row, chosen),
        )
        for row in rows
    ]
    marked = next((i for i, row in enumerate(rows) if row["name"] == chosen), None)
    return Table("Results", head, tuple(cells), marked=marked)


def value_text(value: float | None, metric: JsonObject | None) -> str:
    """Return a value of a run's metric as text, in percent if it is a share; ``-`` for None."""
    return number_text(value, (metric or ACCURACY)["percent"])


def _cost(value: float | None) -> str:
    """Return MACs and the like in full, seconds with four digits."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _other(row: JsonObject, name: str) -> float | None:
    return row.get("metrics", {}).get("test", {}).get(name)


def verdict(row: JsonObject, chosen: str) -> str:
    """Return the verdict on a row: reference, chosen, accepted or refused."""
    if row["accepted"] is None:
        return "reference"
    if row["name"] == chosen:
        return "chosen" if row["accepted"] else "refused, but best"
    return "accepted" if row["accepted"] else "refused"


def leaves_table(
    packed: PyTree, left_alone: Mapping[str, Sequence[str]], parts: Sequence[Part]
) -> Table:
    """Return how each leaf of an artifact is stored.

    Args:
      packed: what `compress_jax.export.load` returned.
      left_alone: paths by reason, as the artifact's metadata has them (relative to ``params``).
      parts: of the file, from `compress_jax.export.breakdown`.

    Returns:
      One row a leaf, then the container's overhead and the total.

    Example:
      >>> import jax.numpy as jnp
      >>> parts = [Part("params/bias", "array", 16), Part("", "header and metadata", 84)]
      >>> skipped = {"no pattern matches": ["bias"]}
      >>> table = leaves_table({"params": {"bias": jnp.ones(4)}}, skipped, parts)
      >>> for row in table.rows:
      ...     print(*filter(None, row))
      params/bias 4 dense 32.00 0.0 % 16 16.0 % no pattern matches
      header and metadata 84 84.0 %
      file 100 100.0 %
    """
    reasons: dict[str, str] = {}
    for reason, paths in left_alone.items():
        reasons |= dict.fromkeys(paths, reason)
    table = coverage(None, packed)
    # Leaves that are coded together share bytes: their parts are no whole numbers.
    file_bytes = round(sum(part.nbytes for part in parts))
    sizes: dict[str, int] = {}
    for row in table.rows:
        sizes[row.path] = round(sum(part.nbytes for part in parts if part.path == row.path))
    rows = [
        (
            row.path,
            "x".join(map(str, row.shape)) or "scalar",
            row.form,
            f"{8 * sizes[row.path] / max(math.prod(row.shape), 1):.2f}",
            percent(row.sparsity, 1),
            f"{sizes[row.path]:,}",
            percent(sizes[row.path] / file_bytes, 1),
            reasons.get(row.path.removeprefix("params/"), ""),
        )
        for row in table.rows
    ]
    # The rest, not a sum of its own: then the rows add up to the file in spite of rounding.
    overhead = file_bytes - sum(sizes.values())
    blank = ("", "", "", "")
    share = percent(overhead / file_bytes, 1)
    rows.append(("header and metadata", *blank, f"{overhead:,}", share, ""))
    rows.append(("file", *blank, f"{file_bytes:,}", percent(1.0, 1), ""))
    head = ("path", "shape", "form", "bits", "zeros", "bytes", "of file", "skipped")
    return Table("Leaves", head, tuple(rows), totals=2)


def causes_table(parts: Sequence[Part]) -> Table:
    """Return the bytes of an artifact by cause; ``parts`` as for `leaves_table`.

    Example:
      >>> codes = [Part("a", "codes", 30), Part("b", "codes", 50)]
      >>> parts = [*codes, Part("", "header and metadata", 20)]
      >>> for row in causes_table(parts).rows:
      ...     print(*row)
      codes 80 80.0 %
      header and metadata 20 20.0 %
    """
    total = sum(part.nbytes for part in parts)
    sizes: dict[str, float] = {}
    for part in parts:
        sizes[part.cause] = sizes.get(part.cause, 0) + part.nbytes
    rows = [(cause, f"{round(size):,}", percent(size / total, 1)) for cause, size in sizes.items()]
    return Table("Bytes by cause", ("cause", "bytes", "of file"), tuple(rows))


def skipped_table(left_alone: Mapping[str, Sequence[str]]) -> Table:
    """Return the leaves that a compression skipped; ``left_alone`` has paths by reason."""
    rows = [(reason, str(len(paths)), ", ".join(paths)) for reason, paths in left_alone.items()]
    return Table("Skipped", ("why", "leaves", "paths"), tuple(rows))


def metadata_table(title: str, metadata: Mapping[str, object]) -> Table:
    """Return an artifact's metadata, or any such dict, one row a key.

    Args:
      title: of the table.
      metadata: text, numbers and what JSON takes, by name; ``left_alone`` is left out, being for
        `leaves_table`.

    Returns:
      One row a key.

    Example:
      >>> metadata = {"model": "LeNet5()", "validation": 0.985, "arguments": {"bits": 4}}
      >>> metadata_table("", metadata).rows
      (('model', 'LeNet5()'), ('validation', '98.50 %'), ('arguments', '{"bits": 4}'))
    """
    rows = [(key, _text(key, value)) for key, value in metadata.items() if key != "left_alone"]
    return Table(title, ("key", "value"), tuple(rows))


def percent(value: float | None, digits: int = 2) -> str:
    """Return a fraction as text, ``-`` for None."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _ratio(base: int | None, nbytes: int) -> str:
    return "-" if base is None else f"{base / nbytes:.1f}x"


def _text(key: str, value: object) -> str:
    if isinstance(value, float) and key in ("validation", "test"):
        return percent(value)
    return " ".join(value.split()) if isinstance(value, str) else json.dumps(value)
