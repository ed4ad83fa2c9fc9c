"""Carry out a candidate's method, item by item; rebuild the model that an artifact belongs to."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from compress_jax.core._chain import chain
from compress_jax.core.compression import Compression, identity, joined
from compress_jax.core.types import JsonObject, Params, PyTree
from compress_jax.distill import Teacher
from compress_jax.export import load
from compress_jax.search._candidate import Candidate, Method, Rewrite, Subject
from compress_jax.search._divided import beside, rules_of
from compress_jax.search._experiment import Experiment
from compress_jax.search._network import Network, Training, Variables
from compress_jax.search._stage import Stage, train, trained_variables
from compress_jax.tasks import PureModel
from compress_jax.trace import bind
from compress_jax.train._parallel import Rules, fitting


def carry_out(
    experiment: Experiment,
    candidate: Candidate,
    student: Variables,
    teacher: Teacher | None,
    folder: Path,
    *,
    name: str | None = None,
    begin: Subject | None = None,
    done: int = 0,
) -> Subject:
    """Apply a candidate's items to the trained student, one after the other.

    Args:
      experiment: for data, task, loss and seed.
      candidate: whose method is carried out.
      student: the trained student's variables.
      teacher: the frozen teacher, or None.
      folder: where checkpoints and metrics go: those of the last training into it, those of earlier
        ones into subfolders.
      name: of the stages, and so of their random seeds; by default the candidate's.
      begin: what some of the first items made before; None to begin with the student.
      done: how many items these were.

    Returns:
      The network at the end, not packed yet.
    """
    title = name or f"candidate {candidate.name}"
    subject = begin or Subject(experiment.student.pure, student)
    items = list(enumerate(candidate.items))[done:]
    trainings = sum(isinstance(item, Training) for _, item in items)
    rules = rules_of(experiment, candidate)
    for number, item in items:
        if isinstance(item, Network):
            stage = f"{title}/network"
            own = trained_variables(experiment, item, stage, folder / "network", teacher)
            subject = Subject(item.pure, own, records=({"network": stage},))
        elif isinstance(item, Rewrite):
            subject = item.run(subject, experiment.task, experiment.data.train)
        elif isinstance(item, Training):
            trainings -= 1
            # The last one has the plain name; most methods have one alone.
            suffix = f"/{number}" if trainings else ""
            place = folder / f"training-{number}" if trainings else folder
            subject = _trained(experiment, subject, item, f"{title}{suffix}", teacher, place, rules)
        else:
            subject = _seen_through(experiment, subject, item, rules)  # a Compression
    return subject


def _trained(
    experiment: Experiment,
    subject: Subject,
    training: Training,
    title: str,
    teacher: Teacher | None,
    folder: Path,
    rules: Rules,
) -> Subject:
    """Train what there is, under its compression, from the state that a solver made if one did."""
    if not training.steps and subject.state is not None:
        return subject  # a solver's state is not to be replaced by that of `init`
    compression = subject.compression or identity()
    kept = fitting(subject.variables["params"], experiment.devices, rules)
    gone = ", ".join(pattern for pattern, spec in rules if (pattern, spec) not in kept)
    if gone:
        note = f"{title}: rules that fit its params no more, so that these are not divided: {gone}"
        subject = subject._replace(notes=(*subject.notes, note))
    stage = Stage(
        title,
        subject.model,
        training,
        teacher,
        compression,
        subject.variables,
        subject.state if subject.before is not None else None,
        subject.records,
        rules=kept,
        teacher_rules=experiment.teacher_rules,
    )
    state = train(experiment, stage, folder)
    # Trained params are no longer those that a solver compressed, so `before` ends here.
    variables = {"params": state.params, **state.model_state}
    own = state.compression if subject.compression is not None else None
    return subject._replace(variables=variables, state=own, before=None)


def _seen_through(
    experiment: Experiment, subject: Subject, item: Compression, rules: Rules
) -> Subject:
    """Add a compression to those that the weights are seen through, bound to their layouts."""
    bound = bound_to(experiment, subject, item)
    if subject.compression is None:
        return subject._replace(compression=bound, state=None)
    params = subject.variables["params"]
    with beside(experiment, subject.variables, rules):
        before = subject.compression.init(params) if subject.state is None else subject.state
        # The new state is made of what the old compression shows: scales of pruned weights, say.
        viewed = subject.compression.view(params, before)
        state = joined([before, bound.init(viewed)])
    return subject._replace(compression=chain(subject.compression, bound), state=state)


def bound_to(experiment: Experiment, subject: Subject, compression: Compression) -> Compression:
    """Return a compression with each leaf's layout read from the model's forward pass."""
    rest = {name: each for name, each in subject.variables.items() if name != "params"}

    def forward(params: Params, rest: Variables, *inputs: PyTree) -> PyTree:
        return subject.model.apply({"params": params, **rest}, *inputs)

    return bind(compression, forward, subject.variables["params"], rest, *experiment.example)


def rebuilt_model(experiment: Experiment, artifact: Path, name: str) -> PureModel:
    """Return the model that a candidate's artifact belongs to.

    Args:
      experiment: that the candidate is of.
      artifact: the file; its metadata say what was done to the network.
      name: of the candidate.

    Returns:
      The student's model, or that of another architecture.
    """
    candidate = next(each for each in experiment.candidates if each.name == name)
    # Networks and rewrites have a record each, in the order of the items.
    records = iter(load(artifact)[1].get("records", ()))
    return _rebuilt(experiment.student.pure, candidate.items, records, experiment.example)


def _rebuilt(
    model: PureModel,
    items: Sequence[Method],
    records: Iterator[JsonObject],
    example: tuple[jax.ShapeDtypeStruct, ...],
) -> PureModel:
    for item in items:
        if isinstance(item, Network):
            next(records)  # its own; the model is in the config
            model = item.pure
        elif isinstance(item, Rewrite):
            model = item.rebuild(model, next(records), example)
    return model
