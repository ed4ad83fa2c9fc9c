"""Top-KAST: a sparse forward pass, and gradients for somewhat more weights than it uses."""

from typing import Any

import jax
import numpy as np

from compress_jax.core.compression import Compression, CompressionState, Params
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import where_finite
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import Scheduled, awake, begin, schedules_of
from compress_jax.core.straight_through import straight_through
from compress_jax.prune._magnitude import magnitude
from compress_jax.prune.masked import fixed_of, of_masks, pruned_leaves, see
from compress_jax.prune.target import Sparsity, Target


def top_kast(sparsity: Sparsity, backward: Sparsity, *, scope: str = "leaf", every: int = 1) -> Compression:
    """Use the largest weights, and train those and the next largest ones.

    The view keeps a set A by magnitude, as `magnitude` does; its derivative is 1 on a larger set B and 0 elsewhere. With
    ``backward=0`` it is `ste` of `magnitude`.

    Args:
      sparsity: of A, as of `magnitude`.
      backward: of B, below that of A.
      scope: ``"leaf"`` or ``"global"``, for both.
      every: both are chosen anew at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": A, "backward": B}``.

    Raises:
      ArgumentError: for impossible arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> c, params = top_kast(0.75, 0.5), {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}
      >>> state = c.init(params)
      >>> c.view(params, state)["w"].tolist()
      [0.0, 0.0, 0.0, 4.0]
      >>> jax.grad(lambda p: c.view(p, state)["w"].sum())(params)["w"].tolist()
      [0.0, 0.0, 1.0, 1.0]

    References:
      Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020, section 2.
    """
    if all(isinstance(each, (int, float, np.number)) for each in (sparsity, backward)) and backward > sparsity:  # type: ignore[operator]
        raise ArgumentError(
            f"backward is below the sparsity {sparsity}, as more weights are trained than used, got {backward}"
        )
    forward, wide = (magnitude(each, scope=scope, every=every) for each in (sparsity, backward))
    why_not = Target.of(sparsity, None, scope).why_not

    def split(state: CompressionState, name: str, params: Params) -> CompressionState:
        return CompressionState({}, {path: fixed_of(state, path)[name] for path in pruned_leaves(params, why_not)})

    def joined(a: CompressionState, b: CompressionState) -> CompressionState:
        return CompressionState({}, {path: {"mask": mask, "backward": b.fixed[path]} for path, mask in a.fixed.items()})

    def init(params: Params, *, step: Any = 0) -> CompressionState:
        return joined(begin(forward, params, step), begin(wide, params, step))

    def updated(forward: Compression, wide: Compression) -> Any:
        def update(params: Params, state: CompressionState, **inputs: Any) -> CompressionState:
            a, b = split(state, "mask", params), split(state, "backward", params)
            return joined(forward.update(params, a, **inputs), wide.update(params, b, **inputs))

        return update

    def view(params: Params, state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        own = {path: fixed_of(state, path) for path in pruned_leaves(params, why_not)}
        return rebuild({**leaves, **{path: _seen(leaves[path], **masks) for path, masks in own.items()}})

    update = Scheduled(updated(forward, wide), schedules_of(forward, wide), updated(awake(forward), awake(wide)))
    return of_masks(why_not)._replace(init=init, update=update, view=view)


def _seen(x: jax.Array, mask: jax.Array, backward: jax.Array) -> jax.Array:
    return where_finite(x, _through(see(x, backward), see(x, mask)))


@straight_through
def _through(x: jax.Array, seen: jax.Array) -> jax.Array:
    return seen
