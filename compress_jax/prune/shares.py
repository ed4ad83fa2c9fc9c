"""How sparse each leaf came out, as a map that any other method takes."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compress_jax.core.compression import CompressionState
from compress_jax.core.paths import flatten


def shares(params: Any, state: CompressionState) -> dict[str, float]:
    """Return the share of pruned entries of every leaf that has a mask: the allocation that a method arrived at.

    A global threshold or `lamp` decides how many weights each layer keeps; `random`, `rigl` or `fisher` can then be held to
    the same numbers, exactly.

    Args:
      params: the params the state belongs to.
      state: of any pruning method, alone or inside combinators; concrete arrays.

    Returns:
      ``{path: sparsity}``, for the ``sparsity`` of any method.

    Example:
      >>> from compress_jax.prune import magnitude
      >>> params = {"a": jnp.array([1.0, 2.0, 9.0, 8.0]), "b": jnp.array([3.0, 7.0])}
      >>> shares(params, magnitude(0.5, scope="global").init(params))
      {'a': 0.5, 'b': 0.5}
    """
    masks = masks_in(state.fixed, flatten(params)[0])
    return {path: int((~mask).sum()) / mask.size for path, mask in masks.items()}


def masks_in(fixed: Any, names: Iterable[str]) -> dict[str, jax.Array]:
    """Return the masks in a fixed state, by path of the leaf, however combinators nest them.

    Args:
      fixed: ``state.fixed``.
      names: the paths of the params; masks of others are not looked for.

    Returns:
      bool arrays by path.

    Example:
      >>> masks_in({"0": {"w": {"mask": jnp.array([True]), "carried": jnp.zeros(1)}}}, ["w"])["w"].tolist()
      [True]
    """
    names, found = frozenset(names), {}
    for name, each in fixed.items():
        if isinstance(each, Mapping) and "mask" in each and name in names:
            found[name] = each["mask"]
        elif isinstance(each, Mapping):
            found.update(masks_in(each, names))
        elif name in names and hasattr(each, "dtype") and jnp.issubdtype(each.dtype, jnp.bool_):
            found[name] = each
    return found
