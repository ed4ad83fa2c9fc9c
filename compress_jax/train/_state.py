"""Everything a training run is, as one tree of arrays."""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.deprecated import renamed_arguments
from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import Params, PyTree


class TrainState(NamedTuple):
    """The state of training: what a checkpoint holds and what one step turns into the next.

    Attributes:
      step: int32 ``[]``, number of steps taken.
      params: the model's parameters, dense and full precision.
      learned: the part of the compression that the optimizer trains with the params.
      fixed: the part of the compression that is never differentiated.
      model_state: the model's other collections, ``{"batch_stats": ...}`` or ``{}``.
      opt_state: state of the optimizer over `trainable`.
      key: typed PRNG key of the run; the key of a step is derived from it and the step's number.
      parts: params of the loss's adapters, which the optimizer trains with the params (regressors,
        variances): saved and resumed with the run, and none of the model's, so that nothing exports
        them.
      memory: what else the loss keeps from step to step (banks, moving averages): never
        differentiated, never exported.

    Example:
      >>> import compress_jax as cj
      >>> int4, optimizer = cj.quantize.uniform(4), optax.sgd(0.1)
      >>> variables = {"params": {"w": jnp.array([0.25, 7.0])}}
      >>> state = cj.train.create(variables, int4, optimizer, jax.random.key(0))
      >>> state.params["w"].tolist(), state.variables(int4)["params"]["w"].tolist()
      ([0.25, 7.0], [0.0, 7.0])
    """

    step: jax.Array
    params: Params
    learned: PyTree
    fixed: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: jax.Array
    parts: PyTree = {}
    memory: PyTree = {}

    @property
    def trainable(self) -> dict[str, PyTree]:
        """The optimizer's params: ``{"params": ..., "learned": ...}``, and ``"parts"`` if any."""
        return _trainable(self.params, self.learned, self.parts)

    @property
    def compression(self) -> CompressionState:
        """The compression's state, both parts."""
        return CompressionState(self.learned, self.fixed)

    def variables(self, compression: Compression | None = None) -> dict[str, PyTree]:
        """Return what ``model.apply`` takes: the compression's view of the params, and state.

        Args:
          compression: the compression to look through; None for the dense params.

        Returns:
          ``{"params": view, **model_state}``.
        """
        params = self.params
        if compression is not None:
            params = compression.view(params, self.compression)
        return {"params": params, **self.model_state}


def _trainable(params: Params, learned: PyTree, parts: PyTree) -> dict[str, PyTree]:
    # Only where there are any: the optimizer of a run without adapters need not know of them.
    return {"params": params, "learned": learned, **({"parts": parts} if parts else {})}


@renamed_arguments(beside="aux")
def create(
    variables: Mapping[str, PyTree],
    compression: Compression,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    aux: tuple[PyTree, PyTree] = ({}, {}),
) -> TrainState:
    """Return the state before the first step.

    Every array is copied: steps donate the state's memory, and the caller's variables must survive
    that.

    Args:
      variables: what ``model.init`` returned, or a trained ``{"params": ..., "batch_stats": ...}``.
      compression: the compression to train under; ``cj.core.identity()`` for none.
      optimizer: over ``{"params": ..., "learned": ...}``; see `label_optimizer`.
      key: typed PRNG key, from ``jax.random.key(seed)``.
      aux: ``(parts, memory)`` from the ``init`` of a `StatefulLoss` that has any.

    Returns:
      A TrainState at step 0.

    Raises:
      ArgumentError: if variables has no ``"params"``.
      ArgumentError: if key is not a typed PRNG key.
      ArgumentError: if the optimizer accumulates gradients by itself (`optax.MultiSteps`): see
        `make_step`.

    Example:
      >>> import compress_jax as cj
      >>> variables = {"params": {"kernel": jnp.ones((2, 3))}}
      >>> state = cj.train.create(variables, cj.identity(), optax.sgd(0.1), jax.random.key(0))
      >>> int(state.step), sorted(state.trainable)
      (0, ['learned', 'params'])
    """
    if "params" not in variables:
        raise ArgumentError(
            "variables must hold 'params', as model.init returns them; got the keys "
            f"{sorted(variables)}"
        )
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise ArgumentError(
            "key must be a typed PRNG key: jax.random.key(seed), not jax.random.PRNGKey(seed)"
        )
    params = variables["params"]
    model_state = {name: each for name, each in variables.items() if name != "params"}
    learned, fixed = compression.init(params)
    opt_state = optimizer.init(_trainable(params, learned, aux[0]))
    refuse_accumulation(opt_state)  # here, before anything is compiled
    state = TrainState(
        jnp.zeros((), jnp.int32), params, learned, fixed, model_state, opt_state, key, *aux
    )
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def refuse_accumulation(opt_state: PyTree) -> None:
    """Raise if an optimizer accumulates gradients by itself, wherever it stands in a chain.

    Args:
      opt_state: what its ``init`` returned.

    Raises:
      ArgumentError: if it does.

    Example:
      >>> refuse_accumulation(optax.adam(0.1).init(jnp.ones(2)))
    """
    # Optimizers nest in each other's states: `chain`, `partition`, `masked`.
    found = [
        each for each in jax.tree.leaves(opt_state, is_leaf=_accumulates) if _accumulates(each)
    ]
    if found:
        raise ArgumentError(
            f"the optimizer accumulates gradients by itself ({type(found[0]).__name__}): each "
            "microbatch would count as a step of every schedule, mask and compression, and the "
            "mean of their means is not the mean of what counts; use "
            "make_step(..., microbatches=n) with the optimizer inside"
        )


def _accumulates(state: PyTree) -> bool:
    return isinstance(state, (optax.MultiStepsState, optax.ApplyEvery))


def label_optimizer(
    params: optax.GradientTransformation,
    learned: optax.GradientTransformation,
    parts: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Return one optimizer of three: for params, learned arrays, and the loss's adapters.

    Scales, centroids and thresholds want other learning rates than weights, and no weight decay.

    Args:
      params: optimizer of the model's parameters.
      learned: optimizer of the compression's learned arrays.
      parts: optimizer of what only the loss needs (regressors, variances); None for that of the
        params.

    Returns:
      One optimizer over ``{"params": ..., "learned": ...}``, and ``"parts"`` where there are any.

    Example:
      >>> optimizer = label_optimizer(optax.sgd(0.1), optax.sgd(0.01))
      >>> trainable = {"params": {"kernel": jnp.ones(1)}, "learned": {"kernel": jnp.ones(1)}}
      >>> updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
      >>> float(updates["params"]["kernel"][0]), float(updates["learned"]["kernel"][0])
      (-0.10000000149011612, -0.009999999776482582)
    """
    optimizers: dict[Hashable, optax.GradientTransformation] = {
        "params": params,
        "learned": learned,
    }
    if parts is not None:
        optimizers["parts"] = parts

    # One label a subtree; "parts" without an optimizer of their own take that of the params.
    def labels(trainable: dict[str, PyTree]) -> dict[str, str]:
        return {name: name if name in optimizers else "params" for name in trainable}

    return optax.partition(optimizers, labels)
