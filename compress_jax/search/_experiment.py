"""What a config returns: data, teacher, student, candidate compressions, and the requirement."""

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from compress_jax.core.arguments import flag, one_of, whole
from compress_jax.core.compression import Compression
from compress_jax.core.errors import ArgumentError, ArtifactError, ConfigError
from compress_jax.core.packed import unpack
from compress_jax.core.types import Batch, DType, Params, PyTree
from compress_jax.data import Data
from compress_jax.distill import Teacher, Term, capture
from compress_jax.export import load
from compress_jax.trace import bind
from compress_jax.train import distillation, label_optimizer

Variables = dict[str, Any]
PerExampleLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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

    def __post_init__(self) -> None:
        """Check types and ranges."""
        with _fields_of("Training"):
            wanted = "an optax optimizer, such as optax.adam(1e-3)"
            _require(_is_optimizer(self.optimizer), "optimizer", wanted, self.optimizer)
            fits = self.learned is None or _is_optimizer(self.learned)
            _require(fits, "learned", f"{wanted}, or None", self.learned)
            whole("steps", self.steps, 0)
            whole("batch_size", self.batch_size, 1)
            whole("save_every", self.save_every, 1)
            fits = self.augment is None or callable(self.augment)
            _require(fits, "augment", "a function (key, batch) -> batch, or None", self.augment)

    def transformation(self) -> optax.GradientTransformation:
        """Return the optimizer of ``{"params": ..., "learned": ...}``."""
        return label_optimizer(self.optimizer, self.learned or self.optimizer)


@dataclass(frozen=True)
class Network:
    """A model and where its weights come from: training, or an artifact of an earlier run.

    Attributes:
      model: Linen module called as ``model(x, train=...)``.
      training: how to train it; None if it is restored.
      artifact: file that holds its trained variables; None if it is trained.

    Example:
      >>> import compress_jax as cj
      >>> cj.search.Network(cj.models.LeNet300100())  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.ConfigError: a Network needs either training=... or artifact=...
    """

    model: nn.Module
    training: Training | None = None
    artifact: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check the model, and that the weights come from exactly one place."""
        with _fields_of("Network"):
            wanted = "a Linen module, made by a call such as models.LeNet300100()"
            _require(_is_model(self.model), "model", wanted, self.model)
            fits = self.training is None or isinstance(self.training, Training)
            _require(fits, "training", "a Training, or None", self.training)
            is_path = isinstance(self.artifact, str | PathLike) and str(self.artifact) != ""
            fits = self.artifact is None or is_path
            _require(fits, "artifact", "the path of a file, or None", self.artifact)
        if (self.training is None) == (self.artifact is None):
            raise ConfigError("a Network needs either training=... or artifact=..., and not both")

    def restore(self) -> Variables:
        """Return the variables that ``artifact`` holds, unpacked.

        Raises:
          ArtifactError: if the file is damaged, or holds no ``"params"``.
        """
        assert self.artifact is not None
        variables = unpack(load(self.artifact)[0])
        if not isinstance(variables, dict) or "params" not in variables:
            raise ArtifactError(
                f"{self.artifact} holds no 'params'; a Network is restored from a file that a run "
                "wrote, or one like it"
            )
        return variables


@dataclass(frozen=True)
class Candidate:
    """One way to make the student smaller: a compression, and the training that goes on under it.

    Attributes:
      name: short; it names a directory, and may be neither ``"teacher"`` nor ``"student"``.
      compression: any Compression; ``chain`` makes one of several.
      training: starts from the trained student's weights.

    Example:
      >>> import compress_jax as cj
      >>> training = cj.search.Training(optax.adam(1e-3), steps=100)
      >>> cj.search.Candidate("int4", cj.quantize.uniform(4), training).name
      'int4'
    """

    name: str
    compression: Compression
    training: Training

    def __post_init__(self) -> None:
        """Check types, and that the name can be that of a directory and of a row."""
        with _fields_of("Candidate"):
            _require(isinstance(self.name, str), "name", "text", self.name)
        with _fields_of(f"candidate {self.name!r}"):
            wanted = (
                "a Compression, such as quantize.uniform(4); a rewrite or a solver of trained "
                "params is none"
            )
            fits = isinstance(self.compression, Compression)
            _require(fits, "compression", wanted, self.compression)
            _require(isinstance(self.training, Training), "training", "a Training", self.training)
        if self.name in ("", ".", "..", "teacher", "student") or {"/", "\0"} & set(self.name):
            raise ConfigError(
                f"a candidate cannot be called {self.name!r}; its name is that of a directory and "
                "of a row"
            )

    def bind(self, model: nn.Module, variables: Variables, images: Any) -> Compression:
        """Return the compression with each leaf's layout read from the model's forward pass.

        Args:
          model: the student's Linen module.
          variables: the student's variables, or their shapes.
          images: array ``[examples, ...]`` whose shape and dtype the model takes.

        Returns:
          The compression that is trained, packed and reported.
        """
        rest = {name: value for name, value in variables.items() if name != "params"}
        example = jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype)

        def forward(params: Params, rest: Variables, x: jax.Array) -> PyTree:
            return model.apply({"params": params, **rest}, x)

        return bind(self.compression, forward, variables["params"], rest, example)


@dataclass(frozen=True)
class Requirement:
    """What the compressed student must satisfy, on validation data and on disk.

    Attributes:
      max_drop: largest loss of validation accuracy below the reference, as a fraction below 1: 0.01
        is one point.
      min_ratio: smallest ratio of the float32 student's bytes on disk to the artifact's.
      max_bytes: largest artifact, in bytes on disk.
      reference: ``"teacher"``, or ``"student"`` for the student in float32. Without a teacher it is
        always the student.

    Example:
      >>> import compress_jax as cj
      >>> cj.search.Requirement(max_drop=0.005, min_ratio=20).max_bytes
      inf
    """

    max_drop: float = 0.01
    min_ratio: float = 1.0
    max_bytes: float = math.inf
    reference: Literal["teacher", "student"] = "teacher"

    def __post_init__(self) -> None:
        """Check types and ranges."""
        with _fields_of("Requirement"):
            fits = _is_number(self.max_drop) and 0 <= self.max_drop < 1
            wanted = "a fraction, at least 0 and below 1"
            if _is_number(self.max_drop) and self.max_drop >= 1:
                wanted += "; 1 means all of it; one point is 0.01"
            _require(fits, "max_drop", wanted, self.max_drop)
            fits = _is_number(self.min_ratio) and 0 < self.min_ratio < math.inf
            _require(fits, "min_ratio", "a number above 0, such as 8", self.min_ratio)
            fits = _is_number(self.max_bytes) and self.max_bytes > 0
            wanted = "a number of bytes above 0, or math.inf for no limit"
            _require(fits, "max_bytes", wanted, self.max_bytes)
            one_of("reference", self.reference, ("teacher", "student"))


@dataclass(frozen=True)
class Experiment:
    """All of one run, as real objects.

    Attributes:
      name: shown in logs and stored in the artifact.
      data: the splits.
      student: the network to compress.
      candidates: ways to compress it, from mild to strong (or the reverse, see ``order``).
      requirement: what must be met.
      teacher: a frozen network to learn from; ``"student"`` for the student itself in float32,
        frozen, which only the candidates then learn from; None to learn from labels alone.
      teacher_dtype: dtype in which the trained teacher's params are stored and its accuracy is
        measured.
      float32_student: what the student learns from before it is compressed: ``"teacher"``, as the
        candidates do, or ``"labels"``, for a reference that does not depend on the teacher.
      loss: ``(student_logits, teacher_logits, labels) -> loss of each example``, or a tuple of
        `distill.Term`, which may look at features and learn parameters of their own; None means
        cross entropy with the labels.
      order: ``"mild_first"`` goes on to stronger candidates while they pass, ``"strong_first"``
        goes on to milder ones until one passes, ``"all"`` tries every one. The smallest artifact
        that passed is the result.
      coded: whether the compressed student is stored at its entropy (see `export.save`). The
        float32 one, which its size is compared with, is stored as plain tensors either way.
      seed: seed for all randomness: initialization, data order and augmentation.
      mesh: devices to train on, with an axis ``"data"``; by default all there are.

    Example:
      >>> import numpy as np
      >>> import compress_jax as cj
      >>> split = {"image": np.ones((8, 4, 4, 1), np.float32), "label": np.zeros(8, np.int32)}
      >>> names, statistics = ("a", "b", "c"), (np.zeros(1), np.ones(1))
      >>> data = cj.data.Data("ones", split, split, split, 3, "", names, *statistics, 1.0, {})
      >>> training = cj.search.Training(optax.adam(1e-3), steps=100)
      >>> student = cj.search.Network(cj.models.LeNet300100(), training)
      >>> candidate = cj.search.Candidate("int8", cj.quantize.uniform(8), training)
      >>> cj.search.Experiment("ones", data, student, (candidate,)).order
      'mild_first'
    """

    name: str
    data: Data
    student: Network
    candidates: tuple[Candidate, ...]
    requirement: Requirement = field(default_factory=Requirement)
    teacher: Network | Literal["student"] | None = None
    teacher_dtype: DType = jnp.float32
    float32_student: Literal["teacher", "labels"] = "teacher"
    loss: PerExampleLoss | tuple[Term, ...] | None = None
    order: Literal["mild_first", "strong_first", "all"] = "mild_first"
    coded: bool = False
    seed: int = 0
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        """Check each field; `check` finds out whether they fit together."""
        with _fields_of("Experiment"):
            self._check_pieces()
            self._check_options()
        names = [candidate.name for candidate in self.candidates]
        if not names or len(set(names)) != len(names):
            raise ConfigError(
                f"an experiment needs at least one candidate, with names that differ; got {names}"
            )
        self._check_loss()

    def _check_pieces(self) -> None:
        """Check the types of the objects."""
        _require(isinstance(self.name, str) and self.name != "", "name", "text", self.name)
        wanted = "a data.Data, such as data.load gives"
        _require(isinstance(self.data, Data), "data", wanted, self.data)
        _require(isinstance(self.student, Network), "student", "a Network", self.student)
        is_tuple = isinstance(self.candidates, tuple)
        fits = is_tuple and all(isinstance(each, Candidate) for each in self.candidates)
        wanted = "a tuple of Candidate; one is (candidate,)"
        _require(fits, "candidates", wanted, self.candidates)
        fits = isinstance(self.requirement, Requirement)
        _require(fits, "requirement", "a Requirement", self.requirement)
        fits = self.teacher is None or isinstance(self.teacher, Network)
        fits = fits or self.teacher == "student"
        _require(fits, "teacher", "a Network, 'student' or None", self.teacher)
        fits = self.mesh is None or (isinstance(self.mesh, Mesh) and "data" in self.mesh.axis_names)
        _require(fits, "mesh", "a Mesh with an axis 'data', or None", self.mesh)

    def _check_options(self) -> None:
        """Check the fields that are words, flags and numbers."""
        fits = _is_floating(self.teacher_dtype)
        _require(fits, "teacher_dtype", "a floating dtype", self.teacher_dtype)
        one_of("float32_student", self.float32_student, ("teacher", "labels"))
        one_of("order", self.order, ("mild_first", "strong_first", "all"))
        flag("coded", self.coded)
        whole("seed", self.seed, 0, 2**32 - 1)

    def _check_loss(self) -> None:
        if self.loss is None:
            return
        if self.teacher is None:
            raise ConfigError(
                "loss compares the student with a teacher, but the experiment has no teacher"
            )
        if callable(self.loss):
            return
        if not (isinstance(self.loss, tuple) and all(isinstance(term, Term) for term in self.loss)):
            kind = type(self.loss).__name__
            raise ConfigError(
                f"loss must be a function or a tuple of distill.Term, and is a {kind}; one term "
                "is (term,)"
            )
        distillation(self.student.model, self.loss)  # refuses two terms of one name

    def freeze(self, model: nn.Module, variables: Variables) -> Teacher:
        """Return a trained network as a frozen teacher, in ``teacher_dtype``.

        Args:
          model: the Linen module.
          variables: its trained variables.

        Returns:
          The teacher. Its calls also give the features that terms of the loss compare.
        """
        terms = self.loss if isinstance(self.loss, tuple) else ()
        paths = tuple(dict.fromkeys(path for term in terms for path in term.teacher))
        apply = capture(model, paths) if paths else model.apply
        return Teacher(apply, variables).cast(self.teacher_dtype)


@contextlib.contextmanager
def _fields_of(owner: str) -> Iterator[None]:
    """Raise what is wrong with a field as a ConfigError that names the field's owner."""
    try:
        yield
    except ArgumentError as error:
        raise ConfigError(f"{owner}: {error}") from error


def _require(holds: bool, name: str, wanted: str, value: object) -> None:
    """Refuse the value of a field unless a condition holds; ``wanted`` follows "must be"."""
    if not holds:
        raise ArgumentError(f"{name} must be {wanted}, got {_brief(value)}")


def _brief(value: object) -> str:
    """Return a value if it is plain and short, else its type and name."""
    if isinstance(value, str | int | float | tuple | type(None)) and len(repr(value)) <= 60:
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return f"the {type(value).__name__} {name}" if name else f"a {type(value).__name__}"


def _is_number(value: object) -> bool:
    """Return whether a value is a real number, infinity included, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def _is_model(value: object) -> bool:
    methods = (getattr(value, name, None) for name in ("init", "apply"))
    return not isinstance(value, type) and all(map(callable, methods))


def _is_optimizer(value: object) -> bool:
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def _is_floating(dtype: DType) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False
