"""The gradient of a step through the compression's view, which is taken where it costs least."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeAlias

import jax
from jax.extend.core import Var

from compress_jax.core.compression import Compression, CompressionState, leaf_views
from compress_jax.core.paths import flatten
from compress_jax.core.types import Key, Params, PyTree
from compress_jax.trace._jaxpr.view_inside import used_inside, view_inside
from compress_jax.train._objective import Aux, Gathered, General, Objective, Trained
from compress_jax.train._state import TrainState

Run: TypeAlias = Callable[[General, Trained], Gathered]
"""From a loss and its first two arguments to its gradients over the batch."""


class Gradients(NamedTuple):
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


def through_view(
    general: General,
    compression: Compression,
    state: TrainState,
    run: Run,
    inputs: Sequence[PyTree],
    key: Key,
) -> Gradients:
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
    general: General, compression: Compression, state: TrainState, run: Run, late: Sequence[str]
) -> Gradients:
    """Differentiate through the view as part of the loss."""

    def loss(
        params: Params, others: tuple[PyTree, PyTree], *inputs: PyTree
    ) -> tuple[Objective, Aux]:
        learned, parts = others
        own = CompressionState(learned, state.fixed)
        views = leaf_views(compression, params, own)
        seen = view_inside(general, {path: views[path] for path in late})
        return seen(_stored(compression.view(params, own), params, late), parts, *inputs)

    found = run(loss, (state.params, (state.learned, state.parts)))
    params, (learned, parts) = found.grads
    grads = state._replace(params=params, learned=learned, parts=parts).trainable
    return Gradients(grads, params, found)


def _at_view(
    general: General, compression: Compression, state: TrainState, run: Run, late: Sequence[str]
) -> Gradients:
    """Differentiate in two pieces, at the view and through it: the update wants both."""

    def view(trainable: dict[str, PyTree]) -> Trained:
        own = CompressionState(trainable["learned"], state.fixed)
        return compression.view(trainable["params"], own), trainable.get("parts", {})

    (viewed, parts), pull_back = jax.vjp(view, state.trainable)
    if late:
        views = leaf_views(compression, state.params, state.compression)
        general = view_inside(general, {path: views[path] for path in late}, at_view=True)
        viewed = _stored(viewed, state.params, late)
    found = run(general, (viewed, parts))
    (grads,) = pull_back(found.grads)
    return Gradients(grads, found.grads[0], found)


def _stored(viewed: Params, params: Params, late: Collection[str]) -> Params:
    """Return viewed params with some leaves as they are stored, whose view is computed nowhere."""
    leaves, rebuild = flatten(viewed)
    stored = flatten(params)[0]
    return rebuild({path: stored[path] if path in late else x for path, x in leaves.items()})
