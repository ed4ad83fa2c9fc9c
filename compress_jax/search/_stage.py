"""One stage of a run: train a model under a compression, and resume only what was made of the same.

Every stage directory has a record, ``made_of.json``: the values and the code that decide how the
stage ends. A directory whose record differs is refused, never trained further.
"""

import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType

from compress_jax.core.compression import Compression, identity
from compress_jax.core.errors import ConfigError
from compress_jax.core.paths import flatten
from compress_jax.core.record import TEXT, Kind, mapping, read_record, sealed
from compress_jax.core.table import printable
from compress_jax.core.types import Batch
from compress_jax.data import batches
from compress_jax.distill import Teacher, on_logits
from compress_jax.export import write_atomically
from compress_jax.search._experiment import Experiment, Network, Training, Variables
from compress_jax.search._ingredients import ingredients
from compress_jax.train import (
    StatefulLoss,
    Step,
    TrainState,
    create,
    distillation,
    fit,
    jit_step,
    make_step,
    place,
    supervised,
)


class Stage(NamedTuple):
    """One network that is trained in a run.

    Attributes:
      name: ``"teacher"``, ``"student"`` or ``"candidate NAME"``; it is part of every random seed.
      model: the Linen module.
      training: optimizer, steps and batch size.
      teacher: the frozen teacher, or None to train on labels.
      compression: what the forward pass sees the params through.
      start: variables that an earlier stage trained, or None to initialize them.
    """

    name: str
    model: nn.Module
    training: Training
    teacher: Teacher | None = None
    compression: Compression = identity()
    start: Variables | None = None


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
    stage = Stage(name, network.model, network.training, teacher)
    return train(experiment, stage, directory).variables()


def train(experiment: Experiment, stage: Stage, directory: Path) -> TrainState:
    """Train a stage, or resume it from the checkpoint in its directory.

    Args:
      experiment: for data, loss, seed and mesh.
      stage: what to train.
      directory: where checkpoints, metrics and the record of the stage go.

    Returns:
      The state after the last step.

    Raises:
      ConfigError: if the directory belongs to a stage that was made of something else.
    """
    require_same(directory, made_of(experiment, stage))
    if experiment.loss is None:
        stage = stage._replace(teacher=None)  # trained on labels alone
    training = stage.training
    data = experiment.data.train
    variables = stage.start or _initialized(experiment, stage)
    first = {name: values[: training.batch_size] for name, values in data.items()}
    step, state = prepare(experiment, stage, variables, first)
    mesh = experiment.mesh
    if mesh is None:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    order_seed = zlib.crc32(f"{experiment.seed}/{stage.name}".encode())
    return fit(
        jit_step(step, mesh, state),
        place(state, mesh),
        batches(data, training.batch_size, seed=order_seed),
        steps=training.steps,
        directory=directory,
        save_every=training.save_every,
        title=stage.name,
        teacher=stage.teacher,
    )


def prepare(
    experiment: Experiment, stage: Stage, variables: Variables, batch: Batch
) -> tuple[Step, TrainState]:
    """Return the training step and the state before it; pure, so it can be traced on shapes."""
    loss = _loss(experiment, stage)
    loss_key = stage_key(experiment.seed, f"{stage.name}/loss")
    aux = loss.init(loss_key, variables, batch, stage.teacher)
    optimizer = stage.training.transformation()
    key = stage_key(experiment.seed, stage.name)
    state = create(variables, stage.compression, optimizer, key, aux)
    return make_step(loss, optimizer, stage.compression), state


def _loss(experiment: Experiment, stage: Stage) -> StatefulLoss:
    augment = stage.training.augment
    if stage.teacher is None or experiment.loss is None:
        return supervised(stage.model, augment=augment)
    terms = experiment.loss
    if not isinstance(terms, tuple):
        terms = (on_logits(terms, labels=True),)
    return distillation(stage.model, terms, augment=augment)


def _initialized(experiment: Experiment, stage: Stage) -> Variables:
    example = jnp.zeros((1, *experiment.data.train["image"].shape[1:]))
    key = stage_key(experiment.seed, f"{stage.name}/init")
    return jax.jit(stage.model.init)(key, example)


def stage_key(seed: int, name: str) -> jax.Array:
    """Return the PRNG key of a stage, from the seed and the stage's name alone.

    It does not depend on the stages before it, so trying one candidate more changes no other.
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


MADE_OF = "made_of.json"
_FORM = {
    "version": Kind("1, the version that is read here", lambda value: value == 1),
    "made_of": mapping(TEXT),
}


def made_of(experiment: Experiment, stage: Stage) -> dict[str, str]:
    """Return all that decides how a stage ends, by name; see `ingredients`."""
    # How often a checkpoint is written changes no number.
    settings = {name: value for name, value in vars(stage.training).items() if name != "save_every"}
    parts: dict[str, Any] = {
        "stage": stage.name,
        "seed": experiment.seed,
        "model": stage.model,
        "training": settings,
        "compression": stage.compression,
    }
    if stage.teacher is not None:
        parts["loss"] = experiment.loss
        parts["teacher"] = flatten(stage.teacher.variables)[0]
    parts["start"] = flatten(stage.start)[0] if stage.start else None
    return ingredients(**parts, data=experiment.data.train)


def require_same(directory: Path, made_of: dict[str, str]) -> None:
    """Check that a stage's directory was made of the same; in a new directory, write the record.

    Args:
      directory: of the stage.
      made_of: from `ingredients`.

    Raises:
      ConfigError: if it was made of something else; the message names what differs.
    """
    recorded = _read_made_of(directory)
    checkpoints = directory / "checkpoints"
    if recorded is not None:
        _compare(directory, recorded, made_of, f"delete {directory} to train it again")
    elif checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise ConfigError(
            f"{directory} has checkpoints, but no {MADE_OF} that says what they were made of; they "
            "are of an earlier version or of another program. Choose another --workdir, or delete "
            f"{directory} to train it again"
        )
    elif jax.process_index() == 0:
        write_atomically(directory / MADE_OF, sealed({"version": 1, "made_of": made_of}))


def require_same_model(directory: Path, model: nn.Module) -> None:
    """Check that a stage trained the same model, if its directory has a record.

    Raises:
      ConfigError: if the model's fields or its code differ.
    """
    recorded = _read_made_of(directory)
    if recorded is not None:
        old = _of_model(recorded)
        new = _of_model(ingredients(model=model))
        _compare(directory, old, new, "its artifact is of the model as it was then")


def _of_model(made_of: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in made_of.items() if name.startswith("model")}


def _read_made_of(directory: Path) -> dict[str, str] | None:
    """Return the record of a stage, or None if its directory has none.

    Raises:
      ConfigError: if the record is damaged.
    """
    file = directory / MADE_OF
    if not os.path.lexists(file):
        return None
    advice = f"delete {directory} to train it again"
    return read_record(file, _FORM, advice, ConfigError)["made_of"]


def _compare(directory: Path, old: dict[str, str], new: dict[str, str], advice: str) -> None:
    """Raise a ConfigError with the first three entries that differ, if any do."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if not names:
        return
    missing = "not there"
    changes = [
        f"{name} was {old.get(name, missing)}, and now is {new.get(name, missing)}"
        for name in names[:3]
    ]
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    text = f"{directory} was made of something else: {'; '.join(changes)}{more}. "
    raise ConfigError(printable(f"{text}Choose another --workdir, or {advice}"))
