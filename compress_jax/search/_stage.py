"""One stage of a run: train a model under a compression, and resume only what was made of the same.

A directory that was made of something else (see `_ingredients`) is refused, never trained further.
"""

import logging
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from compress_jax.core.compression import Compression, identity
from compress_jax.core.errors import CompressError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Batch, JsonObject, PyTree
from compress_jax.data import batches
from compress_jax.distill import Teacher
from compress_jax.search._experiment import Experiment
from compress_jax.search._ingredients import ingredients, require_same
from compress_jax.search._network import Network, Training, Variables
from compress_jax.tasks import PureModel
from compress_jax.tasks._task import REFERENCE
from compress_jax.train import (
    MeshStep,
    StatefulLoss,
    Step,
    TrainState,
    create,
    distillation,
    fit,
    jit_step,
    make_step,
    shardings,
)
from compress_jax.train._parallel import Rules, shardings_like
from compress_jax.train._processes import gathered, spread

_log = logging.getLogger(__name__)
CHECKED = 2**30  # bytes of params up to which the gradients under rules are checked

Aux: TypeAlias = tuple[PyTree, PyTree]
"""Adapters of a loss and its memory."""


class Stage(NamedTuple):
    """One network that is trained in a run.

    Attributes:
      name: ``"teacher"``, ``"student"`` or ``"candidate NAME"``; it is part of every random seed.
      model: the network as pure functions.
      training: optimizer, steps and batch size.
      teacher: the frozen teacher, or None to train on labels.
      compression: what the forward pass sees the params through.
      start: variables that an earlier stage trained, or None to initialize them.
      records: what was done to the network before, see `Subject`.
      rules: how its params are divided over the mesh, see `Network`.
      teacher_rules: how the teacher's are.
    """

    name: str
    model: PureModel
    training: Training
    teacher: Teacher | None = None
    compression: Compression = identity()
    start: Variables | None = None
    records: tuple[JsonObject, ...] = ()
    rules: Rules = ()
    teacher_rules: Rules = ()


def trained_variables(
    experiment: Experiment, network: Network, name: str, directory: Path, teacher: Teacher | None
) -> Variables:
    """Return a network's float32 variables: restored from its artifact, or trained.

    Args:
      experiment: for data, loss and seed.
      network: what to train or restore.
      name: ``"teacher"`` or ``"student"``.
      directory: where checkpoints and metrics go; a finished stage found there is not trained
        again.
      teacher: the frozen teacher, or None to train on labels.

    Returns:
      ``{"params": ..., "batch_stats": ...}``.
    """
    if network.training is None:
        return network.restore()
    stage = Stage(
        name,
        network.pure,
        network.training,
        teacher,
        start=network.variables,
        rules=network.rules,
        teacher_rules=experiment.teacher_rules,
    )
    return train(experiment, stage, directory).variables()


def train(experiment: Experiment, stage: Stage, directory: Path) -> TrainState:
    """Train a stage, or resume it from the checkpoint in its directory.

    Args:
      experiment: for data, loss, seed and mesh.
      stage: what to train.
      directory: where checkpoints, metrics and the record of the stage go.

    Returns:
      The state after the last step, its params and compression on one device of each process.

    Raises:
      ConfigError: if the directory belongs to a stage that was made of something else.
    """
    require_same(directory, made_of(experiment, stage))  # before anything is written there
    if experiment.terms is None:
        stage = stage._replace(teacher=None)  # trained on labels alone
    training = stage.training
    # What the teacher said is for measuring; in training it is asked anew, of augmented inputs.
    data = {name: x for name, x in experiment.data.train.items() if name != REFERENCE}
    first = {name: values[: training.batch_size] for name, values in data.items()}
    begun = (directory / "checkpoints").is_dir()
    if training.steps and (stage.rules or stage.teacher_rules) and not begun:
        _require_same_gradients(experiment, stage, first)
    divided = _divided(experiment, stage, first)
    # crc32, as Python's hash of text differs between processes.
    order_seed = zlib.crc32(f"{experiment.seed}/{stage.name}".encode())
    trained = fit(
        divided.step,
        divided.state,
        batches(data, training.batch_size, seed=order_seed),
        steps=training.steps,
        directory=directory,
        save_every=training.save_every,
        title=stage.name,
        teacher=divided.teacher,
    )
    # What comes after a training (packing, measuring) is done by each process for itself.
    return trained._replace(
        params=gathered(trained.params),
        learned=gathered(trained.learned),
        fixed=gathered(trained.fixed),
        model_state=gathered(trained.model_state),
    )


class _Divided(NamedTuple):
    """A stage before its first step, over the mesh."""

    step: MeshStep
    state: TrainState
    teacher: Teacher | None


def _divided(experiment: Experiment, stage: Stage, batch: Batch) -> _Divided:
    """Return a stage's compiled step, its state and its teacher, each where its rules put it."""
    mesh = experiment.devices
    variables = _divided_variables(experiment, stage, mesh)
    step, begin, aux = prepare(experiment, stage, variables, batch)
    aux = spread(aux, shardings_like(aux, variables["params"], mesh, stage.rules))
    where = shardings(jax.eval_shape(begin, variables, aux), mesh, stage.rules)
    # Born where it lives: no device ever holds more than its part.
    state = jax.jit(begin, out_shardings=where)(variables, aux)
    teacher = stage.teacher
    if teacher is None:
        return _Divided(jit_step(step, mesh, state, rules=stage.rules), state, None)
    params = teacher.variables["params"]
    of_teacher = shardings_like(teacher, params, mesh, stage.teacher_rules)
    compiled = jit_step(step, mesh, state, rules=stage.rules, teacher=of_teacher)
    return _Divided(compiled, state, spread(teacher, of_teacher))


def _require_same_gradients(experiment: Experiment, stage: Stage, batch: Batch) -> None:
    """Check on one batch that the rules change no gradient beyond rounding.

    Compilers divide matrix products in many ways, and a known fault of XLA's leaves out a sum where
    one mesh axis divides both a batch and a kernel (openxla/xla issue 40034): nothing else tells.

    Raises:
      CompressError: if a gradient is another one; it names the leaf.
    """
    variables = stage.start or jax.eval_shape(
        stage.model.init, jax.random.key(0), *experiment.example
    )
    leaves = jax.tree.leaves(variables["params"])
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    if size > CHECKED:
        _log.warning(
            "%s: its gradients under the rules are not compared with those without, as its "
            "%.1f GB may not fit on one device",
            stage.name,
            size / 1e9,
        )
        return
    # One step of plain descent at rate 1 moves each param by its gradient.
    training = replace(stage.training, optimizer=optax.sgd(1.0), learned=None)
    stage = stage._replace(training=training)
    whole = _gradients(experiment, stage._replace(rules=(), teacher_rules=()), batch)
    for path, gradient in _gradients(experiment, stage, batch).items():
        largest = np.abs(whole[path]).max(initial=0.0)
        error = np.abs(gradient - whole[path]).max(initial=0.0)
        if not error <= 0.05 * largest + 1e-6:
            raise CompressError(
                f"{stage.name}: under its rules the gradient of {path} is another one (off by "
                f"{error:.2g}, of at most {largest:.2g}): the compiler divides it wrongly. Divide "
                f"{path} or the leaf after it along other axes, such as "
                "PartitionSpec('tensor', 'fsdp')"
            )


def _gradients(experiment: Experiment, stage: Stage, batch: Batch) -> dict[str, np.ndarray]:
    """Return by how much one step moves each param."""
    divided = _divided(experiment, stage, batch)
    # Copies, as the step may reuse the memory of its state.
    before = {path: np.array(x) for path, x in flatten(gathered(divided.state.params))[0].items()}
    state, _ = divided.step(divided.state, batch, teacher=divided.teacher)
    after = flatten(gathered(state.params))[0]
    return {path: np.asarray(after[path]) - x for path, x in before.items()}


def prepare(
    experiment: Experiment, stage: Stage, variables: Variables, batch: Batch
) -> tuple[Step, Callable[[Variables, Aux], TrainState], Aux]:
    """Return a stage's training step, and what it begins with; it can be traced on shapes.

    Args:
      experiment: for loss, task and seed.
      stage: what is trained.
      variables: where it starts.
      batch: one of the training data.

    Returns:
      ``(step, begin, aux)``: ``begin(variables, aux)`` is the state before the first step.
    """
    loss = _loss(experiment, stage)
    loss_key = stage_key(experiment.seed, f"{stage.name}/loss")
    aux = loss.init(loss_key, variables, batch, stage.teacher)
    optimizer = stage.training.transformation()
    key = stage_key(experiment.seed, stage.name)

    def begin(variables: Variables, aux: Aux) -> TrainState:
        return create(variables, stage.compression, optimizer, key, aux)

    return make_step(loss, optimizer, stage.compression), begin, aux


def _loss(experiment: Experiment, stage: Stage) -> StatefulLoss:
    task = experiment.task
    terms = experiment.terms
    # What compares with a teacher is left out where the stage has none.
    if stage.teacher is None or terms is None:
        terms = (task.on_labels(1.0),)
    return distillation(stage.model, terms, task=task, augment=stage.training.augment)


def _divided_variables(experiment: Experiment, stage: Stage, mesh: Mesh) -> Variables:
    """Return what a stage starts from, over the mesh: variables that are given, or new ones."""
    if stage.start:
        params = stage.start["params"]
        return spread(stage.start, shardings_like(stage.start, params, mesh, stage.rules))
    # Initializers need the shapes of the inputs alone.
    example = [jnp.zeros(x.shape, x.dtype) for x in experiment.example]
    key = stage_key(experiment.seed, f"{stage.name}/init")
    shapes = jax.eval_shape(stage.model.init, key, *example)
    where = shardings_like(shapes, shapes["params"], mesh, stage.rules)
    return jax.jit(stage.model.init, out_shardings=where)(key, *example)


def stage_key(seed: int, name: str) -> jax.Array:
    """Return the PRNG key of a stage, from the seed and the stage's name alone.

    It does not depend on the stages before it, so trying one candidate more changes no other.
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def made_of(experiment: Experiment, stage: Stage) -> dict[str, str]:
    """Return all that decides how a stage ends, by name; see `ingredients`."""
    # How often a checkpoint is written changes no number.
    settings = {name: value for name, value in vars(stage.training).items() if name != "save_every"}
    parts: dict[str, object] = {
        "stage": stage.name,
        "seed": experiment.seed,
        "model": stage.model.source,
        "training": settings,
        "compression": stage.compression,
        "task": experiment.task,
        "records": list(stage.records),
    }
    if stage.teacher is not None:
        parts["loss"] = experiment.loss
        parts["teacher"] = flatten(stage.teacher.variables)[0]
    # Weights count by value: a stage after a changed one is made of something else.
    parts["start"] = flatten(stage.start)[0] if stage.start else None
    return ingredients(**parts, data=experiment.data.train)
