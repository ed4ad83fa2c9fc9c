"""Rewrites of a trained network as parts of a candidate: solvers, folds, smaller widths."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from compress_jax.core._chain import chain
from compress_jax.core.arguments import whole
from compress_jax.core.compression import Compression, joined
from compress_jax.core.errors import ArgumentError, ConfigError
from compress_jax.core.types import Batch, JsonObject, ModelFn, Params, PyTree
from compress_jax.layerwise import Rewritten
from compress_jax.prune import shrink as shrink_function
from compress_jax.quantize import ActivationQuantizer, activations
from compress_jax.search._candidate import Rewrite, Subject
from compress_jax.search._network import Variables
from compress_jax.search._smaller import smaller_model
from compress_jax.tasks import PureModel, Task
from compress_jax.tasks._measure import examples_at_once
from compress_jax.tasks._model import Features, Inputs
from compress_jax.trace import Groups, Reducer, calibrate, gram, groups, reducers, resize
from compress_jax.train._progress import progress

UNCOMPRESSED = Rewritten._field_defaults["compression"]
BATCH = 64  # examples of a calibration batch, at most
PARTS = 8  # batches, at least, where some are held out
WHOLE = ("fold_batch_norm",)  # rewrites of batch statistics too: they take all variables
# What a rewrite's calibration holds, where it is not the Gram matrix.
STATISTICS: dict[str, Callable[[], Reducer]] = {
    "smooth": lambda: reducers.absmax("channel"),
    "correct_bias": reducers.moments,
}


def rewrite(
    function: Callable[..., Rewritten],
    compression: Compression | None = None,
    *,
    examples: int = 512,
    reducer: Reducer | None = None,
    **options: Any,
) -> Rewrite:
    """Return a solver or a rewrite of weights as an item of `Candidate.method`.

    It is called as its signature asks for: with the model as a pure function, params, an example
    of the inputs, calibration statistics of training data, the compression.

    Args:
      function: `quantize.gptq`, `quantize.awq`, `quantize.smooth`, `quantize.fold_batch_norm`,
        `quantize.correct_bias`, `prune.sparsegpt`, `prune.wanda`, `layerwise.solve` and the like,
        or your own with such a signature, which returns a `layerwise.Rewritten`.
      compression: what it solves for, if it takes one; the params are packed by it in the end.
      examples: training examples to calibrate on.
      reducer: the statistic; by default the one that the function's documentation names.
      options: passed on to the function.

    Returns:
      A `Rewrite`.

    Raises:
      ArgumentError: if the function takes no compression and one is given, or the reverse.

    Example:
      >>> import compress_jax as cj
      >>> int4 = cj.quantize.uniform(4, granularity="channel")
      >>> cj.search.rewrite(cj.quantize.gptq, int4, damping=0.05).name
      'gptq'
    """
    if not callable(function) or isinstance(function, type):
        raise ArgumentError(f"rewrite takes a function such as quantize.gptq, got {function!r}")
    name = getattr(function, "__name__", type(function).__name__)
    parameters = inspect.signature(function).parameters
    takes = parameters.get("compression")
    if compression is not None and takes is None:
        raise ArgumentError(f"{name} takes no compression; put it after the rewrite, as an item")
    if compression is None and takes is not None and takes.default is inspect.Parameter.empty:
        raise ArgumentError(f"{name} needs a compression: rewrite({name}, quantize.uniform(4))")
    unknown = [each for each in options if each not in parameters]
    if unknown:
        raise ArgumentError(f"{name} takes no {unknown[0]}=; it takes {', '.join(parameters)}")
    if options.get("donate"):
        raise ArgumentError("donate=True gives up params that other candidates need: leave it out")
    whole("examples", examples, 1)
    statistic = reducer or STATISTICS.get(name, gram)()

    def run(subject: Subject, task: Task, split: Batch) -> Subject:
        # The signature decides what is given: statistics, the target, an example of the inputs.
        is_whole = name in WHOLE
        fn, params = _function(subject, is_whole)
        given: dict[str, Any] = dict(options)
        if "calibration" in parameters:
            batches = calibration_batches(subject, task, split, examples)
            given["calibration"] = calibrate(fn, statistic, params, batches)
        if compression is not None:
            given |= _target(name, subject, compression, "state" in parameters)
        # What corrects an error takes the params on both sides of it.
        elif "compressed" in parameters:
            params, given["compressed"] = _before_and_after(name, subject)
        elif subject.compression is not None:
            raise ConfigError(f"{name} must come before what compresses: put it first")
        if "batches" in parameters:
            given["batches"] = list(calibration_batches(subject, task, split, examples, PARTS))
            with _shown(name) as report:
                # What a user gives is not replaced.
                shown = {"report": report} if "report" in parameters else {}
                found = function(fn, params, **(shown | given))
        elif next(iter(parameters)) == "fn":
            example = next(calibration_batches(subject, task, split, 1))
            found = function(fn, params, *example, **given)
        else:
            found = function(params, **given)
        return _rewritten(subject, name, found, is_whole)

    return Rewrite(name, run, compression=compression)


def _target(
    name: str, subject: Subject, compression: Compression, takes_state: bool
) -> dict[str, PyTree]:
    """Return what a solver solves for: what is pruned already stays so under the new grid."""
    if subject.compression is None:
        return {"compression": compression}
    if not takes_state:
        raise ConfigError(f"{name} must come before what else compresses: put it first")
    # The grid is solved for weights that are pruned already, under masks that it must keep.
    viewed = _viewed(subject)
    before = subject.compression.init(viewed) if subject.state is None else subject.state
    both = chain(subject.compression, compression)
    return {"compression": both, "state": joined([before, compression.init(viewed)])}


def _before_and_after(name: str, subject: Subject) -> tuple[Params, Params]:
    """Return the params before and after compression."""
    if subject.compression is None:
        raise ConfigError(f"{name} has nothing to correct yet: put what compresses before it")
    params = subject.variables["params"]
    return params if subject.before is None else subject.before, _viewed(subject)


def calibration_batches(
    subject: Subject, task: Task, split: Batch, examples: int, parts: int = 1
) -> Iterator[Inputs]:
    """Yield inputs of the model, from the first examples of a split, which are in random order."""
    examples = min(examples, len(next(iter(split.values()))))
    most = min(
        BATCH,
        -(-examples // parts),
        examples_at_once(task, subject.model.apply, subject.variables, split),
    )
    for start in range(0, examples, most):
        rows = {name: x[start : min(start + most, examples)] for name, x in split.items()}
        yield task.inputs_of(task.prepare(rows))


def _function(subject: Subject, is_whole: bool) -> tuple[ModelFn, Params]:
    """Return the eval-mode model as a function of what is rewritten, and that."""
    variables = subject.variables
    if is_whole:
        return subject.model.apply, variables
    rest = {name: each for name, each in variables.items() if name != "params"}
    return lambda p, *x: subject.model.apply({"params": p, **rest}, *x), variables["params"]


def _viewed(subject: Subject) -> Params:
    """Return the params as their compression shows them."""
    params = subject.variables["params"]
    if subject.compression is None:
        return params
    state = subject.compression.init(params) if subject.state is None else subject.state
    return subject.compression.view(params, state)


def _rewritten(subject: Subject, name: str, found: Rewritten, is_whole: bool) -> Subject:
    """Return the subject after a rewrite, with the notes of it."""
    variables = found.params if is_whole else {**subject.variables, "params": found.params}
    record: JsonObject = {"rewrite": name, "changed": len(found.changed)}
    if found.skipped:
        record["skipped"] = dict(found.skipped)
    notes = tuple(f"{name}: {said}" for said in _alike(found.notes))
    new = subject._replace(
        variables=variables, records=(*subject.records, record), notes=(*subject.notes, *notes)
    )
    # The default says that nothing was compressed: weights were only folded or corrected.
    if found.compression is UNCOMPRESSED:
        return new
    # The first of several solvers had the original params; corrections compare with those.
    before = subject.variables["params"] if subject.before is None else subject.before
    # In training that follows, what the solver chose stays: scales made anew of solved weights are
    # of another grid. What its compression learns is trained.
    held = found.compression._replace(update=lambda params, state, **_: state)
    return new._replace(compression=held, state=found.state, before=before)


@contextlib.contextmanager
def _shown(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show how many blocks a solver has done; their number is known when the first is."""
    with contextlib.ExitStack() as stack:
        bars: list[Callable[[int, dict[str, float]], None]] = []

        def report(block: str, number: int, count: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress(name, count)))
            bars[0](number, {})

        yield report


def _alike(notes: Mapping[str, str]) -> Iterator[str]:
    """Yield notes on leaves, one line for all leaves that have the same."""
    paths: dict[str, list[str]] = {}
    for path, note in notes.items():
        paths.setdefault(note, []).append(path)
    for note, own in paths.items():
        yield f"{own[0]}: {note}" if len(own) == 1 else f"{len(own)} leaves: {note}"


def shrink(*, examples: int = 0, **options: Any) -> Rewrite:
    """Return `prune.shrink` as an item of `Candidate.method`: whole channels are removed.

    What follows trains, quantizes and stores the smaller network.

    Args:
      examples: training examples whose activations ``importance`` is measured on; 0 for criteria
        of the weights alone.
      options: of `prune.shrink`: ``ratio``, ``macs``, ``importance``, ``exclude`` and so on. With
        ``examples`` the importance is a function of their statistics, such as
        `prune.importance.activation`; without one these examples choose the criterion.

    Returns:
      A `Rewrite`.

    Raises:
      ArgumentError: if an option is none of `prune.shrink`.

    Example:
      >>> import compress_jax as cj
      >>> cj.search.shrink(ratio=0.5).name
      'shrink'
    """
    parameters = inspect.signature(shrink_function).parameters.values()
    known = [each.name for each in parameters if each.kind == each.KEYWORD_ONLY]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ArgumentError(f"shrink takes no {unknown[0]}=; it takes {', '.join(known)}")

    def run(subject: Subject, task: Task, split: Batch) -> Subject:
        inputs = next(calibration_batches(subject, task, split, 1))
        own = dict(options)
        if examples:
            fn = subject.model.apply
            params = subject.variables
            # Without a criterion the best one is chosen, on batches that are held out.
            batches = calibration_batches(subject, task, split, examples, PARTS)
            if "importance" in options:
                moments = calibrate(fn, reducers.moments(), params, batches)
                own["importance"] = options["importance"](moments)
            else:
                own["batches"] = batches
        small = shrink_function(subject.model.apply, subject.variables, *inputs, **own)
        # Only groups that lose channels go into the record, which is stored as JSON.
        kept = {name: np.asarray(left).tolist() for name, left in small.kept.items()}
        sizes = {group.name: group.size for group in groups_of(subject, inputs)}
        kept = {name: left for name, left in kept.items() if len(left) < sizes[name]}
        record = {"rewrite": "shrink", "kept": kept}
        return subject._replace(
            model=narrowed(subject.model, subject.variables, kept, inputs),
            variables=small.params,
            records=(*subject.records, record),
        )

    def rebuild(model: PureModel, record: JsonObject, example: Inputs) -> PureModel:
        # Groups are found in shapes alone; the weights come from the artifact.
        variables = jax.eval_shape(model.init, jax.random.key(0), *example)
        return narrowed(model, variables, record["kept"], example)

    return Rewrite("shrink", run, rebuild)


def groups_of(subject: Subject, inputs: Inputs) -> Groups:
    """Return the groups of channels of a subject's network."""
    return groups(subject.model.apply, subject.variables, *inputs)


def narrowed(
    model: PureModel, variables: Variables, kept: dict[str, list[int]], inputs: Inputs
) -> PureModel:
    """Return a model whose groups of channels keep only some, by the name of the group.

    Args:
      model: at full width.
      variables: at full width, or their shapes.
      kept: by group of the eval-mode function the channels that stay.
      inputs: an example of them, or shapes.

    Returns:
      The model in eval mode and in training mode; its ``init`` cuts what that at full width draws.
    """
    found = groups(model.apply, variables, *inputs)

    def of_training(training: ModelFn) -> ModelFn:
        own = groups(training, variables, jax.random.key(0), *inputs)
        missing = [name for name in kept if name not in {group.name for group in own}]
        if missing:
            raise ArgumentError(
                f"in training mode the network has no group of channels {missing[0]!r} to narrow; "
                "train before you shrink, or give a network of the smaller width"
            )
        return resize(training, variables, own, kept)

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        return found.keep(model.init(key, *inputs), kept)

    return smaller_model(model, init, resize(model.apply, variables, found, kept), of_training)


def quantize_activations(how: ActivationQuantizer, *, examples: int = 512) -> Rewrite:
    """Return quantized activations as an item of `Candidate.method`.

    Ranges are calibrated on training data and stay as they are in training that follows; for ranges
    that are trained give the student as `train.quantized`.

    Args:
      how: `quantize.static` or `quantize.dynamic`.
      examples: training examples to calibrate on.

    Returns:
      A `Rewrite`.

    Example:
      >>> import compress_jax as cj
      >>> cj.search.quantize_activations(cj.quantize.static(bits=8)).name
      'quantize_activations'
    """
    whole("examples", examples, 1)

    def run(subject: Subject, task: Task, split: Batch) -> Subject:
        # On the params themselves, not on what a compression shows of them.
        batches = list(calibration_batches(subject, task, split, examples))
        model = _on_quantized(subject.model, how)
        quantized = activations(subject.model.apply, how)
        ranges = quantized.init(subject.variables, batches)
        variables = {**subject.variables, RANGES: ranges}
        record = {"rewrite": "quantize_activations", "how": repr(how)[:200]}
        return subject._replace(
            model=model, variables=variables, records=(*subject.records, record)
        )

    def rebuild(model: PureModel, record: JsonObject, example: Inputs) -> PureModel:
        return _on_quantized(model, how)

    return Rewrite("quantize_activations", run, rebuild)


RANGES = "activation_ranges"
"""The collection of variables that holds the ranges of activations."""


def _on_quantized(model: PureModel, how: ActivationQuantizer) -> PureModel:
    """Return a model that reads its activations' ranges from its variables."""
    evaluated = activations(model.apply, how)

    def apply(variables: Variables, *inputs: PyTree) -> PyTree:
        own = {name: each for name, each in variables.items() if name != RANGES}
        return evaluated.apply(own, variables[RANGES], *inputs)

    def training(variables: Variables, key: jax.Array, *inputs: PyTree) -> PyTree:
        state = {name: each for name, each in variables.items() if name != "params"}
        out, _, new = model.train(variables["params"], state, inputs, key, None)
        return out, new

    trained = activations(training, how)

    def train(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array, counts: jax.Array | None
    ) -> tuple[PyTree, Features, PyTree]:
        own = {name: each for name, each in state.items() if name != RANGES}
        out, new = trained.apply({"params": params, **own}, state[RANGES], key, *inputs)
        return out, {}, {**new, RANGES: state[RANGES]}  # ranges stay as calibrated

    def evaluate(params: Params, state: PyTree, inputs: Inputs) -> tuple[PyTree, Features]:
        return apply({"params": params, **state}, *inputs), {}

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        raise ArgumentError("quantized activations have calibrated ranges, and no init")

    return PureModel(init, apply, train, evaluate, None)
