"""What a run was made with: command, arguments, versions, commit, machine and time."""

import shlex

from compress_jax.core.types import JsonObject
from compress_jax.report._read import Run
from compress_jax.report._rows import metadata_table
from compress_jax.report._tables import Table


def command(run: Run) -> str:
    """Return the command that made a run; only the command line writes run.json."""
    if not run.record:
        return "Made by compress_jax.search.compress."
    words = ["compress-jax", "run", run.record["config"], *run.record["flags"]]
    return shlex.join(words)


def origin_tables(run: Run) -> list[Table]:
    """Return the tables of what a run was made with; those without rows are left out.

    Args:
      run: the run.

    Returns:
      Arguments with the seed, versions and data, commit and machine, and the times it ran.
    """
    machine = {**_commit(run), **(run.record.get("hardware") or {})}
    tables = [
        metadata_table("Arguments", run.record.get("arguments", {})),
        metadata_table("Versions", _versions(run)),
        metadata_table("Code and machine", machine),
        _sessions(run),
    ]
    return [table for table in tables if table.rows]


def _versions(run: Run) -> JsonObject:
    keys = ("data", "data_sha256", "model")
    data = {key: run.metadata[key] for key in keys if key in run.metadata}
    return {**run.record.get("versions", {}), **data}


def _commit(run: Run) -> JsonObject:
    """Return the commits of the package and of the config; nothing if none was recorded."""
    return {f"commit of {of}": commit for of, commit in (run.record.get("git") or {}).items()}


def _sessions(run: Run) -> Table:
    """Return how long the command ran, each time; a stopped run has several."""
    rows = [
        (each["started"], f"{each['seconds']:,.1f}", each["devices"], each["ended"])
        for each in run.extra.sessions
    ]
    total = sum(each["seconds"] for each in run.extra.sessions)
    if len(rows) > 1:
        rows.append(("all", f"{total:,.1f}", "", ""))
    head = ("started, UTC", "seconds", "devices", "ended")
    return Table("Wall time", head, tuple(rows), totals=int(len(rows) > 1))
