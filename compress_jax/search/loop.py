"""The loop: train, compress, evaluate; requirements met? If not, choose again. Short, so that you can fork it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress_jax.core.compression import Compression
from compress_jax.core.record import sealed
from compress_jax.export import write_atomically
from compress_jax.search import stages
from compress_jax.search.check import check
from compress_jax.search.experiment import Candidate, Experiment, Network
from compress_jax.search.judge import Assessment, choose, finished, judge, reference

TEACHER, STUDENT, ARTIFACT, RESULTS = "teacher.safetensors", "student.safetensors", "artifact.safetensors", "results.json"


@dataclass(frozen=True)
class Result:
    """What a run found.

    Attributes:
      rows: teacher, student, and every candidate tried, in order.
      chosen: the row of the artifact that was written.
      artifact: the file.
    """

    rows: tuple[Assessment, ...]
    chosen: Assessment
    artifact: Path

    @property
    def met(self) -> bool:
        """Whether the artifact meets the requirement; if not, it is only the best there was."""
        return bool(self.chosen.accepted)


def compress(
    experiment: Experiment, workdir: str | Path, *, about: dict[str, Any] | None = None, say: Callable[[str], None] = print
) -> Result:
    """Find the smallest student that meets the requirement, and leave it in ``workdir`` as one file.

    First all of it is traced on shapes (see `check`), so that what cannot work is found before anything is trained. Then:
    data -> teacher -> student -> candidate: train under its compression, write, read back, evaluate on validation data,
    judge -> accepted or refused, with the reason -> next candidate. Test data is touched once, for the three networks of
    the final table. Started again after any kind of stop, it continues and ends with the same numbers.

    Args:
      experiment: what to do.
      workdir: where everything goes; made if missing. It belongs to one experiment: what it holds is not trained again.
      about: kept in the artifacts' metadata, as JSON takes it (config and arguments, say).
      say: receives one line for each decision.

    Returns:
      The rows, the chosen one, and the file.

    Raises:
      ConfigError: if the pieces do not fit together, or a stage in ``workdir`` was made of something else.
      Interrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
      CompressError: as its pieces do.

    Example:
      >>> import optax, tempfile
      >>> from compress_jax import data, models, quantize
      >>> from compress_jax.search import Network, Training
      >>> folder = Path(tempfile.mkdtemp())
      >>> digits, brief = data.load("digits", data_dir=folder), Training(optax.adam(3e-3), steps=10)
      >>> student = Network(models.LeNet300100(), brief)
      >>> small = Candidate("int8", quantize.uniform(8), brief)
      >>> result = compress(Experiment("digits", digits, student, (small,)), folder / "run", say=lambda line: None)
      >>> result.artifact.name, result.chosen.nbytes < result.rows[0].nbytes / 3
      ('artifact.safetensors', True)
    """
    workdir, about = Path(workdir).absolute(), about or {}
    for sentence in check(experiment, about):
        say(sentence)
    teacher = None
    rows: list[Assessment] = []
    if isinstance(experiment.teacher, Network):
        variables = stages.obtain(experiment, experiment.teacher, "teacher", workdir / "teacher", None)
        model, file = experiment.teacher.model, workdir / TEACHER
        teacher = stages.frozen(experiment, model, variables)
        rows.append(stages.assess(experiment, model, "teacher", teacher.variables, teacher.variables, file, about))
        say(f"teacher: validation accuracy {100 * rows[-1].validation:.2f} %, {rows[-1].nbytes:,} bytes")
    learns_from = teacher if experiment.float32_student == "teacher" else None
    student = stages.obtain(experiment, experiment.student, "student", workdir / "student", learns_from)
    model = experiment.student.model
    rows.append(stages.assess(experiment, model, "student", student, student, workdir / STUDENT, about))
    if experiment.teacher == "student":
        teacher = stages.frozen(experiment, model, student)
    say(f"student in float32: validation accuracy {100 * rows[-1].validation:.2f} %, {rows[-1].nbytes:,} bytes")

    base, held_against, tried = rows[-1], reference(rows, experiment.requirement), []
    for candidate in experiment.candidates:
        row = _try(experiment, candidate, student, teacher, workdir, about)
        row = judge(row, base.nbytes, held_against.validation, experiment.requirement)
        tried.append(row)
        say(f"{candidate.name}: {'accepted' if row.accepted else 'refused'}: {row.reason}")
        if finished(experiment.order, tried):
            break
    return _conclude(experiment, rows, tried, workdir)


def _try(
    experiment: Experiment, candidate: Candidate, student: Any, teacher: Any, workdir: Path, about: dict[str, Any]
) -> Assessment:
    """Train the student under one compression and measure what comes out."""
    model, directory = experiment.student.model, workdir / "candidates" / candidate.name
    stage, c = f"candidate {candidate.name}", stages.fitted(experiment, candidate, student)
    state = stages.train(experiment, model, student, c, candidate.training, stage, directory, teacher, start=student)
    packed = {"params": c.pack(state.params, state.compression), **state.model_state}
    about = {**about, "left_alone": _by_reason(c, state.params)}
    seen, file = state.variables(c), directory / ARTIFACT
    return stages.assess(experiment, model, candidate.name, packed, seen, file, about, coded=experiment.coded)


def _by_reason(compression: Compression, params: Any) -> dict[str, list[str]]:
    """Return the leaves a compression leaves alone, by reason."""
    reasons: dict[str, list[str]] = {}
    for path, reason in compression.skipped(params).items():
        reasons.setdefault(reason, []).append(path)
    return reasons


def _conclude(experiment: Experiment, rows: list[Assessment], tried: Sequence[Assessment], workdir: Path) -> Result:
    """Copy the chosen artifact, measure the final table on test data, and write it down."""
    chosen, artifact = choose(tried), workdir / ARTIFACT
    write_atomically(artifact, (workdir / "candidates" / chosen.name / ARTIFACT).read_bytes())
    student = experiment.student.model
    measured = {chosen.name: stages.measure_on_test(experiment, student, artifact)}
    measured["student"] = stages.measure_on_test(experiment, student, workdir / STUDENT)
    if isinstance(experiment.teacher, Network):
        measured["teacher"] = stages.measure_on_test(experiment, experiment.teacher.model, workdir / TEACHER)
    table = [replace(row, test=measured.get(row.name)) for row in [*rows, *tried]]
    summary = {"experiment": experiment.name, "chosen": chosen.name, "met": bool(chosen.accepted)}
    write_atomically(workdir / RESULTS, sealed({**summary, "rows": [row.as_dict() for row in table]}))
    return Result(tuple(table), next(row for row in table if row.name == chosen.name), artifact)
