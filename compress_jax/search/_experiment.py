"""What a config returns: data, teacher, student, the compressions to try, and what the result must satisfy."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from compress_jax.core.compression import Compression
from compress_jax.core.errors import ConfigError
from compress_jax.core.types import DType
from compress_jax.data import Data
from compress_jax.distill import Term
from compress_jax.train import distillation

# The fields of what a config builds, checked where they are given: wrong types and values are
# refused by name.


def require(holds: bool, owner: str, name: str, wanted: str, value: Any) -> None:
    """Refuse a value unless a condition holds.

    Args:
      holds: the condition.
      owner: what has the field, such as ``"Training"``.
      name: of the field.
      wanted: what it must be, as the end of "... must be".
      value: what was given.

    Raises:
      ConfigError: if it does not hold.

    Example:
      >>> require(False, "Training", "steps", "a whole number, 0 or more", "many")
      Traceback (most recent call last):
      compress_jax.core.errors.ConfigError: Training: steps must be a whole number, 0 or more, got 'many'
    """
    if not holds:
        raise ConfigError(f"{owner}: {name} must be {wanted}, got {told(value)}")


def told(value: Any) -> str:
    """Return what a value is, in a few words: itself if it is plain and short, else its type."""
    if isinstance(value, str | int | float | tuple | type(None)) and len(repr(value)) <= 60:
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"


def whole(owner: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number of a range; ``True`` is none."""
    upper = "" if most is None else f" and at most {most}"
    fits = (
        isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least
    )
    require(
        fits and (most is None or int(value) <= most),
        owner,
        name,
        f"a whole number, {least} or more{upper}",
        value,
    )


def is_number(value: Any) -> bool:
    """Tell whether a value is a real number, infinity included."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def one_of(owner: str, name: str, value: Any, *words: str) -> None:
    """Refuse what is none of some words."""
    listed = f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}"
    require(isinstance(value, str) and value in words, owner, name, listed, value)


PerExampleLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Training:
    """How one network is trained.

    Attributes:
      optimizer: any optax optimizer of the weights.
      steps: number of steps; 0 compresses what is there without training.
      batch_size: examples a step.
      augment: ``(key, batch) -> batch`` inside the step, or None.
      learned: optimizer of what the compression learns (centroids, factors); by default the same as
        of the weights.
      save_every: steps between checkpoints.
    """

    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int = 128
    augment: Callable[[jax.Array, Any], Any] | None = None
    learned: optax.GradientTransformation | None = None
    save_every: int = 500

    def __post_init__(self) -> None:
        """Check types and ranges."""
        for name in ("optimizer", "learned"):
            value = getattr(self, name)
            fits = _is_optimizer(value) or (value is None and name == "learned")
            require(fits, "Training", name, "an optax optimizer, such as optax.adam(1e-3)", value)
        whole("Training", "steps", self.steps, 0)
        whole("Training", "batch_size", self.batch_size, 1)
        whole("Training", "save_every", self.save_every, 1)
        fits = self.augment is None or callable(self.augment)
        require(
            fits, "Training", "augment", "a function (key, batch) -> batch, or None", self.augment
        )


@dataclass(frozen=True)
class Network:
    """A model and where its weights come from: training, or an artifact of an earlier run.

    Attributes:
      model: Linen module called as ``model(x, train=...)``.
      training: how to train it; None if it is restored.
      artifact: file that holds its trained variables; None if it is trained.
    """

    model: nn.Module
    training: Training | None = None
    artifact: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check the model, and that the weights come from exactly one place."""
        made = not isinstance(self.model, type) and all(
            callable(getattr(self.model, n, None)) for n in ("init", "apply")
        )
        require(
            made,
            "Network",
            "model",
            "a Linen module, made by a call such as models.LeNet300100()",
            self.model,
        )
        fits = self.training is None or isinstance(self.training, Training)
        require(fits, "Network", "training", "a Training, or None", self.training)
        fits = self.artifact is None or (
            isinstance(self.artifact, str | PathLike) and str(self.artifact) != ""
        )
        require(fits, "Network", "artifact", "the path of a file, or None", self.artifact)
        if (self.training is None) == (self.artifact is None):
            raise ConfigError("a Network needs either training=... or artifact=..., and not both")


@dataclass(frozen=True)
class Candidate:
    """One way to make the student smaller: a compression, and the training that goes on under it.

    Attributes:
      name: short; it names a directory, and may be neither ``"teacher"`` nor ``"student"``.
      compression: any Compression; ``chain`` makes one of several.
      training: from the trained student's weights on.
    """

    name: str
    compression: Compression
    training: Training

    def __post_init__(self) -> None:
        """Check types, and that the name is one of a directory, and no other row's."""
        require(isinstance(self.name, str), "Candidate", "name", "text", self.name)
        who = f"candidate {self.name!r}"
        wanted = "a Compression, such as quantize.uniform(4); a rewrite or a solver of trained params is none"
        require(
            isinstance(self.compression, Compression), who, "compression", wanted, self.compression
        )
        require(isinstance(self.training, Training), who, "training", "a Training", self.training)
        if self.name in ("", ".", "..", "teacher", "student") or {"/", "\0"} & set(self.name):
            raise ConfigError(
                f"a candidate cannot be called {self.name!r}; its name is that of a directory and "
                "of a row"
            )


@dataclass(frozen=True)
class Requirement:
    """What the compressed student must satisfy, on validation data and on disk.

    Attributes:
      max_drop: largest loss of validation accuracy below the reference, as a fraction below 1: 0.01
        is one point.
      min_ratio: smallest ratio of the float32 student's bytes on disk to the artifact's.
      max_bytes: largest artifact, in bytes on disk.
      reference: ``"teacher"``, or ``"student"`` for the student in float32 (which it is without a
        teacher, too).
    """

    max_drop: float = 0.01
    min_ratio: float = 1.0
    max_bytes: float = math.inf
    reference: Literal["teacher", "student"] = "teacher"

    def __post_init__(self) -> None:
        """Check types and ranges."""
        fits = is_number(self.max_drop) and 0 <= self.max_drop < 1
        meaning = (
            "; 1 means all of it; one point is 0.01"
            if is_number(self.max_drop) and self.max_drop >= 1
            else ""
        )
        require(
            fits,
            "Requirement",
            "max_drop",
            f"a fraction, at least 0 and below 1{meaning}",
            self.max_drop,
        )
        fits = is_number(self.min_ratio) and 0 < self.min_ratio < math.inf
        require(fits, "Requirement", "min_ratio", "a number above 0, such as 8", self.min_ratio)
        fits = is_number(self.max_bytes) and self.max_bytes > 0
        require(
            fits,
            "Requirement",
            "max_bytes",
            "a number of bytes above 0, or math.inf for no limit",
            self.max_bytes,
        )
        one_of("Requirement", "reference", self.reference, "teacher", "student")


@dataclass(frozen=True)
class Experiment:
    """All of one run, as real objects.

    Attributes:
      name: shown in logs and kept in the artifact.
      data: the splits.
      student: the network to compress.
      candidates: ways to compress it, from mild to strong (or the reverse, see ``order``).
      requirement: what must be met.
      teacher: a frozen network to learn from; ``"student"`` for the student itself in float32,
        frozen, which only the candidates then learn from; None to learn from labels alone.
      teacher_dtype: what the teacher's params are stored in once it is trained; its accuracy is
        measured so.
      float32_student: what the student learns from before it is compressed: ``"teacher"``, as the
        candidates do, or ``"labels"``, for a reference that owes nothing to the teacher.
      loss: ``(student_logits, teacher_logits, labels) -> loss of each example``, or a tuple of
        `distill.Term`, which may look at features and learn parts of their own; None means cross
        entropy with the labels.
      order: ``"mild_first"`` goes on to stronger candidates while they pass, ``"strong_first"``
        goes on to milder ones until one passes, ``"all"`` tries every one. The smallest artifact
        that passed is the result.
      coded: whether the compressed student is stored at its entropy (see `export.save`). The
        float32 one, which its size is compared with, is stored as plain tensors either way.
      seed: of initialisation, data order and augmentation.
      mesh: devices to train on, with an axis ``"data"``; by default all there are.
    """

    name: str
    data: Data
    student: Network
    candidates: tuple[Candidate, ...]
    requirement: Requirement = Requirement()
    teacher: Network | Literal["student"] | None = None
    teacher_dtype: Any = jnp.float32
    float32_student: Literal["teacher", "labels"] = "teacher"
    loss: PerExampleLoss | tuple[Term, ...] | None = None
    order: Literal["mild_first", "strong_first", "all"] = "mild_first"
    coded: bool = False
    seed: int = 0
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        """Check what can be checked of the fields; `check` looks at how they fit together."""
        self._check_types()
        names = [candidate.name for candidate in self.candidates]
        if not names or len(set(names)) != len(names):
            raise ConfigError(
                f"an experiment needs at least one candidate, with names that differ; got {names}"
            )
        if self.loss is not None and self.teacher is None:
            raise ConfigError(
                "loss compares the student with a teacher, but the experiment has no teacher"
            )
        if self.loss is None or callable(self.loss):
            return
        if not (isinstance(self.loss, tuple) and all(isinstance(term, Term) for term in self.loss)):
            kind = type(self.loss).__name__
            raise ConfigError(
                f"loss must be a function or a tuple of distill.Term, and is a {kind}; one term "
                "is (term,)"
            )
        distillation(self.student.model, self.loss)  # refuses names that are not each term's own

    def _check_types(self) -> None:
        """Check each field by itself."""
        require(
            isinstance(self.name, str) and self.name != "", "Experiment", "name", "text", self.name
        )
        require(
            isinstance(self.data, Data),
            "Experiment",
            "data",
            "a data.Data, such as data.load gives",
            self.data,
        )
        require(
            isinstance(self.student, Network), "Experiment", "student", "a Network", self.student
        )
        fits = isinstance(self.candidates, tuple) and all(
            isinstance(each, Candidate) for each in self.candidates
        )
        require(
            fits,
            "Experiment",
            "candidates",
            "a tuple of Candidate; one is (candidate,)",
            self.candidates,
        )
        require(
            isinstance(self.requirement, Requirement),
            "Experiment",
            "requirement",
            "a Requirement",
            self.requirement,
        )
        fits = (
            self.teacher is None or isinstance(self.teacher, Network) or self.teacher == "student"
        )
        require(fits, "Experiment", "teacher", "a Network, 'student' or None", self.teacher)
        require(
            _is_floating(self.teacher_dtype),
            "Experiment",
            "teacher_dtype",
            "a floating dtype",
            self.teacher_dtype,
        )
        one_of("Experiment", "float32_student", self.float32_student, "teacher", "labels")
        one_of("Experiment", "order", self.order, "mild_first", "strong_first", "all")
        require(isinstance(self.coded, bool), "Experiment", "coded", "True or False", self.coded)
        whole("Experiment", "seed", self.seed, 0, 2**32 - 1)
        fits = self.mesh is None or (isinstance(self.mesh, Mesh) and "data" in self.mesh.axis_names)
        require(fits, "Experiment", "mesh", "a Mesh with an axis 'data', or None", self.mesh)


def _is_optimizer(value: Any) -> bool:
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def _is_floating(dtype: DType) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False
