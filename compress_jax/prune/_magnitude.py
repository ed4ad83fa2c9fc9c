"""Magnitude pruning: the smallest weights are seen as zero."""

from compress_jax.core.compression import Compression
from compress_jax.prune.masked import Score, masked
from compress_jax.prune.structures import Structure
from compress_jax.prune.target import Sparsity


def magnitude(
    sparsity: Sparsity | None,
    structure: Structure | None = None,
    *,
    scope: str = "leaf",
    every: int = 1,
    floor: float = 0.0,
) -> Compression:
    r"""Prune the weights of smallest magnitude, exactly as many as the sparsity says.

    With the mask ``m = 0`` on the ``floor(sparsity * n + 1/2)`` smallest of n magnitudes ``|x|``, else 1:
    ``view(x) = x`` where ``m = 1``, else ``+0.0``. The gradient is the view's own, ``dx = m * dview``. With a structure, n
    counts its units, and their magnitude is that of their entries as the structure reduces it; `n_m` keeps the largest n of
    each m.

    The mask is recomputed by every `update` from the params, which stay dense under the view. A pruned weight gets no
    gradient, so a plain optimizer leaves it where it was, and it comes back as soon as kept weights have shrunk below it, or
    the sparsity falls. Weight decay and momentum move pruned weights too. To hold a mask, stop updating it (`between`); for
    masks that only shrink, see `nested`.

    Of equal magnitudes the one earlier in C order is pruned first (with ``scope="global"``, the one in the earlier leaf), so
    the mask is that of a stable argsort, under every sharding; but nothing is sorted or flattened. Zeros of either sign are
    equal.

    Args:
      sparsity: share of the weights to prune, 0 to 1, or an optax schedule of the step, or ``{glob: either}``: leaves that
        no glob matches are left alone. `init` uses the schedule at step 0. What a schedule returns is clipped to [0, 1]; see
        `compress_jax.prune.amount` for the rounding. None with an `n_m` structure, which sets it.
      structure: `n_m`, `block`, `channel` or `head`; None for single weights.
      scope: ``"leaf"``: each leaf reaches the sparsity by itself; ``"global"``: all leaves it is given share one
        threshold, and only the total reaches it. With a structure, the sparsity is the share of all units.
      every: the mask is recomputed at steps divisible by it.
      floor: with ``scope="global"``, the share of every leaf that stays, and at least one weight: a threshold for all may
        empty a leaf. 0, the default, guards nothing; `shares` shows what each leaf lost.

    Returns:
      The Compression. ``fixed[path]`` is the mask, bool, the shape of the leaf, true where a weight is kept. Packs to
      `Sparse` where that is smaller than the dense array.

    Raises:
      ValueError: if ``sparsity`` is a number outside [0, 1], ``scope`` is neither of the two, or both contradict the
        structure.

    Example:
      >>> import jax.numpy as jnp
      >>> half, params = magnitude(0.5), {"kernel": jnp.array([0.1, -3.0, 0.2, -0.3])}
      >>> half.view(params, half.init(params))["kernel"].tolist()
      [0.0, -3.0, 0.0, -0.30000001192092896]

    References:
      Han, Pool, Tran and Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015, section 3.
    """
    return masked(Score(lambda seen: seen.x), sparsity, structure, scope=scope, every=every, floor=floor)
