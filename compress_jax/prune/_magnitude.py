"""Magnitude pruning: the smallest weights are seen as zero."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from compress_jax.core.compression import Compression, CompressionState, Params, Pointwise
from compress_jax.core.leafwise import check_finite, leafwise, why_not_float
from compress_jax.core.packed import Sparse, nbytes
from compress_jax.core.paths import flatten
from compress_jax.prune.amount import amount
from compress_jax.prune.select import smallest


def magnitude(sparsity: float | optax.Schedule, *, scope: str = "leaf") -> Compression:
    r"""Prune the weights of smallest magnitude, exactly as many as the sparsity says.

    With the mask ``m = 0`` on the ``floor(sparsity * n + 1/2)`` smallest of n magnitudes ``|x|``, else 1:
    ``view(x) = x`` where ``m = 1``, else ``+0.0``. The gradient is the view's own, ``dx = m * dview``.

    The mask is recomputed by every `update` from the params, which stay dense under the view. A pruned weight gets no
    gradient, so a plain optimizer leaves it where it was, and it comes back as soon as kept weights have shrunk below it, or
    the sparsity falls. Weight decay and momentum move pruned weights too. To hold a mask, stop updating it (`between`).

    Of equal magnitudes the one earlier in C order is pruned first (with ``scope="global"``, the one in the earlier leaf), so
    the mask is that of a stable argsort, under every sharding; but nothing is sorted or flattened. Zeros of either sign are
    equal.

    Args:
      sparsity: share of the weights to prune, 0 to 1, or an optax schedule of the step. `init` uses the schedule at step 0.
        What a schedule returns is clipped to [0, 1]; see `compress_jax.prune.amount` for the rounding.
      scope: ``"leaf"``: each leaf reaches the sparsity by itself; ``"global"``: all leaves it is given share one
        threshold, and only the total reaches it.

    Returns:
      The Compression. ``fixed[path]`` is the mask, bool, the shape of the leaf, true where a weight is kept. Packs to
      `Sparse` where that is smaller than the dense array.

    Raises:
      ValueError: if ``sparsity`` is a number outside [0, 1], or ``scope`` is neither of the two.

    Example:
      >>> half, params = magnitude(0.5), {"kernel": jnp.array([0.1, -3.0, 0.2, -0.3])}
      >>> half.view(params, half.init(params))["kernel"].tolist()
      [0.0, -3.0, 0.0, -0.30000001192092896]

    References:
      Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015, section 3.
    """
    schedule = _schedule(sparsity)
    if scope == "leaf":
        return _each_leaf(schedule)
    if scope == "global":
        return _all_leaves(schedule)
    raise ValueError(f"scope must be 'leaf' or 'global', got {scope!r}")


def _schedule(sparsity: float | optax.Schedule) -> optax.Schedule:
    if callable(sparsity):
        return sparsity
    share = float(sparsity)
    if not 0 <= share <= 1:
        raise ValueError(f"sparsity is the share of weights to prune, between 0 and 1, got {sparsity}")
    return lambda step: share


def _kept(leaves: dict[str, jax.Array], sparsity: Any) -> dict[str, jax.Array]:
    """Return the masks of what is kept when the smallest of all leaves together are pruned."""
    if not leaves:
        return {}
    pruned = smallest(list(leaves.values()), amount(sparsity, sum(x.size for x in leaves.values())))
    return {path: ~mask for path, mask in zip(leaves, pruned, strict=True)}


def _view(x: jax.Array, learned: None, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def _masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    return _view(x, None, mask)


def _pack(x: jax.Array, learned: None, mask: jax.Array) -> Any:
    return min(Sparse.pack(x, mask), _view(x, learned, mask), key=nbytes)


def _each_leaf(schedule: optax.Schedule) -> Compression:
    """A threshold for each leaf."""

    def mask(x: jax.Array, step: Any) -> tuple[None, jax.Array]:
        return None, _kept({"": x}, schedule(step))[""]

    def update(x: jax.Array, *_: Any, step: Any, **__: Any) -> tuple[None, jax.Array]:
        return mask(x, step)

    def pointwise(x: jax.Array, learned: None, mask: jax.Array) -> Pointwise:
        return Pointwise(_masked, (mask,))

    return leafwise(_view, init=lambda x, key: mask(x, 0), update=update, pack=_pack, pointwise=pointwise)


def _all_leaves(schedule: optax.Schedule) -> Compression:
    """One threshold for all leaves; views and packed forms are still those of single leaves."""

    def masks(params: Params, step: Any) -> CompressionState:
        leaves = {path: x for path, x in flatten(params)[0].items() if why_not_float(path, x) is None}
        for path, x in leaves.items():
            check_finite(path, x)
        return CompressionState({}, _kept(leaves, schedule(step)))

    def update(params: Params, state: CompressionState, *, step: Any, **_: Any) -> CompressionState:
        return masks(params, step)

    return _each_leaf(schedule)._replace(init=lambda params: masks(params, 0), update=update)
