"""Gradients of a loss over batches, and their squares: what Taylor and Fisher criteria start from."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.errors import DataError
from compress_jax.core.paths import flatten


def gradients(loss: Callable[..., Any], params: Any, batches: Iterable[Any]) -> dict[str, jax.Array]:
    r"""Return the mean gradient over batches, :math:`\frac1n \sum_b \nabla L_b`.

    Args:
      loss: ``(params, *batch) -> scalar``.
      params: tree of arrays; those that are not floating have no gradient.
      batches: what loss takes after params; a tuple is several arguments.

    Returns:
      ``{path: float32 array}``, for `taylor`.

    Raises:
      DataError: if there is no batch.

    Example:
      >>> gradients(lambda p, x: (p["w"] * x).sum(), {"w": jnp.ones(2)}, [jnp.array([1.0, 3.0]), jnp.array([3.0, -3.0])])
      {'w': Array([2., 0.], dtype=float32)}
    """
    return _mean(loss, params, batches, lambda g: g)


def squared_gradients(loss: Callable[..., Any], params: Any, batches: Iterable[Any]) -> dict[str, jax.Array]:
    r"""Return the mean squared gradient over batches, the diagonal of the empirical Fisher matrix up to a factor.

    Args:
      loss: ``(params, *batch) -> scalar``; batches of one example give the Fisher matrix itself.
      params: as of `gradients`.
      batches: as of `gradients`.

    Returns:
      ``{path: float32 array}``, for `second_order`.

    Raises:
      DataError: if there is no batch.

    Example:
      >>> squared_gradients(lambda p, x: (p["w"] * x).sum(), {"w": jnp.ones(1)}, [jnp.array([1.0]), jnp.array([3.0])])
      {'w': Array([5.], dtype=float32)}
    """
    return _mean(loss, params, batches, jnp.square)


def _mean(
    loss: Callable[..., Any], params: Any, batches: Iterable[Any], of: Callable[[jax.Array], jax.Array]
) -> dict[str, jax.Array]:
    leaves, rebuild = flatten(params)
    moving = {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)}

    @jax.jit
    def add(total: dict[str, jax.Array], moving: dict[str, Any], batch: tuple[Any, ...]) -> dict[str, jax.Array]:
        found = jax.grad(lambda moving: loss(rebuild({**leaves, **moving}), *batch))(moving)
        return {path: total[path] + of(g.astype(jnp.float32)) for path, g in found.items()}

    total, count = {path: jnp.zeros(jnp.shape(leaf), jnp.float32) for path, leaf in moving.items()}, 0
    for batch in batches:
        total = add(total, moving, batch if isinstance(batch, tuple) else (batch,))
        count += 1
    if not count:
        raise DataError("there is no batch to take gradients of")
    return {path: each / count for path, each in total.items()}
