"""The loop: train, compress, evaluate; requirements met? If not, choose again.

It is short, so that you can fork it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from compress_jax.core.compression import Compression, identity
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.errors import ConfigError
from compress_jax.core.record import sealed
from compress_jax.core.types import JsonObject, Params
from compress_jax.distill import Teacher
from compress_jax.export import write_atomically
from compress_jax.search._automatic import Automatic
from compress_jax.search._candidate import LONGER, Candidate, Method, Subject
from compress_jax.search._check import check
from compress_jax.search._comparison import Comparison
from compress_jax.search._divided import asked, beside, divided, from_file, rules_of
from compress_jax.search._experiment import Experiment
from compress_jax.search._ingredients import ingredients
from compress_jax.search._judge import (
    Assessment,
    Trained,
    assess,
    choose,
    finished,
    judge,
    metrics_on_test,
    reference,
)
from compress_jax.search._measuring import Measuring
from compress_jax.search._method import carry_out, rebuilt_model
from compress_jax.search._network import Network, Training, Variables
from compress_jax.search._row import read_row, write_row
from compress_jax.search._space import WHOLE, Proposal
from compress_jax.search._stage import trained_variables
from compress_jax.tasks import Metric
from compress_jax.tasks._task import REFERENCE
from compress_jax.train._processes import once

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
      comparison: what student and artifact answer, if the experiment asks for it.

    Example:
      >>> import compress_jax as cj
      >>> row = cj.search.Assessment("int4", 2500, 1250, validation=0.97, accepted=True)
      >>> cj.search.Result((row,), row, Path("artifact.safetensors")).met
      True
    """

    rows: tuple[Assessment, ...]
    chosen: Assessment
    artifact: Path
    comparison: Comparison | None = None

    @property
    def met(self) -> bool:
        """Whether the artifact meets the requirement; if not, it is only the best there was."""
        return bool(self.chosen.accepted)


@renamed_arguments(about="metadata", say="log_fn")
def compress(
    experiment: Experiment,
    workdir: str | Path,
    *,
    metadata: JsonObject | None = None,
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
      >>> int8 = cj.at("**/kernel", cj.quantize.uniform(8))
      >>> small = cj.search.Candidate("int8", int8, training)
      >>> experiment = cj.search.Experiment("digits", digits, student, (small,))
      >>> result = cj.search.compress(experiment, folder / "run", log_fn=lambda line: None)
      >>> result.artifact.name, result.chosen.nbytes < result.rows[0].nbytes / 3
      ('artifact.safetensors', True)
    """
    metadata = metadata or {}
    for note in (*experiment.data.notes, *check(experiment, metadata)):
        log_fn(note)
    run = _Run(experiment, Path(workdir).absolute(), metadata, log_fn)
    metric = experiment.task.metric

    # Data -> teacher, unless there is none or the student teaches itself.
    baselines: list[Assessment] = []
    teacher = None
    if isinstance(experiment.teacher, Network):
        run, teacher, row = run.teacher(experiment.teacher)
        baselines.append(row)
        log_fn(f"teacher: {_measured(row, metric)}")

    # -> student in float32.
    run, student, row = run.student(teacher)
    baselines.append(row)
    log_fn(f"student in float32: {_measured(row, metric)}")
    if experiment.teacher == "student":
        teacher = experiment.freeze(experiment.student.pure, student)

    # -> choose a method -> apply and train it -> evaluate -> requirement met? No: choose the next.
    run = run._replace(baselines=tuple(baselines))
    tried: list[Assessment] = []
    for candidate in experiment.candidates:
        tried.append(run.judged(candidate, student, teacher))
        if finished(experiment.order, tried):
            break
    if experiment.search is not None:
        run, found = run.searched(student, teacher)
        tried += found

    # -> output, beside what the same training gives without compression.
    chosen = choose(tried, metric)
    if row := run.longer(chosen.name, student, teacher):
        baselines.append(row)
        log_fn(f"student in float32, trained on as {chosen.name}: {_measured(row, metric)}")
    return run.conclude(baselines, tried, chosen)


def with_proposals(experiment: Experiment, proposals: Sequence[Proposal]) -> Experiment:
    """Return an experiment whose candidates are also what its search proposed."""
    search = experiment.search
    if search is None or not proposals:
        return experiment
    found = tuple(each.candidate(search) for each in proposals)
    return replace(experiment, candidates=(*experiment.candidates, *found))


def with_labels(experiment: Experiment, network: Network, variables: Variables) -> Experiment:
    """Where a task's labels are what the teacher says, ask it of every split."""
    if experiment.task.labels is not None or REFERENCE in experiment.data.train:
        return experiment
    data = experiment.data
    apply = network.pure.apply
    variables = divided(experiment, variables, network.rules)
    # Once, ahead: every metric of every network then compares with the same outputs.
    given = {"train": data.train, "validation": data.validation, "test": data.test}
    splits = {
        part: {**split, REFERENCE: asked(experiment, apply, variables, split)}
        for part, split in given.items()
    }
    return replace(experiment, data=replace(data, **splits))


def labelled(experiment: Experiment, workdir: Path) -> Experiment:
    """Return the experiment of a finished run, with the labels that its teacher gave."""
    if experiment.task.labels is not None:
        return experiment
    network = experiment.student
    file = STUDENT
    if isinstance(experiment.teacher, Network):
        network = experiment.teacher
        file = TEACHER
    return with_labels(experiment, network, from_file(experiment, workdir / file, network.rules))


class _Run(NamedTuple):
    """An experiment and the folder it runs in; each method is one step of the loop."""

    experiment: Experiment
    workdir: Path
    metadata: JsonObject
    log_fn: Callable[[str], None]
    baselines: tuple[Assessment, ...] = ()
    proposals: tuple[Proposal, ...] = ()

    def teacher(self, network: Network) -> "tuple[_Run, Teacher, Assessment]":
        """Train or restore the teacher, freeze it, and measure it in the dtype it is stored in."""
        directory = self.workdir / "teacher"
        variables = trained_variables(self.experiment, network, "teacher", directory, None)
        teacher = self.experiment.freeze(network.pure, variables)
        # Measured and stored in the dtype in which it teaches.
        stored = teacher.variables
        run = self._labelled(network, stored)
        trained = Trained("teacher", network.pure, stored, stored, network.rules)
        return run, teacher, run.assess(trained, TEACHER)

    def student(self, teacher: Teacher | None) -> "tuple[_Run, Variables, Assessment]":
        """Train or restore the student in float32, and measure it."""
        network = self.experiment.student
        if self.experiment.float32_student == "labels":
            teacher = None
        directory = self.workdir / "student"
        variables = trained_variables(self.experiment, network, "student", directory, teacher)
        # Without a teacher the student's own outputs in float32 are what is right.
        run = self._labelled(network, variables) if teacher is None else self
        trained = Trained("student", network.pure, variables, variables, network.rules)
        return run, variables, run.assess(trained, STUDENT)

    def _labelled(self, network: Network, variables: Variables) -> "_Run":
        return self._replace(experiment=with_labels(self.experiment, network, variables))

    def assess(self, trained: Trained, file: str | Path, **metadata: object) -> Assessment:
        """Write a network into the folder, and measure what was written."""
        coded = self.experiment.coded and "records" in metadata  # only what is compressed
        own = {**self.metadata, **{name: each for name, each in metadata.items() if each}}
        row = assess(self.experiment, trained, self.workdir / file, own, coded=coded)
        # The first process decides: others whose numbers differed by a bit would go another way.
        return Assessment(**once(lambda: asdict(row)))

    def _known(self, subject: Subject, teacher: Teacher | None) -> dict[str, str]:
        """Return what decides the rows of a start's proposals, besides the proposals."""
        experiment = self.experiment
        required = experiment.requirement
        return ingredients(
            subject=subject.variables,
            model=subject.model.source,
            teacher=teacher.variables if teacher is not None else None,
            task=experiment.task,
            loss=experiment.loss,
            data=[experiment.data.fingerprint, experiment.data.train],
            settings=[experiment.seed, experiment.coded, required.timed, required.remembered],
            calls=[required.runtime, required.batch],
        )

    def judged(
        self, candidate: Candidate, student: Variables, teacher: Teacher | None
    ) -> Assessment:
        """Carry out a candidate, measure it, and decide whether it meets the requirement."""
        return self._judged(self.candidate(candidate, student, teacher))

    def _judged(self, row: Assessment) -> Assessment:
        requirement = self.experiment.requirement
        best = reference(self.baselines, requirement)
        values = best.metrics["validation"]
        further = [(each, values[each.name]) for each in self.experiment.task.metrics[1:]]
        metric = self.experiment.task.metric
        size = self.baselines[-1].nbytes
        row = judge(row, size, best.validation, requirement, metric, further)
        self.log_fn(f"{row.name}: {'accepted' if row.accepted else 'refused'}: {row.reason}")
        return row

    def searched(
        self, student: Variables, teacher: Teacher | None
    ) -> "tuple[_Run, list[Assessment]]":
        """Search the experiment's space; the run then knows what was proposed as candidates."""
        search = self.experiment.search
        assert search is not None
        subjects = {WHOLE: Subject(self.experiment.student.pure, student)}
        before = {WHOLE: self._known(subjects[WHOLE], teacher)}

        def begin(name: str, method: tuple[Method, ...]) -> Subject:
            folder = self.workdir / "starts" / name
            own = carry_out(
                self.experiment,
                Candidate(name, method),
                student,
                teacher,
                folder,
                name=f"start {name}",
            )
            before[name] = self._known(own, teacher)
            return own

        for name, method in search.starts.items():
            subjects[name] = begin(name, method)
        known: list[str] = []

        def assess(proposal: Proposal, begin: Subject) -> Assessment:
            candidate = proposal.candidate(search)
            done = len(proposal.begin(search))
            folder = self._candidate_directory(candidate.name)
            made_of = before[proposal.network] | ingredients(items=candidate.items[done:])
            # The first process decides, as the others would wait for it.
            kept = once(lambda: read_row(folder, made_of))
            if kept is not None:
                known.append(candidate.name)
                return self._judged(Assessment(**kept))
            row = self.candidate(candidate, student, teacher, begin, done)
            once(lambda: write_row(folder, made_of, row))
            return self._judged(row)

        automatic = Automatic(
            self.experiment,
            Measuring(self.experiment, self.workdir / "search", self.log_fn),
            subjects,
            begin,
            assess,
            lambda name: self._candidate_directory(name) / ARTIFACT,
            self.log_fn,
        )
        tried = automatic.run()
        trained = sum(bool(each.steps) for each in tried)
        self.log_fn(
            f"search: {len(tried)} proposals were measured, {trained} of them trained; "
            f"{len(known)} were known from before"
        )
        run = self._replace(
            experiment=with_proposals(self.experiment, tried), proposals=tuple(tried)
        )
        return run, [automatic.rows[each.name] for each in tried]

    def candidate(
        self,
        candidate: Candidate,
        student: Variables,
        teacher: Teacher | None,
        begin: Subject | None = None,
        done: int = 0,
    ) -> Assessment:
        """Apply a candidate's method to the student, pack it, and measure what was packed."""
        folder = self._candidate_directory(candidate.name)
        subject = carry_out(
            self.experiment, candidate, student, teacher, folder, begin=begin, done=done
        )
        for note in subject.notes:
            self.log_fn(f"{candidate.name}: {note}")
        # A method without a compression stores plain tensors; a solver brings a state of its own.
        compression = subject.compression or identity()
        params = subject.variables["params"]
        rest = {name: each for name, each in subject.variables.items() if name != "params"}
        rules = rules_of(self.experiment, candidate)
        with beside(self.experiment, subject.variables, rules):
            state = compression.init(params) if subject.state is None else subject.state
            viewed = {"params": compression.view(params, state), **rest}
            trained = Trained(
                candidate.name,
                subject.model,
                variables=divided(self.experiment, viewed, rules),
                packed={"params": compression.pack(params, state), **rest},
                rules=rules,
            )
        del viewed  # what is divided is not held whole any more
        return self.assess(
            trained,
            folder / ARTIFACT,
            left_alone=_paths_by_reason(compression, params),
            records=list(subject.records),
        )

    def longer(self, chosen: str, student: Variables, teacher: Teacher | None) -> Assessment | None:
        """Train the float32 student on, as a candidate was trained, and measure it."""
        candidate = next(each for each in self.experiment.candidates if each.name == chosen)
        trainings = tuple(item for item in candidate.items if isinstance(item, Training))
        # A candidate with a network of its own has no float32 student to compare with.
        own = not any(isinstance(item, Network) for item in candidate.items)
        if not (self.experiment.longer_student and own and candidate.steps):
            return None
        alone = replace(candidate, method=trainings, training=None)
        folder = self.workdir / LONGER
        subject = carry_out(self.experiment, alone, student, teacher, folder, name=LONGER)
        rules = self.experiment.student.rules
        trained = Trained(LONGER, subject.model, subject.variables, subject.variables, rules)
        return self.assess(trained, f"{LONGER}.safetensors")

    def conclude(
        self, baselines: Sequence[Assessment], tried: Sequence[Assessment], chosen: Assessment
    ) -> Result:
        """Copy the chosen artifact, measure the final table on test data, and write both."""
        artifact = self.workdir / ARTIFACT
        source = self._candidate_directory(chosen.name) / ARTIFACT
        once(lambda: write_atomically(artifact, source.read_bytes()))
        metric = self.experiment.task.metric
        tests = self._tests(chosen.name, baselines)
        rows = tuple(_with_test(row, tests, metric.name) for row in [*baselines, *tried])
        results = {
            "experiment": self.experiment.name,
            "task": self.experiment.task.name,
            "metric": {
                "name": metric.name,
                "percent": metric.percent,
                "higher_is_better": metric.higher_is_better,
            },
            "chosen": chosen.name,
            "met": bool(chosen.accepted),
            "rows": [row.as_dict() for row in rows],
        }
        if self.proposals:
            results["proposals"] = [each.record() for each in self.proposals]
        comparison = self._comparison(chosen.name)
        if comparison is not None:
            results["comparison"] = comparison.record()
        once(lambda: write_atomically(self.workdir / RESULTS, sealed(results)))
        return Result(rows, next(r for r in rows if r.name == chosen.name), artifact, comparison)

    def _comparison(self, chosen: str) -> Comparison | None:
        """Return what the float32 student and the artifact answer."""
        experiment = self.experiment
        if experiment.comparison is None:
            return None
        self.log_fn(f"comparing the student in float32 with {chosen}")
        own = next(each for each in experiment.candidates if each.name == chosen)
        found = experiment.comparison(
            {
                "student": from_file(experiment, self.workdir / STUDENT, experiment.student.rules),
                chosen: from_file(experiment, self.workdir / ARTIFACT, rules_of(experiment, own)),
            }
        )
        if not isinstance(found, Comparison):
            raise ConfigError(
                "Experiment: comparison must return a Comparison, and gave a "
                f"{type(found).__name__}"
            )
        return found.checked()

    def _tests(self, chosen: str, baselines: Sequence[Assessment]) -> dict[str, dict[str, float]]:
        """Return the metrics on test data of the artifact and what it is compared with."""
        experiment = self.experiment
        artifact = self.workdir / ARTIFACT
        model = rebuilt_model(experiment, artifact, chosen)
        own = next(each for each in experiment.candidates if each.name == chosen)
        rules = rules_of(experiment, own)
        # Only the rows of the final table: decisions rest on validation data alone.
        found = {chosen: metrics_on_test(experiment, model.apply, artifact, rules)}
        for row in baselines:
            network = experiment.teacher if row.name == "teacher" else None
            network = network if isinstance(network, Network) else experiment.student
            file = self.workdir / f"{row.name}.safetensors"
            apply = network.pure.apply
            found[row.name] = metrics_on_test(experiment, apply, file, network.rules)
        return found

    def _candidate_directory(self, name: str) -> Path:
        return self.workdir / "candidates" / name


def _with_test(row: Assessment, tests: dict[str, dict[str, float]], metric: str) -> Assessment:
    if row.name not in tests:
        return row
    found = tests[row.name]
    return replace(row, test=found[metric], metrics={**row.metrics, "test": found})


def _measured(row: Assessment, metric: Metric) -> str:
    return f"validation {metric.name} {metric.text(row.validation)}, {row.nbytes:,} bytes"


def _paths_by_reason(compression: Compression, params: Params) -> dict[str, list[str]]:
    """Return the leaves that a compression skips, by reason."""
    paths: dict[str, list[str]] = {}
    for path, reason in compression.skipped(params).items():
        paths.setdefault(reason, []).append(path)
    return paths
