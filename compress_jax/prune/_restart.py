"""Weights that were just grown start from zero, and so do the optimizer's moments of them, whatever the optimizer."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.paths import flatten, owner
from compress_jax.core.types import Params, PyTree

Flags = Mapping[str, jax.Array]


def restart(params: Params, opt_state: PyTree, before: Any, after: Any) -> tuple[Any, Any]:
    """Return params and optimizer state in which the weights that an update of the compression grew are zero.

    For `set`, `rigl` and whatever else is built by `regrowing`, alone or inside combinators; with
    any other compression it returns its arguments. `make_step` calls it after every update.

    Args:
      params: the stored params.
      opt_state: any optax state.
      before: ``state.fixed`` of the compression before its update.
      after: ``state.fixed`` after it.

    Returns:
      ``(params, opt_state)``.

    Example:
      >>> import optax
      >>> params, optimizer = {"w": jnp.array([2.0, 3.0])}, optax.adam(0.1)
      >>> old = {"w": {"mask": jnp.array([True, False]), "grown": jnp.array([False, False])}}
      >>> new = {"w": {"mask": jnp.array([False, True]), "grown": jnp.array([False, True])}}
      >>> restart(params, optimizer.init(params), old, new)[0]["w"].tolist()
      [2.0, 0.0]
    """
    flags = grown(before, after)
    if not flags:
        return params, opt_state

    def zeroed() -> tuple[Any, Any]:
        return reset_moments(params, params, flags), reset_moments(opt_state, params, flags)

    found = reduce(jnp.logical_or, [each.any() for each in flags.values()])
    return jax.lax.cond(found, zeroed, lambda: (params, opt_state))


def grown(before: Any, after: Any) -> dict[str, jax.Array]:
    """Return which weights an update grew, by path: those with ``"grown"`` that had no ``"mask"`` before.

    Args:
      before: ``state.fixed``, of whatever nesting combinators make.
      after: the same after the update.

    Returns:
      bool by path of the leaf; empty if nothing in the state grows.

    Example:
      >>> grown({"w": jnp.array([True])}, {"w": jnp.array([True])})
      {}
    """
    found = {}
    for name, new in after.items() if isinstance(after, Mapping) else ():
        if isinstance(new, Mapping) and {"mask", "grown"} <= new.keys():
            found[name] = new["grown"] & ~before[name]["mask"]
        elif isinstance(new, Mapping):
            found.update(grown(before[name], new))
    return found


def reset_moments(opt_state: PyTree, params: Params, regrown: Flags) -> Any:
    """Return an optimizer state with zeros where weights were grown.

    A leaf of the state belongs to a weight array if its path ends in that array's path and it has
    its shape: momentum, first and second moments, averages. Row and column statistics (Adafactor)
    and scalars belong to no single weight: they stay.

    Args:
      opt_state: any optax state, over the params or over a tree that holds them.
      params: the params, for their names and shapes.
      regrown: ``{path: bool array}``, true where a weight was grown; leaves without an entry stay.

    Returns:
      The state.

    Raises:
      KeyError: if a path is none of the params'.

    Example:
      >>> import optax
      >>> params, optimizer = {"w": jnp.ones(2)}, optax.adam(0.1)
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> reset_moments(state, params, {"w": jnp.array([True, False])})[0].mu["w"].round(3).tolist()
      [0.0, 0.10000000149011612]
    """
    names = flatten(params)[0]
    if unknown := sorted(regrown.keys() - names.keys()):
        raise KeyError(f"no param is named {unknown[0]!r}; there are: {', '.join(names)}")
    leaves, rebuild = flatten(opt_state)
    owners = {path: owner(path, names) for path in leaves}
    return rebuild(
        {path: _zeroed(leaf, regrown.get(owners[path] or "")) for path, leaf in leaves.items()}
    )


def _zeroed(leaf: PyTree, flags: jax.Array | None) -> Any:
    if flags is None or jnp.shape(leaf) != flags.shape:
        return leaf
    return jnp.where(flags, jnp.zeros((), leaf.dtype), leaf)
