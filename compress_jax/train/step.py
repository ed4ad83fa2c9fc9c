"""One training step: a pure function, the same under jit, a mesh and pmap."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.compression import Compression, CompressionState
from compress_jax.prune.restart import restart
from compress_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


class Loss(Protocol):
    """``loss(params, model_state, batch, key, teacher, train=True) -> (scalar, (new_model_state, metrics))``.

    ``params`` are the params as the compression shows them; ``teacher`` is whatever tree the step was given, or None.
    """

    def __call__(
        self, params: Any, model_state: Any, batch: Any, key: jax.Array, teacher: Any, train: bool = True
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """Return the loss to minimise, and the model state and metrics beside it."""
        ...


class StatefulLoss(NamedTuple):
    """A loss with something of its own: parts that are trained beside the model, and a memory rewritten at each step.

    Attributes:
      init: ``(key, variables, batch, teacher) -> (parts, memory)``, for `create`.
      loss: ``(params, parts, model_state, memory, batch, key, teacher, step) -> (scalar, (model_state, memory,
        metrics))``. Gradients flow to params and parts; ``step`` counts from 0, for schedules.
    """

    init: Callable[[jax.Array, Any, Any, Any], tuple[Any, Any]]
    loss: Callable[..., tuple[jax.Array, tuple[Any, Any, Metrics]]]


class Step(Protocol):
    """``step(state, batch, *, teacher=None, axis_name=None) -> (state, metrics)``."""

    def __call__(
        self, state: TrainState, batch: Any, *, teacher: Any = None, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """Return the state after one step on the batch, and the metrics before it."""
        ...


def make_step(loss: Loss | StatefulLoss, optimizer: optax.GradientTransformation, compression: Compression) -> Step:
    """Return the training step of a loss, an optimizer and a compression.

    With params p, learned l and fixed f, the loss L sees ``w = view(p, (l, f))`` and the optimizer follows
    ``(dL/dp, dL/dl)``, both through the view. Afterwards the compression is updated with the new params and with
    ``dL/dw``, the gradient at the weights the model used: dense where a mask is on, as growing methods need it. Weights that
    the update grows (`prune.set`, `prune.rigl`) restart from zero, with the optimizer's moments of them.

    Args:
      loss: see `Loss`; or a `StatefulLoss`, whose parts follow their gradients too.
      optimizer: over ``{"params": ..., "learned": ...}``, and ``"parts"`` if the loss has any.
      compression: what the model's weights are seen through.

    Returns:
      The pure step. ``axis_name`` makes it average gradients, metrics and floating model state over a mapped axis
      (``pmap_step`` passes it); the step number given to ``compression.update`` counts from 0. The teacher is an argument,
      so that it is neither baked into the program nor donated.

    Example:
      >>> from compress_jax.core.compression import identity
      >>> from compress_jax.train.state import create
      >>> def loss(params, model_state, batch, key, teacher, train=True):
      ...     return jnp.square(params["w"] - batch).mean(), (model_state, {})
      >>> state = create({"params": {"w": jnp.zeros(())}}, identity(), optax.sgd(0.5), jax.random.key(0))
      >>> step = jax.jit(make_step(loss, optax.sgd(0.5), identity()))
      >>> state, metrics = step(state, jnp.full((4,), 3.0))
      >>> float(state.params["w"]), float(metrics["loss"])
      (3.0, 9.0)
    """
    general = loss.loss if isinstance(loss, StatefulLoss) else _stateless(loss)

    def step(
        state: TrainState, batch: Any, *, teacher: Any = None, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        mean = _averager(axis_name)
        loss_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        if axis_name is not None:  # each device draws its own noise, but all must draw the same masks
            loss_key = jax.random.fold_in(loss_key, jax.lax.axis_index(axis_name))

        def view(trainable: dict[str, Any]) -> Any:
            seen = compression.view(trainable["params"], CompressionState(trainable["learned"], state.fixed))
            return seen, trainable.get("parts", {})

        seen, pull_back = jax.vjp(view, state.trainable)
        gradient = jax.value_and_grad(general, argnums=(0, 1), has_aux=True)
        (value, (model_state, memory, metrics)), slopes = gradient(
            *seen, state.model_state, state.memory, batch, loss_key, teacher, state.step
        )
        slopes = mean(slopes)
        (grads,) = pull_back(slopes)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts and floats; strict callers may not
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        compressed = compression.update(
            trainable["params"],
            CompressionState(trainable["learned"], state.fixed),
            step=state.step,
            grads=slopes[0],
            key=update_key,
        )
        params, opt_state = restart(trainable["params"], opt_state, state.fixed, compressed.fixed)
        new = state._replace(
            step=state.step + 1,
            params=params,
            learned=compressed.learned,
            fixed=compressed.fixed,
            model_state=mean(model_state),
            opt_state=opt_state,
            parts=trainable.get("parts", {}),
            memory=mean(memory),
        )
        return new, mean({"loss": value, **metrics})

    return step


def _stateless(loss: Loss) -> Callable[..., tuple[jax.Array, tuple[Any, Any, Metrics]]]:
    """Return a plain loss as one with parts and memory, both of which it leaves alone."""

    def general(
        params: Any, parts: Any, model_state: Any, memory: Any, batch: Any, key: jax.Array, teacher: Any, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Any, Metrics]]:
        value, (model_state, metrics) = loss(params, model_state, batch, key, teacher)
        return value, (model_state, memory, metrics)

    return general


def _averager(axis_name: str | None) -> Callable[[Any], Any]:
    """Return the mean of a tree's floating leaves over the mapped axis, or the identity where there is none."""
    if axis_name is None:
        return lambda tree: tree

    def mean(leaf: jax.Array) -> jax.Array:
        return jax.lax.pmean(leaf, axis_name) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) else leaf

    return lambda tree: jax.tree.map(mean, tree)
