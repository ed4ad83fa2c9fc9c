"""A Compression as an optax wrapper, for training loops that only know optimizers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.compression import Compression, CompressionState
from compress_jax.core.errors import ArgumentError
from compress_jax.core.types import Params, PyTree


class AsOptaxState(NamedTuple):
    """State of `as_optax`: the step, the wrapped optimizer's state, the compression's state."""

    step: jax.Array
    optimizer: optax.OptState
    compression: CompressionState


def as_optax(
    optimizer: optax.GradientTransformation, compression: Compression
) -> optax.GradientTransformation:
    """Wrap an optimizer so that the params it makes equal their compressed view, up to rounding.

    Projected descent: ``params <- view(params + update)``. Where the view is zero the result is
    exactly zero. Use ``compression.view(params, state.compression)`` for the exact view elsewhere.
    The compression's learned arrays stay as `init` and `update` leave them: to train them,
    differentiate the view yourself.

    Args:
      optimizer: any optax transformation.
      compression: any Compression.

    Returns:
      An optax transformation; its ``update`` needs ``params``.

    Example:
      >>> import compress_jax as cj
      >>> tx = cj.as_optax(optax.sgd(0.5), cj.leafwise(lambda x, learned, fixed: jnp.round(x)))
      >>> params, grads = {"w": jnp.array([1.2])}, {"w": jnp.array([-1.0])}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [2.0]
    """

    def init(params: Params) -> AsOptaxState:
        return AsOptaxState(
            jnp.zeros((), jnp.int32), optimizer.init(params), compression.init(params)
        )

    def update(
        updates: PyTree, state: PyTree, params: Params = None
    ) -> tuple[PyTree, AsOptaxState]:
        if params is None:
            raise ArgumentError(
                "as_optax projects the params, so pass them: tx.update(grads, state, params)"
            )
        moves, inner = optimizer.update(updates, state.optimizer, params)
        moved: Params = optax.apply_updates(params, moves)
        own = compression.update(moved, state.compression, step=state.step, grads=updates)
        # The optimizer only adds: what moves the params onto their view is the difference.
        projected = jax.tree.map(jnp.subtract, compression.view(moved, own), params)
        return projected, AsOptaxState(state.step + 1, inner, own)

    return optax.GradientTransformation(init, update)
