"""The loop: train, compress, evaluate; requirements met? If not, choose again. Short, so that you can fork it."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.errors import CompressError, ConfigError, DataError, ShapeError
from compress_jax.core.record import sealed
from compress_jax.core.types import Batch, DType, Params, PyTree, Variables
from compress_jax.data import Data
from compress_jax.distill import Teacher
from compress_jax.export import write_atomically
from compress_jax.search import _stages
from compress_jax.search._experiment import Candidate, Experiment, Network, Training
from compress_jax.search._judge import Assessment, choose, finished, judge, reference

# All that a run will do, traced on shapes before anything is trained: what cannot work is found in
# the first second.


# What a function raises that needs the values of arrays: such a one cannot be checked on shapes.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
SIDE = 2  # examples that a model is asked about here


def check(experiment: Experiment, about: dict[str, Any]) -> list[str]:
    """See that the pieces of an experiment fit together: data, models, losses, optimizers and every candidate.

    Models, losses, training steps, and each candidate's init, view, update and pack are traced; no
    array is computed.

    Args:
      experiment: what is to be run.
      about: what the artifacts' metadata will keep.

    Returns:
      Sentences on what could not be checked, as it needs values; usually none.

    Raises:
      DataError: if the splits do not hold labelled examples of one shape, or a label is out of
        range.
      ConfigError: if a model cannot be called on them, has too few outputs, or a step fails; it
        says whose.
      CompressError: as the candidates' compressions do, with the candidate's name.

    Example:
      >>> import optax
      >>> from compress_jax.models import LeNet300100
      >>> from compress_jax.quantize import uniform
      >>> from compress_jax.core import at
      >>> split = {"image": np.ones((8, 4, 4, 1), np.float32), "label": np.zeros(8, np.int32)}
      >>> data = Data("ones", split, split, split, 3, "", ("a", "b", "c"), np.zeros(1), np.ones(1), 1.0, {})
      >>> brief = Training(optax.sgd(0.1), steps=1, batch_size=4)
      >>> wrong = Candidate("int4", at("**/kernels", uniform(4)), brief)
      >>> check(Experiment("ones", data, Network(LeNet300100(3), brief), (wrong,)), {})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.NoMatchError: candidate 'int4': pattern '**/kernels' matches no leaf. The leaves are:
      ...
    """
    try:
        json.dumps(about, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"about is kept in the artifacts as JSON, and cannot be written so: {error}"
        ) from error
    check_data(experiment.data)
    return _Checks(experiment).run()


class _Checks:
    """The experiment and what could not be checked so far."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.unchecked: list[str] = []
        self.stepped: set[Any] = (
            set()
        )  # what was traced already: candidates are often trained alike

    def run(self) -> list[str]:
        experiment = self.experiment
        teacher = None
        if isinstance(experiment.teacher, Network):
            teacher = self._teacher(
                experiment.teacher, self._network("teacher", experiment.teacher, None)
            )
        student = self._network(
            "student",
            experiment.student,
            teacher if experiment.float32_student == "teacher" else None,
        )
        if experiment.teacher == "student":
            teacher = self._teacher(experiment.student, student)
        if student is None:
            return self.unchecked
        for candidate in experiment.candidates:
            with self._of(f"candidate {candidate.name!r}"):
                self._candidate(candidate, student, teacher)
        return self.unchecked

    def _network(self, name: str, network: Network, teacher: Teacher | None) -> Any:
        """Return the shapes of a network's variables, after its calls and its training were traced."""
        variables = None
        with self._of(name):
            variables = self._variables(network)
            self._outputs(network.model, variables)
            if network.training is not None:
                self._training(network.model, variables, network.training, teacher)
        return variables

    def _variables(self, network: Network) -> Any:
        if network.artifact is not None:
            return _shapes(_stages.restored(network.artifact))
        image = self.experiment.data.train["image"]
        return jax.eval_shape(
            network.model.init, jax.random.key(0), _struct((1, *image.shape[1:]), jnp.float32)
        )

    def _outputs(self, model: Any, variables: Variables) -> None:
        """See that the model gives logits, one a class at least."""
        image, classes = self.experiment.data.train["image"], self.experiment.data.classes
        x = _struct((SIDE, *image.shape[1:]), image.dtype)
        out = jax.eval_shape(model.apply, variables, x)
        given = (
            f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else f"a {type(out).__name__}"
        )
        if (
            not hasattr(out, "shape")
            or len(out.shape) != 2
            or out.shape[0] != SIDE
            or out.shape[1] < classes
        ):
            raise ConfigError(
                f"the model must give logits [{SIDE}, {classes}] or more for {SIDE} images "
                f"{list(image.shape[1:])}, as the "
                f"data have {classes} classes; it gives {given}"
            )

    def _training(
        self, model: Any, variables: Variables, training: Training, teacher: Teacher | None
    ) -> None:
        """Trace one step of training without a compression, unless such a one was traced already."""
        split = self.experiment.data.train
        if training.batch_size > len(split["label"]):
            raise ConfigError(
                f"batch_size is {training.batch_size}, but there are {len(split['label'])} "
                "training examples"
            )
        asked = id(model), training.augment, training.batch_size, teacher is None
        if asked in self.stepped:
            return
        self.stepped.add(asked)
        batch = {
            name: _struct((training.batch_size, *x.shape[1:]), x.dtype) for name, x in split.items()
        }
        zeros = jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype), teacher
        )  # a loss may want the teacher's hash

        def whole(variables: Variables, batch: Batch, teacher: Any) -> Any:
            step, state = _stages.prepared(
                self.experiment, model, variables, None, training, "check", zeros, batch
            )
            return state, step(state, batch, teacher=teacher)[0]

        before, after = jax.eval_shape(whole, variables, batch, teacher)
        _require_alike("training step", before, after)

    def _teacher(self, network: Network, variables: Variables) -> Teacher | None:
        if variables is None:
            return None
        with self._of("teacher"):
            return jax.eval_shape(
                functools.partial(_stages.frozen, self.experiment, network.model), variables
            )

    def _candidate(self, candidate: Candidate, student: Any, teacher: Teacher | None) -> None:
        """Trace what a candidate does to the student's params, and its training where it differs from the student's."""
        compression = _stages.fitted(self.experiment, candidate, student)
        key, step = jax.random.key(0), jnp.zeros((), jnp.int32)

        def life(params: Params) -> Any:
            state = compression.init(params)
            seen = compression.view(params, state)
            new = compression.update(params, state, step=step, grads=params, key=key)
            trainable = {"params": params, "learned": state.learned}
            optimizer = _stages.optimizer(candidate.training)
            with jax.numpy_dtype_promotion("standard"):  # as in the step
                optimizer.update(trainable, optimizer.init(trainable), trainable)
            compression.skipped(params)
            return state, seen, new

        state, seen, new = jax.eval_shape(life, student["params"])
        _require_alike("view", student["params"], seen)
        _require_alike("update", state, new)
        _packed(compression, student["params"], state)
        self._training(self.experiment.student.model, student, candidate.training, teacher)

    @contextlib.contextmanager
    def _of(self, who: str) -> Iterator[None]:
        """Say whose an error is; note what cannot be traced."""
        try:
            yield
        except NEEDS_VALUES as error:
            self.unchecked.append(
                f"{who}: it needs the values of arrays ({_first_line(error)}), so it is not "
                "checked ahead"
            )
        except CompressError as error:
            raise type(error)(f"{who}: {error}") from error
        except Exception as error:
            raise ConfigError(f"{who}: {type(error).__name__}: {_first_line(error)}") from error


def check_data(data: Data) -> None:
    """See that splits hold examples of one shape, finite, with labels that are classes.

    Raises:
      DataError: if not; it names the split.
    """
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    for name, split in splits.items():
        for key in ("image", "label"):
            if not isinstance(split, dict) or not hasattr(split.get(key), "shape"):
                raise DataError(
                    f"{name} must be a dict with arrays 'image' and 'label'; it has no array "
                    f"{key!r}"
                )
        sizes = {key: len(values) for key, values in split.items()}
        if len(set(sizes.values())) != 1 or not sizes["label"]:
            raise DataError(f"the arrays of {name} must have one length, and not 0; got {sizes}")
        _check_images(name, split["image"], data.train["image"])
        _check_labels(name, split["label"], data.classes)


def _check_images(name: str, images: Any, train: Any) -> None:
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{name} has images of {images.dtype}, and they must be floats; data.scale_to_unit "
            "makes them so"
        )
    if images.shape[1:] != train.shape[1:]:
        raise DataError(
            f"{name} has images {list(images.shape[1:])}, and train has {list(train.shape[1:])}"
        )
    sums = (
        np.asarray(images, np.float32).reshape(len(images), -1).sum(axis=1)
    )  # not finite where an entry is not
    if not np.isfinite(sums).all():
        at = np.flatnonzero(~np.isfinite(sums))
        raise DataError(
            f"{len(at)} images of {name} are not finite, the first is {at[0]}; data.clean drops "
            "them"
        )


def _check_labels(name: str, labels: Any, classes: int) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{name} has labels {labels.dtype}{list(labels.shape)}; they must be integers, one an "
            "example"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{name} has labels {low} to {high}, but there are {classes} classes, so they must be "
            f"0 to {classes - 1}"
        )


def _packed(compression: Compression, params: Params, state: CompressionState) -> None:
    """Trace pack, which may compute with NumPy: only what it refuses on purpose counts."""
    try:
        jax.eval_shape(compression.pack, params, state)
    except CompressError:
        raise
    except Exception:  # noqa: S110  it takes arrays, and has none here
        pass


def _require_alike(what: str, before: Any, after: Any) -> None:
    """See that trees have the same leaves, shapes and dtypes."""
    old, new = (
        {name: f"{x.dtype}{list(x.shape)}" for name, x in _named(tree)} for tree in (before, after)
    )
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            gone = f"{old.get(name, 'not there')} before, {new.get(name, 'not there')} after"
            raise ShapeError(
                f"the {what} must keep every leaf's shape and dtype; {name or 'the leaf'}: {gone}"
            )


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _struct(shape: tuple[int, ...], dtype: DType) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _shapes(tree: PyTree) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _first_line(error: Exception) -> str:
    lines: list[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no reason is given"


TEACHER, STUDENT, ARTIFACT, RESULTS = (
    "teacher.safetensors",
    "student.safetensors",
    "artifact.safetensors",
    "results.json",
)


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
    experiment: Experiment,
    workdir: str | Path,
    *,
    about: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Find the smallest student that meets the requirement, and leave it in ``workdir`` as one file.

    First all of it is traced on shapes (see `check`), so that what cannot work is found before
    anything is trained. Then: data -> teacher -> student -> candidate: train under its compression,
    write, read back, evaluate on validation data, judge -> accepted or refused, with the reason ->
    next candidate. Test data is touched once, for the three networks of the final table. Started
    again after any kind of stop, it continues and ends with the same numbers.

    Args:
      experiment: what to do.
      workdir: where everything goes; made if missing. It belongs to one experiment: what it holds
        is not trained again.
      about: kept in the artifacts' metadata, as JSON takes it (config and arguments, say).
      say: receives one line for each decision.

    Returns:
      The rows, the chosen one, and the file.

    Raises:
      ConfigError: if the pieces do not fit together, or a stage in ``workdir`` was made of
        something else.
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
        variables = _stages.obtain(
            experiment, experiment.teacher, "teacher", workdir / "teacher", None
        )
        model, file = experiment.teacher.model, workdir / TEACHER
        teacher = _stages.frozen(experiment, model, variables)
        rows.append(
            _stages.assess(
                experiment, model, "teacher", teacher.variables, teacher.variables, file, about
            )
        )
        say(
            f"teacher: validation accuracy {100 * rows[-1].validation:.2f} %, {rows[-1].nbytes:,} "
            "bytes"
        )
    learns_from = teacher if experiment.float32_student == "teacher" else None
    student = _stages.obtain(
        experiment, experiment.student, "student", workdir / "student", learns_from
    )
    model = experiment.student.model
    rows.append(
        _stages.assess(experiment, model, "student", student, student, workdir / STUDENT, about)
    )
    if experiment.teacher == "student":
        teacher = _stages.frozen(experiment, model, student)
    say(
        f"student in float32: validation accuracy {100 * rows[-1].validation:.2f} %, "
        f"{rows[-1].nbytes:,} bytes"
    )

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
    experiment: Experiment,
    candidate: Candidate,
    student: Any,
    teacher: Any,
    workdir: Path,
    about: dict[str, Any],
) -> Assessment:
    """Train the student under one compression and measure what comes out."""
    model, directory = experiment.student.model, workdir / "candidates" / candidate.name
    stage, c = f"candidate {candidate.name}", _stages.fitted(experiment, candidate, student)
    state = _stages.train(
        experiment, model, student, c, candidate.training, stage, directory, teacher, start=student
    )
    packed = {"params": c.pack(state.params, state.compression), **state.model_state}
    about = {**about, "left_alone": _by_reason(c, state.params)}
    seen, file = state.variables(c), directory / ARTIFACT
    return _stages.assess(
        experiment, model, candidate.name, packed, seen, file, about, coded=experiment.coded
    )


def _by_reason(compression: Compression, params: Params) -> dict[str, list[str]]:
    """Return the leaves a compression leaves alone, by reason."""
    reasons: dict[str, list[str]] = {}
    for path, reason in compression.skipped(params).items():
        reasons.setdefault(reason, []).append(path)
    return reasons


def _conclude(
    experiment: Experiment, rows: list[Assessment], tried: Sequence[Assessment], workdir: Path
) -> Result:
    """Copy the chosen artifact, measure the final table on test data, and write it down."""
    chosen, artifact = choose(tried), workdir / ARTIFACT
    write_atomically(artifact, (workdir / "candidates" / chosen.name / ARTIFACT).read_bytes())
    student = experiment.student.model
    measured = {chosen.name: _stages.measure_on_test(experiment, student, artifact)}
    measured["student"] = _stages.measure_on_test(experiment, student, workdir / STUDENT)
    if isinstance(experiment.teacher, Network):
        measured["teacher"] = _stages.measure_on_test(
            experiment, experiment.teacher.model, workdir / TEACHER
        )
    table = [replace(row, test=measured.get(row.name)) for row in [*rows, *tried]]
    summary = {"experiment": experiment.name, "chosen": chosen.name, "met": bool(chosen.accepted)}
    write_atomically(
        workdir / RESULTS, sealed({**summary, "rows": [row.as_dict() for row in table]})
    )
    return Result(tuple(table), next(row for row in table if row.name == chosen.name), artifact)
