"""Fewer blocks of layers as a part of a candidate."""

import inspect
from collections.abc import Sequence
from typing import Any

import jax

from compress_jax.core.arguments import whole
from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.types import Batch, JsonObject, ModelFn, PyTree
from compress_jax.prune import drop_blocks as drop_function
from compress_jax.search._candidate import Rewrite, Subject
from compress_jax.search._network import Variables
from compress_jax.search._rewrites import PARTS, calibration_batches
from compress_jax.search._smaller import smaller_model
from compress_jax.tasks import PureModel, Task
from compress_jax.tasks._model import Inputs
from compress_jax.trace import Blocks, blocks


def drop_blocks(*, examples: int = 64, **options: Any) -> Rewrite:
    """Return `prune.drop_blocks` as an item of `Candidate.method`: whole blocks are removed.

    What follows trains, quantizes and stores the shallower network.

    Args:
      examples: training examples that the blocks' influence is measured on.
      options: of `prune.drop_blocks`: ``count`` or ``ratio``, ``by``, ``patterns`` and so on.

    Returns:
      A `Rewrite`.

    Raises:
      ArgumentError: if an option is none of `prune.drop_blocks`.

    Example:
      >>> import compress_jax as cj
      >>> cj.search.drop_blocks(ratio=0.25).name
      'drop_blocks'
    """
    whole("examples", examples, 1)
    known = [
        name
        for name, each in inspect.signature(drop_function).parameters.items()
        if each.kind == each.KEYWORD_ONLY and name != "batches"
    ]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ArgumentError(f"drop_blocks takes no {unknown[0]}=; it takes {', '.join(known)}")
    patterns = options.get("patterns")

    def run(subject: Subject, task: Task, split: Batch) -> Subject:
        batches = list(calibration_batches(subject, task, split, examples, PARTS))
        short = drop_function(subject.model.apply, subject.variables, batches=batches, **options)
        gone = [row.block for row in short.table.rows if not row.kept]
        return subject._replace(
            model=shortened(subject.model, subject.variables, gone, batches[0], patterns),
            variables=short.params,
            records=(*subject.records, {"rewrite": "drop_blocks", "gone": gone}),
            notes=(*subject.notes, f"drop_blocks: without {', '.join(gone)}"),
        )

    def rebuild(model: PureModel, record: JsonObject, example: Inputs) -> PureModel:
        # Blocks are found in shapes alone; the weights come from the artifact.
        variables = jax.eval_shape(model.init, jax.random.key(0), *example)
        return shortened(model, variables, record["gone"], example, patterns)

    return Rewrite("drop_blocks", run, rebuild)


def shortened(
    model: PureModel,
    variables: Variables,
    gone: Sequence[str],
    inputs: Inputs,
    patterns: Any = None,
) -> PureModel:
    """Return a model without some blocks.

    Args:
      model: with all of them.
      variables: of all, or their shapes.
      gone: the names of blocks of the eval-mode function.
      inputs: an example of them, or shapes.
      patterns: as of `prune.drop_blocks`.

    Returns:
      The model in eval mode and in training mode.
    """
    found = blocks(model.apply, variables, *inputs, patterns=patterns)
    small_apply = _without(found, variables, gone)

    def of_training(training: ModelFn) -> ModelFn:
        own = blocks(training, variables, jax.random.key(0), *inputs, patterns=patterns)
        try:
            return _without(own, variables, gone)
        except ShapeError as error:
            raise ArgumentError(
                f"in training mode {error}; train before you drop blocks, or give a network with "
                "fewer of them"
            ) from error

    def init(key: jax.Array, *inputs: PyTree) -> Variables:
        return found.without(model.init(key, *inputs), gone)[0]

    return smaller_model(model, init, small_apply, of_training)


def _without(found: Blocks, variables: Variables, gone: Sequence[str]) -> ModelFn:
    """Return the function without some blocks; only the shapes of the variables matter."""
    functions = []

    def shapes(variables: Variables) -> Variables:
        smaller, function = found.without(variables, gone)
        functions.append(function)
        return smaller

    jax.eval_shape(shapes, variables)
    return functions[0]
