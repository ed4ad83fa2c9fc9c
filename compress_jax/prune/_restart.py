"""Restart grown weights from zero, and their moments in any optax state."""

from collections.abc import Mapping
from functools import reduce

import jax
import jax.numpy as jnp

from compress_jax.core.errors import NoMatchError
from compress_jax.core.paths import flatten, owner
from compress_jax.core.types import Params, PyTree
from compress_jax.prune._masks.bit_mask import unpacked

Flags = Mapping[str, jax.Array]
"""bool arrays by path."""


def restart(
    params: Params, opt_state: PyTree, before: PyTree, after: PyTree
) -> tuple[Params, PyTree]:
    """Set the weights that an update of the compression grew, and their moments, to zero.

    For `sparse_evolution`, `rigl` and other methods built by `regrowing`, alone or inside
    combinators; with any other compression it returns its arguments. `make_step` calls it after
    every update.

    Args:
      params: the stored params.
      opt_state: any optax state.
      before: ``state.fixed`` of the compression before its update.
      after: ``state.fixed`` after it.

    Returns:
      ``(params, opt_state)``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import compress_jax as cj
      >>> params = {"w": jnp.array([2.0, 3.0])}
      >>> opt_state = optax.adam(0.1).init(params)
      >>> old = {"w": {"mask": jnp.array([True, False]), "grown": jnp.array([False, False])}}
      >>> new = {"w": {"mask": jnp.array([False, True]), "grown": jnp.array([False, True])}}
      >>> cj.prune.restart(params, opt_state, old, new)[0]["w"].tolist()
      [2.0, 0.0]
    """
    flags = newly_active(before, after)
    if not flags:
        return params, opt_state

    def zeroed() -> tuple[Params, PyTree]:
        return reset_moments(params, params, flags), reset_moments(opt_state, params, flags)

    # Most steps grow nothing, and then params and moments are not rewritten.
    any_grown = reduce(jnp.logical_or, [each.any() for each in flags.values()])
    return jax.lax.cond(any_grown, zeroed, lambda: (params, opt_state))


def newly_active(before: PyTree, after: PyTree) -> dict[str, jax.Array]:
    """Return masks of the weights that an update grew, by path.

    They are the weights that are true in ``"grown"`` after the update, and false in ``"mask"``
    before it.

    Args:
      before: ``state.fixed`` before the update, nested as combinators nest it.
      after: ``state.fixed`` after the update.

    Returns:
      bool masks by path of the leaf; empty for a method that does not grow weights.

    Example:
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> old = {"w": {"mask": jnp.array([True, False]), "grown": jnp.array([False, False])}}
      >>> new = {"w": {"mask": jnp.array([False, True]), "grown": jnp.array([False, True])}}
      >>> cj.prune.newly_active(old, new)["w"].tolist()
      [False, True]
    """
    found = {}
    for name, new in after.items() if isinstance(after, Mapping) else ():
        if isinstance(new, Mapping) and {"mask", "grown"} <= new.keys():
            # A state that `every` or `between` left as it was still says "grown"; then its mask was
            # true before.
            found[name] = unpacked(new["grown"]) & ~unpacked(before[name]["mask"])
        elif isinstance(new, Mapping):
            found.update(newly_active(before[name], new))
    return found


def reset_moments(opt_state: PyTree, params: Params, regrown: Flags) -> PyTree:
    """Return an optimizer state with zeros where weights were grown.

    A leaf of the state belongs to a parameter if its path ends in that parameter's path and it has
    the same shape: momentum, first and second moments, averages. Row and column statistics
    (Adafactor) and scalars belong to no single weight and are not changed.

    Args:
      opt_state: any optax state, over the params or over a tree that holds them.
      params: the params, for their paths and shapes.
      regrown: ``{path: bool array}``, true where a weight was grown.

    Returns:
      The state.

    Raises:
      NoMatchError: if the params have no such path.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import compress_jax as cj
      >>> params = {"w": jnp.ones(2)}
      >>> optimizer = optax.adam(0.1)
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> state = cj.prune.reset_moments(state, params, {"w": jnp.array([True, False])})
      >>> state[0].mu["w"].round(3).tolist()
      [0.0, 0.10000000149011612]
    """
    names = flatten(params)[0]
    if unknown := sorted(regrown.keys() - names.keys()):
        raise NoMatchError(f"no param is named {unknown[0]!r}; there are: {', '.join(names)}")
    leaves, rebuild = flatten(opt_state)
    for path, leaf in leaves.items():
        # Paths of the state end in paths of params ("0/mu/dense/kernel"). Factored moments do too,
        # but have other shapes.
        flags = regrown.get(owner(path, names) or "")
        if flags is not None and jnp.shape(leaf) == flags.shape:
            leaves[path] = jnp.where(flags, jnp.zeros((), leaf.dtype), leaf)
    return rebuild(leaves)
