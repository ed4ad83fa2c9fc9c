"""One stage of a run: train a model under a compression, and resume only what was made of the same.

A directory that was made of something else (see `_ingredients`) is refused, never trained further.
"""

import logging
import math
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

from compress_jax.core.compression import Compression, CompressionState, identity
from compress_jax.core.errors import CompressError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Batch, JsonObject, PyTree
from compress_jax.data import batches
from compress_jax.data._disk.stored import columns_of
from compress_jax.distill import Teacher
from compress_jax.search._divided import measured
from compress_jax.search._experiment import Experiment
from compress_jax.search._ingredients import ingredients
from compress_jax.search._network import Network, Training, Variables
from compress_jax.search._reuse import begin_stage
from compress_jax.search._shared import shared_stage
from compress_jax.tasks import PureModel
from compress_jax.tasks._task import REFERENCE
from compress_jax.train import (
    Best,
    Checkpoints,
    MeshStep,
    StatefulLoss,
    Step,
    TrainState,
    average_of,
    create,
    distillation,
    fit,
    jit_step,
    make_step,
    shardings,
)
from compress_jax.train._parallel import Rules, shardings_like
from compress_jax.train._processes import gathered, hosted, spread

_log = logging.getLogger(__name__)
NETWORK = ("params", "learned", "fixed", "model_state")  # fields of a state
# Options that records of earlier versions lack, as they were then.
LATER = {"best_every": None, "microbatches": 1, "average": None}
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
      state: of the compression, where a solver made one; None to make one of the params.
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
    state: CompressionState | None = None
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
      The state after the last step; with `Training.best_every` the network is that of the best
      one, and the weights are their average if the training keeps one. Params and compression are
      on one device of each process or, where the rules divide them, in host memory.

    Raises:
      ConfigError: if the directory belongs to a stage that was made of something else.
    """
    record = made_of(experiment, stage)
    begin_stage(directory, record)  # before anything is written there
    with shared_stage(directory, record, stage.name):
        return _trained(experiment, stage, directory)


def _trained(experiment: Experiment, stage: Stage, directory: Path) -> TrainState:
    """Train a stage from where its checkpoints are, to its end."""
    if experiment.terms is None:
        stage = stage._replace(teacher=None)  # trained on labels alone
    training = stage.training
    # What the teacher said is for measuring; in training it is asked anew, of augmented inputs.
    data = {name: x for name, x in experiment.data.train.items() if name != REFERENCE}
    first = {name: values[: training.batch_size] for name, values in data.items()}
    begun = (directory / "checkpoints").is_dir()
    divides = _divides(experiment.devices, (*stage.rules, *stage.teacher_rules))
    if training.steps and divides and not begun:
        _require_same_gradients(experiment, stage, first)
    placed = _divided(experiment, stage, first)
    # crc32, as Python's hash of text differs between processes.
    order_seed = zlib.crc32(f"{experiment.seed}/{stage.name}".encode())
    best = _best(experiment, stage)
    trained = fit(
        placed.step,
        placed.state,
        batches(
            data,
            training.batch_size,
            seed=order_seed,
            rows=placed.step.rows(training.batch_size),
            check=_label_check(experiment),
        ),
        steps=training.steps,
        directory=directory,
        save_every=training.save_every,
        evaluate=_evaluation(experiment, stage) if best else None,
        eval_every=training.best_every,
        best=best,
        title=stage.name,
        teacher=placed.teacher,
        tokens=_tokens_of(experiment, first),
    )
    if best:
        trained = _restored_best(trained, directory, best)
    return _gathered(_averaged(trained, training))


def _averaged(state: TrainState, training: Training) -> TrainState:
    """Return a state with the average of its weights, if its training keeps one."""
    return state if training.average is None else average_of(state)


def _gathered(state: TrainState) -> TrainState:
    """Return a state whose network is on one device of each process, or in host memory.

    What comes after a training (packing, rewriting) is done by each process for itself. What was
    divided may not fit on one device.
    """
    own = {name: getattr(state, name) for name in NETWORK}
    return state._replace(**(gathered(own) if _is_whole(state) else hosted(own)))


def _is_whole(state: TrainState) -> bool:
    """Tell whether every device holds the network whole."""
    own = [getattr(state, name) for name in NETWORK]
    return all(leaf.is_fully_replicated for leaf in jax.tree.leaves(own))


def _best(experiment: Experiment, stage: Stage) -> Best | None:
    """Return the metric that decides which state a stage ends with; None for the last one."""
    if stage.training.best_every is None or not stage.training.steps:
        return None
    metric = experiment.task.metric
    return Best(metric.name, metric.higher_is_better)


def _evaluation(experiment: Experiment, stage: Stage) -> Callable[[TrainState], dict[str, float]]:
    """Return what measures a state on validation data, through the stage's compression."""
    view = jax.jit(lambda state: state.variables(stage.compression))

    def evaluate(state: TrainState) -> dict[str, float]:
        state = _averaged(state, stage.training)
        # What the rules divide is measured over the mesh.
        variables = view(_gathered(state) if _is_whole(state) else state)
        split = experiment.data.validation
        return measured(experiment, stage.model.apply, variables, split).values

    return evaluate


def _restored_best(state: TrainState, directory: Path, best: Best) -> TrainState:
    """Return a state with the step and the network of the best checkpoint."""
    names = (*NETWORK, "opt_state")  # the optimizer keeps the average of the weights
    only = ("step", *(f"{name}/**" for name in names if jax.tree.leaves(getattr(state, name))))
    with Checkpoints(directory / "checkpoints", best=best) as checkpoints:
        step, restored = checkpoints.restore_best(state, only=only)
    _log.info("%s: step %d of %d is the best", directory, step, int(state.step))
    return restored


def _label_check(experiment: Experiment) -> Callable[[Batch], None] | None:
    """Return a check of a batch's labels; those in memory were all checked before."""
    task = experiment.task
    stored = columns_of(experiment.data.train)
    if task.labels is None or not stored:
        return None

    def check(batch: Batch) -> None:
        labels = task.prepare(batch)[task.labels]
        task.check_labels(labels, experiment.data.classes)

    return check


def _tokens_of(experiment: Experiment, batch: Batch) -> Callable[[Batch], int] | None:
    """Return what counts the tokens of a batch, where the model is given integers [batch, n]."""
    task = experiment.task
    shapes = jax.eval_shape(lambda batch: task.inputs_of(task.prepare(batch)), batch)
    inputs = [each for each in shapes if hasattr(each, "dtype")]
    tokens = [x for x in inputs if len(x.shape) == 2 and jnp.issubdtype(x.dtype, jnp.integer)]
    number = math.prod(tokens[0].shape) if tokens else 0
    return (lambda _: number) if tokens else None


def _divides(mesh: Mesh, rules: Rules) -> bool:
    """Return whether rules divide anything: whether they name an axis of several devices."""
    named = jax.tree.leaves([tuple(spec) for _, spec in rules])
    return any(mesh.shape.get(name, 1) > 1 for name in named)


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
    made = spread(stage.state, shardings_like(stage.state, variables["params"], mesh, stage.rules))
    where = shardings(jax.eval_shape(begin, variables, aux, made), mesh, stage.rules)
    # Born where it lives: no device ever holds more than its part.
    state = jax.jit(begin, out_shardings=where)(variables, aux, made)
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
    training = replace(stage.training, optimizer=optax.sgd(1.0), learned=None, average=None)
    stage = stage._replace(training=training)
    whole = _gradients(experiment, stage._replace(rules=(), teacher_rules=()), batch)
    for path, gradient in _gradients(experiment, stage, batch).items():
        # Norms: single entries differ by a tenth between two ways to round to bfloat16.
        size = np.linalg.norm(whole[path])
        error = np.linalg.norm(gradient - whole[path])
        if not error <= 0.05 * size + 1e-6:
            raise CompressError(
                f"{stage.name}: under its rules the gradient of {path} is another one (off by "
                f"{error:.2g}, of {size:.2g}): the compiler divides it wrongly. Divide "
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
) -> tuple[Step, Callable[..., TrainState], Aux]:
    """Return a stage's training step, and what it begins with; it can be traced on shapes.

    Args:
      experiment: for loss, task and seed.
      stage: what is trained.
      variables: where it starts.
      batch: one of the training data.

    Returns:
      ``(step, begin, aux)``: ``begin(variables, aux, compression's state or None)`` is the state
      before the first step.
    """
    loss = _loss(experiment, stage)
    loss_key = stage_key(experiment.seed, f"{stage.name}/loss")
    aux = loss.init(loss_key, variables, batch, stage.teacher)
    optimizer = stage.training.transformation()
    key = stage_key(experiment.seed, stage.name)

    def begin(variables: Variables, aux: Aux, made: CompressionState | None = None) -> TrainState:
        compression = stage.compression
        if made is not None:
            compression = compression._replace(init=lambda params: made)
        return create(variables, compression, optimizer, key, aux)

    parts = stage.training.microbatches
    return make_step(loss, optimizer, stage.compression, microbatches=parts), begin, aux


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
    settings = {
        name: value
        for name, value in vars(stage.training).items()
        if name != "save_every" and (name not in LATER or value != LATER[name])
    }
    by_validation = stage.training.best_every is not None
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
    if by_validation:
        parts["validation"] = experiment.data.validation
    # Weights count by value: a stage after a changed one is made of something else.
    parts["start"] = flatten(stage.start)[0] if stage.start else None
    if stage.state is not None:
        parts["state"] = jax.tree.leaves(stage.state)
    return ingredients(**parts, data=experiment.data.train)
