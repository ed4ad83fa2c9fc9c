"""Finished runs, and groups of those that differ in one argument alone."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from compress_jax.core.errors import ConfigError
from compress_jax.core.record import read_record
from compress_jax.core.types import JsonObject
from compress_jax.report._read import RUN_FORM, read_results


class FinishedRun(NamedTuple):
    """What a finished run was made of, and its results.

    Attributes:
      directory: its folder.
      record: ``run.json``.
      results: ``results.json``.
    """

    directory: Path
    record: JsonObject
    results: JsonObject

    @property
    def config(self) -> str:
        """The config's name, and the beginning of its digest."""
        digest = self.record.get("config_sha256") or ""
        return f"{Path(self.record['config']).stem}@{digest[:6]}"


class Group(NamedTuple):
    """Runs that differ in one argument alone.

    Attributes:
      label: what tells it from the other groups, such as ``bits=3``.
      runs: by the value of that argument.
    """

    label: str
    runs: dict[object, FinishedRun]


def found_runs(folders: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """Read runs, and those in folders of runs.

    Args:
      folders: of runs, or of sweeps.

    Returns:
      ``(runs, notes)``; the notes name what has not finished.

    Raises:
      ConfigError: if nothing has finished there, or a file is damaged.
    """
    runs: dict[Path, FinishedRun] = {}
    notes: list[str] = []
    for folder in folders:
        inside = [folder]
        if not os.path.lexists(folder / "results.json") and folder.is_dir():
            inside = sorted(
                (each.parent for each in folder.glob("*/run.json")), key=_by_numbers
            ) or [folder]
        for each in inside:
            if len(inside) > 1 and not os.path.lexists(each / "results.json"):
                notes.append(f"{each} has not finished, and is left out")
                continue
            runs[each.resolve()] = _finished_run(each)
    return list(runs.values()), notes


def _by_numbers(path: Path) -> list[tuple[int, float, str]]:
    """Return a key by which bits=2 comes before bits=10."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(0, float(part), "") if part.isdigit() else (1, 0.0, part) for part in parts]


def _finished_run(folder: Path) -> FinishedRun:
    results = read_results(folder)
    if not os.path.lexists(folder / "run.json"):
        raise ConfigError(
            f"{folder} has no run.json that says what it was made of, so it has no group; give "
            "folders that compress-jax run or sweep made"
        )
    advice = "copy it from where it is whole, or leave the run out"
    return FinishedRun(
        folder, read_record(folder / "run.json", RUN_FORM, advice, ConfigError), results
    )


def grouped(runs: Sequence[FinishedRun], by: str) -> list[Group]:
    """Return the groups of runs that differ in one argument alone, in the order of their first.

    Args:
      runs: from `found_runs`.
      by: the argument's name.

    Raises:
      ConfigError: if two runs do not even differ in that argument.
    """
    members: dict[str, dict[object, FinishedRun]] = {}
    for run in runs:
        group = members.setdefault(json.dumps(_rest(run, by), sort_keys=True), {})
        # JSON lists are no keys of a dict.
        value = json.dumps(run.record["arguments"].get(by))
        if value in group:
            raise ConfigError(
                f"{group[value].directory} and {run.directory} have the same config and "
                f"arguments; leave one out, or name the argument they differ in by --by"
            )
        group[value] = run
    firsts = [next(iter(group.values())) for group in members.values()]
    labels = _labels([_rest(run, by) for run in firsts])
    return [Group(label, group) for label, group in zip(labels, members.values(), strict=True)]


def _rest(run: FinishedRun, by: str) -> JsonObject:
    """Return all that a run's group has in common."""
    arguments = {name: each for name, each in run.record["arguments"].items() if name != by}
    return {"config": run.config, **arguments}


def _labels(common: Sequence[JsonObject]) -> list[str]:
    """Return what tells groups apart: the arguments that are not the same in all."""
    names = dict.fromkeys(name for each in common for name in each)
    differing = [name for name in names if len({json.dumps(each.get(name)) for each in common}) > 1]
    if not differing:
        return [common[0]["config"].partition("@")[0]]
    labels = []
    for each in common:
        parts = [
            each[name] if name == "config" else f"{name}={each[name]}"
            for name in differing
            if name in each
        ]
        labels.append(", ".join(map(str, parts)))
    return labels
