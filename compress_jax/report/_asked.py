"""What was asked of a run and what was reached, requirement by requirement."""

import math
from typing import NamedTuple

from compress_jax.core.types import JsonObject
from compress_jax.report._read import LIMITED, Run
from compress_jax.report._rows import ACCURACY, value_text
from compress_jax.report._tables import Table

SLACK = 1e-9  # as the search has it: the limit is a difference of decimal fractions
KNOWN = ("max_drop", "min_ratio", "max_bytes", "reference")


class Limits(NamedTuple):
    """The region that a requirement allows.

    Attributes:
      reference: name of the network whose metric is compared with.
      metric: the worst validation metric that is good enough.
      nbytes: the largest artifact, in bytes.
    """

    reference: str
    metric: float
    nbytes: float


def limits(run: Run) -> Limits | None:
    """Return the limits of a run's requirement, or None if the folder does not record it."""
    requirement = run.record.get("requirement")
    rows = {row["name"]: row for row in run.results["rows"]}
    if not requirement or "student" not in rows:
        return None
    student = rows["student"]
    # Without a teacher the reference is always the student.
    wanted = requirement["reference"] if requirement["reference"] in rows else "student"
    metric = run.results.get("metric") or ACCURACY
    drop = requirement["max_drop"] or 0.0
    worst = rows[wanted]["validation"] + (-drop if metric["higher_is_better"] else drop)
    # Without a ratio the artifact must be no larger than the student.
    by_ratio = student["nbytes"] / (requirement["min_ratio"] or 1.0)
    return Limits(wanted, worst, min(by_ratio, requirement["max_bytes"] or math.inf))


def requirements_table(run: Run) -> Table | None:
    """Return what was asked and what the artifact reached.

    Args:
      run: the run.

    Returns:
      One row a requirement, with its verdict; None if the folder does not record what was asked.
    """
    found = limits(run)
    if found is None:
        return None
    requirement = run.record["requirement"]
    rows = {row["name"]: row for row in run.results["rows"]}
    chosen = rows[run.results["chosen"]]
    cells = [_metric(run, chosen, found)]
    if requirement["min_ratio"]:
        ratio = rows["student"]["nbytes"] / chosen["nbytes"]
        asked = f"at least {requirement['min_ratio']:g}x smaller than the student in float32"
        met = ratio >= requirement["min_ratio"]
        cells.append(("ratio to student", asked, f"{ratio:.1f}x", _verdict(met)))
    if requirement["max_bytes"]:
        asked = f"at most {requirement['max_bytes']:,.0f}"
        met = chosen["nbytes"] <= requirement["max_bytes"]
        cells.append(("bytes on disk", asked, f"{chosen['nbytes']:,}", _verdict(met)))
    cells += [_other(name, requirement[name], chosen) for name in _others(requirement)]
    return Table("Requirements", ("what", "asked", "reached", "verdict"), tuple(cells))


def _metric(run: Run, chosen: JsonObject, found: Limits) -> tuple[str, ...]:
    metric = run.results.get("metric") or ACCURACY
    higher = metric["higher_is_better"]
    loss = found.metric - chosen["validation"]
    met = (loss if higher else -loss) <= SLACK
    drop = value_text(run.record["requirement"]["max_drop"] or 0.0, metric)
    asked = (
        f"at {'least' if higher else 'most'} {value_text(found.metric, metric)} "
        f"({'less' if higher else 'more'} than the {found.reference}'s by {drop} at most)"
    )
    reached = value_text(chosen["validation"], metric)
    return f"validation {metric['name']}", asked, reached, _verdict(met)


def _others(requirement: JsonObject) -> list[str]:
    """Return the names of further requirements that were asked."""
    return [name for name, value in requirement.items() if name not in KNOWN and value is not None]


def _other(name: str, asked: object, chosen: JsonObject) -> tuple[str, ...]:
    """Return the row of a largest cost, or of a requirement that this version does not know."""
    if name == "max_drops" and isinstance(asked, dict):
        limits = ", ".join(f"{metric} {drop:g} worse" for metric, drop in asked.items())
        return "other metrics", f"at most {limits}", "-", _verdict(bool(chosen.get("accurate")))
    cost = name.removeprefix("max_")
    reached = chosen.get(cost)
    known = name.startswith("max_") and cost in LIMITED
    if not known or reached is None or not isinstance(asked, int | float):
        return name, str(asked), "-", "not judged here"
    return LIMITED[cost], f"at most {asked:,g}", f"{reached:,g}", _verdict(reached <= asked)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"
