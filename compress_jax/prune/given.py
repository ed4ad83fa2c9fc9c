"""What an update is given: gradients that are checked, and steps that are left out because they are broken or not due."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from compress_jax.core.compression import CompressionState, Params
from compress_jax.core.errors import ArgumentError, ShapeError
from compress_jax.core.leafwise import check_finite
from compress_jax.core.paths import flatten
from compress_jax.prune.choose import Masks


def gradients_of(leaves: Mapping[str, Any], params: Params, grads: Any, needed: bool) -> dict[str, Any]:
    """Return the gradients of some leaves that `update` was given, by path, all of them of their leaf's shape.

    Args:
      leaves: by path, those that are pruned.
      params: the tree they are of.
      grads: a tree of the same names, or None.
      needed: whether there must be one for every leaf, finite as far as that can be told.

    Returns:
      ``{path: gradient}``.

    Raises:
      ArgumentError: if they are needed and missing, or of leaves that there are not.
      ShapeError: if one has another shape than its leaf.
      NonFiniteError: outside ``jit``, if they are needed and not finite.
    """
    found = flatten(grads)[0] if grads is not None else {}
    if unknown := [path for path in found if path not in flatten(params)[0]]:
        raise ArgumentError(
            f"there are gradients for {', '.join(unknown)}, but no such leaf; there are: {', '.join(leaves)}"
        )
    missing = [path for path in leaves if found.get(path) is None]
    if needed and missing:
        raise ArgumentError(
            f"this method looks at gradients, and there is none for {', '.join(missing)}; give update(..., grads=...) "
            "the gradient of the loss at the weights the model used"
        )
    found = {path: found[path] for path in leaves if found.get(path) is not None}
    for path, grad in found.items():
        if jnp.shape(grad) != leaves[path].shape:
            raise ShapeError(f"leaf {path!r} has shape {leaves[path].shape}, its gradient {jnp.shape(grad)}")
        if needed:
            check_finite(f"{path} (its gradient)", grad)
    return found


def unless_broken(gradients: Mapping[str, Any], new: CompressionState, old: CompressionState) -> CompressionState:
    """Return the new state, or under ``jit`` the old one whole if any gradient is not finite: a step an optimizer skips.

    Args:
      gradients: what the new state follows from.
      new: the state after an update.
      old: the state before it, of the same structure.

    Returns:
      Either.
    """
    if not gradients:
        return new
    sound = jnp.stack([jnp.isfinite(grad).all() for grad in gradients.values()]).all()
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, old)


def chosen(acts: Any, new: Callable[[], Masks], old: Callable[[], Masks]) -> Masks:
    """Return one of two sets of masks: by a plain choice where it is known which, so that errors can be raised."""
    if isinstance(acts, Tracer):
        return jax.lax.cond(acts, new, old)
    return new() if bool(acts) else old()
