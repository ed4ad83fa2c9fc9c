"""A network whose functions were made smaller, as a model."""

import functools
from collections.abc import Callable

import jax

from compress_jax.core.types import ModelFn, Params, PyTree, Variables
from compress_jax.tasks import PureModel
from compress_jax.tasks._model import Features, Inputs


def smaller_model(
    model: PureModel,
    init: Callable[..., Variables],
    apply: ModelFn,
    of_training: Callable[[ModelFn], ModelFn],
) -> PureModel:
    """Return a model of a smaller function.

    Args:
      model: before it was made smaller.
      init: of the smaller one.
      apply: of the smaller one, in eval mode.
      of_training: what makes ``(variables, key, *inputs) -> (outputs, state)`` of training mode
        smaller. It is called when the model is first trained, as a network whose training mode
        cannot be made smaller can be measured all the same.

    Returns:
      The model in eval mode and in training mode.
    """

    def training(variables: Variables, key: jax.Array, *inputs: PyTree) -> PyTree:
        state = {name: each for name, each in variables.items() if name != "params"}
        out, _, new = model.train(variables["params"], state, inputs, key, None)
        return out, new

    @functools.cache
    def small_training() -> ModelFn:
        return of_training(training)

    def train(
        params: Params, state: PyTree, inputs: Inputs, key: jax.Array, counts: jax.Array | None
    ) -> tuple[PyTree, Features, PyTree]:
        out, new = small_training()({"params": params, **state}, key, *inputs)
        return out, {}, new

    def evaluate(params: Params, state: PyTree, inputs: Inputs) -> tuple[PyTree, Features]:
        return apply({"params": params, **state}, *inputs), {}

    return PureModel(init, apply, train, evaluate, None)
