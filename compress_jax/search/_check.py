"""Trace all that a run will do on shapes, so that what cannot work is found in the first second."""

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.errors import CompressError, ConfigError, DataError, ShapeError
from compress_jax.core.types import Array, Batch, DType, Params, PyTree, Shape
from compress_jax.data import Data
from compress_jax.distill import Teacher
from compress_jax.search._experiment import Candidate, Experiment, Network, Training, Variables
from compress_jax.search._stage import Stage, prepare

# Raised by functions that need the values of arrays, and so cannot be traced on shapes.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
EXAMPLES = 2  # batch size of the traced calls


def check(experiment: Experiment, metadata: dict[str, Any]) -> list[str]:
    """Check that data, models, losses, optimizers and every candidate fit together.

    Models, losses, training steps, and each candidate's init, view, update and pack are traced; no
    array is computed.

    Args:
      experiment: what is to be run.
      metadata: what will be stored in the artifacts.

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
      >>> import compress_jax as cj
      >>> split = {"image": np.ones((8, 4, 4, 1), np.float32), "label": np.zeros(8, np.int32)}
      >>> names, statistics = ("a", "b", "c"), (np.zeros(1), np.ones(1))
      >>> data = Data("ones", split, split, split, 3, "", names, *statistics, 1.0, {})
      >>> training = Training(optax.sgd(0.1), steps=1, batch_size=4)
      >>> student = Network(cj.models.LeNet300100(3), training)
      >>> wrong = Candidate("int4", cj.at("**/kernels", cj.quantize.uniform(4)), training)
      >>> check(Experiment("ones", data, student, (wrong,)), {})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.NoMatchError: candidate 'int4': pattern '**/kernels' matches ...
    """
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"metadata is stored in the artifacts as JSON, which cannot hold it: {error}"
        ) from error
    check_data(experiment.data)
    return _Checks(experiment).run()


class _Checks:
    """The checks of one experiment, and the notes on what could not be checked."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.notes: list[str] = []
        # Candidates are often trained alike: each kind of step is traced once.
        self.traced_steps: set[Any] = set()

    def run(self) -> list[str]:
        experiment = self.experiment
        teacher = None
        if isinstance(experiment.teacher, Network):
            variables = self._network("teacher", experiment.teacher, None)
            teacher = self._teacher(experiment.teacher, variables)
        learns_from = teacher if experiment.float32_student == "teacher" else None
        student = self._network("student", experiment.student, learns_from)
        if experiment.teacher == "student":
            teacher = self._teacher(experiment.student, student)
        if student is None:
            return self.notes
        for candidate in experiment.candidates:
            with self._named(f"candidate {candidate.name!r}"):
                self._candidate(candidate, student, teacher)
        return self.notes

    def _network(self, name: str, network: Network, teacher: Teacher | None) -> Variables | None:
        """Trace a network's calls and training; return the shapes of its variables."""
        variables = None
        with self._named(name):
            variables = self._variables(network)
            self._outputs(network.model, variables)
            if network.training is not None:
                self._training(network.model, variables, network.training, teacher)
        return variables

    def _variables(self, network: Network) -> Variables:
        if network.artifact is not None:
            return _shapes(network.restore())
        image = _struct((1, *self.experiment.data.train["image"].shape[1:]), jnp.float32)
        return jax.eval_shape(network.model.init, jax.random.key(0), image)

    def _outputs(self, model: nn.Module, variables: Variables) -> None:
        """Check that the model gives logits, at least one for each class."""
        image = self.experiment.data.train["image"]
        classes = self.experiment.data.classes
        x = _struct((EXAMPLES, *image.shape[1:]), image.dtype)
        out = jax.eval_shape(model.apply, variables, x)
        shape = getattr(out, "shape", None)
        if shape is None:
            given = f"a {type(out).__name__}"
        elif len(shape) != 2 or shape[0] != EXAMPLES or shape[1] < classes:
            given = f"{out.dtype}{list(shape)}"
        else:
            return
        raise ConfigError(
            f"the model must give logits [{EXAMPLES}, {classes}] or more for {EXAMPLES} images "
            f"{list(image.shape[1:])}, as the data have {classes} classes; it gives {given}"
        )

    def _training(
        self, model: nn.Module, variables: Variables, training: Training, teacher: Teacher | None
    ) -> None:
        """Trace one training step without a compression, unless its like was traced already."""
        split = self.experiment.data.train
        if training.batch_size > len(split["label"]):
            raise ConfigError(
                f"batch_size is {training.batch_size}, but there are {len(split['label'])} "
                "training examples"
            )
        kind = id(model), training.augment, training.batch_size, teacher is None
        if kind in self.traced_steps:
            return
        self.traced_steps.add(kind)
        size = training.batch_size
        batch = {name: _struct((size, *x.shape[1:]), x.dtype) for name, x in split.items()}
        # Some losses hash the teacher, which needs arrays; those of `whole` are traced.
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), teacher)
        stage = Stage("check", model, training, zeros)

        def whole(variables: Variables, batch: Batch, teacher: Teacher | None) -> PyTree:
            step, state = prepare(self.experiment, stage, variables, batch)
            return state, step(state, batch, teacher=teacher)[0]

        before, after = jax.eval_shape(whole, variables, batch, teacher)
        _require_alike("training step", before, after)

    def _teacher(self, network: Network, variables: Variables | None) -> Teacher | None:
        if variables is None:
            return None
        with self._named("teacher"):
            freeze = functools.partial(self.experiment.freeze, network.model)
            return jax.eval_shape(freeze, variables)

    def _candidate(self, candidate: Candidate, student: Variables, teacher: Teacher | None) -> None:
        """Trace a candidate's compression of the student's params, and its training."""
        experiment = self.experiment
        model = experiment.student.model
        compression = candidate.bind(model, student, experiment.data.train["image"])
        key = jax.random.key(0)
        step = jnp.zeros((), jnp.int32)

        def life(params: Params) -> PyTree:
            state = compression.init(params)
            view = compression.view(params, state)
            new = compression.update(params, state, step=step, grads=params, key=key)
            trainable = {"params": params, "learned": state.learned}
            optimizer = candidate.training.transformation()
            with jax.numpy_dtype_promotion("standard"):  # as in the training step
                optimizer.update(trainable, optimizer.init(trainable), trainable)
            compression.skipped(params)
            return state, view, new

        state, view, new = jax.eval_shape(life, student["params"])
        _require_alike("view", student["params"], view)
        _require_alike("update", state, new)
        _trace_pack(compression, student["params"], state)
        self._training(model, student, candidate.training, teacher)

    @contextlib.contextmanager
    def _named(self, owner: str) -> Iterator[None]:
        """Begin errors with whose they are; turn what needs values into a note."""
        try:
            yield
        except NEEDS_VALUES as error:
            self.notes.append(
                f"{owner}: it needs the values of arrays ({_first_line(error)}), so it is not "
                "checked ahead"
            )
        except CompressError as error:
            raise type(error)(f"{owner}: {error}") from error
        except Exception as error:
            raise ConfigError(f"{owner}: {type(error).__name__}: {_first_line(error)}") from error


def check_data(data: Data) -> None:
    """Check that splits hold examples of one shape, finite, with labels that are classes.

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


def _check_images(name: str, images: Array, train: Array) -> None:
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(
            f"{name} has images of {images.dtype}, and they must be floats; data.scale_to_unit "
            "makes them so"
        )
    if images.shape[1:] != train.shape[1:]:
        raise DataError(
            f"{name} has images {list(images.shape[1:])}, and train has {list(train.shape[1:])}"
        )
    # A sum is not finite if any of its terms is not; it needs no mask as large as the images.
    sums = np.asarray(images, np.float32).reshape(len(images), -1).sum(axis=1)  # [examples]
    bad = np.flatnonzero(~np.isfinite(sums))
    if len(bad):
        raise DataError(
            f"{len(bad)} images of {name} are not finite, the first is {bad[0]}; data.clean drops "
            "them"
        )


def _check_labels(name: str, labels: Array, classes: int) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{name} has labels {labels.dtype}{list(labels.shape)}; they must be integers, one an "
            "example"
        )
    low = int(labels.min())
    high = int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{name} has labels {low} to {high}, but there are {classes} classes, so they must be "
            f"0 to {classes - 1}"
        )


def _trace_pack(compression: Compression, params: Params, state: CompressionState) -> None:
    """Trace pack; it may compute with NumPy, so only errors raised on purpose count."""
    try:
        jax.eval_shape(compression.pack, params, state)
    except CompressError:
        raise
    except Exception:  # noqa: S110  it takes arrays, and has none here
        pass


def _require_alike(what: str, before: PyTree, after: PyTree) -> None:
    """Check that two trees have the same leaves, shapes and dtypes."""
    old = _described_leaves(before)
    new = _described_leaves(after)
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            change = f"{old.get(name, 'not there')} before, {new.get(name, 'not there')} after"
            raise ShapeError(
                f"the {what} must keep every leaf's shape and dtype; {name or 'the leaf'}: {change}"
            )


def _described_leaves(tree: PyTree) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _struct(shape: Shape, dtype: DType) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: _struct(x.shape, x.dtype), tree)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no reason is given"
