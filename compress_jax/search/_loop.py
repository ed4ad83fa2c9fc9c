"""The loop: train, compress, evaluate; requirements met? If not, choose again.

It is short, so that you can fork it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from compress_jax.core.compression import Compression
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.record import sealed
from compress_jax.core.types import Params
from compress_jax.distill import Teacher
from compress_jax.export import write_atomically
from compress_jax.search._check import check
from compress_jax.search._experiment import Candidate, Experiment, Network, Variables
from compress_jax.search._judge import (
    Assessment,
    Trained,
    accuracy_on_test,
    assess,
    choose,
    finished,
    judge,
    reference,
)
from compress_jax.search._stage import Stage, train, trained_variables

TEACHER = "teacher.safetensors"
STUDENT = "student.safetensors"
ARTIFACT = "artifact.safetensors"
RESULTS = "results.json"


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
      rows: teacher, student, and every candidate tried, in order.
      chosen: the row of the artifact that was written.
      artifact: the file.

    Example:
      >>> import compress_jax as cj
      >>> row = cj.search.Assessment("int4", 2500, 1250, validation=0.97, accepted=True)
      >>> cj.search.Result((row,), row, Path("artifact.safetensors")).met
      True
    """

    rows: tuple[Assessment, ...]
    chosen: Assessment
    artifact: Path

    @property
    def met(self) -> bool:
        """Whether the artifact meets the requirement; if not, it is only the best there was."""
        return bool(self.chosen.accepted)


@renamed_arguments(about="metadata", say="log_fn")
def compress(
    experiment: Experiment,
    workdir: str | Path,
    *,
    metadata: dict[str, Any] | None = None,
    log_fn: Callable[[str], None] = print,
) -> Result:
    """Find the smallest student that meets the requirement; write it as one file.

    First all of it is traced on shapes (see `check`), so that what cannot work is found before
    anything is trained. Then: data -> teacher -> student -> candidate: train under its compression,
    write, read back, evaluate on validation data, judge -> accepted or refused, with the reason ->
    next candidate. Test data is used once, for the three networks of the final table. Started
    again after any kind of stop, it continues and ends with the same numbers.

    Args:
      experiment: what to do.
      workdir: where everything goes; made if missing. It belongs to one experiment: what it holds
        is not trained again.
      metadata: stored in the artifacts, as JSON takes it (config and arguments, for example).
      log_fn: called with one line for each decision.

    Returns:
      The rows, the chosen one, and the file.

    Raises:
      ConfigError: if the pieces do not fit together, or a stage in ``workdir`` was made of
        something else.
      Interrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
      CompressError: as its pieces do.

    Example:
      >>> import optax, tempfile
      >>> import compress_jax as cj
      >>> folder = Path(tempfile.mkdtemp())
      >>> digits = cj.data.load("digits", data_dir=folder)
      >>> training = cj.search.Training(optax.adam(3e-3), steps=10)
      >>> student = cj.search.Network(cj.models.LeNet300100(), training)
      >>> small = cj.search.Candidate("int8", cj.quantize.uniform(8), training)
      >>> experiment = cj.search.Experiment("digits", digits, student, (small,))
      >>> result = cj.search.compress(experiment, folder / "run", log_fn=lambda line: None)
      >>> result.artifact.name, result.chosen.nbytes < result.rows[0].nbytes / 3
      ('artifact.safetensors', True)
    """
    run = _Run(experiment, Path(workdir).absolute(), metadata or {})
    for note in check(experiment, run.metadata):
        log_fn(note)

    # Data -> teacher, unless there is none or the student teaches itself.
    baselines: list[Assessment] = []
    teacher = None
    if isinstance(experiment.teacher, Network):
        teacher, row = run.teacher(experiment.teacher)
        baselines.append(row)
        log_fn(f"teacher: {_measured(row)}")

    # -> student in float32.
    student, row = run.student(teacher)
    baselines.append(row)
    log_fn(f"student in float32: {_measured(row)}")
    if experiment.teacher == "student":
        teacher = experiment.freeze(experiment.student.model, student)

    # -> choose a compression -> train -> evaluate -> requirement met? No: choose the next.
    target = reference(baselines, experiment.requirement).validation
    tried: list[Assessment] = []
    for candidate in experiment.candidates:
        row = run.candidate(candidate, student, teacher)
        row = judge(row, baselines[-1].nbytes, target, experiment.requirement)
        tried.append(row)
        log_fn(f"{candidate.name}: {'accepted' if row.accepted else 'refused'}: {row.reason}")
        if finished(experiment.order, tried):
            break

    # -> output.
    return run.conclude(baselines, tried)


class _Run(NamedTuple):
    """An experiment and the folder it runs in; each method is one step of the loop."""

    experiment: Experiment
    workdir: Path
    metadata: dict[str, Any]

    def teacher(self, network: Network) -> tuple[Teacher, Assessment]:
        """Train or restore the teacher, freeze it, and measure it in the dtype it is stored in."""
        directory = self.workdir / "teacher"
        variables = trained_variables(self.experiment, network, "teacher", directory, None)
        teacher = self.experiment.freeze(network.model, variables)
        stored = teacher.variables
        trained = Trained("teacher", network.model, stored, stored)
        return teacher, assess(self.experiment, trained, self.workdir / TEACHER, self.metadata)

    def student(self, teacher: Teacher | None) -> tuple[Variables, Assessment]:
        """Train or restore the student in float32, and measure it."""
        network = self.experiment.student
        if self.experiment.float32_student == "labels":
            teacher = None
        directory = self.workdir / "student"
        variables = trained_variables(self.experiment, network, "student", directory, teacher)
        trained = Trained("student", network.model, variables, variables)
        return variables, assess(self.experiment, trained, self.workdir / STUDENT, self.metadata)

    def candidate(
        self, candidate: Candidate, student: Variables, teacher: Teacher | None
    ) -> Assessment:
        """Train the student under one compression, pack it, and measure what was packed."""
        experiment = self.experiment
        model = experiment.student.model
        compression = candidate.bind(model, student, experiment.data.train["image"])
        name = f"candidate {candidate.name}"
        stage = Stage(name, model, candidate.training, teacher, compression, start=student)
        directory = self._candidate_directory(candidate.name)
        state = train(experiment, stage, directory)
        params = compression.pack(state.params, state.compression)
        trained = Trained(
            candidate.name,
            model,
            variables=state.variables(compression),
            packed={"params": params, **state.model_state},
        )
        metadata = {**self.metadata, "left_alone": _paths_by_reason(compression, state.params)}
        file = directory / ARTIFACT
        return assess(experiment, trained, file, metadata, coded=experiment.coded)

    def conclude(self, baselines: Sequence[Assessment], tried: Sequence[Assessment]) -> Result:
        """Copy the chosen artifact, measure the final table on test data, and write both."""
        chosen = choose(tried)
        artifact = self.workdir / ARTIFACT
        source = self._candidate_directory(chosen.name) / ARTIFACT
        write_atomically(artifact, source.read_bytes())
        tests = self._test_accuracies(chosen.name)
        rows = tuple(replace(row, test=tests.get(row.name)) for row in [*baselines, *tried])
        results = {
            "experiment": self.experiment.name,
            "chosen": chosen.name,
            "met": bool(chosen.accepted),
            "rows": [row.as_dict() for row in rows],
        }
        write_atomically(self.workdir / RESULTS, sealed(results))
        return Result(rows, next(row for row in rows if row.name == chosen.name), artifact)

    def _test_accuracies(self, chosen: str) -> dict[str, float]:
        """Return the test accuracies of the artifact, the student and the teacher, by name."""
        data = self.experiment.data
        student = self.experiment.student.model
        tests = {
            chosen: accuracy_on_test(student, self.workdir / ARTIFACT, data),
            "student": accuracy_on_test(student, self.workdir / STUDENT, data),
        }
        teacher = self.experiment.teacher
        if isinstance(teacher, Network):
            tests["teacher"] = accuracy_on_test(teacher.model, self.workdir / TEACHER, data)
        return tests

    def _candidate_directory(self, name: str) -> Path:
        return self.workdir / "candidates" / name


def _measured(row: Assessment) -> str:
    return f"validation accuracy {100 * row.validation:.2f} %, {row.nbytes:,} bytes"


def _paths_by_reason(compression: Compression, params: Params) -> dict[str, list[str]]:
    """Return the leaves that a compression skips, by reason."""
    paths: dict[str, list[str]] = {}
    for path, reason in compression.skipped(params).items():
        paths.setdefault(reason, []).append(path)
    return paths
