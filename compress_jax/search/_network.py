"""A network of a run, and how it is trained."""

import contextlib
import functools
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike

import jax
import optax
from jax.sharding import PartitionSpec

from compress_jax.core.arguments import number, whole
from compress_jax.core.errors import ArgumentError, ArtifactError, ConfigError
from compress_jax.core.packed import unpack
from compress_jax.core.types import Batch, Model, PyTree
from compress_jax.export import load
from compress_jax.tasks import PureModel, pure
from compress_jax.train import averaged, label_optimizer
from compress_jax.train._parallel import Rules

Variables = dict[str, PyTree]
"""Params and other collections of a model, ``{"params": ..., "batch_stats": ...}``."""


@dataclass(frozen=True)
class Training:
    """How one network is trained.

    Attributes:
      optimizer: any optax optimizer of the weights.
      steps: number of steps; 0 compresses the network as it is, without training.
      batch_size: examples a step.
      augment: ``(key, batch) -> batch`` inside the step, or None.
      learned: optimizer of what the compression learns (centroids, factors); by default the same as
        of the weights.
      save_every: steps between checkpoints.
      best_every: steps between measurements on validation data, of which the one with the task's
        best metric is the result; the same data then choose the state and judge it. None for the
        state after the last step.
      microbatches: into how many parts a batch is cut, one after the other, to need less memory;
        the gradient is that of the whole batch, see `train.make_step`. Augmentation and batch norms
        work on each part by itself.
      average: decay of a moving average of the weights, see `train.averaged`, such as 0.999: then
        the average is what the stage ends with, what is judged, packed and written. None for the
        weights after the last step.

    Example:
      >>> import compress_jax as cj
      >>> cj.search.Training(optax.adam(1e-3), steps=-5)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.ConfigError: Training: steps must be a whole number of at least 0...
    """

    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int = 128
    augment: Callable[[jax.Array, Batch], Batch] | None = None
    learned: optax.GradientTransformation | None = None
    save_every: int = 500
    best_every: int | None = None
    microbatches: int = 1
    average: float | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        with fields_of("Training"):
            wanted = "an optax optimizer, such as optax.adam(1e-3)"
            require(_is_optimizer(self.optimizer), "optimizer", wanted, self.optimizer)
            fits = self.learned is None or _is_optimizer(self.learned)
            require(fits, "learned", f"{wanted}, or None", self.learned)
            whole("steps", self.steps, 0)
            whole("batch_size", self.batch_size, 1)
            whole("save_every", self.save_every, 1)
            if self.best_every is not None:
                whole("best_every", self.best_every, 1)
            parts = whole("microbatches", self.microbatches, 1)
            fits = self.batch_size % parts == 0
            wanted = f"a divisor of batch_size={self.batch_size}"
            require(fits, "microbatches", wanted, self.microbatches)
            fits = self.augment is None or callable(self.augment)
            require(fits, "augment", "a function (key, batch) -> batch, or None", self.augment)
            if self.average is not None:
                number("average", self.average, 0, 1, below=True)

    def transformation(self) -> optax.GradientTransformation:
        """Return the optimizer of ``{"params": ..., "learned": ...}``."""
        optimizer = label_optimizer(self.optimizer, self.learned or self.optimizer)
        return optimizer if self.average is None else averaged(optimizer, self.average)


@dataclass(frozen=True)
class Network:
    """A model and where its weights come from: training, given ones, or an earlier run.

    Attributes:
      model: a Linen, NNX or Equinox module, or another that `tasks.pure` takes.
      training: how to train it; None if its weights are there.
      artifact: file that holds its trained variables, of an earlier run; instead of training.
      variables: ``{"params": ..., **state}``, such as published weights: where training starts, or
        without training what is used; None for those that the model's ``init`` draws.
      rules: how its params are divided over the experiment's mesh, ``((glob, PartitionSpec),
        ...)``; see `train.shardings`. A param that none matches is whole on every device.

    Example:
      >>> import compress_jax as cj
      >>> cj.search.Network(cj.models.LeNet300100())  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.ConfigError: a Network needs training=..., artifact=... or ...
    """

    model: Model
    training: Training | None = None
    artifact: str | PathLike[str] | None = None
    variables: Variables | None = field(default=None, compare=False, repr=False)
    rules: Rules = ()

    def __post_init__(self) -> None:
        """Check the model, and that the weights come from exactly one place."""
        with fields_of("Network"):
            # Here, so that a wrong model is an error of the config's line and not of the run.
            self.pure  # noqa: B018  raises an error for what is no model
            fits = self.training is None or isinstance(self.training, Training)
            require(fits, "training", "a Training, or None", self.training)
            is_path = isinstance(self.artifact, str | PathLike) and str(self.artifact) != ""
            fits = self.artifact is None or is_path
            require(fits, "artifact", "the path of a file, or None", self.artifact)
            is_tree = isinstance(self.variables, dict) and "params" in self.variables
            fits = self.variables is None or is_tree
            require(fits, "variables", "a dict with 'params', or None", self.variables)
            fits = isinstance(self.rules, tuple) and all(map(_is_rule, self.rules))
            wanted = 'a tuple of rules such as ("**/kernel", PartitionSpec(None, "fsdp"))'
            require(fits, "rules", wanted, self.rules)
        given = (self.training or self.variables) is not None, self.artifact is not None
        if given in ((False, False), (True, True)):
            raise ConfigError(
                "a Network needs training=..., artifact=... or variables=...; training may start "
                "from variables, and an artifact stands alone"
            )

    @functools.cached_property
    def pure(self) -> PureModel:
        """The model as pure functions; always the same, so that what is compiled is reused."""
        return pure(self.model)

    def restore(self) -> Variables:
        """Return the variables that are given, or that ``artifact`` holds, unpacked.

        Raises:
          ArtifactError: if the file is damaged, or holds no ``"params"``.
        """
        if self.variables is not None:
            return self.variables
        assert self.artifact is not None
        variables = unpack(load(self.artifact)[0])
        if not isinstance(variables, dict) or "params" not in variables:
            raise ArtifactError(
                f"{self.artifact} holds no 'params'; a Network is restored from a file that a run "
                "wrote, or one like it"
            )
        return variables

    def shapes(self, example: tuple[jax.ShapeDtypeStruct, ...]) -> Variables:
        """Return the shapes of the variables it starts from.

        Args:
          example: the shapes of the model's inputs for one example.

        Returns:
          Variables of `jax.ShapeDtypeStruct`.
        """
        if self.artifact is None and self.variables is None:
            return jax.eval_shape(self.pure.init, jax.random.key(0), *example)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.restore())


# Fields are checked by name.


@contextlib.contextmanager
def fields_of(owner: str) -> Iterator[None]:
    """Raise what is wrong with a field as a ConfigError that names the field's owner."""
    try:
        yield
    except (ArgumentError, ConfigError) as error:
        raise ConfigError(f"{owner}: {error}") from error


def require(holds: bool, name: str, wanted: str, value: object) -> None:
    """Refuse the value of a field unless a condition holds; ``wanted`` follows "must be"."""
    if not holds:
        raise ArgumentError(f"{name} must be {wanted}, got {_brief(value)}")


def _brief(value: object) -> str:
    """Return a value if it is plain and short, else its type and name."""
    if isinstance(value, str | int | float | tuple | type(None)) and len(repr(value)) <= 60:
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"


def is_number(value: object) -> bool:
    """Return whether a value is a real number, infinity included, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_rule(value: object) -> bool:
    # In older versions of JAX a PartitionSpec is a tuple too.
    if isinstance(value, PartitionSpec) or not isinstance(value, tuple) or len(value) != 2:
        return False
    return isinstance(value[0], str) and isinstance(value[1], PartitionSpec)


def _is_optimizer(value: object) -> bool:
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
