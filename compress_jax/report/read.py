"""A run's folder to what a report shows; everything is read, nothing is measured again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_jax.core import unpack
from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import flatten
from compress_jax.export import Part, breakdown, load

Curves = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Run:
    """What a folder holds.

    Attributes:
      directory: the folder.
      results: ``results.json``.
      about: ``run.json``: config, arguments, versions, requirement; empty if the run was not made by the command line.
      decisions: the lines of ``log.txt``, or made from the results.
      packed: the artifact's variables, packed.
      metadata: of the artifact.
      before: params of the float32 student, dense, by path.
      after: params of the artifact, unpacked, by path.
      curves: metrics by stage: ``{stage: {"train/loss": [(step, value), ...]}}``.
      parts: what the bytes of the artifact are for.
    """

    directory: Path
    results: dict[str, Any]
    about: dict[str, Any]
    decisions: list[str]
    packed: Any
    metadata: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    curves: dict[str, Curves]
    parts: list[Part]


def read_results(directory: Path) -> dict[str, Any]:
    """Return ``results.json`` of a folder.

    Args:
      directory: of a finished run.

    Returns:
      ``{"experiment", "chosen", "met", "rows"}``.

    Raises:
      ConfigError: if it is not there: no run was finished in this folder.

    Example:
      >>> import tempfile
      >>> directory = Path(tempfile.mkdtemp())
      >>> _ = (directory / "results.json").write_text('{"chosen": "int4", "rows": []}')
      >>> read_results(directory)["chosen"]
      'int4'
    """
    try:
        return json.loads((directory / "results.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory} has no results.json to read; finish the run first (compress-jax run)") from error


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
      >>> from compress_jax.export import save
      >>> directory, params = Path(tempfile.mkdtemp()), {"params": {"kernel": jnp.ones((2, 2))}}
      >>> names = ("student", "artifact")
      >>> sizes = [save(directory / f"{name}.safetensors", params) for name in names]
      >>> numbers = {"validation": 0.9, "test": 0.8, "bits": 32.0, "accepted": None, "reason": ""}
      >>> rows = [{"name": name, "nbytes": size, **numbers} for name, size in zip(names, sizes)]
      >>> results = {"experiment": "tiny", "chosen": "artifact", "met": True, "rows": rows}
      >>> _ = (directory / "results.json").write_text(json.dumps(results))
      >>> read_run(directory).after["kernel"].tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    results = read_results(directory)
    packed, metadata = load(directory / "artifact.safetensors")
    student, _ = load(directory / "student.safetensors")
    return Run(
        directory=directory,
        results=results,
        about=_json(directory / "run.json"),
        decisions=_decisions(directory, results["rows"]),
        packed=packed,
        metadata=metadata,
        before=flatten(unpack(student)["params"])[0],
        after=flatten(unpack(packed)["params"])[0],
        curves=_curves(directory, [row["name"] for row in results["rows"]]),
        parts=breakdown(directory / "artifact.safetensors"),
    )


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_bytes()) if file.exists() else {}


def _decisions(directory: Path, rows: list[dict[str, Any]]) -> list[str]:
    if (directory / "log.txt").exists():
        return (directory / "log.txt").read_text(encoding="utf-8").splitlines()
    judged = [row for row in rows if row["accepted"] is not None]
    return [f"{row['name']}: {'accepted' if row['accepted'] else 'refused'}: {row['reason']}" for row in judged]


def _curves(directory: Path, names: list[str]) -> dict[str, Curves]:
    """Return the metrics of each stage that was trained here; a restored teacher has none."""
    found: dict[str, Curves] = {}
    for name in names:
        folder = directory / name if name in ("teacher", "student") else directory / "candidates" / name
        if (folder / "metrics.jsonl").exists():
            found[name] = _series((folder / "metrics.jsonl").read_text())
    return found


def _series(text: str) -> Curves:
    series: Curves = {}
    for line in text.splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            if value is not None:
                series.setdefault(name, []).append((step, value))
    return series
