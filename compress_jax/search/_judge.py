"""Measure what was trained; are the requirements met? If not, what next?

`judge`, `reference`, `finished` and `choose` are pure functions of measured numbers.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from compress_jax.core.errors import CompressError
from compress_jax.core.packed import unpack
from compress_jax.core.paths import flatten
from compress_jax.core.types import ModelFn, PyTree
from compress_jax.data import Data
from compress_jax.export import load, save
from compress_jax.search._experiment import Experiment, Requirement, Variables
from compress_jax.train import accuracy, logits


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

    @property
    def bits(self) -> float:
        """Bits on disk for each parameter, everything in the file counted."""
        return 8 * self.nbytes / self.parameters

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and `bits`, as JSON takes them."""
        return {**asdict(self), "bits": self.bits}


class Trained(NamedTuple):
    """A network at the end of its training.

    Attributes:
      name: of its row.
      model: the Linen module.
      variables: those that the forward pass of training used.
      packed: the same with packed leaves, as they are stored.
    """

    name: str
    model: nn.Module
    variables: Variables
    packed: PyTree


def assess(
    experiment: Experiment,
    trained: Trained,
    file: Path,
    metadata: dict[str, Any],
    *,
    coded: bool = False,
) -> Assessment:
    """Write a network to disk, read it back, and measure it on validation data.

    What is read must give the same logits as what was trained, bit for bit.

    Args:
      experiment: for the data.
      trained: the network.
      file: the artifact to write.
      metadata: to store in it, as JSON takes it.
      coded: how to write it, see `export.save`.

    Returns:
      The row, not judged yet.

    Raises:
      CompressError: if the file gives other logits.
    """
    data = experiment.data
    apply: ModelFn = trained.model.apply
    expected = logits(apply, trained.variables, data.validation)  # [examples, classes]
    validation = float((expected.argmax(-1) == data.validation["label"]).mean())
    metadata = {
        "experiment": experiment.name,
        "name": trained.name,
        "model": _constructor_call(trained.model),
        **metadata,
        "data": data.name,
        "data_sha256": data.fingerprint,
        "validation": validation,
    }
    nbytes = save(file, trained.packed, metadata, coded=coded)
    if not np.array_equal(logits(apply, unpack(load(file)[0]), data.validation), expected):
        raise CompressError(
            f"{file} does not give the logits the trained model gives; please report this with "
            "its config"
        )
    leaves = flatten(trained.variables["params"])[0].values()
    return Assessment(trained.name, sum(leaf.size for leaf in leaves), nbytes, validation)


def _constructor_call(model: nn.Module) -> str:
    """Return the call that makes a module, without defaults.

    Addresses are left out, as they differ between processes.
    """
    arguments = []
    for field in dataclasses.fields(model):
        if not field.init or field.name in ("parent", "name"):
            continue
        value = repr(getattr(model, field.name))
        if value != repr(field.default):
            arguments.append(f"{field.name}={value}")
    text = re.sub(r" at 0x[0-9a-f]+", "", ", ".join(arguments))
    return f"{type(model).__name__}({text})"


def accuracy_on_test(model: nn.Module, file: Path, data: Data) -> float:
    """Return the accuracy of an artifact, read from disk, on the test split."""
    apply: ModelFn = model.apply
    return accuracy(apply, unpack(load(file)[0]), data.test)


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
      >>> import compress_jax as cj
      >>> wanted = cj.search.Requirement(max_drop=0.005, min_ratio=20)
      >>> row = cj.search.Assessment("a", 2500, 900, validation=0.97)
      >>> cj.search.judge(row, 10_000, 0.98, wanted).reason
      'accuracy 97.00 % is below 97.50 %; 11.1x smaller, not 20x'
      >>> row = cj.search.Assessment("b", 2500, 400, validation=0.98)
      >>> cj.search.judge(row, 10_000, 0.98, wanted).reason
      'accuracy 98.00 % is at least 97.50 %; 25.0x smaller; 400 bytes'
    """
    floor = reference - requirement.max_drop
    ratio = student_nbytes / row.nbytes
    accurate = row.validation >= floor - 1e-9  # the floor is a difference of decimal fractions
    small = ratio >= requirement.min_ratio
    fits = row.nbytes <= requirement.max_bytes
    percent = f"accuracy {100 * row.validation:.2f} %"
    verdicts = (
        (accurate, f"{percent} is {'at least' if accurate else 'below'} {100 * floor:.2f} %"),
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
    """Return the network whose validation accuracy a candidate is compared with.

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
    return accurate if order == "strong_first" else not accurate


def choose(rows: Sequence[Assessment]) -> Assessment:
    """Return the smallest accepted candidate, else the most accurate one (the smaller at a tie).

    Args:
      rows: the candidates tried, at least one.

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
    return max(rows, key=lambda row: (row.validation, -row.nbytes))
