"""Top-KAST: a sparse forward pass, and gradients for somewhat more weights than it uses."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from compress_jax.core.arguments import compression as checked
from compress_jax.core.axes import Axes
from compress_jax.core.compression import Compression, CompressionState, bound, stamped
from compress_jax.core.describe import call_of, describe
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import where_finite
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import Scheduled, awake, begin, schedules_of
from compress_jax.core.straight_through import straight_through
from compress_jax.core.types import Params, PyTree, Step
from compress_jax.prune._masks.score import Leaves, fixed_of, of_masks, see
from compress_jax.prune._masks.target import Sparsity, Target
from compress_jax.prune._scores import magnitude


def top_kast(
    sparsity: Sparsity, backward: Sparsity, *, scope: str = "leaf", every: int = 1
) -> Compression:
    """Use the largest weights, and train those and the next largest ones.

    The view keeps a set A by magnitude, as `magnitude` does; its derivative is 1 on a larger set B
    and 0 elsewhere. With ``backward=0`` it is `ste` of `magnitude`.

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
    numbers = (
        isinstance(sparsity, int | float | np.number),
        isinstance(backward, int | float | np.number),
    )
    if all(numbers) and backward > sparsity:  # type: ignore[operator]
        raise ArgumentError(
            f"backward is below the sparsity {sparsity}, as more weights are trained than used, "
            f"got {backward}"
        )
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
        rested = self._replace(forward=awake(self.forward), wide=awake(self.wide))
        update = Scheduled(self.update, schedules_of(self.forward, self.wide), rested.update)
        made = of_masks(self.leaves)._replace(
            init=self.init, update=update, view=self.view, bind=self.bind
        )
        return stamped(
            made, call_of("top_kast", forward=self.forward, backward=self.wide), self.known
        )

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        return _TopKast(
            self.target, bound(self.forward, known), bound(self.wide, known), known
        ).compression()

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        return _joined(begin(self.forward, params, step), begin(self.wide, params, step))

    def update(self, params: Params, state: CompressionState, **inputs: PyTree) -> CompressionState:
        a, b = self.split(state, "mask", params), self.split(state, "backward", params)
        return _joined(
            self.forward.update(params, a, **inputs), self.wide.update(params, b, **inputs)
        )

    def split(self, state: CompressionState, name: str, params: Params) -> CompressionState:
        return CompressionState(
            {}, {path: fixed_of(state, path)[name] for path in self.leaves.of(params)}
        )

    def view(self, params: Params, state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        own = {path: fixed_of(state, path) for path in self.leaves.of(params)}
        return rebuild(
            {**leaves, **{path: _seen(leaves[path], **masks) for path, masks in own.items()}}
        )


def _joined(a: CompressionState, b: CompressionState) -> CompressionState:
    return CompressionState(
        {}, {path: {"mask": mask, "backward": b.fixed[path]} for path, mask in a.fixed.items()}
    )


def _seen(x: jax.Array, mask: jax.Array, backward: jax.Array) -> jax.Array:
    return where_finite(x, _through(see(x, backward), see(x, mask)))


@straight_through
def _through(x: jax.Array, seen: jax.Array) -> jax.Array:
    return seen


# Straight-through pruning: the model sees pruned weights, and all weights are trained.


def ste(compression: Compression) -> Compression:
    """Give the view of a pruning method the derivative of the identity, also where weights are pruned.

    A pruned weight then follows the gradient at its zero, and comes back once it has grown, as the
    mask is updated.

    Args:
      compression: a method whose view holds masks, such as `magnitude`; what it learns itself gets
        no gradient.

    Returns:
      The Compression; its values, state and packed form are those of the method.

    Example:
      >>> import jax.numpy as jnp
      >>> from compress_jax.prune import magnitude
      >>> c, params = ste(magnitude(0.5)), {"w": jnp.array([1.0, 2.0])}
      >>> jax.grad(lambda p: c.view(p, c.init(params))["w"].sum())(params)["w"].tolist()
      [1.0, 1.0]

    References:
      Bengio, Leonard and Courville, "Estimating or Propagating Gradients Through Stochastic
      Neurons", 2013, section 3. Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural
      Networks From Scratch", 2021, section 3.
    """
    checked("compression", compression)

    def view(params: Params, state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        seen, left = flatten(compression.view(params, state))[0], compression.skipped(params)
        return rebuild(
            {path: x if path in left else _straight(x, seen[path]) for path, x in leaves.items()}
        )

    return compression._replace(
        view=view,
        call=f"ste({describe(compression)})",
        bind=lambda known: ste(bound(compression, known)),
    )


@straight_through
def _straight(x: jax.Array, seen: jax.Array) -> jax.Array:
    return seen
