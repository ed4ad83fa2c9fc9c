"""Trace all that a run will do on shapes, so that what cannot work is found in the first second."""

import contextlib
import functools
import json
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.errors import CompressError, ConfigError, DataError, ShapeError
from compress_jax.core.types import Array, Batch, JsonObject, Params, PyTree
from compress_jax.data import Data
from compress_jax.data._data import PARTS
from compress_jax.data._disk.stored import columns_of, some
from compress_jax.distill import Teacher
from compress_jax.search._amounts import amounts
from compress_jax.search._candidate import Candidate, Rewrite, Subject
from compress_jax.search._cuts import DEPTH
from compress_jax.search._experiment import Experiment, shapes_of
from compress_jax.search._method import bound_to
from compress_jax.search._network import Network, Training, Variables, require
from compress_jax.search._rewrites import groups_of
from compress_jax.search._space import Search
from compress_jax.search._stage import Stage, prepare
from compress_jax.tasks import PureModel, Task
from compress_jax.tasks._measure import require_entries, trace_metrics
from compress_jax.tasks._model import Inputs
from compress_jax.trace import cost
from compress_jax.train._parallel import batch_axes, shardings_like, unmatched

# Raised by functions that need the values of arrays, and so cannot be traced on shapes.
NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
EXAMPLES = 2  # batch size of the traced calls


def check(experiment: Experiment, metadata: JsonObject) -> list[str]:
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
      >>> arrays = {"image": np.ones((80, 4, 4, 1), np.float32), "label": np.arange(80) % 3}
      >>> data = cj.data.Data.from_arrays(arrays)
      >>> training = cj.search.Training(optax.sgd(0.1), steps=1, batch_size=8)
      >>> student = cj.search.Network(cj.models.LeNet300100(3), training)
      >>> int4 = cj.at("**/kernels", cj.quantize.uniform(4))
      >>> wrong = cj.search.Candidate("int4", int4, training)
      >>> check(cj.search.Experiment("ones", data, student, (wrong,)), {})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compress_jax.core.errors.NoMatchError: candidate 'int4': pattern '**/kernels' matches ...
    """
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"metadata is stored in the artifacts as JSON, which cannot hold it: {error}"
        ) from error
    check_data(experiment.data, experiment.task)
    return _Checks(experiment).run()


class _Checks:
    """The checks of one experiment, and the notes on what could not be checked."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.notes: list[str] = []
        self.classes = classes_of(experiment)
        # Candidates are often trained alike: each kind of step is traced once.
        self.traced_steps: set[tuple[object, ...]] = set()

    def run(self) -> list[str]:
        experiment = self.experiment
        # In the order of `compress`: teacher, student, candidates.
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
        if experiment.search is not None:
            with self._named("Search"):
                self._search(experiment.search, student, teacher)
        return self.notes

    def _network(self, name: str, network: Network, teacher: Teacher | None) -> Variables | None:
        """Trace a network's calls and training; return the shapes of its variables."""
        variables = None
        with self._named(name):
            variables = network.shapes(self.experiment.example)
            self._outputs(network.pure, variables)
            self._rules(name, network, variables["params"])
            if network.training is not None:
                self._training(network.pure, variables, network.training, teacher)
        return variables

    def _rules(self, name: str, network: Network, params: Params) -> None:
        """Check that a network's params can be divided by its rules; note those that are not."""
        shardings_like(params, params, self.experiment.devices, network.rules)
        whole = unmatched(params, network.rules)
        if network.rules and whole:
            few = ", ".join(whole[:3]) + (", ..." if len(whole) > 3 else "")
            self.notes.append(
                f"{name}: every device holds {len(whole)} of its params whole, as no rule matches "
                f"them: {few}"
            )

    def _outputs(self, model: PureModel, variables: Variables) -> None:
        """Check that what the model gives is what the task's labels ask for."""
        experiment = self.experiment
        task = experiment.task
        batch = jax.eval_shape(task.prepare, shapes_of(experiment.data.train, EXAMPLES))
        out = jax.eval_shape(model.apply, variables, *task.inputs_of(batch))
        labels = batch[task.labels] if task.labels else None
        task.check_outputs(out, labels, self.classes)
        trace_metrics(task, batch, out)

    def _training(
        self, model: PureModel, variables: Variables, training: Training, teacher: Teacher | None
    ) -> None:
        """Trace one training step without a compression, unless its like was traced already."""
        split = self.experiment.data.train
        number = len(next(iter(split.values())))
        if training.batch_size > number:
            raise ConfigError(
                f"batch_size is {training.batch_size}, but there are {number} training examples"
            )
        devices = _devices(self.experiment)
        if training.batch_size % devices:
            raise ConfigError(
                f"batch_size is {training.batch_size}, which {devices} devices cannot share "
                f"evenly; choose a multiple of {devices}, or give a mesh of fewer devices"
            )
        kind = (
            id(model),
            id(training.optimizer),
            training.augment,
            training.batch_size,
            teacher is None,
        )
        if kind in self.traced_steps:
            return
        self.traced_steps.add(kind)
        size = training.batch_size
        batch = shapes_of(split, size)
        stage = Stage("check", model, training)

        def whole(variables: Variables, batch: Batch, teacher: Teacher | None) -> PyTree:
            own = stage._replace(teacher=teacher)
            step, begin, aux = prepare(self.experiment, own, variables, batch)
            state = begin(variables, aux)
            return state, step(state, batch, teacher=teacher)[0]

        before, after = jax.eval_shape(whole, variables, batch, teacher)
        _require_alike("training step", before, after)

    def _teacher(self, network: Network, variables: Variables | None) -> Teacher | None:
        if variables is None:
            return None
        with self._named("teacher"):
            freeze = functools.partial(self.experiment.freeze, network.pure)
            return jax.eval_shape(freeze, variables)

    def _candidate(self, candidate: Candidate, student: Variables, teacher: Teacher | None) -> None:
        """Trace what a candidate does to the student's params, and its training.

        What a rewrite gives is known only when it has run: what follows one is checked on the
        network as it was before, where that can be.
        """
        model = self.experiment.student.pure
        variables = student
        rewritten = [item.name for item in candidate.items if isinstance(item, Rewrite)]
        if rewritten:
            self.notes.append(
                f"candidate {candidate.name!r}: what follows {rewritten[0]} is checked on the "
                "network before it"
            )
        for item in candidate.items:
            if isinstance(item, Network):
                found = self._network(f"candidate {candidate.name!r}", item, teacher)
                if found is None:  # it needs values, as a note says, and so does what follows
                    return
                model = item.pure
                variables = found
            elif isinstance(item, Compression):
                self._compression(candidate, Subject(model, variables), item)
            elif isinstance(item, Rewrite) and item.compression is not None:
                self._compression(candidate, Subject(model, variables), item.compression)
            elif isinstance(item, Training):
                self._training(model, variables, item, teacher)

    def _search(self, search: Search, student: Variables, teacher: Teacher | None) -> None:
        """Check a search's trainings and starts, and that its options can be small enough."""
        model = self.experiment.student.pure
        training = search.recovery(search.steps)
        if training is not None:
            fits = isinstance(training, Training)
            require(fits, "training", "a function steps -> Training", training)
            self._training(model, student, training, teacher)
        for name, method in search.starts.items():
            self._candidate(Candidate(name, method), student, teacher)
        self._baselines(search, student, teacher)
        if not search.starts:  # which have sizes of their own
            self._reachable(search)

    def _baselines(self, search: Search, student: Variables, teacher: Teacher | None) -> None:
        """Check the methods of baselines, for a result that takes what the student takes."""
        total = cost(self.experiment.student.pure.apply, student, *self.experiment.example)
        leaves = jax.tree.leaves(student["params"])
        taken: dict[str, float] = {
            "nbytes": sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves),
            "macs": total.macs,
            "bitops": round(total.bit_operations),
            "parameters": sum(math.prod(x.shape) for x in leaves),
        }
        for name, baseline in search.baselines.items():
            if callable(baseline):
                self._candidate(Candidate(name, search.beside(name, taken)), student, teacher)

    def _reachable(self, search: Search) -> None:
        """Refuse limits that no choice of options meets, whatever the weights will be."""
        experiment = self.experiment
        model = experiment.student.pure
        wanted = experiment.requirement
        if not any(map(math.isfinite, (wanted.max_bytes, wanted.max_bitops, wanted.max_macs))):
            return  # every option would be packed for nothing
        example = [jnp.zeros(x.shape, x.dtype) for x in experiment.example]
        # Any weights will do: what an option takes depends on their shapes.
        drawn = experiment.student.variables or jax.jit(model.init)(jax.random.key(0), *example)
        least = self._narrowest(search, Subject(model, drawn), tuple(example))
        model, drawn = least.model, least.variables
        rest = {name: each for name, each in drawn.items() if name != "params"}

        def fn(params: Params, *inputs: PyTree) -> PyTree:
            return model.apply({"params": params, **rest}, *inputs)

        found = amounts(fn, drawn["params"], tuple(example), search.options, search.where)
        # Coded files take fewer bytes than their leaves.
        found.check(None if experiment.coded else wanted.max_bytes, wanted.max_bitops)
        macs = cost(fn, drawn["params"], *example).macs
        if macs > wanted.max_macs:
            raise ConfigError(
                f"max_macs={wanted.max_macs:,} cannot be met: the least is {macs:,} "
                "multiply-accumulates, which no option of a leaf changes; add larger width_ratios, "
                "or starts with fewer channels: starts={'half': (search.shrink(ratio=0.5), "
                "training)}"
            )

    def _narrowest(self, search: Search, subject: Subject, example: Inputs) -> Subject:
        """Return a network without the largest shares that a search may remove, all at once."""
        shares: dict[str, float] = {}
        if search.width_ratios:
            names = [each.name for each in groups_of(subject, example)]
            shares = dict.fromkeys(names, max(search.width_ratios))
        if search.depth_ratios:
            shares[DEPTH] = max(search.depth_ratios)
        for method in search.cut(shares, examples=0):  # only sizes matter
            assert isinstance(method, Rewrite)
            try:
                subject = method.run(subject, self.experiment.task, self.experiment.data.train)
            except ConfigError as error:  # nothing can be removed
                self.notes.append(f"width_ratios, depth_ratios: {error}")
        return subject

    def _compression(self, candidate: Candidate, subject: Subject, item: Compression) -> None:
        """Trace a compression's init, view, update and pack on the params of a network."""
        compression = bound_to(self.experiment, subject, item)
        key = jax.random.key(0)
        step = jnp.zeros((), jnp.int32)
        trainings = [each for each in candidate.items if isinstance(each, Training)]

        def life(params: Params) -> PyTree:
            state = compression.init(params)
            view = compression.view(params, state)
            new = compression.update(params, state, step=step, grads=params, key=key)
            trainable = {"params": params, "learned": state.learned}
            # Each training's optimizer, over what it will be given.
            with jax.numpy_dtype_promotion("standard"):  # as in the training step
                for training in trainings:
                    optimizer = training.transformation()
                    optimizer.update(trainable, optimizer.init(trainable), trainable)
            compression.skipped(params)  # the artifact's metadata says what was left alone
            return state, view, new

        params = subject.variables["params"]
        state, view, new = jax.eval_shape(life, params)
        # The model takes the view in place of the params, and the next step takes the new state.
        _require_alike("view", params, view)
        _require_alike("update", state, new)
        _trace_pack(compression, params, state)

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


def check_data(data: Data, task: Task) -> None:
    """Check that splits hold examples of one shape, finite, with labels that can be right.

    Raises:
      DataError: if not; it names the split.
    """
    splits = {part: getattr(data, part) for part in PARTS}
    for name, split in splits.items():
        if not isinstance(split, dict) or not all(hasattr(x, "shape") for x in split.values()):
            raise DataError(f"{name} must be a dict of arrays; data.Data.from_arrays makes it so")
        with _of_split(name):
            require_entries(task, split)
        sizes = {key: len(values) for key, values in split.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise DataError(f"the arrays of {name} must have one length, and not 0; got {sizes}")
        # Of what stays on disk some examples are checked here, and all when they are read.
        seen = some(split)
        for key, values in seen.items():
            _check_entry(name, key, values, data.train[key], images=key in task.inputs)
        if task.labels is not None:
            with _of_split(name):
                labels = task.prepare(dict(seen))[task.labels]
                task.check_labels(labels, data.classes)


@contextlib.contextmanager
def _of_split(name: str) -> Iterator[None]:
    """Raise what is wrong with a split's entries as a DataError that names it."""
    try:
        yield
    except CompressError as error:
        raise DataError(f"{name}: {error}") from error


def _check_entry(split: str, key: str, values: Array, train: Array, *, images: bool) -> None:
    """Check one entry of a split against that of train."""
    if images and values.ndim == 4 and not np.issubdtype(values.dtype, np.floating):
        raise DataError(
            f"{split} has images of {values.dtype}, and they must be floats; data.scale_to_unit "
            "makes them so"
        )
    if values.shape[1:] != train.shape[1:] or values.dtype != train.dtype:
        ours = f"{values.dtype}{list(values.shape[1:])}"
        theirs = f"{train.dtype}{list(train.shape[1:])}"
        raise DataError(f"{split} has {key!r} {ours}, and train has {theirs}")
    if not np.issubdtype(values.dtype, np.floating):
        return
    # A sum is not finite if any of its terms is not; it needs no mask as large as the entry.
    sums = np.asarray(values, np.float32).reshape(len(values), -1).sum(axis=1)  # [examples]
    bad = np.flatnonzero(~np.isfinite(sums))
    if len(bad):
        raise DataError(
            f"{len(bad)} examples of {split} have a {key!r} that is not finite, the first is "
            f"{bad[0]}; data.clean drops them"
        )


def classes_of(experiment: Experiment) -> int | None:
    """Return the number of classes: the data's, else one more than the largest label."""
    task = experiment.task
    if experiment.data.classes is not None or task.labels is None or not task.logits:
        return experiment.data.classes
    splits = [getattr(experiment.data, part) for part in PARTS]
    if any(map(columns_of, splits)):
        raise ConfigError(
            "the data stay on disk, so nobody counts their classes: say it, "
            "data.from_records(..., classes=10)"
        )
    labels = [np.asarray(task.prepare(split)[task.labels]) for split in splits]
    if not all(np.issubdtype(each.dtype, np.integer) for each in labels):
        return None
    return 1 + max(int(each.max()) for each in labels)


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


def _devices(experiment: Experiment) -> int:
    """Return over how many devices a batch is spread."""
    return math.prod(experiment.devices.shape[name] for name in batch_axes(experiment.devices))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no reason is given"
