"""The pieces of the loop: train a network, train it under a compression, write it to disk and measure what was written."""

import dataclasses
import re
import zlib
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from compress_jax.core.compression import Compression, identity
from compress_jax.core.errors import ArtifactError, CompressError
from compress_jax.core.packed import unpack
from compress_jax.core.paths import flatten
from compress_jax.core.types import Batch, Params, PyTree
from compress_jax.data import batches
from compress_jax.distill import Teacher, capture
from compress_jax.export import load, save
from compress_jax.search._experiment import Candidate, Experiment, Network, Training
from compress_jax.search._ingredients import ingredients
from compress_jax.search._judge import Assessment
from compress_jax.search._stage_record import require_same
from compress_jax.trace import bind
from compress_jax.train import (
    Loss,
    StatefulLoss,
    Step,
    TrainState,
    accuracy,
    create,
    distillation,
    distilled,
    fit,
    jit_step,
    label_optimizer,
    logits,
    make_step,
    place,
    supervised,
)

Variables = dict[str, Any]


def stage_key(seed: int, stage: str) -> jax.Array:
    """Return the PRNG key of a stage: a function of the seed and its name, not of what ran before it."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def obtain(
    experiment: Experiment, network: Network, stage: str, directory: Path, teacher: Teacher | None
) -> Variables:
    """Train a network in float32, or restore it.

    Args:
      experiment: for data, loss and seed.
      network: what to train or restore.
      stage: ``"teacher"`` or ``"student"``.
      directory: where its checkpoints and metrics go; a finished stage found there is not trained
        again.
      teacher: the frozen teacher, or None to train on labels.

    Returns:
      ``{"params": ..., "batch_stats": ...}``.
    """
    if network.artifact is not None:
        return restored(network.artifact)
    assert network.training is not None
    example = jnp.zeros((1, *experiment.data.train["image"].shape[1:]))
    variables = jax.jit(network.model.init)(stage_key(experiment.seed, f"{stage}/init"), example)
    state = train(
        experiment,
        network.model,
        variables,
        identity(),
        network.training,
        stage,
        directory,
        teacher,
    )
    return state.variables()


def restored(artifact: str | PathLike[str]) -> Variables:
    """Return the variables of a network that an earlier run wrote."""
    variables = unpack(load(artifact)[0])
    if not isinstance(variables, dict) or "params" not in variables:
        raise ArtifactError(
            f"{artifact} holds no 'params'; a Network is restored from what a run wrote, or the "
            "like of it"
        )
    return variables


def fitted(experiment: Experiment, candidate: Candidate, variables: Variables) -> Compression:
    """Return a candidate's compression bound to this student: the one place where candidates meet the model.

    Args:
      experiment: has the student's model and the data.
      candidate: has the compression.
      variables: the student's, or their shapes.

    Returns:
      The compression that is trained, packed and described: each leaf's layout is read from the
      student's forward pass.
    """
    model = experiment.student.model
    rest = {name: value for name, value in variables.items() if name != "params"}
    images = experiment.data.train["image"]
    example = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)

    def forward(params: Params, rest: Variables, x: jax.Array) -> Any:
        return model.apply({"params": params, **rest}, x)

    return bind(candidate.compression, forward, variables["params"], rest, example)


def optimizer(training: Training) -> optax.GradientTransformation:
    """Return the optimizer of the weights and of what the compression learns."""
    return label_optimizer(training.optimizer, training.learned or training.optimizer)


def prepared(
    experiment: Experiment,
    model: Any,
    variables: Variables,
    compression: Compression | None,
    training: Training,
    stage: str,
    teacher: Teacher | None,
    batch: Batch,
) -> tuple[Step, TrainState]:
    """Return the step of a stage and the state before the first; pure, so that it can be traced on shapes."""
    compression = compression or identity()
    loss, beside = _loss(experiment, model, training, teacher), ({}, {})
    if isinstance(loss, StatefulLoss):
        beside = loss.init(stage_key(experiment.seed, f"{stage}/loss"), variables, batch, teacher)
    state = create(
        variables, compression, optimizer(training), stage_key(experiment.seed, stage), beside
    )
    return make_step(loss, optimizer(training), compression), state


def train(
    experiment: Experiment,
    model: Any,
    variables: Variables,
    compression: Compression,
    training: Training,
    stage: str,
    directory: Path,
    teacher: Teacher | None,
    start: Variables | None = None,
) -> TrainState:
    """Train a model seen through a compression, from given variables on; continue if the directory holds a checkpoint.

    Args:
      experiment: for data, loss, seed and mesh.
      model: the Linen module.
      variables: where to begin.
      compression: what the forward pass sees the params through.
      training: optimizer, steps, batches.
      stage: names the randomness and the progress bar.
      directory: where checkpoints and metrics go.
      teacher: the frozen teacher, or None to train on labels.
      start: variables that an earlier stage trained, which the directory then belongs to.

    Returns:
      The state after the last step.

    Raises:
      ConfigError: if the directory belongs to a stage that was made of something else.
    """
    about = made_of(experiment, model, training, stage, compression, teacher, start)
    require_same(directory, about)
    batch = {name: values[: training.batch_size] for name, values in experiment.data.train.items()}
    step, state = prepared(
        experiment, model, variables, compression, training, stage, teacher, batch
    )
    mesh = experiment.mesh or jax.make_mesh(
        (jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)
    )
    feed = batches(
        experiment.data.train,
        training.batch_size,
        seed=zlib.crc32(f"{experiment.seed}/{stage}".encode()),
    )
    return fit(
        jit_step(step, mesh, state),
        place(state, mesh),
        feed,
        steps=training.steps,
        directory=directory,
        save_every=training.save_every,
        title=stage,
        teacher=teacher,
    )


def made_of(
    experiment: Experiment,
    model: Any,
    training: Training,
    stage: str,
    compression: Compression,
    teacher: Teacher | None,
    start: Variables | None,
) -> dict[str, str]:
    """Return all that decides how a stage ends, by name; see `ingredients`."""
    brief = {name: value for name, value in vars(training).items() if name != "save_every"}
    parts = {
        "stage": stage,
        "seed": experiment.seed,
        "model": model,
        "training": brief,
        "compression": compression,
    }
    if teacher is not None:
        parts |= {"loss": experiment.loss, "teacher": flatten(teacher.variables)[0]}
    return ingredients(
        **parts, start=flatten(start)[0] if start else None, data=experiment.data.train
    )


def _loss(
    experiment: Experiment, model: Any, training: Training, teacher: Teacher | None
) -> Loss | StatefulLoss:
    if teacher is None or experiment.loss is None:
        return supervised(model, augment=training.augment)
    if isinstance(experiment.loss, tuple):
        return distillation(model, experiment.loss, augment=training.augment)
    return distilled(model, _ask, experiment.loss, augment=training.augment)


def _ask(teacher: Teacher, x: jax.Array) -> jax.Array:
    return teacher(x)


def frozen(experiment: Experiment, model: Any, variables: Variables) -> Teacher:
    """Return a trained network as the teacher, in the dtype asked for, with the features that terms of the loss look at.

    Args:
      experiment: for loss and dtype.
      model: the Linen module.
      variables: what it was trained to.

    Returns:
      The teacher; nothing is differentiated through it.
    """
    terms = experiment.loss if isinstance(experiment.loss, tuple) else ()
    paths = tuple(dict.fromkeys(path for term in terms for path in term.teacher))
    return Teacher(capture(model, paths) if paths else model.apply, variables).cast(
        experiment.teacher_dtype
    )


def assess(
    experiment: Experiment,
    model: Any,
    name: str,
    packed: PyTree,
    seen: Variables,
    file: Path,
    about: dict[str, Any],
    *,
    coded: bool = False,
) -> Assessment:
    """Write a network to disk, read it back, prove that it is the one that was trained, and measure it on validation.

    Args:
      experiment: for the data.
      model: the Linen module.
      name: of the row.
      packed: variables with packed leaves.
      seen: the variables training saw; the file must give the same logits, bit for bit.
      file: the artifact to write.
      about: metadata to keep in it, as JSON takes it.
      coded: how to write it, see `export.save`.

    Returns:
      The row, not judged yet.

    Raises:
      CompressError: if what was written is not what was trained.
    """
    split = experiment.data.validation
    trained = logits(model.apply, seen, split)
    validation = float((trained.argmax(-1) == split["label"]).mean())
    metadata = {"experiment": experiment.name, "name": name, "model": _describe(model), **about}
    metadata |= {
        "data": experiment.data.name,
        "data_sha256": experiment.data.fingerprint,
        "validation": validation,
    }
    nbytes = save(file, packed, metadata, coded=coded)
    if not np.array_equal(logits(model.apply, unpack(load(file)[0]), split), trained):
        raise CompressError(
            f"{file} does not give the logits the trained model gives; please report this with "
            "its config"
        )
    return Assessment(name, count(seen["params"]), nbytes, validation)


def _describe(model: Any) -> str:
    """Return the call that makes a module, without what is default and without addresses, which differ between processes."""
    fields = [
        field
        for field in dataclasses.fields(model)
        if field.init and field.name not in ("parent", "name")
    ]
    values = {
        field.name: (repr(getattr(model, field.name)), repr(field.default)) for field in fields
    }
    text = ", ".join(
        f"{name}={value}" for name, (value, default) in values.items() if value != default
    )
    return f"{type(model).__name__}({re.sub(r' at 0x[0-9a-f]+', '', text)})"


def measure_on_test(experiment: Experiment, model: Any, file: Path) -> float:
    """Return the accuracy of an artifact, read from disk, on the test split."""
    return accuracy(model.apply, unpack(load(file)[0]), experiment.data.test)


def count(params: Params) -> int:
    """Return the number of entries of all params."""
    return sum(leaf.size for leaf in flatten(params)[0].values())
