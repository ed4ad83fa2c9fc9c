"""Are the requirements met? If not, what next? Pure functions of measured numbers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from compress_jax.search._experiment import Requirement


@dataclass(frozen=True)
class Assessment:
    """What was measured of one network; a row of the results table.

    Attributes:
      name: ``"teacher"``, ``"student"`` or the candidate's name.
      parameters: entries of its params, as a dense model.
      nbytes: its artifact's bytes on disk, header and all.
      validation: accuracy on the validation split, 0 to 1.
      test: accuracy on the test split, measured only for what is reported in the end; else None.
      accurate: whether its validation accuracy met the requirement; None for teacher and student.
      accepted: whether it met the whole requirement; None for teacher and student.
      reason: why, as a sentence.
    """

    name: str
    parameters: int
    nbytes: int
    validation: float
    test: float | None = None
    accurate: bool | None = None
    accepted: bool | None = None
    reason: str = ""

    @property
    def bits(self) -> float:
        """Bits on disk for each parameter, everything in the file counted."""
        return 8 * self.nbytes / self.parameters

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and `bits`, as JSON takes them."""
        return {**asdict(self), "bits": self.bits}


def judge(
    row: Assessment, student_nbytes: int, reference: float, requirement: Requirement
) -> Assessment:
    """Decide whether a compressed network meets the requirement, and say why.

    Args:
      row: what was measured of it.
      student_nbytes: bytes of the float32 student's artifact.
      reference: validation accuracy of the reference, 0 to 1.
      requirement: the requirement.

    Returns:
      The row with ``accurate``, ``accepted`` and ``reason``.

    Example:
      >>> wanted = Requirement(max_drop=0.005, min_ratio=20)
      >>> judge(Assessment("a", 2500, 900, validation=0.97), 10_000, 0.98, wanted).reason
      'accuracy 97.00 % is below 97.50 %; 11.1x smaller, not 20x'
      >>> judge(Assessment("b", 2500, 400, validation=0.98), 10_000, 0.98, wanted).reason
      'accuracy 98.00 % is at least 97.50 %; 25.0x smaller; 400 bytes'
    """
    floor, ratio = reference - requirement.max_drop, student_nbytes / row.nbytes
    accurate = row.validation >= floor - 1e-9  # the floor is a difference of decimal fractions
    small, fits = ratio >= requirement.min_ratio, row.nbytes <= requirement.max_bytes
    verdicts = (
        (
            accurate,
            f"accuracy {100 * row.validation:.2f} % is {'at least' if accurate else 'below'} "
            f"{100 * floor:.2f} %",
        ),
        (small, f"{ratio:.1f}x smaller" + ("" if small else f", not {requirement.min_ratio:g}x")),
        (
            fits,
            f"{row.nbytes:,} bytes" + ("" if fits else f", more than {requirement.max_bytes:,}"),
        ),
    )
    accepted = accurate and small and fits
    reason = "; ".join(text for met, text in verdicts if met == accepted)
    return replace(row, accurate=accurate, accepted=accepted, reason=reason)


def reference(rows: Sequence[Assessment], requirement: Requirement) -> Assessment:
    """Return the network whose validation accuracy a candidate is held against.

    Args:
      rows: the teacher, if there is one, and the student in float32.
      requirement: says which.

    Returns:
      One of them.

    Example:
      >>> teacher, student = Assessment("teacher", 10, 40, 0.9), Assessment("student", 10, 40, 0.8)
      >>> [reference([teacher, student], Requirement(reference=name)).name for name in ("teacher", "student")]
      ['teacher', 'student']
    """
    return rows[-1] if requirement.reference == "student" else rows[0]


def finished(order: str, rows: Sequence[Assessment]) -> bool:
    """Decide from what was tried so far whether to stop trying.

    From mild to strong, accuracy falls and size falls. So a candidate that lost too much accuracy
    ends the way up, and one that kept enough ends the way down: what is milder is larger.

    Args:
      order: see `Experiment.order`.
      rows: the candidates tried, in order.

    Returns:
      True if the candidates left cannot do better, as their order promises.

    Example:
      >>> good = Assessment("mild", 10, 40, 0.9, accurate=True)
      >>> finished("mild_first", [good]), finished("strong_first", [good]), finished("all", [good])
      (False, True, False)
    """
    return bool(rows) and order != "all" and bool(rows[-1].accurate) == (order == "strong_first")


def choose(rows: Sequence[Assessment]) -> Assessment:
    """Return the smallest candidate that was accepted; if none was, the most accurate one (the smaller at a tie).

    Args:
      rows: the candidates tried, at least one.

    Returns:
      One of them.

    Example:
      >>> choose([Assessment("a", 10, 40, 0.9, accepted=True), Assessment("b", 10, 20, 0.8, accepted=False)]).name
      'a'
    """
    accepted = [row for row in rows if row.accepted]
    if accepted:
        return min(accepted, key=lambda row: row.nbytes)
    return max(rows, key=lambda row: (row.validation, -row.nbytes))
