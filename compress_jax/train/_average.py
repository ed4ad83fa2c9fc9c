"""A moving average of the weights, kept by the optimizer beside its moments."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from compress_jax.core import arguments
from compress_jax.core.errors import StateError
from compress_jax.core.types import Params, PyTree
from compress_jax.train._state import TrainState


class Average(NamedTuple):
    """The state of an `averaged` optimizer.

    Attributes:
      average: the average in the structure and the shapes of what is trained, at least float32;
        leaves that are not floating point are the latest ones.
      count: int32 ``[]``, the number of updates.
      inner: the state of the wrapped optimizer.
    """

    average: PyTree
    count: jax.Array
    inner: optax.OptState


def averaged(
    optimizer: optax.GradientTransformation, decay: float = 0.999, *, debias: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that its state holds an exponential moving average of the weights.

    Of the weights :math:`p_1, \dots, p_t` after each step, with :math:`d` the decay,

    .. math:: a_t = \frac{1 - d}{1 - d^t} \sum_{i=1}^{t} d^{\,t-i}\, p_i,

    which is about their mean as long as :math:`t \ll 1 / (1 - d)`. Without ``debias``,
    :math:`a_t = d\, a_{t-1} + (1 - d)\, p_t` from the initial weights :math:`a_0 = p_0`.

    The average is part of the optimizer's state: checkpoints hold it, rules divide it as the params
    are divided, and an update is one step, however many microbatches it has. `average_of` returns
    it. What is averaged is all that is trained: params, learned arrays of the compression, and
    adapters of the loss. Masks and scales are not: see `average_of`.

    Weights that a method grows (`prune.rigl`) start again with an average of zero, as their moments
    do: while they were pruned, the model saw zeros.

    Args:
      optimizer: over ``{"params": ..., "learned": ...}``, all of it: wrap what `label_optimizer`
        returns, not its parts.
      decay: the share of the average that stays at each update, from 0 to below 1.
      debias: average only weights after a step, none of them the initial ones.

    Returns:
      The optimizer. Its updates are those of the wrapped one.

    Raises:
      ArgumentError: if the decay is no number from 0 to below 1.

    Example:
      >>> import compress_jax as cj
      >>> optimizer = cj.train.averaged(optax.sgd(1.0), decay=0.5)
      >>> params = {"w": jnp.array(4.0)}
      >>> state = optimizer.init(params)
      >>> for _ in range(2):  # the weight is 3, then 2
      ...     updates, state = optimizer.update({"w": jnp.array(1.0)}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> round(float(state.average["w"]), 4)  # (0.5 * 3 + 2) / 1.5
      2.3333

    References:
      Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992. Kingma and
      Ba, "Adam", 2015, section 3 (the correction of the bias).
    """
    decay = arguments.number("decay", decay, 0, 1, below=True)
    debias = arguments.flag("debias", debias)
    # Extra arguments of `update` are for the wrapped optimizer, whether it takes any or not.
    wrapped = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> Average:
        start = jax.tree.map(_widened, params)
        return Average(start, jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(
        updates: PyTree, state: PyTree, params: Params = None, **extra: PyTree
    ) -> tuple[optax.Updates, Average]:
        updates, inner = wrapped.update(updates, state.inner, params, **extra)
        count = state.count + 1
        weight = _weight(decay, count) if debias else jnp.float32(1 - decay)

        def moved(average: jax.Array, new: jax.Array) -> jax.Array:
            new = _widened(new)
            if not jnp.issubdtype(average.dtype, jnp.inexact):
                return new
            return average + weight.astype(average.dtype) * (new - average)

        new = optax.apply_updates(params, updates)
        return updates, Average(jax.tree.map(moved, state.average, new), count, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _widened(x: jax.Array) -> jax.Array:
    """Return an array in float32 if it has fewer bits: small moves of an average would be lost."""
    x = jnp.asarray(x)
    few = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if few else x


def _weight(decay: float, count: jax.Array) -> jax.Array:
    """Return ``(1 - decay) / (1 - decay**count)``, float32: the share of the newest weights."""
    if decay == 0:
        return jnp.float32(1)
    # 1 - decay**count would lose its digits where decay**count is close to 1.
    rest = -jnp.expm1(count.astype(jnp.float32) * math.log(decay))
    return jnp.float32(1 - decay) / rest


def average_of(state: TrainState) -> TrainState:
    """Return a state of training with averaged weights: to evaluate, to pack, to export.

    The compression's fixed arrays stay as they are, and its view is taken of the average: under a
    mask, what the mask prunes is zero whatever the average is there. The model's other collections
    are those of the raw weights: where a model has batch norm, collect its statistics anew, by
    running it in training mode over some batches.

    Args:
      state: of a run whose optimizer is `averaged`.

    Returns:
      The state with the averages of params, learned arrays and adapters in their own dtypes; before
      the first step they are the initial ones. To train on, keep the state that was given.

    Raises:
      StateError: if the optimizer's state holds no average of all that is trained, or several.

    Example:
      >>> import compress_jax as cj
      >>> optimizer = cj.train.averaged(optax.sgd(0.1))
      >>> variables, key = {"params": {"w": jnp.ones(2)}}, jax.random.key(0)
      >>> state = cj.train.create(variables, cj.identity(), optimizer, key)
      >>> cj.train.average_of(state).params["w"].tolist()
      [1.0, 1.0]
    """
    nodes = jax.tree.leaves(state.opt_state, is_leaf=_is_average)
    wanted = jax.tree.structure(state.trainable)
    found = [x.average for x in nodes if _is_average(x)]
    whole = [average for average in found if jax.tree.structure(average) == wanted]
    if len(whole) != 1:
        raise StateError(
            f"the optimizer's state holds {len(whole)} averages of all that is trained, and this "
            "takes one; train with cj.train.averaged(optimizer), around the whole optimizer"
        )
    narrowed = jax.tree.map(lambda x, like: x.astype(like.dtype), whole[0], state.trainable)
    return state._replace(
        params=narrowed["params"],
        learned=narrowed["learned"],
        parts=narrowed.get("parts", {}),
    )


def _is_average(x: object) -> bool:
    return isinstance(x, Average)
