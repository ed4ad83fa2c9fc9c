"""What a config returns: data, teacher, student, candidates, and the requirement."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from compress_jax.core.arguments import flag, one_of, whole
from compress_jax.core.errors import ConfigError
from compress_jax.core.types import Array, DType, Model, PyTree
from compress_jax.data import Data
from compress_jax.distill import Teacher, Term, on_logits
from compress_jax.search._candidate import Candidate
from compress_jax.search._comparison import Comparison
from compress_jax.search._network import Network, Variables, fields_of, require
from compress_jax.search._requirement import Requirement
from compress_jax.search._space import Search
from compress_jax.tasks import Task, classification, pure
from compress_jax.train import distillation
from compress_jax.train._parallel import Rules, automatic, make_mesh

Compare = Callable[[Mapping[str, Variables]], Comparison]
PerExampleLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Experiment:
    """All of one run, as real objects.

    Attributes:
      name: shown in logs and stored in the artifact.
      data: the splits.
      student: the network to compress.
      candidates: ways to compress it, from mild to strong (or the reverse, see ``order``); may be
        empty if there is a ``search``.
      requirement: what must be met.
      search: a space to search by itself, after the candidates.
      teacher: a frozen network to learn from; ``"student"`` for the student itself in float32,
        frozen, which only the candidates then learn from; None to learn from labels alone.
      teacher_dtype: dtype in which the trained teacher's params are stored and its accuracy is
        measured.
      float32_student: what the student learns from before it is compressed: ``"teacher"``, as the
        candidates do, or ``"labels"``, for a reference that does not depend on the teacher.
      loss: ``(student_logits, teacher_logits, labels) -> loss of each example``, or a tuple of
        `distill.Term`, which may look at features and learn parameters of their own:
        ``task.distillation(alpha=0.1, temperature=4.0)``; None means the task's loss on labels.
      task: what a batch is, how the loss on labels is computed and what is measured; by default
        `tasks.classification` of ``image`` and ``label``.
      order: ``"mild_first"`` goes on to stronger candidates while they pass, ``"strong_first"``
        goes on to milder ones until one passes, ``"all"`` tries every one. The smallest artifact
        that passed is the result.
      coded: whether the compressed student is stored at its entropy (see `export.save`). The
        float32 one, which its size is compared with, is stored as plain tensors either way.
      seed: seed for all randomness: initialization, data order and augmentation.
      mesh: devices to train on, with an axis ``"data"``: see `train.make_mesh`; by default all
        there are, each with whole networks. `Network.rules` say what is divided over other axes.
      comparison: what people are shown in the end, beside the numbers: ``{name: variables} ->
        Comparison``, given the float32 student's and the artifact's, such as what both write after
        some prompts; see `compare_language`.
      longer_student: whether the float32 student is also trained on as the chosen candidate was,
        without its compression, and measured: what compression costs is then not mixed with what
        longer training gives.

    Example:
      >>> import numpy as np
      >>> import optax
      >>> import compress_jax as cj
      >>> arrays = {"image": np.ones((80, 4, 4, 1), np.float32), "label": np.arange(80) % 3}
      >>> data = cj.data.Data.from_arrays(arrays)
      >>> training = cj.search.Training(optax.adam(1e-3), steps=100)
      >>> student = cj.search.Network(cj.models.LeNet300100(), training)
      >>> candidate = cj.search.Candidate("int8", cj.quantize.uniform(8), training)
      >>> cj.search.Experiment("ones", data, student, (candidate,)).order
      'mild_first'
    """

    name: str
    data: Data
    student: Network
    candidates: tuple[Candidate, ...] = ()
    requirement: Requirement = field(default_factory=Requirement)
    teacher: Network | Literal["student"] | None = None
    teacher_dtype: DType = jnp.float32
    float32_student: Literal["teacher", "labels"] = "teacher"
    loss: PerExampleLoss | tuple[Term, ...] | None = None
    order: Literal["mild_first", "strong_first", "all"] = "mild_first"
    coded: bool = False
    seed: int = 0
    mesh: Mesh | None = None
    task: Task = field(default_factory=classification)
    longer_student: bool = True
    search: Search | None = None
    comparison: Compare | None = None

    def __post_init__(self) -> None:
        """Check each field; `check` finds out whether they fit together."""
        with fields_of("Experiment"):
            self._check_pieces()
            self._check_options()
        # Candidates are directories and rows of a table, by name.
        names = [candidate.name for candidate in self.candidates]
        if not (names or self.search) or len(set(names)) != len(names):
            raise ConfigError(
                "an experiment needs a search=Search(...), or at least one candidate, with names "
                f"that differ; got {names}"
            )
        self._check_loss()
        self._check_task()

    def _check_pieces(self) -> None:
        """Check the types of the objects."""
        require(isinstance(self.name, str) and self.name != "", "name", "text", self.name)
        wanted = (
            "a data.Data, such as data.load gives; data.Data.from_arrays(train, validation, test) "
            "makes one of dicts of arrays"
        )
        require(isinstance(self.data, Data), "data", wanted, self.data)
        require(isinstance(self.student, Network), "student", "a Network", self.student)
        is_tuple = isinstance(self.candidates, tuple)
        fits = is_tuple and all(isinstance(each, Candidate) for each in self.candidates)
        wanted = "a tuple of Candidate; one is (candidate,)"
        require(fits, "candidates", wanted, self.candidates)
        fits = isinstance(self.requirement, Requirement)
        require(fits, "requirement", "a Requirement", self.requirement)
        fits = self.search is None or isinstance(self.search, Search)
        require(fits, "search", "a Search, or None", self.search)
        fits = self.comparison is None or callable(self.comparison)
        wanted = "a function {name: variables} -> Comparison, or None"
        require(fits, "comparison", wanted, self.comparison)
        fits = self.teacher is None or isinstance(self.teacher, Network)
        fits = fits or self.teacher == "student"
        require(fits, "teacher", "a Network, 'student' or None", self.teacher)
        fits = self.mesh is None or (isinstance(self.mesh, Mesh) and "data" in self.mesh.axis_names)
        require(fits, "mesh", "a Mesh with an axis 'data', or None", self.mesh)

    def _check_options(self) -> None:
        """Check the fields that are words, flags and numbers."""
        fits = _is_floating(self.teacher_dtype)
        require(fits, "teacher_dtype", "a floating dtype", self.teacher_dtype)
        one_of("float32_student", self.float32_student, ("teacher", "labels"))
        one_of("order", self.order, ("mild_first", "strong_first", "all"))
        flag("coded", self.coded)
        flag("longer_student", self.longer_student)
        wanted = "a Task, such as tasks.regression()"
        require(isinstance(self.task, Task), "task", wanted, self.task)
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
        distillation(self.student.pure, self.loss)  # refuses two terms of one name

    def _check_task(self) -> None:
        """Check the requirement against the task, and that there is something to learn."""
        self.requirement.require_metrics(tuple(each.name for each in self.task.metrics))
        metric = self.task.metric
        drop = self.requirement.max_drop
        # A drop of 1 was most likely meant in percent.
        if metric.percent and drop >= 1:
            raise ConfigError(
                f"Requirement: max_drop must be a fraction, at least 0 and below 1, for "
                f"{metric.name}; got {drop}; 1 means all of it; one point is 0.01"
            )
        if self.task.labels is None and self.teacher is None:
            raise ConfigError(
                f"the task {self.task.name!r} has no labels, so a teacher must say what is right: "
                "give teacher=Network(...), or teacher='student' for the float32 student itself"
            )

    @functools.cached_property
    def devices(self) -> Mesh:
        """The mesh to train on."""
        return make_mesh() if self.mesh is None else automatic(self.mesh)

    @property
    def teacher_rules(self) -> Rules:
        """How the teacher's params are divided over the mesh."""
        return self.teacher.rules if isinstance(self.teacher, Network) else self.student.rules

    @property
    def terms(self) -> tuple[Term, ...] | None:
        """What is learned from the teacher; None to learn from labels alone."""
        # Without labels the teacher is all there is to learn from.
        if self.loss is None:
            return self.task.distillation() if self.task.labels is None else None
        if isinstance(self.loss, tuple):
            return self.loss
        return (on_logits(self.loss, labels=True),)  # a function of logits and labels

    @property
    def example(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes and dtypes of the model's inputs for one example."""
        batch = shapes_of(self.data.train, 1)
        inputs = jax.eval_shape(lambda batch: self.task.inputs_of(self.task.prepare(batch)), batch)
        return inputs

    def freeze(self, model: Model, variables: Variables) -> Teacher:
        """Return a trained network as a frozen teacher, in ``teacher_dtype``.

        Args:
          model: any that `tasks.pure` takes.
          variables: its trained variables.

        Returns:
          The teacher. Its calls also give the features that terms of the loss compare.
        """
        # Features are captured only for terms that compare them.
        terms = self.loss if isinstance(self.loss, tuple) else ()
        paths = tuple(dict.fromkeys(chain.from_iterable(term.teacher for term in terms)))
        functions = pure(model, paths)

        def with_features(variables: Variables, *inputs: PyTree) -> PyTree:
            state = {name: each for name, each in variables.items() if name != "params"}
            return functions.evaluate(variables["params"], state, inputs)

        apply = with_features if paths else functions.apply
        return Teacher(apply, variables).cast(self.teacher_dtype)


def shapes_of(split: Mapping[str, Array], examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of some examples of a split."""
    return {
        name: jax.ShapeDtypeStruct((examples, *x.shape[1:]), x.dtype) for name, x in split.items()
    }


def _is_floating(dtype: DType) -> bool:
    # Anything may stand in a config; NumPy raises a TypeError for what is no dtype.
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False
