"""What a config returns: data, teacher, student, the compressions to try, and what the result must satisfy."""

import math
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
from compress_jax.data import Data
from compress_jax.distill import Term
from compress_jax.train import distillation

PerExampleLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Training:
    """How one network is trained.

    Attributes:
      optimizer: any optax optimizer of the weights.
      steps: number of steps.
      batch_size: examples a step.
      augment: ``(key, batch) -> batch`` inside the step, or None.
      learned: optimizer of what the compression learns (centroids, factors); by default the same as of the weights.
      save_every: steps between checkpoints.
    """

    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int = 128
    augment: Callable[[jax.Array, Any], Any] | None = None
    learned: optax.GradientTransformation | None = None
    save_every: int = 500


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
        """Check that the weights come from exactly one place."""
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
        """Check that the name is one of a directory, and no other row's."""
        if self.name in ("", ".", "..", "teacher", "student") or {"/", "\0"} & set(self.name):
            raise ConfigError(f"a candidate cannot be called {self.name!r}; its name is that of a directory and of a row")


@dataclass(frozen=True)
class Requirement:
    """What the compressed student must satisfy, on validation data and on disk.

    Attributes:
      max_drop: largest loss of validation accuracy below the reference, as a fraction: 0.01 is one point.
      min_ratio: smallest ratio of the float32 student's bytes on disk to the artifact's.
      max_bytes: largest artifact, in bytes on disk.
      reference: ``"teacher"``, or ``"student"`` for the student in float32 (which it is without a teacher, too).
    """

    max_drop: float = 0.01
    min_ratio: float = 1.0
    max_bytes: float = math.inf
    reference: Literal["teacher", "student"] = "teacher"


@dataclass(frozen=True)
class Experiment:
    """All of one run, as real objects.

    Attributes:
      name: shown in logs and kept in the artifact.
      data: the splits.
      student: the network to compress.
      candidates: ways to compress it, from mild to strong (or the reverse, see ``order``).
      requirement: what must be met.
      teacher: a frozen network to learn from; ``"student"`` for the student itself in float32, frozen, which only the
        candidates then learn from; None to learn from labels alone.
      teacher_dtype: what the teacher's params are stored in once it is trained; its accuracy is measured so.
      float32_student: what the student learns from before it is compressed: ``"teacher"``, as the candidates do, or
        ``"labels"``, for a reference that owes nothing to the teacher.
      loss: ``(student_logits, teacher_logits, labels) -> loss of each example``, or a tuple of `distill.Term`, which may
        look at features and learn parts of their own; None means cross entropy with the labels.
      order: ``"mild_first"`` goes on to stronger candidates while they pass, ``"strong_first"`` goes on to milder ones
        until one passes, ``"all"`` tries every one. The smallest artifact that passed is the result.
      coded: whether the compressed student is stored at its entropy (see `export.save`). The float32 one, which its size is
        compared with, is stored as plain tensors either way.
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
        """Check what can be checked before anything is trained."""
        names = [candidate.name for candidate in self.candidates]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"an experiment needs at least one candidate, with names that differ; got {names}")
        if self.order not in ("mild_first", "strong_first", "all"):
            raise ConfigError(f"order must be 'mild_first', 'strong_first' or 'all', got {self.order!r}")
        if isinstance(self.teacher, str) and self.teacher != "student":
            raise ConfigError(f"teacher must be a Network, 'student' or None, got {self.teacher!r}")
        if self.float32_student not in ("teacher", "labels"):
            raise ConfigError(f"float32_student must be 'teacher' or 'labels', got {self.float32_student!r}")
        if self.loss is not None and self.teacher is None:
            raise ConfigError("loss compares the student with a teacher, but the experiment has no teacher")
        if self.loss is None or callable(self.loss):
            return
        if not (isinstance(self.loss, tuple) and all(isinstance(term, Term) for term in self.loss)):
            kind = type(self.loss).__name__
            raise ConfigError(f"loss must be a function or a tuple of distill.Term, and is a {kind}; one term is (term,)")
        distillation(self.student.model, self.loss)  # refuses names that are not each term's own
