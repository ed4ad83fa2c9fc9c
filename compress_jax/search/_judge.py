"""Measure what was trained; are the requirements met? If not, what next?

`judge`, `reference`, `finished` and `choose` are pure functions of measured numbers.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from compress_jax.core.errors import CompressError
from compress_jax.core.paths import flatten
from compress_jax.core.types import JsonObject, Model, ModelFn, PyTree
from compress_jax.export import save
from compress_jax.search._costs import costs
from compress_jax.search._divided import divided, from_file, measured
from compress_jax.search._experiment import Experiment
from compress_jax.search._network import Variables
from compress_jax.search._requirement import LIMITS, Requirement
from compress_jax.tasks import Metric, PureModel, accuracy
from compress_jax.train._parallel import Rules
from compress_jax.train._processes import once

ACCURACY = accuracy()
COSTS = {name.removeprefix("max_"): unit for name, unit in LIMITS.items() if name != "max_bytes"}
LONGEST = 200  # letters of a field of a model that is worth naming


@dataclass(frozen=True)
class Assessment:
    """What was measured of one network; a row of the results table.

    Attributes:
      name: ``"teacher"``, ``"student"`` or the candidate's name.
      parameters: entries of its params, as a dense model.
      nbytes: its artifact's bytes on disk, header and all.
      validation: the task's metric on the validation split, such as accuracy, 0 to 1.
      test: the same on the test split, measured only for what is reported in the end; else None.
      accurate: whether its metric met the requirement; None for teacher and student.
      accepted: whether it met the whole requirement; None for teacher and student.
      reason: why, as a sentence.
      drop: by how much its metric is worse than the reference's; None for teacher and student.
      fits: whether it met all that is not a metric: bytes, work, time.
      costs: multiply-accumulates, bit-operations and more of one example, see `Requirement`.
      metrics: every metric of the task by split, ``{"validation": {"accuracy": 0.97}}``.

    Example:
      >>> import compress_jax as cj
      >>> cj.search.Assessment("int4", parameters=2000, nbytes=1250, validation=0.97).bits
      5.0
    """

    name: str
    parameters: int
    nbytes: int
    validation: float
    test: float | None = None
    accurate: bool | None = None
    accepted: bool | None = None
    reason: str = ""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    drop: float | None = None
    fits: bool | None = None
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits on disk for each parameter, everything in the file counted."""
        return 8 * self.nbytes / self.parameters

    def as_dict(self) -> JsonObject:
        """Return the fields and `bits`, as JSON takes them."""
        return {**asdict(self), "bits": self.bits}


class Trained(NamedTuple):
    """A network at the end of its training.

    Attributes:
      name: of its row.
      model: the network as pure functions.
      variables: those that the forward pass of training used.
      packed: the same with packed leaves, as they are stored.
      rules: how its params are divided over the experiment's mesh to be measured.
    """

    name: str
    model: PureModel
    variables: Variables
    packed: PyTree
    rules: Rules = ()


def assess(
    experiment: Experiment,
    trained: Trained,
    file: Path,
    metadata: JsonObject,
    *,
    coded: bool = False,
) -> Assessment:
    """Write a network to disk, read it back, and measure it on validation data.

    What is read must give the same outputs as what was trained, bit for bit.

    Args:
      experiment: for data and task.
      trained: the network.
      file: the artifact to write.
      metadata: to store in it, as JSON takes it.
      coded: how to write it, see `export.save`.

    Returns:
      The row, not judged yet.

    Raises:
      CompressError: if the file gives other outputs.
    """
    data = experiment.data
    apply = trained.model.apply
    variables = divided(experiment, trained.variables, trained.rules)
    expected = measured(experiment, apply, variables, data.validation)
    validation = expected.values[experiment.task.metric.name]
    metadata = {
        "experiment": experiment.name,
        "name": trained.name,
        "model": _constructor_call(trained.model.source),
        **metadata,
        "data": data.name,
        "data_sha256": data.fingerprint,
        "validation": validation,
    }
    nbytes = once(lambda: save(file, trained.packed, metadata, coded=coded))
    # Bit for bit: what is judged must be what ships, not what was trained.
    variables = from_file(experiment, file, trained.rules)
    again = measured(experiment, apply, variables, data.validation)
    if again.digest != expected.digest:
        raise CompressError(
            f"{file} does not give the outputs the trained model gives; please report this with "
            "its config"
        )
    leaves = flatten(trained.variables["params"])[0].values()
    parameters = sum(leaf.size for leaf in leaves)
    return Assessment(
        trained.name,
        parameters,
        nbytes,
        validation,
        metrics={"validation": expected.values},
        costs=costs(experiment, trained.model, trained.packed, file.parent),
    )


def _constructor_call(model: Model) -> str:
    """Return the call that makes a module, without defaults; of other models, a name.

    Addresses are left out, as they differ between processes.
    """
    if isinstance(model, type) or not dataclasses.is_dataclass(model):
        return getattr(model, "__qualname__", type(model).__qualname__)
    arguments = []
    for each in dataclasses.fields(model):
        if not each.init or each.name in ("parent", "name"):
            continue
        value = repr(getattr(model, each.name))
        # Compared as text, as the == of arrays gives no bool.
        if value != repr(each.default) and len(value) <= LONGEST:
            arguments.append(f"{each.name}={value}")
    text = re.sub(r" at 0x[0-9a-f]+", "", ", ".join(arguments))
    return f"{type(model).__name__}({text})"


def metrics_on_test(
    experiment: Experiment, apply: ModelFn, file: Path, rules: Rules = ()
) -> dict[str, float]:
    """Return the metrics of an artifact, read from disk, on the test split."""
    variables = from_file(experiment, file, rules)
    return measured(experiment, apply, variables, experiment.data.test).values


def judge(
    row: Assessment,
    student_nbytes: int,
    reference: float,
    requirement: Requirement,
    metric: Metric = ACCURACY,
    further: Sequence[tuple[Metric, float]] = (),
) -> Assessment:
    """Decide whether a compressed network meets the requirement, and say why.

    Args:
      row: what was measured of it.
      student_nbytes: bytes of the float32 student's artifact.
      reference: the metric of the reference on validation data.
      requirement: the requirement.
      metric: what is measured.
      further: other metrics of the task, each with the reference's value.

    Returns:
      The row with ``accurate``, ``fits``, ``accepted`` and ``reason``.

    Example:
      >>> import compress_jax as cj
      >>> wanted = cj.search.Requirement(max_drop=0.005, min_ratio=20)
      >>> row = cj.search.Assessment("a", 2500, 900, validation=0.97)
      >>> cj.search.judge(row, 10_000, 0.98, wanted).reason
      'accuracy 97.00 % is below 97.50 %; 11.1x smaller, not 20x'
      >>> row = cj.search.Assessment("b", 2500, 400, validation=0.98)
      >>> cj.search.judge(row, 10_000, 0.98, wanted).reason
      'accuracy 98.00 % is at least 97.50 %; 25.0x smaller; 400 bytes'
    """
    values = row.metrics.get("validation", {})
    drops = [(metric, row.validation, reference, requirement.max_drop)]
    for each, expected in further:
        if each.name in requirement.max_drops:
            drops.append((each, values[each.name], expected, requirement.max_drops[each.name]))
    measured = [_compared(*each) for each in drops]
    limited = _limits(row, student_nbytes, requirement)
    accurate = all(met for met, _ in measured)
    fits = all(met for met, _ in limited)
    # A refusal names only what was missed, an acceptance all that was met.
    accepted = accurate and fits
    reason = "; ".join(text for met, text in (*measured, *limited) if met == accepted)
    drop = metric.loss(row.validation, reference)
    return replace(row, accurate=accurate, accepted=accepted, reason=reason, drop=drop, fits=fits)


def _compared(metric: Metric, value: float, reference: float, drop: float) -> tuple[bool, str]:
    """Tell whether a metric is good enough, and how it stands to the limit, in words."""
    # The limit is a difference of decimal fractions.
    good = metric.loss(value, reference) <= drop + 1e-9
    if metric.higher_is_better:
        limit = reference - drop
        stands = "at least" if good else "below"
    else:
        limit = reference + drop
        stands = "at most" if good else "above"
    return good, f"{metric.name} {metric.text(value)} is {stands} {metric.text(limit)}"


def _limits(
    row: Assessment, student_nbytes: int, requirement: Requirement
) -> list[tuple[bool, str]]:
    """Tell of each limit that is not a metric whether it is kept, in words."""
    ratio = student_nbytes / row.nbytes
    small = ratio >= requirement.min_ratio
    fits = row.nbytes <= requirement.max_bytes
    found = [
        (small, f"{ratio:.1f}x smaller" + ("" if small else f", not {requirement.min_ratio:g}x")),
        (
            fits,
            f"{row.nbytes:,} bytes" + ("" if fits else f", more than {requirement.max_bytes:,}"),
        ),
    ]
    for name, unit in COSTS.items():
        limit = getattr(requirement, f"max_{name}")
        if math.isfinite(limit):
            value = row.costs[name]
            met = value <= limit
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            found.append((met, f"{text} {unit}" + ("" if met else f", more than {limit:,}")))
    if requirement.min_throughput:
        rate = 1e3 * requirement.batch / row.costs["latency_ms"]
        met = rate >= requirement.min_throughput
        text = f"{rate:,.4g} examples a second"
        found.append((met, text + ("" if met else f", fewer than {requirement.min_throughput:,}")))
    return found


def reference(rows: Sequence[Assessment], requirement: Requirement) -> Assessment:
    """Return the network whose metric on validation data a candidate is compared with.

    Args:
      rows: the teacher, if there is one, and the student in float32.
      requirement: says which.

    Returns:
      One of them.

    Example:
      >>> import compress_jax as cj
      >>> teacher = cj.search.Assessment("teacher", 10, 40, 0.9)
      >>> student = cj.search.Assessment("student", 10, 40, 0.8)
      >>> wanted = cj.search.Requirement(reference="student")
      >>> cj.search.reference([teacher, student], wanted).name
      'student'
    """
    return rows[-1] if requirement.reference == "student" else rows[0]


def finished(order: str, rows: Sequence[Assessment]) -> bool:
    """Decide from what was tried so far whether to stop trying.

    From mild to strong, accuracy falls and size falls. So ``"mild_first"`` ends with the first
    candidate that loses too much accuracy, and ``"strong_first"`` with the first one that does not:
    every milder candidate would be larger.

    Args:
      order: see `Experiment.order`.
      rows: the candidates tried, in order.

    Returns:
      True if, by their order, no remaining candidate can do better.

    Example:
      >>> import compress_jax as cj
      >>> good = cj.search.Assessment("mild", 10, 40, 0.9, accurate=True)
      >>> [cj.search.finished(o, [good]) for o in ("mild_first", "strong_first", "all")]
      [False, True, False]
    """
    if not rows or order == "all":
        return False
    accurate = bool(rows[-1].accurate)
    # By accuracy alone: of two accurate candidates the stronger is the smaller.
    return accurate if order == "strong_first" else not accurate


def choose(rows: Sequence[Assessment], metric: Metric = ACCURACY) -> Assessment:
    """Return the smallest accepted candidate, else the most accurate one (the smaller at a tie).

    Args:
      rows: the candidates tried, at least one.
      metric: what is measured.

    Returns:
      One of them.

    Example:
      >>> import compress_jax as cj
      >>> accepted = cj.search.Assessment("a", 10, 40, 0.9, accepted=True)
      >>> refused = cj.search.Assessment("b", 10, 20, 0.8, accepted=False)
      >>> cj.search.choose([accepted, refused]).name
      'a'
    """
    accepted = [row for row in rows if row.accepted]
    if accepted:
        return min(accepted, key=lambda row: row.nbytes)
    # Nothing passed: the best there was, for which the run then says that it is not enough.
    sign = 1 if metric.higher_is_better else -1
    return max(rows, key=lambda row: (sign * row.validation, -row.nbytes))
