"""Top-KAST: a sparse forward pass, and gradients for somewhat more weights than it uses."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, CompressionState, Params, bound, stamped
from compress_jax.core.describe import call_of
from compress_jax.core.paths import flatten
from compress_jax.core.straight_through import straight_through
from compress_jax.prune._magnitude import magnitude
from compress_jax.prune.masked import Leaves, fixed_of, of_masks, see
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
      ValueError: for impossible arguments.

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
    if all(isinstance(each, (int, float)) for each in (sparsity, backward)) and backward > sparsity:  # type: ignore[operator]
        raise ValueError(f"backward is below the sparsity {sparsity}, as more weights are trained than used, got {backward}")
    target = Target.of(sparsity, None, scope)
    forward, wide = (magnitude(each, scope=scope, every=every) for each in (sparsity, backward))
    return _TopKast(target, forward, wide).compression()


class _TopKast(NamedTuple):
    target: Target
    forward: Compression
    wide: Compression
    known: Mapping[str, Axes] | None = None

    @property
    def leaves(self) -> Leaves:
        return Leaves(self.target.why_not, self.known)

    def compression(self) -> Compression:
        made = of_masks(self.leaves)._replace(init=self.init, update=self.update, view=self.view, bind=self.bind)
        return stamped(made, call_of("top_kast", forward=self.forward, backward=self.wide), self.known)

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return _TopKast(self.target, bound(self.forward, known), bound(self.wide, known), known).compression()

    def init(self, params: Params) -> CompressionState:
        return _joined(self.forward.init(params), self.wide.init(params))

    def update(self, params: Params, state: CompressionState, **inputs: Any) -> CompressionState:
        a, b = self.split(state, "mask", params), self.split(state, "backward", params)
        return _joined(self.forward.update(params, a, **inputs), self.wide.update(params, b, **inputs))

    def split(self, state: CompressionState, name: str, params: Params) -> CompressionState:
        return CompressionState({}, {path: fixed_of(state, path)[name] for path in self.leaves.of(params)})

    def view(self, params: Params, state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        own = {path: fixed_of(state, path) for path in self.leaves.of(params)}
        return rebuild({**leaves, **{path: _seen(leaves[path], **masks) for path, masks in own.items()}})


def _joined(a: CompressionState, b: CompressionState) -> CompressionState:
    return CompressionState({}, {path: {"mask": mask, "backward": b.fixed[path]} for path, mask in a.fixed.items()})


def _seen(x: jax.Array, mask: jax.Array, backward: jax.Array) -> jax.Array:
    return _through(see(x, backward), see(x, mask))


@straight_through
def _through(x: jax.Array, seen: jax.Array) -> jax.Array:
    return seen
