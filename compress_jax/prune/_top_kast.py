"""Sparse forward passes with denser gradients: Top-KAST and the straight-through estimator."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from compress_jax.core._straight_through import straight_through as with_identity_gradient
from compress_jax.core.arguments import compression as checked
from compress_jax.core.axes import Axes
from compress_jax.core.compression import (
    ByLeaf,
    Compression,
    CompressionState,
    LeafView,
    bound,
    leaf_views,
    stamped,
)
from compress_jax.core.describe import call_of, describe
from compress_jax.core.errors import ArgumentError
from compress_jax.core.finite import where_finite
from compress_jax.core.paths import flatten
from compress_jax.core.schedules import Scheduled, awake, begin, schedules_of
from compress_jax.core.types import Params, PyTree, Step
from compress_jax.prune._masks.score import Leaves, apply_mask, fixed_of, mask_compression
from compress_jax.prune._masks.target import Sparsity, Target
from compress_jax.prune._scores import magnitude

NUMBERS = int | float | np.number


def top_kast(
    sparsity: Sparsity, backward: Sparsity, *, scope: str = "leaf", every: int = 1
) -> Compression:
    """Use the largest weights, and train those and the next largest ones.

    The view keeps a set A by magnitude, as `magnitude` does; its derivative is 1 on a larger set B
    and 0 elsewhere. With ``backward=0`` it is `straight_through` of `magnitude`.

    Args:
      sparsity: the sparsity of A, as of `magnitude`.
      backward: the sparsity of B, below that of A.
      scope: ``"leaf"`` or ``"global"``, for both.
      every: both masks are recomputed at steps divisible by it.

    Returns:
      The Compression. ``fixed[path]`` is ``{"mask": A, "backward": B}``.

    Raises:
      ArgumentError: for impossible arguments.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.top_kast(0.75, 0.5)
      >>> params = {"w": jnp.array([1.0, 2.0, 3.0, 4.0])}
      >>> state = c.init(params)
      >>> c.view(params, state)["w"].tolist()
      [0.0, 0.0, 0.0, 4.0]
      >>> jax.grad(lambda p: c.view(p, state)["w"].sum())(params)["w"].tolist()
      [0.0, 0.0, 1.0, 1.0]

    References:
      Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020, section 2.
    """
    # Schedules and maps cannot be compared before training.
    numbers = [each for each in (sparsity, backward) if isinstance(each, NUMBERS)]
    if len(numbers) == 2 and numbers[1] > numbers[0]:
        raise ArgumentError(
            f"backward is below the sparsity {sparsity}, as more weights are trained than used, "
            f"got {backward}"
        )
    target = Target.of(sparsity, None, scope)
    forward = magnitude(sparsity, scope=scope, every=every)
    trained = magnitude(backward, scope=scope, every=every)
    return _TopKast(target, forward, trained).compression()


class _TopKast(NamedTuple):
    """The two compressions of `top_kast`, and the functions of the joint Compression."""

    target: Target
    forward: Compression
    backward: Compression
    known: Mapping[str, Axes] | None = None

    @property
    def leaves(self) -> Leaves:
        return Leaves(self.target.why_not, self.known)

    def compression(self) -> Compression:
        # At the last update of a `between` both masks are recomputed, however rarely they are else.
        awoken = self._replace(forward=awake(self.forward), backward=awake(self.backward))
        schedules = schedules_of(self.forward, self.backward)
        update = Scheduled(self.update, schedules, awoken.update)
        made = mask_compression(self.leaves)
        view = ByLeaf(self.view, self.leaf_views)
        made = made._replace(init=self.init, update=update, view=view, bind=self.bind)
        call = call_of("top_kast", forward=self.forward, backward=self.backward)
        return stamped(made, call, self.known)

    def bind(self, known: Mapping[str, Axes]) -> Compression:
        forward = bound(self.forward, known)
        backward = bound(self.backward, known)
        return _TopKast(self.target, forward, backward, known).compression()

    def init(self, params: Params, *, step: Step = 0) -> CompressionState:
        return _joined(begin(self.forward, params, step), begin(self.backward, params, step))

    def update(self, params: Params, state: CompressionState, **inputs: PyTree) -> CompressionState:
        forward = self.split(state, "mask", params)
        backward = self.split(state, "backward", params)
        # Both rank by magnitude, so that A lies within B as long as B has the lower sparsity.
        return _joined(
            self.forward.update(params, forward, **inputs),
            self.backward.update(params, backward, **inputs),
        )

    def split(self, state: CompressionState, name: str, params: Params) -> CompressionState:
        """Return the state of one of the two compressions."""
        fixed = {path: fixed_of(state, path)[name] for path in self.leaves.of(params)}
        return CompressionState({}, fixed)

    def view(self, params: Params, state: CompressionState) -> Params:
        leaves, rebuild = flatten(params)
        for path, x in self.leaves.of(params).items():
            leaves[path] = _view(x, fixed_of(state, path))
        return rebuild(leaves)

    def leaf_views(self, params: Params, state: CompressionState) -> dict[str, LeafView]:
        return {
            path: LeafView(_view, fixed_of(state, path), stacked=x.ndim)
            for path, x in self.leaves.of(params).items()
        }


def _joined(a: CompressionState, b: CompressionState) -> CompressionState:
    fixed = {path: {"mask": mask, "backward": b.fixed[path]} for path, mask in a.fixed.items()}
    return CompressionState({}, fixed)


def _view(x: jax.Array, masks: Mapping[str, jax.Array], _: None = None) -> jax.Array:
    # The value has the mask A; the gradient passes through the mask B.
    value = apply_mask(x, masks["mask"])
    return where_finite(x, _value_of(apply_mask(x, masks["backward"]), value))


def straight_through(compression: Compression) -> Compression:
    """Give the view of a pruning method the derivative of the identity, for pruned weights too.

    A pruned weight then follows the gradient at its zero, and comes back when the mask is updated
    after it has grown.

    Args:
      compression: a method whose view applies masks, such as `magnitude`. Its learned state gets no
        gradient.

    Returns:
      The Compression; its values, state and packed form are those of the method.

    Raises:
      ArgumentError: if the argument is no Compression.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import compress_jax as cj
      >>> c = cj.prune.straight_through(cj.prune.magnitude(0.5))
      >>> params = {"w": jnp.array([1.0, 2.0])}
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
        pruned = flatten(compression.view(params, state))[0]
        skipped = compression.skipped(params)
        # A leaf that is not pruned has the identity's derivative already.
        for path, x in leaves.items():
            if path not in skipped:
                leaves[path] = _value_of(x, pruned[path])
        return rebuild(leaves)

    def passing(view: LeafView) -> LeafView:
        def fn(x: jax.Array, layers: PyTree, shared: PyTree) -> jax.Array:
            return _value_of(x, view.fn(x, layers, shared))

        return view._replace(fn=fn)

    def leaves(params: Params, state: CompressionState) -> dict[str, LeafView]:
        own = leaf_views(compression, params, state)
        return {path: passing(view) for path, view in own.items()}

    return compression._replace(
        view=ByLeaf(view, leaves) if isinstance(compression.view, ByLeaf) else view,
        # Saved states hold this text and are refused under another one, so the name is the old one.
        call=f"ste({describe(compression)})",
        bind=lambda known: straight_through(bound(compression, known)),
    )


@with_identity_gradient
def _value_of(x: jax.Array, value: jax.Array) -> jax.Array:
    """Return the value; the derivative is that of ``x``."""
    return value
