"""One training step: a pure function, the same under jit, a mesh and pmap."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import jax
import optax
from jax.extend.core import Var

from compress_jax.core.compression import Compression, CompressionState, leaf_views
from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.paths import flatten
from compress_jax.core.types import Batch, Key, Params, PyTree, Variables
from compress_jax.core.types import Step as StepNumber
from compress_jax.distill import Total
from compress_jax.prune._restart import restart
from compress_jax.trace._jaxpr.view_inside import used_inside, view_inside
from compress_jax.train._objective import (
    Aux,
    Gathered,
    General,
    LossMetrics,
    Objective,
    Trained,
    counted,
    gather,
)
from compress_jax.train._state import TrainState, refuse_accumulation

Metrics = dict[str, jax.Array]
"""Scalars by name, means over the batch of a step: ``loss``, and what the loss reports."""


class Loss(Protocol):
    """A loss without state of its own, which `make_step` lifts to a `StatefulLoss`.

    ``loss(params, model_state, batch, key, teacher, train=True) -> (scalar, (new_model_state,
    metrics))``. ``params`` are the params after the compression's view; ``teacher`` is the tree the
    step was given, or None. The loss may return a `compress_jax.distill.Total` in place of the
    scalar, and metrics may be totals: sums and counts are then added up over devices and
    microbatches and divided last. A loss over a mask must return a total (see `make_step`).

    Example:
      >>> import compress_jax as cj, jax.numpy as jnp
      >>> def squares(params, model_state, batch, key, teacher, train=True):
      ...     return jnp.square(params["w"] - batch).mean(), (model_state, {"w": params["w"]})
      >>> loss: cj.train.Loss = squares
      >>> loss({"w": jnp.ones(())}, {}, jnp.array([3.0]), jax.random.key(0), None)[0].tolist()
      4.0
    """

    def __call__(
        self,
        params: Params,
        model_state: PyTree,
        batch: Batch,
        key: jax.Array,
        teacher: PyTree,
        train: bool = True,
    ) -> tuple[jax.Array | Total, tuple[PyTree, LossMetrics]]:
        """Return the loss to minimise, the new model state and metrics."""
        ...


class StatefulLoss(NamedTuple):
    """The protocol of a training loss: params of its own that are trained, and a memory.

    Attributes:
      init: ``(key, variables, batch, teacher) -> (parts, memory)``, the ``aux`` of `create`.
      loss: ``(params, parts, model_state, memory, batch, key, teacher, step) -> (scalar,
        (model_state, memory, metrics))``. Gradients flow to params and parts (the params of
        adapters); ``step`` counts from 0, for schedules. As in a `Loss`, the scalar and metrics may
        be totals.
      totals: as ``loss``, but in place of the scalar it returns an `Objective`: pairs of a weight
        and a `Total`, each of which is divided last. None if there is just the scalar.

    Example:
      >>> import compress_jax as cj, jax.numpy as jnp
      >>> model, key = cj.models.LeNet300100(), jax.random.key(1)
      >>> batch = {"image": jnp.ones((2, 4)), "label": jnp.ones(2, int)}
      >>> variables = model.init(jax.random.key(0), batch["image"])
      >>> loss = cj.train.distillation(model, [cj.distill.on_labels()])
      >>> aux = loss.init(key, variables, batch, None)
      >>> value, _ = loss.loss(variables["params"], aux[0], {}, aux[1], batch, key, None, 0)
      >>> value.shape, aux
      ((), ({}, {}))
    """

    init: Callable[[jax.Array, Variables, Batch, PyTree], tuple[PyTree, PyTree]]
    loss: Callable[..., tuple[jax.Array | Total, Aux]]
    totals: General | None = None

    def __call__(
        self,
        params: Params,
        model_state: PyTree,
        batch: Batch,
        key: jax.Array,
        teacher: PyTree = None,
        train: bool = True,
    ) -> tuple[jax.Array | Total, tuple[PyTree, LossMetrics]]:
        """Evaluate a loss without adapters and memory as a `Loss`, at step 0."""
        # Losses without a parameter `train` can be called too.
        options = {} if train else {"train": False}
        value, (model_state, _, metrics) = self.loss(
            params, {}, model_state, {}, batch, key, teacher, 0, **options
        )
        return value, (model_state, metrics)


class Step(Protocol):
    """``step(state, batch, *, teacher=None, axis_name=None) -> (state, metrics)``.

    Example:
      >>> import compress_jax as cj, jax.numpy as jnp
      >>> def loss(params, model_state, batch, key, teacher, train=True):
      ...     return params["w"] * batch, (model_state, {})
      >>> step: cj.train.Step = cj.train.make_step(loss, optax.sgd(1.0), cj.identity())
      >>> variables, key = {"params": {"w": jnp.ones(())}}, jax.random.key(0)
      >>> state = cj.train.create(variables, cj.identity(), optax.sgd(1.0), key)
      >>> float(step(state, jnp.float32(2.0))[0].params["w"])
      -1.0
    """

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        *,
        teacher: PyTree = None,
        axis_name: str | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Return the state after one step on the batch, and the metrics before it."""
        ...


def make_step(
    loss: Loss | StatefulLoss,
    optimizer: optax.GradientTransformation,
    compression: Compression,
    *,
    microbatches: int = 1,
) -> Step:
    """Return the training step of a loss, an optimizer and a compression.

    With params p, learned l and fixed f, the loss L sees ``w = view(p, (l, f))`` and the optimizer
    follows ``(dL/dp, dL/dl)``, both through the view. Afterwards the compression is updated with
    the new params and with ``dL/dw``, the gradient at the weights the model used: dense where a
    mask is on, as growing methods need it. Weights that the update grows (`prune.sparse_evolution`,
    `prune.rigl`) restart from zero, with the optimizer's moments of them.

    Means are over all that counts in the step's whole batch, however it is spread: sums and counts
    are added up over microbatches and devices and divided last, so that the gradient is that of the
    batch seen at once, whatever its masks. (Losses on how examples lie to each other, batch norm
    and random numbers see a microbatch, or a device's part, alone.)

    Args:
      loss: see `Loss`; or a `StatefulLoss`, whose parts follow their gradients too.
      optimizer: over ``{"params": ..., "learned": ...}``, and ``"parts"`` if the loss has any.
      compression: what the model's weights are seen through.
      microbatches: into how many parts the batch is cut, one after the other, to need less memory:
        still one step of the optimizer, of every schedule and of the compression.
        `optax.MultiSteps` is refused: it averages the means of microbatches, which is another
        gradient where they count differently, and counts each as a step.

    Returns:
      The pure step. ``axis_name`` makes it add up or average gradients, metrics and floating model
      state over a mapped axis (``pmap_step`` passes it); the step number given to
      ``compression.update`` counts from 0. The teacher is an argument, so that it is neither baked
      into the program nor donated.

    Raises:
      ArgumentError: if ``microbatches`` is no number from 1; from the step, if the optimizer
        accumulates by itself, or if a loss returns the scalar mean of a batch that has a ``"mask"``
        while there are several devices or microbatches.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> def loss(params, model_state, batch, key, teacher, train=True):
      ...     return jnp.square(params["w"] - batch).mean(), (model_state, {})
      >>> variables = {"params": {"w": jnp.zeros(())}}
      >>> state = cj.train.create(variables, cj.identity(), optax.sgd(0.5), jax.random.key(0))
      >>> step = jax.jit(cj.train.make_step(loss, optax.sgd(0.5), cj.identity()))
      >>> state, metrics = step(state, jnp.full((4,), 3.0))
      >>> float(state.params["w"]), float(metrics["loss"])
      (3.0, 9.0)
    """
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise ArgumentError(
            "microbatches is how many parts a batch is cut into, a whole number from 1; got "
            f"{microbatches!r}"
        )
    stateful = loss if isinstance(loss, StatefulLoss) else _stateful(loss)
    general = _objective_of(stateful)

    def step(
        state: TrainState, batch: Batch, *, teacher: PyTree = None, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        refuse_accumulation(state.opt_state)
        # The key of a step depends on its number alone: a resumed run draws what it would have.
        loss_key, update_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        if axis_name is not None:
            # Each device draws its own noise, but all must draw the same masks.
            loss_key = jax.random.fold_in(loss_key, jax.lax.axis_index(axis_name))

        carried = (state.model_state, state.memory)
        rest = (teacher, state.step)

        def run(general: General, trained: Trained) -> Gathered:
            return gather(general, trained, carried, batch, loss_key, rest, microbatches, axis_name)

        inputs = (*carried, batch, loss_key, *rest)
        found = _through_view(general, compression, state, run, inputs, update_key)
        return _updated(state, found, optimizer, compression, update_key), found.found.metrics

    return step


def _updated(
    state: TrainState,
    gradients: "_Gradients",
    optimizer: optax.GradientTransformation,
    compression: Compression,
    key: Key,
) -> TrainState:
    """Return the state after the optimizer's update and the compression's."""
    # Optax mixes int32 counts and floats, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"), jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(gradients.trainable, state.opt_state, state.trainable)
        trainable: PyTree = optax.apply_updates(state.trainable, updates)
    with jax.named_scope("compression_update"):
        compressed = compression.update(
            trainable["params"],
            CompressionState(trainable["learned"], state.fixed),
            step=state.step,
            grads=gradients.at_view,
            key=key,
        )
        # Weights that this update grew start from zero, and so do their moments.
        params, opt_state = restart(trainable["params"], opt_state, state.fixed, compressed.fixed)
    return state._replace(
        step=state.step + 1,
        params=params,
        learned=compressed.learned,
        fixed=compressed.fixed,
        model_state=gradients.found.model_state,
        opt_state=opt_state,
        parts=trainable.get("parts", {}),
        memory=gradients.found.memory,
    )


# The gradient through the compression's view, which is taken where it costs least.

_Run: TypeAlias = Callable[[General, Trained], Gathered]
"""From a loss and its first two arguments to its gradients over the batch."""


class _Gradients(NamedTuple):
    """What a step computes of its batch.

    Attributes:
      trainable: gradients at what the optimizer trains.
      at_view: what the compression's update is given: ``dL/dw`` at the view w. Where the update
        does not use it, any tree of its shapes.
      found: metrics, model state and memory.
    """

    trainable: dict[str, PyTree]
    at_view: Params
    found: Gathered


def _through_view(
    general: General,
    compression: Compression,
    state: TrainState,
    run: _Run,
    inputs: Sequence[PyTree],
    key: Key,
) -> _Gradients:
    """Return the gradients of a loss of the viewed params.

    The view is taken before the model runs, but for leaves that a loop of the model takes in slices
    or a rematerialized part uses: seen inside, a layer at a time, they are not held twice.

    Args:
      general: the loss, of viewed params.
      compression: the view.
      state: the state of training.
      run: differentiates a loss over the batch.
      inputs: the other arguments of the loss, to trace it.
      key: the key of the update.

    Returns:
      The gradients.
    """
    views = leaf_views(compression, state.params, state.compression)
    late: list[str] = []
    if views:  # else nothing is traced for it
        # A loss that cannot be traced says why below, in its own words.
        with contextlib.suppress(ShapeError):
            used = used_inside(general, state.params, state.parts, *inputs)
            late = [path for path in used if path in views]
    if late and not _uses_gradients(compression, state, key):
        return _inside(general, compression, state, run, late)
    return _at_view(general, compression, state, run, late)


def _uses_gradients(compression: Compression, state: TrainState, key: Key) -> bool:
    """Tell whether the compression's update depends on gradients, by its trace."""

    def update(grads: Params) -> CompressionState:
        return compression.update(
            state.params, state.compression, step=state.step, grads=grads, key=key
        )

    jaxpr = jax.make_jaxpr(update)(state.params).jaxpr
    used = {v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, Var)}
    return any(v in used or v in jaxpr.outvars for v in jaxpr.invars)


def _inside(
    general: General, compression: Compression, state: TrainState, run: _Run, late: Sequence[str]
) -> _Gradients:
    """Differentiate through the view as part of the loss."""

    def loss(
        params: Params, others: tuple[PyTree, PyTree], *inputs: PyTree
    ) -> tuple[Objective, Aux]:
        learned, parts = others
        own = CompressionState(learned, state.fixed)
        views = leaf_views(compression, params, own)
        seen = view_inside(general, {path: views[path] for path in late})
        return seen(_stored(_viewed(compression, params, own), params, late), parts, *inputs)

    found = run(loss, (state.params, (state.learned, state.parts)))
    params, (learned, parts) = found.grads
    grads = state._replace(params=params, learned=learned, parts=parts).trainable
    return _Gradients(grads, params, found)


def _at_view(
    general: General, compression: Compression, state: TrainState, run: _Run, late: Sequence[str]
) -> _Gradients:
    """Differentiate in two pieces, at the view and through it: the update wants both."""

    def view(trainable: dict[str, PyTree]) -> Trained:
        own = CompressionState(trainable["learned"], state.fixed)
        return _viewed(compression, trainable["params"], own), trainable.get("parts", {})

    (viewed, parts), pull_back = jax.vjp(view, state.trainable)
    if late:
        views = leaf_views(compression, state.params, state.compression)
        general = view_inside(general, {path: views[path] for path in late}, at_view=True)
        viewed = _stored(viewed, state.params, late)
    found = run(general, (viewed, parts))
    (grads,) = pull_back(found.grads)
    return _Gradients(grads, found.grads[0], found)


def _viewed(compression: Compression, params: Params, own: CompressionState) -> Params:
    """Return the view of params, under its name in profiles."""
    with jax.named_scope("view"):
        return compression.view(params, own)


def _stored(viewed: Params, params: Params, late: Collection[str]) -> Params:
    """Return viewed params with some leaves as they are stored, whose view is computed nowhere."""
    leaves, rebuild = flatten(viewed)
    stored = flatten(params)[0]
    return rebuild({path: stored[path] if path in late else x for path, x in leaves.items()})


def _stateful(loss: Loss) -> StatefulLoss:
    """Return a plain loss as one with neither adapters nor memory."""

    def run(
        params: Params,
        parts: PyTree,
        model_state: PyTree,
        memory: PyTree,
        batch: Batch,
        key: jax.Array,
        teacher: PyTree,
        step: StepNumber,
    ) -> tuple[jax.Array | Total, Aux]:
        value, (model_state, metrics) = loss(params, model_state, batch, key, teacher)
        return value, (model_state, memory, metrics)  # the memory stays as it is: empty

    return StatefulLoss(lambda key, variables, batch, teacher: ({}, {}), run)


def _objective_of(loss: StatefulLoss) -> General:
    """Return a loss as a function that returns an `Objective` in place of a scalar."""
    if loss.totals is not None:
        return loss.totals

    def general(*args: PyTree) -> tuple[Objective, Aux]:
        value, aux = loss.loss(*args)
        return ((1.0, counted(value)),), aux

    return general
